"""How the rate moves over a run: the slot `Schedule`.

A multiplier of the optimizer's rate, a function of progress alone. The loop asks for it in the middle of each update, (i + 1/2) / updates,
so that neither the first nor the last update is spent at rate 0.
"""

from __future__ import annotations

import math
from typing import Protocol

from temper.parts import Problem, Share, part, slot


@slot
class Schedule(Protocol):
    """How does the rate move over the run? `(progress 0..1) -> multiplier` of the optimizer's own rate."""

    def __call__(self, progress: float) -> float: ...


def _decay(progress: float, warmup: float, floor: float, shape: float) -> float:
    """Rises to 1 over `warmup`; after it falls from 1 to `floor` as `shape` falls from 1 to 0."""
    return progress / warmup if progress < warmup else floor + (1 - floor) * shape


def _after(progress: float, warmup: float) -> float:
    """Progress since the warm-up, 0..1."""
    return (progress - warmup) / (1 - warmup) if warmup < 1 else 0.0


@part
class Constant:
    """One rate after the warm-up.  Formula: min(1, p / warmup)."""

    warmup: Share = 0.0
    """Share of the run in which the rate rises from 0."""

    def __call__(self, progress: float) -> float:
        return _decay(progress, self.warmup, 1.0, 1.0)


@part
class Linear:
    """Falls in a line.  Formula: floor + (1 - floor) (1 - q), q = (p - warmup) / (1 - warmup); p / warmup before."""

    warmup: Share = 0.03
    """Share of the run in which the rate rises from 0."""
    floor: Share = 0.0
    """Multiplier at the end."""

    def __call__(self, progress: float) -> float:
        return _decay(progress, self.warmup, self.floor, 1 - _after(progress, self.warmup))


@part
class Cosine:
    """Falls along half a cosine.  Loshchilov and Hutter 2017, SGDR, eq. 5.
    Formula: floor + (1 - floor) (1 + cos(pi q)) / 2, q = (p - warmup) / (1 - warmup); p / warmup before."""

    warmup: Share = 0.03
    """Share of the run in which the rate rises from 0."""
    floor: Share = 0.0
    """Multiplier at the end."""

    def __call__(self, progress: float) -> float:
        shape = (1 + math.cos(math.pi * _after(progress, self.warmup))) / 2
        return _decay(progress, self.warmup, self.floor, shape)


@part
class WarmupStableDecay:
    """Rises, holds, falls in a line over the last `decay` of the run.  Hu et al. 2024, MiniCPM, section 4.
    Formula: p / warmup; 1; floor + (1 - floor) (1 - p) / decay."""

    warmup: Share = 0.03
    """Share of the run in which the rate rises from 0."""
    decay: Share = 0.2
    """Share of the run, at its end, in which it falls."""
    floor: Share = 0.0
    """Multiplier at the end."""

    def __post_init__(self) -> None:
        if self.warmup + self.decay > 1:
            raise Problem(f"warmup {self.warmup} and decay {self.decay} are shares of one run; together they must be at most 1")

    def __call__(self, progress: float) -> float:
        falling = min(1.0, (1 - progress) / self.decay) if self.decay else 1.0
        return _decay(progress, self.warmup, self.floor, falling)
