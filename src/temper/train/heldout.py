"""The loss on examples that are not trained on, as `train(evaluate=...)` takes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from temper.train.batching import collate
from temper.train.precision import Precision, autocast

if TYPE_CHECKING:
    from temper.train.batching import Batch
    from temper.train.examples import Example
    from temper.train.objectives import Sum


def heldout(
    examples: Sequence[Example], loss: Callable[[Any, Batch], Sum], *, device: str, precision: Precision = "float32", tokens: int = 8192
) -> Callable[[Any], dict[str, float]]:
    """A function of a model that gives `heldout_loss`, the mean over all that the examples supervise, and the loss's extras likewise.

    The examples of a preference follow one another and stay together. tokens: of a batch at most, padding counted.
    """
    pair = 2 if examples[0].side else 1
    units = [examples[start : start + pair] for start in range(0, len(examples), pair)]
    units.sort(key=lambda unit: max(map(len, unit)))
    groups: list[list[Example]] = []
    for unit in units:
        longest = max(map(len, unit))  # units only grow, so this is the batch's width
        if not groups or longest * (len(groups[-1]) + pair) > tokens:
            groups.append([])
        groups[-1].extend(unit)

    def evaluate(model: Any) -> dict[str, float]:
        total, count, extras = 0.0, 0, dict[str, float]()
        for group in groups:
            with autocast(device, precision):
                result = loss(model, collate(group).to(device))
            total += float(result.total)
            count += result.count
            for name, value in result.extras.items():
                extras[name] = extras.get(name, 0.0) + float(value)
        return {"heldout_loss": total / count, **{f"heldout_{name}": value / count for name, value in extras.items()}}

    return evaluate
