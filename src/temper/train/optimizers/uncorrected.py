"""AdamW whose means are not corrected for starting at zero."""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from temper.lazy import torch
from temper.train.distribution import local
from temper.train.optimizers.common import FirstOrder
from temper.train.slices import sliced


class UncorrectedAdamW(FirstOrder):
    """See the part `adamw` without `bias_correction`. State: two means per parameter, in its number format."""

    def __init__(self, groups: Iterable[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    def move(self, group: dict[str, Any], moving: list[torch.nn.Parameter]) -> None:
        for one in moving:
            if not self.state[one]:
                self.state[one].update(mean=torch.zeros_like(one), square=torch.zeros_like(one))
        rate, (beta1, beta2) = group["lr"], group["betas"]
        gradients: list[Any] = [one.grad for one in moving]
        means, squares = ([self.state[one][name] for one in moving] for name in ("mean", "square"))
        for weights, slopes, mean, square in sliced(local(moving), local(gradients), local(means), local(squares)):
            torch._foreach_mul_(weights, 1 - rate * group["weight_decay"])
            torch._foreach_lerp_(mean, slopes, 1 - beta1)
            torch._foreach_mul_(square, beta2)
            torch._foreach_addcmul_(square, slopes, slopes, value=1 - beta2)
            roots = torch._foreach_sqrt(square)
            torch._foreach_add_(roots, group["eps"])
            torch._foreach_addcdiv_(weights, mean, roots, value=-rate)
