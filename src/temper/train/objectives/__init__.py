"""What is learnt from a batch: the slot `Objective`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from temper.parts import slot
from temper.train.objectives.base import Causal, Sum, added, check
from temper.train.objectives.masked import Masked
from temper.train.objectives.middle import FillMiddle
from temper.train.objectives.prefix import Prefix
from temper.train.objectives.spans import SpanMixture

if TYPE_CHECKING:
    from temper.train.batching import Batch


@slot(combine=added)
class Objective(Protocol):
    """What is learnt from a batch? `(model, batch) -> Sum`, from `input_ids [B, T]` to a sum over targets and their number.

    A part may change the batch before the model sees it, and draws for each row by `batch.update` and the row's key. A list is summed.
    """

    def __call__(self, model: Any, batch: Batch) -> Sum: ...


__all__ = ["Causal", "FillMiddle", "Masked", "Objective", "Prefix", "SpanMixture", "Sum", "added", "check"]
