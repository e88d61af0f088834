"""How sure a figure is: the slot `Resample`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from temper.lazy import numpy
from temper.parts import Count, Share, part, slot

if TYPE_CHECKING:
    from temper.context import Context

Statistic = Callable[[Any], Any]
"""Totals [..., K] -> values [...]: a figure as a function of sums over the examples."""


@slot(phased=False)
class Resample(Protocol):
    """How sure is a figure?

    `(sums [C, K], statistic) -> (low, high)`: the ends of an interval around `statistic(sums.sum(0))`, where `sums` holds a row for
    each of C independent units of data (an example, or all examples of one module) and `statistic` maps totals [..., K] to values
    [...]. None where the data cannot tell. The draws depend on C alone, so figures of several models on the same data are drawn on
    the same units, and the columns of two models side by side give their paired difference.
    """

    def __call__(self, sums: numpy.ndarray, statistic: Statistic) -> tuple[float, float] | None: ...


@part
class Bootstrap:
    """The percentile bootstrap over units.  Efron 1979; Efron and Tibshirani 1993, section 13.3.

    Formula: the (1 - level)/2 and (1 + level)/2 quantiles of statistic(sum_i n_i x_i), n ~ Multinomial(C; 1/C, ..., 1/C).
    A ratio is resampled as numerator and denominator together. Units that are all alike give a point, however few they are;
    one unit alone gives no interval. Resamples in which the figure is no number, such as a share of nothing, do not count.
    """

    samples: Count = 1000
    """Resamples drawn."""
    level: Share = 0.95
    """Share of resamples inside the interval."""

    def start(self, context: Context) -> Drawn:
        return Drawn(self, context.stream().seed())


class Drawn:
    """A bootstrap with its random stream."""

    def __init__(self, settings: Bootstrap, seed: int):
        self._settings, self._seed = settings, seed

    def __call__(self, sums: numpy.ndarray, statistic: Statistic) -> tuple[float, float] | None:
        units = len(sums)
        if units < 2:
            return None
        generator = numpy.random.default_rng(self._seed)
        at_once = max(1, 2**22 // units)  # bounds the memory of a draw, whatever the number of units
        values = []
        for first in range(0, self._settings.samples, at_once):
            count = min(at_once, self._settings.samples - first)
            drawn = generator.integers(0, units, (count, units)) + units * numpy.arange(count)[:, None]
            times = numpy.bincount(drawn.ravel(), minlength=count * units).reshape(count, units)
            values.append(statistic(times.astype(numpy.float64) @ sums))
        found = numpy.concatenate(values)
        found = found[numpy.isfinite(found)]
        if not len(found):
            return None
        tail = (1 - self._settings.level) / 2
        low, high = numpy.quantile(found, [tail, 1 - tail])
        return float(low), float(high)
