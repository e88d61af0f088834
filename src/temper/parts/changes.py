"""What may change over a run: ramps of a number, phases of a slot, and how far the run is."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

from temper.parts.problems import Problem, shown


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a run is: updates done, of how many (of a run of so many seconds an estimate), tokens seen."""

    step: int = 0
    steps: float = 1
    tokens: int = 0

    @property
    def share(self) -> float:
        return min(1.0, self.step / max(1, self.steps))


@dataclasses.dataclass(frozen=True)
class Until:
    """A point of a run: a share of it, a number of updates or of tokens, or its end."""

    amount: float
    unit: str

    @staticmethod
    def read(value: Any) -> Until:
        if value == "end":
            return Until(math.inf, "end")
        if isinstance(value, float) and 0 <= value <= 1:
            return Until(value, "share")
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return Until(value, "steps")
        if isinstance(value, str) and (found := re.fullmatch(r"([\d.]+)\s*([kMG]?)\s*(steps|tokens)", value.strip())):
            return Until(float(found[1]) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}[found[2]], found[3])
        raise Problem(f'{shown(value)} is no point of a run; write a share such as 0.5, steps such as 200, "2M tokens", or end')

    def passed(self, progress: Progress) -> bool:
        at = {"end": -1.0, "share": progress.share, "steps": progress.step, "tokens": progress.tokens}[self.unit]
        return at >= self.amount

    def dump(self) -> Any:
        return {"end": "end", "share": self.amount, "steps": int(self.amount or 0) if self.unit == "steps" else 0}.get(
            self.unit, f"{self.amount:g} {self.unit}"
        )


@dataclasses.dataclass(frozen=True)
class Ramp:
    """A number that moves over a run, from `first` to `last` between two shares of it."""

    first: float
    last: float
    start: float = 0.0
    until: float = 1.0
    shape: str = "linear"
    whole: bool = False

    def at(self, progress: Progress) -> float | int:
        x = min(1.0, max(0.0, (progress.share - self.start) / max(1e-12, self.until - self.start)))
        match self.shape:
            case "cosine":
                value = self.first + (self.last - self.first) * (1 - math.cos(math.pi * x)) / 2
            case "exponential":
                value = self.first * (self.last / self.first) ** x
            case _:
                value = self.first + (self.last - self.first) * x
        return round(value) if self.whole else value


@dataclasses.dataclass(frozen=True)
class Ramped:
    """A part some of whose settings move; the run asks for the part at its progress, the part sees plain numbers."""

    part: Any
    ramps: tuple[tuple[str, Ramp], ...]

    def at(self, progress: Progress) -> Any:
        return dataclasses.replace(self.part, **{name: ramp.at(progress) for name, ramp in self.ramps})


@dataclasses.dataclass(frozen=True)
class Phased:
    """Parts that follow one another in a slot: `[[until, part], ...]`."""

    phases: tuple[tuple[Until, Any], ...]

    def index(self, progress: Progress) -> int:
        for index, (until, _) in enumerate(self.phases):
            if not until.passed(progress):
                return index
        return len(self.phases) - 1
