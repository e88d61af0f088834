"""How the rate moves over a run: the slot `Schedule`.

A multiplier of the optimizer's rate, a function of progress alone. The loop asks for it in the middle of each update, (i + 1/2) / updates,
so that neither the first nor the last update is spent at rate 0. `transformers` asks at i / updates, torch's one-cycle at
i / (updates - 1): the same curves, read half an update earlier, and at its ends.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Protocol

from pydantic import Field

from temper.parts import Problem, Rate, Share, part, slot
from temper.train.optimizers import Keep

if TYPE_CHECKING:
    from temper.lazy import torch


@slot
class Schedule(Protocol):
    """How does the rate move over the run? `(progress 0..1) -> multiplier` of the optimizer's own rate.

    It may have `momentum(progress)` beside, which gives the momentum, or None to leave it as it is.
    """

    def __call__(self, progress: float) -> float: ...


def set_rates(optimizer: torch.optim.Optimizer, schedule: Schedule, progress: float) -> None:
    """Gives every group of an optimizer its rate at `progress`, and where the schedule moves the momentum, that too.

    The rate is the multiplier times the group's own one, kept as `initial_lr`; the momentum is `momentum`, or the first of `betas`.
    Raises `Problem` where a group has neither.
    """
    multiplier = schedule(progress)
    momentum = schedule.momentum(progress) if hasattr(schedule, "momentum") else None  # type: ignore[attr-defined]
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * multiplier
        if momentum is None:
            continue
        if "betas" in group:
            group["betas"] = (momentum, *group["betas"][1:])
        elif "momentum" in group:
            group["momentum"] = momentum
        else:
            raise Problem("the schedule moves the momentum and the optimizer has none; give the schedule `momenta: none`")


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


@part
class Rewarm:
    """Takes up a finished model: rises in a line to a peak, falls along half a cosine.  Gupta et al. 2023, section 2.
    Formula: begin + (peak - begin) p / warmup; floor + (peak - floor) (1 + cos(pi q)) / 2, q = (p - warmup) / (1 - warmup)."""

    peak: Rate = 1.0
    """Multiplier at the top, where the optimizer's rate is the one that the model was first trained with."""
    warmup: Share = 0.01
    """Share of the run in which the rate rises. The paper finds that its length hardly matters."""
    begin: Share = 0.0
    """Multiplier at the beginning, such as the one that the earlier training ended with."""
    floor: Share = 0.1
    """Multiplier at the end."""

    def __call__(self, progress: float) -> float:
        if progress < self.warmup:
            return self.begin + (self.peak - self.begin) * progress / self.warmup
        shape = (1 + math.cos(math.pi * _after(progress, self.warmup))) / 2
        return self.floor + (self.peak - self.floor) * shape


@part
class OneCycle:
    """Rises in a line and falls again while the momentum does the opposite, then falls far below.  Smith 2018, section 4.
    Formula: lines from `low` to 1 over `rise`, to `low` over `rise`, to `floor`; momentum from high to low, to high, high."""

    rise: Annotated[float, Field(gt=0, le=0.5)] = 0.45
    """Share of the run in which the rate rises, and again in which it falls."""
    low: Share = 0.1
    """Multiplier at the beginning, and where the last fall begins."""
    floor: Share = 1e-4
    """Multiplier at the end, orders of magnitude below `low`."""
    momenta: tuple[Keep, Keep] | None = (0.95, 0.85)
    """Momentum where the rate is lowest and where it is greatest (of Adam the first of its betas); none: the optimizer's own."""

    def __call__(self, progress: float) -> float:
        return self._between(progress, self.low, 1.0, self.floor)

    def momentum(self, progress: float) -> float | None:
        """The momentum at `progress`."""
        return None if self.momenta is None else self._between(progress, *self.momenta, self.momenta[0])

    def _between(self, progress: float, low: float, high: float, last: float) -> float:
        """The line from low to high, back to low and on to last."""
        leg = progress / self.rise
        if leg <= 1:
            return low + (high - low) * leg
        if leg <= 2:
            return high + (low - high) * (leg - 1)
        return low + (last - low) * (progress - 2 * self.rise) / (1 - 2 * self.rise)
