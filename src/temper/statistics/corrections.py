"""p-values of several tests together: each adjusted so that it may be read alone."""

from __future__ import annotations

from collections.abc import Sequence

from temper.lazy import numpy
from temper.parts import Problem


def bonferroni(p: Sequence[float]) -> list[float]:
    """Each times their number: the chance of any false finding stays at the level.  Dunn 1961"""
    values = _checked(p)
    return numpy.minimum(1, values * len(values)).tolist()


def holm(p: Sequence[float]) -> list[float]:
    """As `bonferroni` promises, and never larger.  Holm 1979

    Formula: with p_(1) <= ... <= p_(m), adjusted p_(i) = max over j <= i of min(1, (m - j + 1) p_(j)).
    """
    values = _checked(p)
    order = numpy.argsort(values, kind="stable")
    adjusted = numpy.empty_like(values)
    adjusted[order] = numpy.minimum(1, numpy.maximum.accumulate(values[order] * numpy.arange(len(values), 0, -1)))
    return adjusted.tolist()


def benjamini_hochberg(p: Sequence[float]) -> list[float]:
    """The expected share of false ones among the findings stays at the level.  Benjamini and Hochberg 1995

    Formula: adjusted p_(i) = min over j >= i of min(1, m p_(j) / j).
    """
    values = _checked(p)
    order = numpy.argsort(values, kind="stable")[::-1]
    adjusted = numpy.empty_like(values)
    adjusted[order] = numpy.minimum(1, numpy.minimum.accumulate(values[order] * len(values) / numpy.arange(len(values), 0, -1)))
    return adjusted.tolist()


def _checked(p: Sequence[float]) -> numpy.ndarray:
    array = numpy.asarray(p, dtype=numpy.float64)
    if not ((array >= 0) & (array <= 1)).all():  # true of no NaN
        raise Problem(f"p-values {array.tolist()}: each is a number from 0 to 1")
    return array
