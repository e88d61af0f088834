"""MeZO: a slope from two forward passes along noise that is drawn again from its seed instead of being stored."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from temper.lazy import F, torch
from temper.train.optimizers.common import Joined

if TYPE_CHECKING:
    from temper.context import Stream


class ZerothOrder(Joined):
    """See the part `mezo`. State: the bases', the number of updates, and under `sparsity` a threshold per parameter.

    bases: an optimizer per parameter, so that only one parameter's gradient is ever in memory. At most one parameter's noise is, too;
    under `sparsity` a bit per weight for as long as an update takes.
    """

    forward_only = True

    def __init__(
        self,
        bases: Sequence[torch.optim.Optimizer],
        stream: Stream,
        *,
        epsilon: float,
        estimator: Literal["difference", "sign", "conservative"],
        sparsity: float,
    ):
        super().__init__(*bases)
        self._stream, self._epsilon, self._estimator, self._sparsity = stream, epsilon, estimator, sparsity
        self.passes = 5 if estimator == "conservative" else 2
        self._held = [group["params"][0] for group in self.param_groups]
        self.param_groups[0]["updates"] = 0
        self._place = 0.0  # the weights stand at w + place z
        self._masks: list[torch.Tensor | None] = []

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Calls the closure without gradients, at w + epsilon z and w - epsilon z, and for `conservative` in three places more.

        Gives the first loss. Where a call raises, the weights are put back before the error goes on.
        """
        assert closure is not None, "the slope comes from losses: step(closure)"
        self._masks = [self._mask(one, group) for one, group in zip(self._held, self.param_groups)]
        cautious = self._estimator == "conservative"
        try:
            losses = [self._loss(closure, place) for place in (*([0.0] if cautious else []), self._epsilon, -self._epsilon)]
            slope = float(losses[-2] - losses[-1]) / (2 * self._epsilon)
            if cautious:
                self._best(closure, float(losses[0]), self.param_groups[0]["lr"] * slope)
        except BaseException:
            self._go(0.0)
            raise
        if not cautious:
            self._descend(slope if self._estimator == "difference" else math.copysign(float(slope != 0), slope))
        self._masks = []
        self._place = 0.0
        self.param_groups[0]["updates"] += 1
        return losses[0]

    def _loss(self, closure: Callable[[], Any], place: float) -> Any:
        self._go(place)
        return closure()

    def _go(self, place: float) -> None:
        """Moves all weights along the noise."""
        if place != self._place:
            for index, one in enumerate(self._held):
                one.add_(self._noise(index), alpha=place - self._place)
        self._place = place

    def _descend(self, slope: float) -> None:
        """Parameter by parameter: back to w, the estimate slope z as its gradient, a step of its base."""
        for index, (one, base) in enumerate(zip(self._held, self.inner)):
            noise = self._noise(index)
            one.add_(noise, alpha=-self._place)
            one.grad = noise.mul_(slope)
            base.step()
            one.grad = None

    def _best(self, closure: Callable[[], Any], here: float, change: float) -> None:
        """Tries w - change z and w + change z and stays where the loss is lowest, at w too."""
        ahead, behind = (float(self._loss(closure, place)) for place in (-change, change))
        self._go((0.0 if here < behind else change) if ahead > here else (-change if ahead < behind else change))

    def _noise(self, index: int) -> torch.Tensor:
        """z of one parameter in this update, the same whenever it is asked for; 0 where the weight stands still."""
        one, mask = self._held[index], self._masks[index]
        seed = self._stream.seed(self.param_groups[0]["updates"], index)
        generator = torch.Generator(one.device).manual_seed(seed)
        noise = torch.randn(one.shape, generator=generator, dtype=one.dtype, device=one.device)
        return noise if mask is None else noise.mul_(_unpacked(mask, one.numel()).view_as(one))

    def _mask(self, one: torch.Tensor, group: dict[str, Any]) -> torch.Tensor | None:
        """Which weights move, those of at most the parameter's threshold, a bit each; None: all."""
        if not self._sparsity:
            return None
        if "threshold" not in group:
            moving = max(1, round((1 - self._sparsity) * one.numel()))
            group["threshold"] = one.abs().flatten().kthvalue(moving).values.item()
        return _packed(one.abs() <= group["threshold"])


def _packed(mask: torch.Tensor) -> torch.Tensor:
    """bool -> a bit each, uint8 [ceil(n / 8)]."""
    bits = F.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


def _unpacked(bits: torch.Tensor, count: int) -> torch.Tensor:
    """The first `count` bits, as bool [count]."""
    return ((bits[:, None] >> torch.arange(8, dtype=torch.uint8, device=bits.device)) & 1).bool().flatten()[:count]
