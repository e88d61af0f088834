"""What is learnt from a batch: the slot `Objective`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Protocol

from temper.parts import part, slot
from temper.train import logprobs

if TYPE_CHECKING:
    from temper.lazy import torch
    from temper.train.batching import Batch


@dataclasses.dataclass(frozen=True)
class Sum:
    """A loss before it is averaged, so that micro-batches add up to exactly what one large batch gives.

    total: scalar, the sum over `count` tokens (or pairs, or samples). extras: further figures for the curve, each a sum over the
    same `count` (scalar tensors, detached by the loop, or numbers). The loop adds up and divides by the update's count.
    """

    total: torch.Tensor
    count: int
    extras: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def mean(self) -> torch.Tensor:
        return self.total / self.count


@slot
class Objective(Protocol):
    """What is learnt from a batch? `(model, batch) -> Sum`, from `input_ids [B, T]` to a sum over targets and their number."""

    def __call__(self, model: Any, batch: Batch) -> Sum: ...


@part
class Causal:
    """Next-token cross-entropy over the supervised tokens, in nats.  Formula: - sum_t log p(x_t | x_<t)."""

    def __call__(self, model: Any, batch: Batch) -> Sum:
        logits, targets = logprobs.supervised_logits(model, batch)
        return Sum(-logprobs.token_logprobs(logits, targets).sum(), batch.targets)
