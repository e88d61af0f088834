"""What a recipe becomes: steps in order, each with its spec and where its inputs come from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from temper.parts import Problem, nearest, plain
from temper.recipe.places import Place


@dataclasses.dataclass(frozen=True)
class FromStep:
    """What an earlier step of the plan gives; `checkpoint` one that it kept: after an update, or the `best`."""

    index: int
    checkpoint: int | str | None = None


@dataclasses.dataclass(frozen=True)
class Outside:
    """A model from a folder or a hub."""

    ref: str
    folder: Path


@dataclasses.dataclass(frozen=True)
class Condition:
    """`until: evaluate.accuracy >= 0.9`."""

    index: int
    figure: str
    above: bool
    strict: bool
    value: float

    def holds(self, figures: Mapping[str, Any]) -> bool:
        found = [one for name, one in figures.items() if name == self.figure or name.endswith("." + self.figure)]
        if len(found) != 1:
            raise Problem(f"`until` asks for the figure `{self.figure}`{nearest(self.figure, figures)}")
        have = found[0].value
        if self.strict:
            return have > self.value if self.above else have < self.value
        return have >= self.value if self.above else have <= self.value


@dataclasses.dataclass(frozen=True)
class Step:
    """An engine at work. `path` is where it stands in the recipe; `earlier` the same step one repetition before."""

    name: str
    engine: str
    method: str
    spec: Any
    inputs: Mapping[str, Any]
    seed: int
    path: tuple[str | int, ...]
    earlier: int | None = None
    loop: str = ""
    until: Condition | None = None
    files: tuple[Path, ...] = ()
    about: str = ""
    aim: tuple[str, ...] = ()

    @property
    def given(self) -> list[FromStep]:
        """The earlier steps that it reads."""
        flat = [one for value in self.inputs.values() for one in (value if isinstance(value, tuple) else (value,))]
        return [one for one in flat if isinstance(one, FromStep)]


@dataclasses.dataclass(frozen=True)
class Plan:
    """A recipe, checked and unrolled. `text` is what the user wrote."""

    name: str
    steps: tuple[Step, ...]
    text: str
    folder: Path
    export: tuple[str, ...]
    seed: int
    about: str
    place: Place
    track: tuple[str, ...] = ()

    def step(self, name: str) -> Step:
        for one in self.steps:
            if plain(one.name) == plain(name):
                return one
        raise Problem(f"no step `{name}`{nearest(name, [one.name for one in self.steps])}")

    def locate(self, problem: Problem, step: Step) -> Problem:
        """A problem found while a step was checked or run, with its line."""
        return self.place.locate(problem.under(*step.path), step.name)
