"""Lion: the sign of an interpolated momentum."""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from temper.lazy import torch
from temper.train.distribution import local
from temper.train.optimizers.common import FirstOrder
from temper.train.slices import sliced


class Lion(FirstOrder):
    """See the part `lion`. State: a momentum per parameter, in its number format."""

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float]):
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    def move(self, group: dict[str, Any], moving: list[torch.nn.Parameter]) -> None:
        for one in moving:
            if not self.state[one]:
                self.state[one]["momentum"] = torch.zeros_like(one)
        rate, (beta1, beta2) = group["lr"], group["betas"]
        gradients: list[Any] = [one.grad for one in moving]
        momenta = [self.state[one]["momentum"] for one in moving]
        for weights, slopes, kept in sliced(local(moving), local(gradients), local(momenta)):
            signs = torch._foreach_lerp(kept, slopes, 1 - beta1)
            torch._foreach_sign_(signs)
            torch._foreach_mul_(weights, 1 - rate * group["weight_decay"])
            torch._foreach_add_(weights, signs, alpha=-rate)
            torch._foreach_lerp_(kept, slopes, 1 - beta2)
