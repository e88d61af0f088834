"""Rows as questions with an answer, and whether another answer is right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from temper.parts import Problem
from temper.tasks import verifiable
from temper.tasks.rows import Rows


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
    return verifiable.correct(_plain(row), answer)


def formed(row: Mapping[str, Any], answer: str) -> bool:
    """Whether an answer, right or wrong, has the form that a completion row asks for."""
    return verifiable.formed(_plain(row), answer)


def _plain(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row whose completion is a text. Of messages, no task is asked."""
    if isinstance(row["completion"], str):
        return row
    rest = {"format": row["format"]} if "format" in row else {}
    return {"completion": row["completion"][0].get("content") or "", **rest}
