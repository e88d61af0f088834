"""Means and shares with their 95 % intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Literal

from temper.passport import Figure

_Z = 1.959964
"""The normal distribution holds 95 % within so many standard deviations."""


def mean(values: Sequence[float], unit: str, better: Literal["lower", "higher"] | None) -> Figure:
    """The mean of independent values; its interval from their standard error, none for a single one."""
    middle = statistics.fmean(values)
    if len(values) < 2:
        return Figure(middle, n=len(values), unit=unit, better=better)
    half = _Z * statistics.stdev(values) / math.sqrt(len(values))
    return Figure(middle, middle - half, middle + half, len(values), unit, better)


def share(hits: int, count: int, better: Literal["lower", "higher"] | None = "higher") -> Figure:
    """`hits` of `count`, with Wilson's score interval, which stays within 0 and 1.  Wilson 1927."""
    value, scale = hits / count, 1 + _Z**2 / count
    middle = (value + _Z**2 / (2 * count)) / scale
    half = _Z / scale * math.sqrt(value * (1 - value) / count + _Z**2 / (4 * count**2))
    return Figure(value, max(0.0, middle - half), min(1.0, middle + half), count, "share", better)
