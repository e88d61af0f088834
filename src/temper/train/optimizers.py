"""How gradients become changes of weights: the slot `Optimizer`.

The loop calls `optimizer.step(closure)` and nothing else. The closure runs an update's micro-batches, leaves clipped gradients and
returns the mean loss; it goes backward only where gradients are enabled. So an optimizer may call it once (Adam), twice
(sharpness-aware minimisation), or under `torch.no_grad` (zeroth order).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Protocol

from pydantic import Field

from temper.lazy import torch
from temper.parts import Problem, Rate, part, slot

Keep = Annotated[float, Field(ge=0, lt=1)]
"""What is kept of a running mean per update."""
Pull = Annotated[float, Field(ge=0)]
"""Strength of weight decay."""


@slot(phased=False)
class Optimizer(Protocol):
    """How do gradients become changes? `build(parameters) -> torch.optim.Optimizer` whose `step(closure)` calls the closure."""

    def build(self, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer: ...


def _grouped(parameters: Iterable[torch.nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; biases and the gains of norms (one dimension or none) do not."""
    parameters = list(parameters)
    groups = [
        {"params": [one for one in parameters if one.ndim > 1], "weight_decay": weight_decay},
        {"params": [one for one in parameters if one.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _fused(groups: list[dict[str, Any]]) -> bool:
    """Whether torch's one-kernel update takes these parameters."""
    return all(one.is_floating_point() and one.device.type in ("cpu", "cuda") for group in groups for one in group["params"])


@part(name="adamw")
class AdamW:
    """Adam with decoupled weight decay.  Loshchilov and Hutter 2019, algorithm 2.
    Formula: w <- w - lr (m / (sqrt(v) + eps) + weight_decay w), m and v bias-corrected; no decay on vectors."""

    lr: Rate = 1e-3
    """Rate that the schedule multiplies."""
    betas: tuple[Keep, Keep] = (0.9, 0.999)
    """Decay of the mean of gradients and of the mean of their squares, per update."""
    eps: Rate = 1e-8
    """Added to the square root."""
    weight_decay: Pull = 0.01
    """Share of a weight taken off per update, times the rate."""

    def build(self, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        groups = _grouped(parameters, self.weight_decay)
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=_fused(groups))


@part(name="sgd")
class SGD:
    """Stochastic gradient descent with momentum.  Sutskever et al. 2013.
    Formula: b <- momentum b + g + weight_decay w, w <- w - lr b; no decay on vectors."""

    lr: Rate = 1e-2
    """Rate that the schedule multiplies."""
    momentum: Keep = 0.9
    """Share of the last change that goes on."""
    nesterov: bool = False
    """Whether the gradient counts once more beyond the momentum: w <- w - lr (g + momentum b)."""
    weight_decay: Pull = 0.0
    """Pull of a weight towards 0, added to its gradient."""

    def __post_init__(self) -> None:
        if self.nesterov and not self.momentum:
            raise Problem("nesterov looks ahead along the momentum, which is 0; give a momentum, or nesterov: false")

    def build(self, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        groups = _grouped(parameters, self.weight_decay)
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov, fused=_fused(groups))
