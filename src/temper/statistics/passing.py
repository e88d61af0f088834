"""Rare successes: an instance is sampled until it passes so many times, or a budget is spent.  Hu et al. 2023 (PassUntil)"""

from __future__ import annotations

import dataclasses
from typing import Any

from temper.lazy import numpy
from temper.parts import Problem
from temper.statistics.fits import Fitted, fit
from temper.statistics.shared import counts, finite, share


@dataclasses.dataclass(frozen=True)
class Passed:
    """What sampling an instance came to: `passes` of `samples`, sampling having ended at `wanted` passes or when the budget was spent."""

    passes: int
    samples: int
    wanted: int

    def __post_init__(self) -> None:
        counts(passes=self.passes, samples=self.samples, wanted=self.wanted)
        if not (self.passes <= self.samples and self.passes <= self.wanted and self.samples and self.wanted):
            seen = f"{self.passes} passes of {self.samples} samples, {self.wanted} wanted"
            raise Problem(f"{seen}: sampling stops at the wanted passes, and takes at least one sample")

    @property
    def rate(self) -> float:
        """The most likely chance of a pass, passes/samples, whichever way sampling ended.  Hu et al. 2023

        Too high on average, since sampling ends on a success: see `bias`.
        """
        return self.passes / self.samples

    @property
    def unbiased(self) -> float:
        """The chance of a pass without bias; of no use at 1 wanted pass.  Haldane 1945; with a budget: Girshick, Mosteller and Savage 1946

        Formula: (passes - 1)/(samples - 1) where the wanted passes were reached, passes/samples where the budget was spent.
        """
        if self.passes < self.wanted or self.samples == 1:
            return self.rate
        return (self.passes - 1) / (self.samples - 1)

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """An exact interval of the chance of a pass: covers with at least the level, whatever the chance and the budget.

        Formula: outcomes are ordered by how much they speak for passing (early success, late success, budget spent with fewer and
        fewer passes). An end is the chance at which what was seen or beyond has probability (1 - level)/2: quantiles of Beta(r, K - r + 1)
        and of Beta(r, K - r) where r passes came at sample K, else of Beta(r, K - r + 1) and Beta(r + 1, K - r).
        """
        from scipy import stats

        tail = (1 - share(level, "the level of an interval")) / 2
        passes, missed = self.passes, self.samples - self.passes
        more = passes if passes == self.wanted else passes + 1
        low = float(stats.beta.ppf(tail, passes, missed + 1)) if passes else 0.0
        high = float(stats.beta.isf(tail, more, missed)) if missed else 1.0
        return low, high


def bias(chance: float, wanted: int, budget: int) -> float:
    """How far `Passed.rate` lies from the chance of a pass on average, exactly.

    Formula: sum over K = wanted .. budget of (wanted/K) P(K) + sum over s < wanted of (s/budget) P(s) - chance, K negative binomial
    and s binomial.
    """
    from scipy import stats

    if not (0 <= chance <= 1 and 1 <= wanted <= budget):
        raise Problem(
            f"{chance:g}, {wanted} of at most {budget}: a chance is from 0 to 1, and the budget holds the wanted passes, at least 1"
        )
    samples, passes = numpy.arange(wanted, budget + 1), numpy.arange(wanted)
    reached = stats.nbinom.pmf(samples - wanted, wanted, chance) if chance else numpy.zeros(len(samples))
    spent = stats.binom.pmf(passes, budget, chance)
    return float(wanted * (reached / samples).sum() + (passes * spent).sum() / budget - chance)


def mean_log(rates: Any) -> float:
    """The mean over instances of log pass rate, which the task scaling law is about. `Problem` where a rate is 0: it has no logarithm."""
    rates = finite(rates, "pass rates")
    if not ((rates > 0) & (rates <= 1)).all():
        raise Problem(f"{int((rates <= 0).sum())} of {len(rates)} instances never passed: a logarithm needs a pass; give a larger budget")
    return float(numpy.log(rates).mean())


def scaling(sizes: Any, mean_logs: Any) -> Fitted:
    """The task scaling law through models' mean log pass rates, [N] or [B, N].  Hu et al. 2023, equation 3

    Formula: PU(N) = exp(-c N^-alpha), a straight line of log(-log PU) over log N. Fitted is -log PU = a N^b: c is `a`, alpha is -`b`, and
    exp(-fitted.predict(N)) the pass rate of a model of N parameters. A curve that bends down from the line is their accelerated emergence.
    """
    return fit("log-log-line", sizes, -finite(mean_logs, "mean log pass rates", 2))
