"""How long an update's passes take, for choices that are made by measurement."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from temper.lazy import torch
from temper.train.precision import Precision, autocast

if TYPE_CHECKING:
    from temper.train.batching import Batch
    from temper.train.objectives import Sum


def seconds(model: Any, loss: Callable[[Any, Batch], Sum], batches: Sequence[Batch], precision: Precision, tries: int = 3) -> float:
    """Of an update's forward and backward passes: the best of so many tries, after one that warms up.

    batches: on the model's device. Weights, gradients and torch's random state are as before.
    """
    times = []
    for _ in range(1 + tries):
        begun = time.perf_counter()
        passes(model, loss, batches, precision)
        times.append(time.perf_counter() - begun)
    return min(times[1:])


def passes(
    model: Any, loss: Callable[[Any, Batch], Sum], batches: Sequence[Batch], precision: Precision, *, forward_only: bool = False
) -> None:
    """Goes forward and, unless `forward_only`, backward over batches; the gradients are thrown away."""
    device = batches[0].input_ids.device
    learnt = [one for one in model.parameters() if one.requires_grad]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for batch in batches:
            with autocast(device.type, precision), torch.set_grad_enabled(not forward_only):
                total = loss(model, batch).total
            if not forward_only:
                torch.autograd.grad(total, learnt, allow_unused=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
