"""Statistics of a model over training examples, as the engines give them to parts that ask for some."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from temper.lazy import torch
from temper.models.statistics import Statistics
from temper.train.batching import Batch, collate
from temper.train.objectives import Causal

if TYPE_CHECKING:
    from temper.context import Context
    from temper.train.examples import Example


def statistics_of(
    model: Any,
    examples: Sequence[Example],
    loss: Callable[[Any, Batch], Any],
    modules: Callable[[], Sequence[str]],
    context: Context,
    batch: int = 8,
) -> Statistics:
    """Statistics over examples in an order drawn from the stream `statistics`, `batch` to a forward pass; nothing is computed yet.

    Of a stream of examples, the first block alone is drawn from. A preference's two answers count as one example. Models whose layers do
    not know the rows of their tokens, encoder-decoders and mixtures of experts, read one example at a time. modules: names of the linear
    layers that a request without names is about. loss: the loss that gradients are of.
    """
    config = model.config
    alone = getattr(config, "is_encoder_decoder", False) or any(
        getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")
    )
    size, unit = 1 if alone else batch, 2 if examples[0].side else 1

    def batches() -> Iterator[Batch]:
        order = torch.randperm(len(examples) // unit, generator=context.stream("statistics").generator()).tolist()
        for update, start in enumerate(range(0, len(order), size)):
            drawn = order[start : start + size]
            yield collate([examples[unit * one + side] for one in drawn for side in range(unit)], update)

    return Statistics(model, modules, batches, loss, unit=unit)


def statistics(
    spec: Any, model: Any, examples: Sequence[Example], context: Context, loss: Callable[[], Callable[[Any, Batch], Any]] = Causal
) -> Statistics:
    """Those of a step: over the modules that its delta may go to.

    spec: with `where` and `delta`. model: the one that the delta is put on. loss: gives what gradients are of, when some are asked for.
    """
    places, made = spec.where or spec.delta.usual, functools.cache(loss)

    def modules() -> Sequence[str]:
        return getattr(places, "candidates", places)(model)

    return statistics_of(model, examples, lambda model, batch: made()(model, batch), modules, context)
