"""What holds the weights near where they were: the slot `Anchor`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from temper.lazy import torch
from temper.parts import Rate, part, slot
from temper.train.distribution import is_sharded, like, local

if TYPE_CHECKING:
    from temper.context import Context
    from temper.world import World


class Anchoring(Protocol):
    """A term on the parameters beside the loss. Parameters are the same ones, in the same order, whenever they are given."""

    def __call__(self, parameters: Iterable[torch.nn.Parameter], scale: float) -> torch.Tensor:
        """The term's value, a scalar. Where gradients are enabled its gradient, times `scale`, is added to the parameters' `grad`."""
        ...


@slot(phased=False)
class Anchor(Protocol):
    """What holds the weights near where they were? `start(context)` gives the term beside the loss, `(parameters, scale) -> value`,
    which adds `scale` times its gradient to the parameters' `grad`; asked once a pass, not once a micro-batch."""

    def start(self, context: Context) -> Anchoring: ...


@part(name="l2")
class L2:
    """Half the squared distance from the weights at the start.  Li et al. 2018 (L2-SP), eq. 2.  4 bytes a weight.
    Formula: strength / 2 sum (w - w0)^2, with gradient strength (w - w0), over all weights that are trained."""

    strength: Rate = 0.01
    """Multiplies the term."""

    def start(self, context: Context) -> Near:
        return Near(self.strength, context.world)


class Near:
    """A term that grows with the squared distance from the parameters as they were when it was first asked for.

    Under `shard` each process knows its shards' distance; `world` adds them up.
    """

    def __init__(self, strength: float, world: World):
        self._strength, self._world = strength, world
        self._start: list[Any] = []

    def __call__(self, parameters: Iterable[torch.nn.Parameter], scale: float) -> torch.Tensor:
        parameters = list(parameters)
        learning = torch.is_grad_enabled()
        with torch.no_grad():
            if not self._start:
                self._start = [one.detach().clone() for one in parameters]
            squares: dict[bool, list[torch.Tensor]] = {False: [], True: []}  # of whole parameters, of shards
            for one, start in zip(parameters, self._placed(parameters)):
                apart = torch.sub(*local([one, start]))
                squares[is_sharded(one)].append(torch.linalg.vector_norm(apart).square())
                if learning and one.grad is not None:  # what nothing gives a gradient stays at its start
                    local([one.grad])[0].add_(apart, alpha=self._strength * scale)
            sums = [torch.stack(some).sum() for some in squares.values() if some]
            if squares[True]:
                self._world.sum(sums[-1])
            return torch.stack(sums).sum() * (self._strength / 2)

    def _placed(self, parameters: list[torch.nn.Parameter]) -> list[Any]:
        """The start where the parameters are, and cut as they are: what a checkpoint gives back is whole and on the CPU."""
        pairs = list(zip(self._start, parameters, strict=True))
        self._start = [start if is_sharded(start) else like(start.to(one.device), one) for start, one in pairs]
        return self._start

    def state_dict(self) -> dict[str, Any]:
        return {"start": list(self._start)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._start = [one.clone() for one in state["start"]]
