"""What is done to the rows before they are asked: the slot `Perturb`."""

from __future__ import annotations

import math
import random
import re
import string
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from pydantic import Field

from temper.parts import Problem, Share, part, slot
from temper.tasks.rows import Rows, key_of

if TYPE_CHECKING:
    from temper.context import Context


def in_turn(perturbations: Sequence[Callable[[Rows], Rows]]) -> Callable[[Rows], Rows]:
    """How a list of perturbations acts as one: one after the other."""

    def perturb(rows: Rows) -> Rows:
        for one in perturbations:
            rows = one(rows)
        return rows

    return perturb


@slot(combine=in_turn, phased=False)
class Perturb(Protocol):
    """What is done to the rows first?

    `(rows) -> rows`, as many and in the same order. Prompts change (of chats, the user's turns), answers and choices do not. A row of
    a task is judged by what it asked before, which it keeps as `asked`.
    """

    def __call__(self, rows: Rows) -> Rows: ...


@part
class Typos:
    """Letters exchanged with the next one, left out, or replaced, as a hasty hand does.  After Belinkov and Bisk 2018

    A prompt's typos depend on the seed and the prompt alone. Digits, marks and white space stay.
    """

    rate: Share = 0.05
    """Share of letters, each drawn for itself."""
    kinds: Annotated[tuple[Literal["swap", "drop", "replace"], ...], Field(min_length=1)] = ("swap", "drop", "replace")
    """What happens to one: exchanged with the next letter, left out, replaced by another letter; each as often."""

    def start(self, context: Context) -> Callable[[Rows], Rows]:
        stream = context.stream()
        return lambda rows: _changed(rows, lambda text, key: mistyped(text, self.rate, self.kinds, random.Random(stream.seed(key))))


@part
class Cut:
    """Prompts shortened: how much of them is needed."""

    keep: Share = 0.5
    """Share of the words kept, at least one."""
    lost: Literal["start", "end"] = "start"
    """Which side of the prompt is left out."""

    def __call__(self, rows: Rows) -> Rows:
        return _changed(rows, lambda text, key: shortened(text, self.keep, self.lost))


def mistyped(text: str, rate: float, kinds: Sequence[str], rng: random.Random) -> str:
    """A text in which each ASCII letter has a mistake with chance `rate`. A letter that has been exchanged has no second one, and one
    without a next letter is replaced instead."""
    made, index = [], 0
    while index < len(text):
        letter, following = text[index], text[index + 1 : index + 2]
        index += 1
        if letter not in string.ascii_letters or rng.random() >= rate:
            made.append(letter)
            continue
        kind = rng.choice(kinds)
        if kind == "swap" and following and following in string.ascii_letters:
            made.append(following + letter)
            index += 1
        elif kind != "drop":
            alphabet = string.ascii_uppercase if letter.isupper() else string.ascii_lowercase
            made.append(rng.choice(alphabet.replace(letter, "")))
    return "".join(made)


def shortened(text: str, keep: float, lost: str) -> str:
    """A text without its first words, or without its last; `keep` of them are left, rounded up."""
    words = re.findall(r"\S+\s*", text)
    left = max(1, math.ceil(keep * len(words)))
    if left >= len(words):
        return text
    return "".join(words[-left:]) if lost == "start" else "".join(words[:left]).rstrip()


def _changed(rows: Rows, change: Callable[[str, str], str]) -> Rows:
    """Rows with `change(text, key)` in place of what they ask. key: of the row, the same wherever it stands."""
    if rows.shape not in ("completion", "chat"):
        raise Problem(f"{rows.name} holds {rows.shape} rows, which have no prompt to change; give completion or chat rows", ("perturb",))
    column = "prompt" if rows.shape == "completion" else "messages"

    def changed(row: dict[str, Any]) -> dict[str, Any]:
        key, asked = key_of(row, rows.shape), row[column]
        if isinstance(asked, str):
            kept = {"asked": row.get("asked", asked)} if "task" in row else {}
            return {**row, column: change(asked, key), **kept}
        turns = [
            {**one, "content": change(one["content"], f"{key} {number}")} if one["role"] == "user" and one.get("content") else one
            for number, one in enumerate(asked)
        ]
        return {**row, column: turns}

    return Rows(rows.shape, [changed(row) for row in rows.rows], rows.name, rows.origin)
