"""SGD-SaI: momentum with a constant rate per tensor, taken from the first gradient."""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from temper.lazy import torch
from temper.train.distribution import full, local
from temper.train.optimizers.common import FirstOrder, evaluate
from temper.train.slices import sliced


def signal_to_noise(gradient: torch.Tensor, eps: float) -> torch.Tensor:
    """||g|| / (std(g) + eps), a scalar: sqrt(n (1 + mean^2 / var)) but for eps and the n - 1 in std (Xu et al. 2024, algorithm 1, line 12).

    A tensor whose entries are all alike has no noise to compare with; it counts as one without a mean, sqrt(n).
    """
    count = gradient.numel()
    gradient = gradient.float() if gradient.dtype in (torch.bfloat16, torch.float16) else gradient
    mean = full(gradient.sum()) / count
    variance = full((gradient - mean).square().sum()) / max(1, count - 1)
    ratio = (variance * (count - 1) + count * mean.square()).sqrt() / (variance.sqrt() + eps)
    return torch.where(variance > 0, ratio, math.sqrt(count))


class SGDSaI(FirstOrder):
    """See the part `sgd-sai`. State: a momentum per parameter, in its number format, and a scale per tensor."""

    def __init__(self, groups: Iterable[dict[str, Any]], *, lr: float, momentum: float, eps: float, normalised: bool):
        super().__init__(groups, {"lr": lr, "momentum": momentum, "eps": eps, "weight_decay": 0.0, "largest": None if normalised else 1.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = evaluate(closure)
        self._scale()
        super().step()
        return loss

    def _scale(self) -> None:
        """Gives a scale to every tensor that has none and has a gradient other than zero: a factor of LoRA gets its first one late."""
        fresh = [
            (group, one)
            for group in self.param_groups
            for one in group["params"]
            if one.grad is not None and "scale" not in self.state[one]
        ]
        if not fresh:
            return
        found = [(signal_to_noise(one.grad, group["eps"]), full((one.grad != 0).sum())) for group, one in fresh]
        ratios = torch.stack([torch.stack([ratio.double(), some.double()]) for ratio, some in found]).tolist()
        known = [(one, ratio) for (_, one), (ratio, some) in zip(fresh, ratios) if some]
        if known and self.param_groups[0]["largest"] is None:
            for group in self.param_groups:
                group["largest"] = max(ratio for _, ratio in known)
        for one, ratio in known:
            self.state[one]["scale"] = ratio / self.param_groups[0]["largest"]

    def move(self, group: dict[str, Any], moving: list[torch.nn.Parameter]) -> None:
        moving = [one for one in moving if "scale" in self.state[one]]
        if not moving:
            return
        gradients: list[Any] = [one.grad for one in moving]
        rate, keep = group["lr"], group["momentum"]
        for one in moving:
            if keep and "momentum" not in self.state[one]:
                self.state[one]["momentum"] = one.grad.clone()  # type: ignore[union-attr]
        momenta = [self.state[one]["momentum"] for one in moving] if keep else gradients
        scales = [-rate * self.state[one]["scale"] for one in moving]
        for weights, slopes, kept, factors in sliced(local(moving), local(gradients), local(momenta), scales):
            if keep:
                torch._foreach_lerp_(kept, slopes, 1 - keep)
            torch._foreach_mul_(weights, 1 - rate * group["weight_decay"])
            torch._foreach_add_(weights, torch._foreach_mul(kept, factors))
