"""Slot `loss`: what tuning minimises."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from temper.parts import slot
from temper.train.objectives import Causal, FillMiddle, Masked, Prefix, SpanMixture, Sum, added, check

if TYPE_CHECKING:
    from temper.train.batching import Batch


@slot(combine=added)
class Loss(Protocol):
    """What is minimised? `(model, batch) -> Sum`, from `input_ids [B, T]` to a sum over the batch's targets and their number.

    A list is summed."""

    def __call__(self, model: Any, batch: Batch) -> Sum: ...


__all__ = ["Causal", "FillMiddle", "Loss", "Masked", "Prefix", "SpanMixture", "check"]
