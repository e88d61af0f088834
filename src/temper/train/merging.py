"""What merging an adapter on quantised weights would cost, measured on examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from temper.lazy import torch
from temper.models import io
from temper.models.deltas import merge
from temper.passport import Artefact, Figure, family
from temper.train.batching import collate
from temper.train.logprobs import supervised_logits

if TYPE_CHECKING:
    from temper.context import Context
    from temper.train.examples import Example

_ROWS = 8


def merge_costs(model: Any, given: Artefact, examples: Sequence[Example], count: int, dtype: str, context: Context) -> dict[str, Figure]:
    """`kl_<target>`, KL(trained || merged) in nats a token, and `logit_gap_<target>`, the greatest difference of a logit.

    model: the trained adapter on an NF4 base, made of `given`, which is loaded anew for the target `merged_float`. examples: `count`
    of them, evenly spread, are compared at their supervised tokens, in float32. dtype: number format in which merged weights would
    leave. Nothing of a model that does not write from left to right.
    """
    from temper.models.divergence import apart, merge_targets

    if family(type(model.get_base_model()).__name__) != "causal" or not len(examples):
        return {}
    count = min(count, len(examples))
    some = sorted((examples[index * len(examples) // count] for index in range(count)), key=len)
    batches = (collate(some[first : first + _ROWS]).to(context.device) for first in range(0, count, _ROWS))
    original = merge(io.load_model(given, device=context.device, constraints=False))
    found = apart(
        model, batches, lambda one, batch: supervised_logits(one, batch)[0], merge_targets(model, original, getattr(torch, dtype))
    )
    figures = {}
    for name, one in found.items():
        figures[f"kl_{name}"] = Figure(one.mean, n=one.tokens, unit="nats", better="lower")
        figures[f"logit_gap_{name}"] = Figure(one.gap, n=one.tokens, better="lower")
    return figures
