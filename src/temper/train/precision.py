"""Number formats for training: whether bf16 autocast pays on this device for this model."""

from __future__ import annotations

import bisect
import contextlib
import itertools
import math
import time
from typing import Any, Literal

from temper.lazy import F, torch

Precision = Literal["float32", "bf16"]

_GAIN = 1.2  # casting costs memory and rounding, so a gain within the noise of a short measurement does not count
_SECONDS = 0.3  # of measuring, beyond the least number of tries


def choose(model: Any, device: str) -> tuple[Precision, str]:
    """bf16 autocast or float32, and why; for `context.decide("precision", ...)`.

    Measured on one linear layer, forward and backward, casts counted: small layers lose more by casting than they gain. Its size is that
    of the matrix in which the model's median weight stands, so that many small adapters do not speak for a large model.
    """
    if device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "float32", "this GPU has no bf16 arithmetic"
    if (size := typical(model)) is None:
        return "float32", "the model has no matrices"
    rows, columns = size
    gain = _gain(rows, columns, device)
    measured = f"on a {rows} x {columns} layer here, forward and backward, bf16 runs {gain:.2f} times as fast as float32"
    return ("bf16", measured) if gain >= _GAIN else ("float32", f"{measured}; {_GAIN} is asked for")


def typical(model: Any) -> tuple[int, int] | None:
    """Rows and columns of the matrix in which the model's median weight stands; None where it has no matrices."""
    sizes = sorted((tuple(one.shape) for one in model.parameters() if one.ndim == 2), key=math.prod)
    if not sizes:
        return None
    below = list(itertools.accumulate(map(math.prod, sizes)))
    return sizes[bisect.bisect_left(below, below[-1] / 2)]


def autocast(device: str, precision: Precision) -> contextlib.AbstractContextManager[Any]:
    """The context in which a forward pass runs at `precision`."""
    return torch.autocast(device, dtype=torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()


def _gain(rows: int, columns: int, device: str) -> float:
    """Time in float32 over time under bf16 autocast: the best of several interleaved tries of each."""
    # Drawn from a generator of its own: measuring must not move anybody's random numbers.
    weight, inputs = (torch.randn(n, columns, generator=torch.Generator().manual_seed(0)).to(device) for n in (rows, 512))
    weight.requires_grad_()

    def once(precision: Precision) -> float:
        _wait(device)
        start = time.perf_counter()
        with autocast(device, precision):
            total = F.linear(inputs, weight).float().sum()
        total.backward()
        _wait(device)
        return time.perf_counter() - start

    times: list[tuple[float, float]] = []
    for precision in ("float32", "bf16"):
        once(precision)  # the first tries warm up
    start = time.perf_counter()
    while len(times) < 3 or (len(times) < 8 and time.perf_counter() - start < _SECONDS):
        times.append((once("float32"), once("bf16")))
    return min(one for one, _ in times) / min(two for _, two in times)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
