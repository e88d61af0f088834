"""Whether paired differences lie above a margin."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from temper.lazy import numpy
from temper.parts import Problem
from temper.statistics.shared import counts, finite, moments, root, share


@dataclasses.dataclass(frozen=True)
class Tested:
    """What a test says of a difference, first minus second.

    p_above: the one-sided p-value against "the difference is the margin or less"; small where it lies above. p_below: the mirror.
    Twice the smaller is the two-sided p-value.
    """

    estimate: float
    low: float
    """The interval's lower end. -inf where so few observations bound nothing at that level."""
    high: float
    p_above: float
    p_below: float
    name: str
    n: int
    """Pairs, or resamples of a bootstrap."""


@dataclasses.dataclass(frozen=True)
class Omnibus:
    """What a test says of several at once: small p, they are not all alike. It has no direction and no interval."""

    statistic: float
    p: float
    name: str
    n: int


def paired_t(differences: Any, *, margin: float = 0.0, level: float = 0.95) -> Tested:
    """Student's t of n >= 2 paired differences.  Student 1908

    Formula: t = (mean - margin) / (s / sqrt(n)), n - 1 degrees of freedom. Differences that are all alike leave no doubt (p 0 or 1), or
    say nothing where they equal the margin (both p 1).
    """
    differences = finite(differences, "differences", 2)
    n = len(differences)
    mean, spread = moments(differences)
    error = spread / math.sqrt(n)
    reach = _reach(n - 1, level) * error
    above, below = _tails(n - 1, mean - margin, error)
    return Tested(mean, mean - reach, mean + reach, above, below, "paired t", n)


def wilcoxon(differences: Any, *, margin: float = 0.0, level: float = 0.95) -> Tested:
    """Signed ranks of paired differences: nothing is assumed of their shape but symmetry.  Wilcoxon 1945; Hodges and Lehmann 1963

    Formula: W = sum of the ranks of |d - margin| over d > margin; differences equal to the margin are left out, ties share their mean
    rank. p-values are exact given the ranks up to 300 differences (all 2^n signs counted), then normal. The estimate is the median of
    the pairwise means (d_i + d_j)/2, i <= j; the interval runs between the k-th least and k-th greatest of them, k the greatest with
    P(W <= k - 1) <= (1 - level)/2. Under 6 differences no finite interval has a level of 0.95: it is infinite.
    """
    differences = finite(differences, "differences", 2)
    n, tail = len(differences), (1 - share(level, "the level of an interval")) / 2
    if n > 5000:
        raise Problem(f"{n} differences: their pairwise means would not fit; beyond 5000 use the t-test, which assumes little by then")
    first, second = numpy.triu_indices(n)
    means = numpy.sort((differences[first] + differences[second]) / 2)
    k = _end(n, tail)
    low, high = (float(means[k - 1]), float(means[-k])) if k else (-math.inf, math.inf)

    from scipy import stats

    left = differences[differences != margin] - margin
    ranks = stats.rankdata(abs(left))
    won, lost = float(ranks[left > 0].sum()), float(ranks[left < 0].sum())
    return Tested(float(numpy.median(means)), low, high, _chance(ranks, won), _chance(ranks, lost), "Wilcoxon", n)


def mcnemar(only_first: int, only_second: int, n: int, *, level: float = 0.95, mid_p: bool = True) -> Tested:
    """Of n pairs, `only_first` were right in the first alone, `only_second` in the second alone.  McNemar 1947

    Formula: p_above = P(X >= only_first), X ~ Binomial(only_first + only_second, 1/2), less P(X = only_first)/2 for mid-p (Fagerland,
    Lydersen and Laake 2013). The estimate is (only_first - only_second)/n; its interval is Tango's (1998): all differences whose score
    test is not significant. The margin is 0.
    """
    from scipy import stats

    counts(only_first=only_first, only_second=only_second, n=n)
    if n < 1 or only_first + only_second > n:
        raise Problem(f"{only_first} and {only_second} pairs that differ, of {n}: those that differ are among the pairs, at least 1")
    differ = only_first + only_second
    above, below = (
        float(stats.binom.sf(count - 1, differ, 0.5)) - (float(stats.binom.pmf(count, differ, 0.5)) / 2 if mid_p else 0.0)
        for count in (only_first, only_second)
    )
    low, high = _tango(only_first, only_second, n, share(level, "the level of an interval"))
    name = "McNemar, mid-p" if mid_p else "McNemar, exact"
    return Tested((only_first - only_second) / n, low, high, above, below, name, n)


def five_by_two_t(differences: Any, *, level: float = 0.95) -> Tested:
    """Five splits in half, each half once learnt from: differences [5, 2].  Dietterich 1998

    Formula: t = d_11 / sqrt(sum_i s_i^2 / 5), s_i^2 the sum of squares of split i about its mean; 5 degrees of freedom. The estimate is
    d_11 too: the test looks at that one difference, and at the rest for its spread alone.
    """
    differences = _five_by_two(differences)
    first, error = float(differences[0, 0]), math.sqrt(_within(differences) / 5)
    reach = _reach(5, level) * error
    above, below = _tails(5, first, error)
    return Tested(first, first - reach, first + reach, above, below, "5x2 t", 10)


def five_by_two_F(differences: Any, *, level: float = 0.95) -> Tested:
    """Five splits in half, all ten differences [5, 2] used: the combined F-test.  Alpaydin 1999

    Formula: F = sum_ij d_ij^2 / (2 sum_i s_i^2), with 10 and 5 degrees of freedom. F has no direction: half its p-value goes to the
    side of the mean of the ten, which is the estimate. The interval holds every delta for which the differences d - delta are not
    significant; where there is none (the splits differ more than their halves) it is the mean plus or minus the reach of `five_by_two_t`.
    """
    from scipy import stats

    differences = _five_by_two(differences)
    mean, within = float(differences.mean()), _within(differences)
    squares = float((differences**2).sum())
    half = float(stats.f.sf(squares / (2 * within), 10, 5)) / 2 if within else 0.0 if squares else 1.0
    above, below = (half, 1 - half) if mean > 0 else (1 - half, half) if mean < 0 else (max(half, 0.5),) * 2
    tail = 1 - share(level, "the level of an interval")
    room = 2 * within * float(stats.f.isf(tail, 10, 5)) - float(((differences - mean) ** 2).sum())
    reach = math.sqrt(room / 10) if room >= 0 else _reach(5, level) * math.sqrt(within / 5)
    return Tested(mean, mean - reach, mean + reach, above, below, "5x2 F", 10)


def cochran_q(right: Any) -> Omnibus:
    """Whether k models are right equally often on the same n examples: right [n, k], 0 or 1.  Cochran 1950

    Formula: Q = (k - 1) (k sum_j G_j^2 - T^2) / (k T - sum_i L_i^2), G_j and L_i sums of columns and rows, T of all; chi-squared with k - 1
    degrees of freedom. Examples on which all agree do not count; where all do, Q is 0 and p is 1.
    """
    from scipy import stats

    right = finite(right, "models", 2)
    if right.ndim != 2 or not numpy.isin(right, (0, 1)).all():
        raise Problem(f"answers of shape {list(right.shape)}: Cochran's Q takes [examples, models] of 0 or 1")
    n, k = right.shape
    columns, rows, total = right.sum(0), right.sum(1), right.sum()
    spread = float(k * total - (rows**2).sum())
    statistic = float((k - 1) * (k * (columns**2).sum() - total**2)) / spread if spread else 0.0
    return Omnibus(statistic, float(stats.chi2.sf(statistic, k - 1)), "Cochran's Q", n)


_EXACT = 300


def _tails(freedom: int, distance: float, error: float) -> tuple[float, float]:
    """P(T >= t) and P(T <= t) of Student's t = distance/error."""
    from scipy import special

    if error:
        return float(special.stdtr(freedom, -distance / error)), float(special.stdtr(freedom, distance / error))
    return (0.0, 1.0) if distance > 0 else (1.0, 0.0) if distance < 0 else (1.0, 1.0)


def _reach(freedom: int, level: float) -> float:
    """How many standard errors an interval of Student's t reaches."""
    from scipy import special

    return -float(special.stdtrit(freedom, (1 - share(level, "the level of an interval")) / 2))


def _signed_ranks(ranks: Any) -> numpy.ndarray:
    """The chances of twice the sum of the ranks with a plus sign being 0, 1, 2 ..., each sign a fair coin."""
    doubled = numpy.rint(2 * numpy.asarray(ranks)).astype(int)  # ties share a mean rank, which ends in .0 or .5
    chances = numpy.zeros(int(doubled.sum()) + 1)
    chances[0] = 1.0
    for rank in doubled:
        chances[rank:] += chances[:-rank]  # the right side is read whole before it is added
        chances /= 2
    return chances


def _chance(ranks: numpy.ndarray, total: float) -> float:
    """P(W >= total)."""
    if len(ranks) <= _EXACT:
        return min(1.0, float(_signed_ranks(ranks)[round(2 * total) :].sum()))
    from scipy import stats

    spread = math.sqrt(float((ranks**2).sum()) / 4)
    return float(stats.norm.sf((total - 0.5 - float(ranks.sum()) / 2) / spread))


def _end(n: int, tail: float) -> int:
    """The greatest k with P(W <= k - 1) <= tail, of n differences without ties."""
    if n <= _EXACT:
        return int(numpy.searchsorted(_signed_ranks(numpy.arange(1, n + 1))[::2].cumsum(), tail, side="right"))
    from scipy import stats

    return int(n * (n + 1) / 4 + 0.5 - float(stats.norm.isf(tail)) * math.sqrt(n * (n + 1) * (2 * n + 1) / 24))


def _tango(b: int, c: int, n: int, level: float) -> tuple[float, float]:
    """The two differences at which the score test of b and c pairs that differ, of n, is on the brink."""
    from scipy import stats

    z = float(stats.norm.isf((1 - level) / 2))

    def excess(delta: float, side: int) -> float:
        w, q = (2 * n - b + c) * delta - b - c, c * delta * (1 - delta)
        only_second = (math.sqrt(max(0.0, w * w + 8 * n * q)) - w) / (4 * n)  # the most likely share, given the difference
        return b - c - n * delta + side * z * math.sqrt(max(0.0, n * (2 * only_second + delta * (1 - delta))))

    seen, aside = (b - c) / n, 1e-12  # where no pair differs, or all do so one way, the score is 0/0 at `seen` itself
    low = -1.0 if c == n else root(lambda delta: excess(delta, -1), -1.0, seen - aside)
    high = 1.0 if b == n else root(lambda delta: excess(delta, 1), seen + aside, 1.0)
    return low, high


def _five_by_two(differences: Any) -> numpy.ndarray:
    differences = finite(differences, "differences", 2)
    if differences.shape != (5, 2):
        raise Problem(f"differences of shape {list(differences.shape)}: five splits in two halves give [5, 2]")
    return differences


def _within(differences: numpy.ndarray) -> float:
    return float(((differences - differences.mean(1, keepdims=True)) ** 2).sum())
