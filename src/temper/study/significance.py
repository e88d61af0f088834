"""How sure a study is of a number: the slot `Test`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from temper.lazy import numpy
from temper.parts import Count, Problem, part, slot
from temper.statistics import bootstrap, tests

if TYPE_CHECKING:
    from temper.statistics.tests import Tested


@dataclasses.dataclass(frozen=True, eq=False)
class Evidence:
    """What stands behind a number that a study found.

    value: the number. draws: how many -> that many of the number over resampled seeds and examples, [B]. examples: whether there are any
    examples to resample, and not seeds alone. seeds: the number at each seed, [S]; None where it is no sum of arms' figures. pair: for the
    difference of two arms at one seed, both arms' figures of each example, [C] and [C]; else None.
    """

    value: float
    draws: Callable[[int], numpy.ndarray]
    examples: bool = True
    seeds: numpy.ndarray | None = None
    pair: tuple[numpy.ndarray, numpy.ndarray] | None = None


@slot(phased=False)
class Test(Protocol):
    """How sure is the number?

    `(evidence, margin, level) -> Tested`: an interval at that level, and the chances of such figures were the number `margin` or less,
    `margin` or more.
    """

    def __call__(self, evidence: Evidence, margin: float, level: float) -> Tested: ...


@part
class MultiBootstrap:
    """Seeds and examples resampled together.  Sellam et al. 2022 (MultiBERTs), section 3

    Formula: the percentiles of the number over draws of seeds and of examples with replacement, the same for all arms. A sum of figures
    without examples is tested by `paired-t`: draws of a few seeds alone would find a difference in noise half of the time (two seeds).
    One run of each arm without examples says nothing: the interval is infinite.
    """

    samples: Count = 2000
    """Resamples drawn."""

    def __call__(self, evidence: Evidence, margin: float, level: float) -> Tested:
        if not evidence.examples and evidence.seeds is not None:
            if len(evidence.seeds) > 1:
                return tests.paired_t(evidence.seeds, margin=margin, level=level)
            return tests.Tested(evidence.value, -math.inf, math.inf, 1.0, 1.0, "one run, no test", 1)
        values = evidence.draws(self.samples)
        low, high = bootstrap.interval(values, level)
        above, below = bootstrap.p_above(values, margin), bootstrap.p_below(values, margin)
        return tests.Tested(evidence.value, low, high, above, below, "multi-bootstrap", len(values))


@part
class PairedT:
    """Student's t over the seeds: the examples count as given.  Student 1908"""

    def __call__(self, evidence: Evidence, margin: float, level: float) -> Tested:
        return tests.paired_t(_seeds(evidence, 2), margin=margin, level=level)


@part
class Wilcoxon:
    """Signed ranks over the seeds: no shape is assumed but symmetry.  Wilcoxon 1945; Hodges and Lehmann 1963"""

    def __call__(self, evidence: Evidence, margin: float, level: float) -> Tested:
        return tests.wilcoxon(_seeds(evidence, 2), margin=margin, level=level)


@part(name="mcnemar")
class McNemar:
    """The examples that one of two models gets right and the other does not.  McNemar 1947

    Of two arms at one seed, and a figure that is 0 or 1 for each example; against no margin.
    """

    mid_p: bool = True
    """Half the chance of what was seen itself: less cautious than exact, and near its level (Fagerland et al. 2013)."""

    def __call__(self, evidence: Evidence, margin: float, level: float) -> Tested:
        if evidence.pair is None:
            raise Problem("McNemar's test compares two arms at one seed; give `seeds: 1`, or another test", ("test",))
        one, two = evidence.pair
        if not all(numpy.isin(side, (0, 1)).all() for side in (one, two)):
            raise Problem("McNemar's test needs a figure that is 0 or 1 for each example, such as accuracy; use another test", ("test",))
        if margin:
            raise Problem(f"McNemar's test knows no margin; {margin:g} needs another test", ("margin",))
        return tests.mcnemar(int((one > two).sum()), int((two > one).sum()), len(one), level=level, mid_p=self.mid_p)


@part(name="5x2")
class FiveByTwo:
    """Five times two halves of the data, each once learnt from: the combined F-test.  Alpaydin 1999

    The study's seeds are ten: 2 r and 2 r + 1 are the halves of split r (the data source `halves`). Against no margin.
    """

    def __call__(self, evidence: Evidence, margin: float, level: float) -> Tested:
        seeds = _seeds(evidence, 10)
        if len(seeds) != 10:
            raise Problem(f"the 5x2 test needs 10 seeds, two a split; the study has {len(seeds)}", ("test",))
        if margin:
            raise Problem(f"the 5x2 test knows no margin; {margin:g} needs another test", ("margin",))
        return tests.five_by_two_F(seeds.reshape(5, 2), level=level)


def _seeds(evidence: Evidence, least: int) -> numpy.ndarray:
    if evidence.seeds is None:
        raise Problem("the number is no sum of arms' figures; use multi-bootstrap", ("test",))
    if len(evidence.seeds) < least:
        raise Problem(
            f"{len(evidence.seeds)} seeds: this test needs at least {least}; give more `seeds`, or use multi-bootstrap", ("test",)
        )
    return evidence.seeds
