"""Rare successes and emergence: simulation, sums over every outcome, closed forms."""

from __future__ import annotations

import functools
import math

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from scipy import stats

from temper.parts import Problem
from temper.statistics import emergence, passing


def sampled(chance, wanted, budget, instances, seed=0):
    """Instances sampled until `wanted` passes or `budget` samples."""
    made = []
    for tries in numpy.random.default_rng(seed).random((instances, budget)) < chance:
        reached = tries.cumsum() >= wanted
        samples = int(reached.argmax()) + 1 if reached[-1] else budget
        made.append(passing.Passed(int(tries[:samples].sum()), samples, wanted))
    return made


@pytest.mark.parametrize(("chance", "wanted", "budget"), [(0.05, 2, 40), (0.3, 3, 500), (0.02, 1, 60)])
def test_bias_of_sampling_until_passes(chance, wanted, budget):
    made = sampled(chance, wanted, budget, 12000)
    rates = numpy.array([one.rate for one in made])
    error = 4 * rates.std() / math.sqrt(len(rates))
    assert rates.mean() - chance == pytest.approx(passing.bias(chance, wanted, budget), abs=error)
    unbiased = numpy.array([one.unbiased for one in made])
    assert unbiased.mean() == pytest.approx(chance, abs=4 * unbiased.std() / math.sqrt(len(rates)))


def test_bias_in_closed_form():
    """One wanted pass and no budget to speak of: E[1/K] = -p log p / (1 - p)."""
    assert passing.bias(0.2, 1, 2000) + 0.2 == pytest.approx(-0.2 * math.log(0.2) / 0.8)
    assert passing.bias(0.0, 2, 10) == 0.0
    assert passing.bias(1.0, 2, 10) == 0.0


@pytest.mark.parametrize(("chance", "wanted", "budget"), [(0.05, 3, 50), (0.4, 2, 30), (0.01, 2, 40)])
def test_intervals_of_passes_cover_exactly(chance, wanted, budget):
    """Over every way that sampling can end, weighted by its chance: at most 2.5% misses at each side."""
    ends = [(passing.Passed(wanted, k, wanted), stats.nbinom.pmf(k - wanted, wanted, chance)) for k in range(wanted, budget + 1)]
    ends += [(passing.Passed(s, budget, wanted), stats.binom.pmf(s, budget, chance)) for s in range(wanted)]
    assert sum(weight for _, weight in ends) == pytest.approx(1)
    assert sum(weight for end, weight in ends if end.interval()[0] > chance) <= 0.025
    assert sum(weight for end, weight in ends if end.interval()[1] < chance) <= 0.025
    assert all(0 <= end.interval()[0] <= end.rate <= end.interval()[1] <= 1 for end, _ in ends)


def test_the_ends_of_an_interval_are_exact():
    """3 passes in 20 samples: at the low end as many so soon have a chance of 2.5%, at the high end as few so late."""
    low, high = passing.Passed(3, 20, 3).interval()
    assert stats.nbinom.cdf(17, 3, low) == pytest.approx(0.025)
    assert stats.nbinom.sf(16, 3, high) == pytest.approx(0.025)


def test_an_interval_of_a_budget_spent_is_clopper_and_pearsons():
    low, high = passing.Passed(3, 40, 5).interval(0.9)
    peer = stats.binomtest(3, 40).proportion_ci(0.9, method="exact")
    assert (low, high) == pytest.approx((peer.low, peer.high))


def test_the_task_scaling_law_is_recovered():
    sizes = numpy.array([1e6, 3e6, 1e7, 3e7])
    made = passing.scaling(sizes, -500 * sizes**-0.35)
    assert (made.parameters["a"], made.parameters["b"]) == pytest.approx((500, -0.35), rel=1e-10)
    assert math.exp(-made.predict(1e8)) == pytest.approx(math.exp(-500 * 1e8**-0.35))
    assert passing.mean_log([0.1, 0.001]) == pytest.approx(math.log(0.01))


# ------------------------------------------------------------------------------------------------------------ emergence


def test_exact_match_and_edits_by_simulation():
    right = numpy.random.default_rng(0).random((20000, 5)) < 0.8
    assert emergence.exact_match([0.8], 5)[0] == pytest.approx(right.all(1).mean(), abs=0.01)
    assert emergence.expected_edits([0.8], 5)[0] == pytest.approx((~right).sum(1).mean(), abs=0.02)
    assert emergence.seen([0.001], 200)[0] == pytest.approx(1 - 0.999**200)
    chance = emergence.token_chance([1e6, 1e9], 1e7, -0.3)
    assert -numpy.log(chance) == pytest.approx([0.1**-0.3, 100**-0.3])


@given(some.lists(some.integers(0, 3), max_size=7), some.lists(some.integers(0, 3), max_size=7))
@settings(deadline=None)
def test_edit_distance_is_the_recursion(first, second):
    @functools.cache
    def slow(i, j):
        if not i or not j:
            return i + j
        return min(slow(i - 1, j) + 1, slow(i, j - 1) + 1, slow(i - 1, j - 1) + (first[i - 1] != second[j - 1]))

    assert emergence.edit_distance(first, second) == slow(len(first), len(second))


def test_edit_distance_of_words():
    assert emergence.edit_distance("kitten", "sitting") == 3
    assert emergence.edit_distance(["a", "b"], []) == 2


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: passing.Passed(3, 2, 3), "3 passes of 2 samples"),
        (lambda: passing.bias(0.1, 5, 4), "5 of at most 4"),
        (lambda: passing.mean_log([0.5, 0.0]), "1 of 2 instances never passed"),
    ],
)
def test_refusals(call, says):
    with pytest.raises(Problem, match=says):
        call()
