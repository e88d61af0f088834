"""How examples become batches: the slot `Batching`.

A plan is asked for the micro-batches of update i and keeps no position, so a resumed run needs the update's number alone, and what
an update holds depends neither on the past nor on how many processes share it. Only a plan over a stream has to know where it stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from temper.parts import slot
from temper.train.batching.batch import Batch, Plan, collate, collate_packed
from temper.train.batching.decomposed import Decomposed, DecomposedPlan, decompose
from temper.train.batching.drawn import Bucketed, DrawnPlan, Padded
from temper.train.batching.fitting import best_fit
from temper.train.batching.packed import BestFit, BestFitPlan, Packed, PackedPlan
from temper.train.batching.separating import can_separate
from temper.train.batching.streamed import StreamedPlan, planned

if TYPE_CHECKING:
    from temper.context import Stream
    from temper.train.examples import Example
    from temper.train.feed import Feed


@slot(phased=False)
class Batching(Protocol):
    """How do examples become batches? `(examples, stream, feed) -> Plan`, whose `update(i)` gives update i's micro-batches `[B, T]`."""

    def __call__(self, examples: Sequence[Example], stream: Stream, feed: Feed = ...) -> Plan: ...


__all__ = [
    "Batch",
    "Batching",
    "BestFit",
    "BestFitPlan",
    "Bucketed",
    "Decomposed",
    "DecomposedPlan",
    "DrawnPlan",
    "Packed",
    "PackedPlan",
    "Padded",
    "Plan",
    "StreamedPlan",
    "best_fit",
    "can_separate",
    "collate",
    "collate_packed",
    "decompose",
    "planned",
]
