"""Questions in two: one row that asks for the answer, one that asks for the working."""

from __future__ import annotations

from typing import Any, Literal

from temper.parts import Problem
from temper.tasks import verifiable
from temper.tasks.rows import Rows

_OF_ANSWERS = {"task", "asked", "choices", "answer", "answers", "format"}
"""Columns by which an answer is judged."""


def rationales(rows: Rows, split: Literal["train", "test"], label: str, rationale: str) -> list[dict[str, Any]]:
    """Of each question a row `label prompt` -> answer and, to train on, a row `rationale prompt` -> working.

    The working is what the row's column `rationale` holds, else the steps of its task. A label's row keeps the columns by which an answer
    is judged; `asked` is the prompt without its prefix. Both rows of a question are of one `group`. Raises a `Problem` where a row is no
    question in words, or has no working.
    """
    if rows.shape != "completion":
        raise Problem(f"{rows.name} holds {rows.shape} rows; rationales need questions, with `prompt` and `completion`")
    made: list[dict[str, Any]] = []
    for number, row in enumerate(rows.rows):
        prompt, answer, working = row["prompt"], row["completion"], row.get("rationale")
        if not (isinstance(prompt, str) and isinstance(answer, str)):
            raise Problem(f"{rows.name}, row {number + 1}: rationales need a prompt and a completion that are texts, not messages")
        if working is None and (found := verifiable.worked(row)) is not None:
            working, answer = " ; ".join(found[0]), f" {found[1]}"
        if not isinstance(working, str) or not working.strip():
            raise Problem(f"{rows.name}, row {number + 1}: it has no working; give rows a column `rationale`, or a task that has steps")
        rest = {key: value for key, value in row.items() if key != "rationale"}
        rest = rest if rest.keys() & {"group", "module"} else {**rest, "group": number}
        made.append({"asked": prompt, **rest, "prompt": f"{label} {prompt}", "completion": answer})
        if split == "train":
            about = {key: value for key, value in rest.items() if key not in _OF_ANSWERS}
            made.append({**about, "prompt": f"{rationale} {prompt}", "completion": f" {working.strip()}"})
    return made
