"""Whether `torch.compile` pays back within a run, and a model's blocks compiled while it trains."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from temper.lazy import torch
from temper.models import walk
from temper.parts import Problem
from temper.train.measuring import passes, seconds
from temper.train.precision import Precision

if TYPE_CHECKING:
    from temper.train.batching import Batch
    from temper.train.objectives import Sum

_GAIN = 1.1  # below it, the time that compiling took and the wait for it are not worth it
_SHARE = 0.1  # of the run, as compiling may take at most
_USUAL = 30.0  # seconds that compiling a block of a transformer takes
_LEAST = 100  # updates of a run in which so much as measuring is worth it


def choose(model: Any, loss: Callable[[Any, Batch], Sum], batches: Sequence[Batch], updates: int, precision: Precision) -> tuple[bool, str]:
    """Whether to compile, and why; for `context.decide("compile", ...)`. Tries it only in a run that is long enough to pay for the try.

    batches: an update's, on the model's device. The model's weights and gradients are as before.
    """
    if updates < _LEAST:
        return False, f"{updates} updates are too few to pay for compiling"
    once = seconds(model, loss, batches, precision)
    run = once * updates
    if run * _SHARE < _USUAL:
        return False, f"the run takes about {run:.0f} s, too short to pay for compiling, which takes some {_USUAL:.0f} s"
    try:
        with compiled(model):
            begun = time.perf_counter()
            passes(model, loss, batches, precision)
            took = time.perf_counter() - begun
            faster = seconds(model, loss, batches, precision)
    except Exception as error:  # a compiler that is missing, a model that it cannot take
        return False, f"compiling failed: {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
    measured = f"compiled, an update takes {once / faster:.2f} times less, and compiling took {took:.0f} s of about {run:.0f} s"
    return once / faster >= _GAIN and took < run * (1 - faster / once), measured


@contextlib.contextmanager
def compiled(model: Any) -> Iterator[None]:
    """Within, the model's blocks run compiled, for inputs of any shape; after it they are as before.

    What is computed does not depend on the shapes that come first, so a resumed run goes on in the same bits.
    """
    try:
        parts = [block for _, block in walk.blocks(model)]
    except Problem:
        parts = [model]
    torch._dynamo.reset()  # what comes out must not depend on what this process compiled before
    for part in parts:
        part.compile(dynamic=True)
    try:
        yield
    finally:
        for part in parts:
            part._compiled_call_impl = None
