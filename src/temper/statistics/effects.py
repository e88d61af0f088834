"""How large a difference is beside its spread: numbers without a unit."""

from __future__ import annotations

import math
from typing import Any

from temper.lazy import numpy
from temper.parts import Problem
from temper.statistics.shared import counts, finite, moments


def cohens_dz(differences: Any) -> float:
    """The mean of n >= 2 paired differences over their standard deviation.  Cohen 1988

    Infinite where they are all alike, 0 where they are all 0.
    """
    mean, spread = moments(finite(differences, "differences", 2))
    return mean / spread if spread else math.copysign(math.inf, mean) if mean else 0.0


def hedges_g(differences: Any) -> float:
    """`cohens_dz` without its bias for small n >= 3.  Hedges 1981

    Formula: g = d_z Gamma(m/2) / (sqrt(m/2) Gamma((m - 1)/2)), m = n - 1.
    """
    m = len(finite(differences, "differences", 3)) - 1
    return cohens_dz(differences) * math.exp(math.lgamma(m / 2) - math.lgamma((m - 1) / 2)) / math.sqrt(m / 2)


def cliffs_delta(first: Any, second: Any) -> float:
    """P(x > y) - P(x < y) of an x of the first and a y of the second, from -1 to 1.  Cliff 1993"""
    first, second = finite(first, "values"), numpy.sort(finite(second, "values"))
    less = numpy.searchsorted(second, first, side="left")
    greater = len(second) - numpy.searchsorted(second, first, side="right")
    return float((less - greater).sum()) / (len(first) * len(second))


def odds_ratio(only_first: int, only_second: int) -> float:
    """How many pairs only the first got right for each that only the second did; infinite over none. The ratio of McNemar's test."""
    counts(only_first=only_first, only_second=only_second)
    if not only_first + only_second:
        raise Problem("no pair differs: their odds ratio is not defined")
    return only_first / only_second if only_second else math.inf
