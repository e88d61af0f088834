"""GaLore: AdamW in a subspace of each matrix's gradient."""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.optim.adamw import adamw

from temper.lazy import torch
from temper.train.optimizers.common import FirstOrder, fused


def basis(gradient: torch.Tensor, rank: int) -> torch.Tensor:
    """The leading singular vectors of a gradient [m, n] on its shorter side: [m, rank] where m <= n, else [rank, n].

    A singular vector's sign is free; here its largest entry is positive, so that the means of a basis carry over to the next.
    """
    left, _, right = torch.linalg.svd(gradient.to(torch.promote_types(gradient.dtype, torch.float32)), full_matrices=False)
    rows = left.T if gradient.shape[0] <= gradient.shape[1] else right
    rows = rows[:rank]
    signs = rows.gather(1, rows.abs().argmax(1, keepdim=True)).sign()
    rows = (rows * signs).to(gradient.dtype)
    return rows.T.contiguous() if gradient.shape[0] <= gradient.shape[1] else rows.contiguous()


class GaLore(FirstOrder):
    """See the part `galore`. State of a projected matrix: its basis and two means of the projection's shape; of others AdamW's."""

    def __init__(self, groups: Iterable[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float, **settings: Any):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, **settings})

    def move(self, group: dict[str, Any], moving: list[Any]) -> None:
        if not group["project"]:
            self._adamw(group, moving, moving, [one.grad for one in moving], group["weight_decay"])
            return
        torch._foreach_mul_(moving, 1 - group["lr"] * group["weight_decay"])
        low = [self._project(one, group) for one in moving]
        changes = list(map(torch.zeros_like, low))
        self._adamw(group, moving, changes, low, 0.0)
        for one, change in zip(moving, changes):
            basis, (rows, columns) = self.state[one]["basis"], one.shape
            factors = (basis, change) if rows <= columns else (change, basis)
            one.addmm_(*factors, alpha=group["scale"])

    def _project(self, one: torch.nn.Parameter, group: dict[str, Any]) -> torch.Tensor:
        """The gradient in the subspace, which is chosen anew every `gap` updates: [rank, n] where m <= n, else [m, rank]."""
        state, gradient = self.state[one], one.grad
        assert gradient is not None
        if "basis" not in state or int(state["step"]) % group["gap"] == 0:
            state["basis"] = basis(gradient, group["rank"])
        return state["basis"].T @ gradient if one.shape[0] <= one.shape[1] else gradient @ state["basis"].T

    def _adamw(
        self, group: dict[str, Any], owners: list[torch.nn.Parameter], weights: list[Any], gradients: list[torch.Tensor], decay: float
    ) -> None:
        """torch's AdamW on `weights`, with the means that are kept for `owners`."""
        kernel = fused(gradients)
        for one, like in zip(owners, gradients):
            if "mean" not in self.state[one]:
                step = torch.zeros((), device=like.device if kernel else "cpu")
                self.state[one].update(step=step, mean=torch.zeros_like(like), square=torch.zeros_like(like))
        means, squares, steps = ([self.state[one][name] for one in owners] for name in ("mean", "square", "step"))
        settings = {"beta1": group["betas"][0], "beta2": group["betas"][1], "lr": group["lr"], "eps": group["eps"], "weight_decay": decay}
        adamw(weights, gradients, means, squares, [], steps, fused=kernel, amsgrad=False, maximize=False, **settings)
