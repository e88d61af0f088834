"""From a trail of keys to file, line and column."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from temper.parts import Problem, Problems

BLOCKS = ("repeat", "each")
"""What stands among steps and holds steps."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Turns a trail of keys into file, line and column. changed: paths whose values `by` put there, not the file."""

    file: str
    raw: Any
    changed: tuple[tuple[str | int, ...], ...] = ()
    by: str = "--set"

    def locate(self, problem: Problem, step: str = "") -> Problem:
        found = [
            one if isinstance(one, Located) else Located(self._text(one, step or self._step(one.path)), one.path) for one in problem.all
        ]
        located = list({str(one): one for one in found}.values())
        return located[0] if len(located) == 1 else Problems(located)

    def _text(self, problem: Problem, step: str) -> str:
        words = [key for key in problem.path if key not in ("steps", *BLOCKS) and not isinstance(key, int)]
        words = words[1:] if step and words else words  # the engine's own key says nothing that the step's name does not
        where = f"step `{step}`, " if step and words else f"step `{step}`: " if step else ""
        at = ".".join(map(str, words))
        line = self._line(problem.path)
        changed = any(problem.path[: len(one)] == one for one in self.changed)
        source = self.by if changed else f"{self.file}:{line}" if line else self.file
        return f"{source}: {where}{f'`{at}`: ' if at else ''}{problem.text}"

    def _step(self, path: Sequence[str | int]) -> str:
        """The name of the innermost step on a path."""
        node: Any = self.raw
        name = ""
        for depth, key in enumerate(path):
            if isinstance(node, (list, tuple)) and isinstance(key, int) and key < len(node) and depth and path[depth - 1] == "steps":
                entry: Any = node[key]
                engine = next(iter(entry), "") if isinstance(entry, Mapping) else entry
                body = entry.get(engine) if isinstance(entry, Mapping) else None
                if engine not in BLOCKS and len(path) > depth + 1:
                    name = str(body.get("name", engine)) if isinstance(body, Mapping) else str(engine)
            try:
                node = node[key]  # pyright: ignore[reportArgumentType, reportCallIssue]
            except (KeyError, IndexError, TypeError):
                break
        return name

    def _line(self, path: Sequence[str | int]) -> str:
        node: Any = self.raw
        line = ""
        for key in path:
            position = getattr(node, "lc", None)
            if position is None:
                break
            try:
                row, column = position.key(key) if isinstance(node, Mapping) else position.item(key)
                child = node[key]
            except (KeyError, IndexError, TypeError):
                break
            if isinstance(node, Mapping) and not isinstance(child, (Mapping, list)):
                row, column = position.value(key)
            line = f"{row + 1}:{column + 1}"
            node = child
        return line


class Located(Problem):
    """A problem whose text already says where it is."""

    def under(self, *keys: str | int) -> Problem:
        return self

    def __str__(self) -> str:
        return self.text


class Follows(Located):
    """A problem that another one brings with it, and that need not be told: a reference to a step that is itself in trouble."""
