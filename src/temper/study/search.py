"""How the trials of an arm are spent: the slot `Search`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Protocol

from temper.lazy import numpy
from temper.parts import Count, Problem, Share, part, slot


@dataclasses.dataclass(frozen=True)
class Tried:
    """One run of a trial. number: which settings. effort: its share of a whole run. value: what chooses, less is better."""

    number: int
    rung: int
    effort: float
    value: float


@slot(phased=False)
class Search(Protocol):
    """How are trials spent?

    `(trials, run) -> [Tried]`: tries settings 0 .. trials - 1 with `run([(number, effort)]) -> [value]`; a value that is no number loses.
    The best of the last rung is chosen. What is tried depends on the values alone, never on the arm.
    """

    def __call__(self, trials: int, run: Callable[[Sequence[tuple[int, float]]], list[float]]) -> list[Tried]: ...


@part
class Random:
    """Every setting gets a whole run.  Bergstra and Bengio 2012"""

    def __call__(self, trials: int, run: Callable[[Sequence[tuple[int, float]]], list[float]]) -> list[Tried]:
        values = run([(number, 1.0) for number in range(trials)])
        return [Tried(number, 0, 1.0, value) for number, value in enumerate(values)]


@part
class Halving:
    """Many short runs, of which the best go on longer: successive halving.  Jamieson and Talwalkar 2016

    Formula: rung k runs the best ceil(n / keep^k) settings at a share of first * keep^k of a whole run, at most 1.
    """

    first: Share = 0.25
    """The share of a whole run that every setting gets."""
    keep: Count = 2
    """One of so many goes on."""

    def __post_init__(self) -> None:
        if self.first <= 0:
            raise Problem("0: the first rung is a share above 0 of a whole run", ("first",))
        if self.keep < 2:
            raise Problem("1: of so many settings one goes on; at 1 none would be left out", ("keep",))

    def __call__(self, trials: int, run: Callable[[Sequence[tuple[int, float]]], list[float]]) -> list[Tried]:
        made: list[Tried] = []
        going, rung, effort = list(range(trials)), 0, self.first
        while True:
            values = run([(number, effort) for number in going])
            made += [Tried(number, rung, effort, value) for number, value in zip(going, values, strict=True)]
            if effort >= 1:
                return made
            ranked = [number for _, number in sorted(zip([math.inf if math.isnan(one) else one for one in values], going, strict=True))]
            going = sorted(ranked[: math.ceil(len(going) / self.keep)])
            rung, effort = rung + 1, min(1.0, effort * self.keep)


def best(tried: Sequence[Tried]) -> Tried | None:
    """The least value of the last rung, the first of equals; None where no value is a number."""
    last = [one for one in tried if one.rung == tried[-1].rung and math.isfinite(one.value)]
    return min(last, key=lambda one: one.value) if last else None


def shares(trials: int, settings: int, seed: int) -> list[list[float]]:
    """Where in its ranges each trial looks: [trials][settings] numbers from 0 to 1, the same for every arm.

    A Latin hypercube: of every setting's range each of `trials` equal pieces is looked at once.
    """
    from scipy.stats import qmc

    if not settings:
        return [[] for _ in range(trials)]
    return numpy.asarray(qmc.LatinHypercube(settings, rng=seed).random(trials)).tolist()
