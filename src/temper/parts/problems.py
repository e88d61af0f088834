"""Problems: what is wrong with a request, where, and the nearest right word."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class Problem(ValueError):
    """A request that cannot be met: the value, the rule and the remedy, and where it was written.

    `path` is the trail of keys and list positions from the thing being checked down to the bad value; whoever
    knows the file turns it into a line and a column.
    """

    def __init__(self, text: str, path: Sequence[str | int] = ()):
        super().__init__(text)
        self.text = text
        self.path = tuple(path)

    @property
    def all(self) -> tuple[Problem, ...]:
        return (self,)

    def under(self, *keys: str | int) -> Problem:
        """The same problem seen from further out."""
        return Problem(self.text, (*keys, *self.path))

    def __str__(self) -> str:
        return f"{trail(self.path)}{self.text}"


class Problems(Problem):
    """Several problems found in one reading."""

    def __init__(self, problems: Iterable[Problem]):
        self._all = tuple(one for problem in problems for one in problem.all)
        super().__init__("\n".join(str(problem) for problem in self._all))

    @property
    def all(self) -> tuple[Problem, ...]:
        return self._all

    def under(self, *keys: str | int) -> Problem:
        return Problems(problem.under(*keys) for problem in self._all)


def trail(path: Sequence[str | int]) -> str:
    """`("delta", "lora", "rank")` -> "`delta.lora.rank`: "."""
    return f"`{'.'.join(map(str, path))}`: " if path else ""


def collect(problems: Sequence[Problem]) -> None:
    """Raises what was found, if anything was."""
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise Problems(problems)


def plain(name: str) -> str:
    """Names match regardless of case, hyphens, underscores and spaces."""
    return re.sub(r"[-_\s]", "", name).lower()


def nearest(word: str, known: Iterable[str]) -> str:
    """`"; did you mean `lora`?"`, or the whole list where nothing is near; nothing where there is nothing to choose."""
    known = sorted(known)
    by_plain = {plain(name): name for name in known}
    close = difflib.get_close_matches(plain(word), by_plain, n=1, cutoff=0.6)
    if close:
        return f"; did you mean `{by_plain[close[0]]}`?"
    return f"; there is {' · '.join(f'`{name}`' for name in known)}" if known else ""


def shown(value: Any) -> str:
    """A value as the user wrote it, in JSON's words, cut at 60 characters."""
    match value:
        case None:
            text = "null"
        case bool():
            text = str(value).lower()
        case str():
            text = f'"{value}"'
        case Mapping():
            text = "{" + ", ".join(f"{key}: {shown(one)}" for key, one in value.items()) + "}"
        case list() | tuple():
            text = "[" + ", ".join(map(shown, value)) + "]"
        case _:
            text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
