"""What the modules share: refusals, and roots."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from temper.lazy import numpy
from temper.parts import Problem


def finite(values: Any, what: str, least: int = 1) -> numpy.ndarray:
    """The values as float64. `Problem` where one is not finite, or where there are fewer than `least` along the last axis."""
    array = numpy.asarray(values, dtype=numpy.float64)
    if array.ndim == 0 or array.shape[-1] < least:
        raise Problem(f"{array.shape[-1] if array.ndim else 'no list of'} {what}: at least {least} are needed")
    broken = int((~numpy.isfinite(array)).sum())
    if broken:
        raise Problem(f"{broken} of {array.size} {what} are no finite numbers; leave out what failed, or see why it did")
    return array


def share(value: float, what: str) -> float:
    """A number strictly between 0 and 1, else a `Problem`."""
    if not 0 < value < 1:
        raise Problem(f"{value:g}: {what} lies between 0 and 1, such as 0.95")
    return value


def counts(**values: int) -> None:
    """`Problem` where one of the named counts is no whole number from 0."""
    for name, value in values.items():
        if value != int(value) or value < 0:
            raise Problem(f"{value}: `{name}` is a count, a whole number from 0")


def moments(values: numpy.ndarray) -> tuple[float, float]:
    """Mean and standard deviation (n - 1) of values [n]; exactly 0 where they are all alike, whatever rounding makes of their mean."""
    if (values == values[0]).all():
        return float(values[0]), 0.0
    return float(values.mean()), float(values.std(ddof=1))


def root(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a function that changes sign between `low` and `high` is 0."""
    from scipy import optimize

    found: Any = optimize.brentq(function, low, high, xtol=1e-13)
    return float(found)
