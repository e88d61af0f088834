"""What so many seeds or examples would find, and how many are needed. All two-sided at 1 - level, as the intervals are."""

from __future__ import annotations

import math
from collections.abc import Callable

from temper.lazy import numpy
from temper.parts import Problem
from temper.statistics.shared import root, share


def of_t(difference: float, spread: float, n: int, *, level: float = 0.95, paired: bool = True) -> float:
    """The chance that a t-test finds the difference.

    paired: n pairs, `spread` the standard deviation of their differences. Else: n in each of two groups, `spread` that within each.
    Formula: P(|T| > t), T noncentral t with n - 1 degrees of freedom about difference sqrt(n)/spread; unpaired 2 n - 2, sqrt(n/2).
    """
    if spread <= 0:
        raise Problem(f"{spread:g}: a spread is above 0; without any, every difference is found")
    return _of_noncentrality(abs(difference) / spread * math.sqrt(n if paired else n / 2), n, level, paired)


def minimum_detectable(spread: float, n: int, *, level: float = 0.95, power: float = 0.8, paired: bool = True) -> float:
    """The difference that n pairs (or n in each group) find with that power; `spread` as for `of_t`, 0 gives 0."""
    share(power, "power")
    if not (math.isfinite(spread) and spread >= 0):
        raise Problem(f"{spread:g}: a spread is a finite number from 0")
    high = 4.0
    while _of_noncentrality(high, n, level, paired) < power:
        high *= 2
    # without any difference a test still finds one with chance 1 - level
    found = root(lambda one: _of_noncentrality(one, n, level, paired) - power, 0, high) if power > 1 - level else 0.0
    return spread * found / math.sqrt(n if paired else n / 2)


def needed(difference: float, spread: float, *, level: float = 0.95, power: float = 0.8, paired: bool = True) -> int:
    """How many pairs (or how many in each group) find the difference with that power; at least 2."""
    if difference == 0:
        raise Problem("0: no number of pairs finds a difference of 0")
    return _least(lambda n: of_t(difference, spread, n, level=level, paired=paired) >= share(power, "power"), 2)


def of_mcnemar(difference: float, discordant: float, n: int, *, level: float = 0.95) -> float:
    """The chance that McNemar's mid-p test of n pairs finds a difference of two shares of right answers.

    discordant: the share of pairs on which just one of the two is right; the difference is no larger. Formula: the sum over m
    pairs that differ ~ Binomial(n, discordant) of the chance that X ~ Binomial(m, (1 + difference/discordant)/2) is significant.
    """
    from scipy import stats

    if not (0 < discordant <= 1 and abs(difference) <= discordant * (1 + 1e-12)):
        raise Problem(f"{difference:g} of {discordant:g}: the share that differs is above 0 and at most 1, the difference no larger")
    m = numpy.arange(n + 1)
    weights = stats.binom.pmf(m, n, discordant)
    m, weights = m[weights > 1e-12], weights[weights > 1e-12]
    tail = (1 - share(level, "the level of a test")) / 2
    least = stats.binom.isf(tail, m, 0.5)[:, None] + numpy.arange(3)  # the least significant count is one of these
    mid_p = stats.binom.sf(least, m[:, None], 0.5) + stats.binom.pmf(least, m[:, None], 0.5) / 2
    critical = least[:, 0] + (mid_p > tail).sum(1)
    chance = min(1.0, (1 + abs(difference) / discordant) / 2)
    return float(weights @ (stats.binom.sf(critical - 1, m, chance) + stats.binom.cdf(m - critical, m, chance)))


def mcnemar_detectable(discordant: float, n: int, *, level: float = 0.95, power: float = 0.8) -> float:
    """The difference of shares that n pairs find with that power; infinite where they find not even all pairs differing one way."""
    share(power, "power")
    if of_mcnemar(discordant, discordant, n, level=level) < power:
        return math.inf
    return root(lambda one: of_mcnemar(one, discordant, n, level=level) - power, 0, discordant)


def mcnemar_needed(difference: float, discordant: float, *, level: float = 0.95, power: float = 0.8) -> int:
    """How many pairs find the difference with that power: counts being whole, power saws, and a few fewer may reach it too."""
    if difference == 0:
        raise Problem("0: no number of pairs finds a difference of 0")
    return _least(lambda n: of_mcnemar(difference, discordant, n, level=level) >= share(power, "power"), 1)


def _of_noncentrality(noncentrality: float, n: int, level: float, paired: bool) -> float:
    """P(|T| > t) = E[P(|Z + noncentrality| > t w)], w the estimated over the true spread; scipy's noncentral t is NaN far out."""
    from scipy import integrate, special

    if n < 2:
        raise Problem(f"{n}: a t-test needs at least 2 of each")
    freedom = n - 1 if paired else 2 * n - 2
    critical = -special.stdtrit(freedom, (1 - share(level, "the level of a test")) / 2)

    def found(w: numpy.ndarray) -> numpy.ndarray:
        log_density = special.xlogy(freedom - 1, w) - freedom * w**2 / 2
        return numpy.exp(log_density - log_whole) * (
            special.ndtr(noncentrality - critical * w) + special.ndtr(-noncentrality - critical * w)
        )

    log_whole = special.gammaln(freedom / 2) - math.log(2) - freedom / 2 * math.log(freedom / 2)
    low, high = numpy.sqrt(2 / freedom * special.gammaincinv(freedom / 2, [1e-15, 1 - 1e-15]))
    return float(integrate.fixed_quad(found, low, high, n=200)[0])


def _least(enough: Callable[[int], bool], low: int) -> int:
    """The least whole number from `low` that is enough, more being enough too."""
    high = low
    while not enough(high):
        low, high = high + 1, high * 2
        if high > 2**24:
            raise Problem("more than 16 million would be needed; look for a larger difference")
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return high
