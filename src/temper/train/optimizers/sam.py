"""Sharpness-aware minimisation around any optimizer that takes one gradient."""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Callable
from typing import Any

from temper.lazy import torch
from temper.train.distribution import full, local
from temper.train.optimizers.common import Joined, evaluate
from temper.train.slices import sliced


class SharpnessAware(Joined):
    """See the part `sam`. State: the base's alone; the weights are copied during an update, and put back bit for bit."""

    passes = 2

    def __init__(self, base: torch.optim.Optimizer, rho: float, adaptive: bool):
        super().__init__(base)
        self.rho, self.adaptive = rho, adaptive

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Calls the closure twice, at the weights and where the loss is about highest near them. Gives the loss at the weights."""
        assert closure is not None, "the gradient is taken in two places: step(closure)"
        loss = evaluate(closure)
        moving = [one for group in self.param_groups for one in group["params"] if one.grad is not None]
        start = [one.detach().clone() for one in moving]
        try:
            self._climb(moving)
            evaluate(closure)
        finally:
            for one, before in zip(moving, start):
                one.copy_(before)
        super().step()
        return loss

    def _climb(self, moving: list[torch.nn.Parameter]) -> None:
        """w + rho g / ||g||, or where adaptive w + rho w^2 g / || |w| g ||."""
        gradients: list[Any] = [one.grad for one in moving]
        norms = [torch.linalg.vector_norm(slope * one if self.adaptive else slope) for one, slope in zip(moving, gradients)]
        factor = self.rho / (torch.stack(list(map(full, norms))).norm() + 1e-12)
        for weights, slopes in sliced(local(moving), local(gradients)):
            steps = torch._foreach_mul(slopes, factor)
            if self.adaptive:
                torch._foreach_mul_(steps, weights)
                torch._foreach_mul_(steps, weights)
            torch._foreach_add_(weights, steps)
