"""The learning-rate range test: a short probe before a run, in which the rate rises until the loss does."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

from temper.lazy import torch
from temper.parts import Problem

if TYPE_CHECKING:
    from temper.parts import Live

_NEAR = 20  # smoothed over a twentieth of the updates on each side
_MEMORY, _DIVERGED = 0.9, 4.0  # ends where the running mean, this much of it kept, is so many times its lowest
_SAFETY = 10.0


@dataclasses.dataclass(frozen=True)
class RangeTest:
    """What a probe found. updates: as many as were planned. rates, losses: of each update that was done, the loss before it."""

    updates: int
    rates: list[float]
    losses: list[float]

    @property
    def smoothed(self) -> list[float]:
        """Each loss with its neighbours, a twentieth of the updates on each side: a running mean would lag behind the rate."""
        near = max(1, self.updates // _NEAR)
        return [statistics.fmean(self.losses[max(0, place - near) : place + near + 1]) for place in range(len(self.losses))]

    @property
    def lowest(self) -> int:
        """The update before which the smoothed loss was lowest."""
        return min(range(len(self.losses)), key=self.smoothed.__getitem__)

    @property
    def suggested(self) -> float:
        """A tenth of the last rate that led to the lowest smoothed loss, since what an update can bear is too much for a run."""
        return self.rates[max(0, self.lowest - 1)] / _SAFETY

    @property
    def reason(self) -> str:
        """How the suggestion came about, in words."""
        end = ", and it fell to the end: a range that goes higher may find more" if self.lowest == len(self.losses) - 1 else ""
        return (
            f"in {len(self.rates)} probing updates with rates from {self.rates[0]:.2g} to {self.rates[-1]:.2g} the smoothed loss fell to "
            f"{self.smoothed[self.lowest]:.3g} up to a rate of {10 * self.suggested:.2g}, of which a tenth is taken{end}"
        )


def range_test(
    model: Any,
    build: Callable[[], torch.optim.Optimizer],
    closure: Callable[[torch.optim.Optimizer, int], Callable[[], Any]],
    *,
    low: float = 1e-7,
    high: float = 1.0,
    updates: int = 100,
    steps: Literal["exponential", "linear"] = "exponential",
    live: Live | None = None,
) -> RangeTest:
    """Trains `model` for so many updates with a rate that rises from `low` to `high`, and puts everything back.  Smith 2017, section 3.3.

    build: a fresh optimizer over what is trained. closure: `(optimizer, update) -> closure` over that update's batches; whatever it
    draws must come from generators of its own or torch's. live: started slots whose state the probe may change. The probe ends early
    where the loss is not finite, or its running mean is more than four times its lowest.

    Parameters that are trained, buffers, mode, torch's random state and the slots' state are afterwards what they were, bit for bit.
    Raises `Problem` where the first loss is not finite, or no later one is lower.
    """
    if updates < 2 or not 0 < low < high:
        raise Problem(f"a range of {updates} updates from {low:g} to {high:g}; give at least 2, from a rate above 0 to a greater one")
    with _put_back(model, live):
        optimizer = build()
        rates, losses, means = list[float](), list[float](), list[float]()
        first = [group["lr"] for group in optimizer.param_groups]
        for update in range(updates):
            share = update / (updates - 1)
            rate = low * (high / low) ** share if steps == "exponential" else low + (high - low) * share
            for group, own in zip(optimizer.param_groups, first):
                group["lr"] = rate * own / first[0]
            try:
                loss = float(optimizer.step(closure(optimizer, update)))
            except FloatingPointError:
                loss = math.nan
            if not math.isfinite(loss):
                break
            rates.append(rate)
            losses.append(loss)
            means.append(_MEMORY * means[-1] + (1 - _MEMORY) * loss if means else loss)
            if means[-1] > _DIVERGED * min(means):
                break
    if not losses:
        raise Problem(f"the loss was not finite before the first probing update, at a rate of {low:g}; look at the data and the model")
    found = RangeTest(updates, rates, losses)
    if found.lowest == 0:
        raise Problem(f"the loss was lowest before any change, at rates from {low:g} on; give a lower range, or more updates")
    return found


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Gives an optimizer a rate in place of its own; where its groups differ, the first gets it and the others keep their ratio to it."""
    first = optimizer.param_groups[0]["lr"]
    for group in optimizer.param_groups:
        group["lr"] *= rate / first


@contextlib.contextmanager
def _put_back(model: Any, live: Live | None) -> Iterator[None]:
    """Training mode within; on leaving, all that training changes is as it was."""
    training = model.training
    learnt = [one for one in (*model.parameters(), *(live.parameters() if live is not None else ())) if one.requires_grad]
    held = [(one, one.detach().clone()) for one in (*learnt, *model.buffers())]
    state = copy.deepcopy(live.state_dict()) if live is not None else {}
    devices = sorted({one.device for one, _ in held if one.device.type == "cuda"}, key=str)
    with torch.random.fork_rng(devices):
        model.train()
        try:
            yield
        finally:
            model.train(training)
            with torch.no_grad():
                for one, before in held:
                    one.copy_(before)
                    one.grad = None
            if live is not None:
                live.load_state_dict(state)
