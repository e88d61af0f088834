"""Rows as questions with an answer, and whether another answer is right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from temper.parts import Problem
from temper.tasks.rows import Rows
from temper.tasks.verifiable import correct


def questions(rows: Rows) -> tuple[list[int], Rows]:
    """Completion rows that ask something, and where each stands in `rows`. Of a chat, the last assistant turn is the answer.

    Raises `Problem` where nothing is asked.
    """
    if rows.shape == "completion":
        return list(range(len(rows))), rows
    numbers, made = [], []
    for number, row in enumerate(rows.rows if rows.shape == "chat" else []):
        last = max((index for index, message in enumerate(row["messages"]) if message["role"] == "assistant"), default=0)
        if last > 0:
            numbers.append(number)
            made.append({"prompt": row["messages"][:last], "completion": row["messages"][last : last + 1]})
    if not made:
        raise Problem(f"{rows.name} asks nothing; give completion rows, or chats with an assistant turn after another's")
    return numbers, Rows("completion", made, rows.name, rows.origin)


def right(row: Mapping[str, Any], answer: str) -> bool:
    """Whether an answer is right for a completion row, whose texts may be messages."""
    if isinstance(row["completion"], str):
        return correct(row, answer)
    return correct({"completion": row["completion"][0].get("content") or ""}, answer)
