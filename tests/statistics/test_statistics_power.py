"""Power against statsmodels, against simulation, and against itself turned round."""

from __future__ import annotations

import math

import numpy
import pytest
from statsmodels.stats.power import TTestIndPower, TTestPower

from temper.parts import Problem
from temper.statistics import power, tests


@pytest.mark.parametrize("n", [3, 8, 50])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_t_is_statsmodels(n, level):
    for paired, peer in ((True, TTestPower().power), (False, TTestIndPower().power)):
        for effect in (0.2, 0.5, 1.0):  # beyond, theirs is NaN
            assert power.of_t(effect * 0.02, 0.02, n, level=level, paired=paired) == pytest.approx(peer(effect, n, 1 - level), abs=1e-9)
    assert power.minimum_detectable(0.02, n, level=level) / 0.02 == pytest.approx(
        TTestPower().solve_power(nobs=n, alpha=1 - level, power=0.8), rel=1e-5
    )


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("n", [2, 3, 5, 40])
def test_the_detectable_difference_has_its_power_and_needs_its_n(n, paired):
    found = power.minimum_detectable(0.5, n, power=0.9, paired=paired)
    assert power.of_t(found, 0.5, n, paired=paired) == pytest.approx(0.9, abs=1e-9)
    assert power.needed(found * (1 + 1e-6), 0.5, power=0.9, paired=paired) == n
    assert power.minimum_detectable(0.0, n) == 0.0


def test_mcnemar_by_counting_every_table():
    """The chance of all tables of 12 pairs whose mid-p test, two-sided, is at most 0.05."""
    n, discordant, difference = 12, 0.6, 0.5
    first, second = (discordant + difference) / 2, (discordant - difference) / 2
    chance = 0.0
    for b in range(n + 1):
        for c in range(n + 1 - b):
            made = tests.mcnemar(b, c, n)
            if 2 * min(made.p_above, made.p_below) <= 0.05:
                ways = math.comb(n, b) * math.comb(n - b, c)
                chance += ways * first**b * second**c * (1 - discordant) ** (n - b - c)
    assert power.of_mcnemar(difference, discordant, n) == pytest.approx(chance, rel=1e-9)


def test_mcnemar_detectable_and_needed():
    found = power.mcnemar_detectable(0.2, 400)
    assert power.of_mcnemar(found, 0.2, 400) == pytest.approx(0.8, abs=1e-6)
    # Connor 1987's approximation, for the size of it
    z = 1.959964 * math.sqrt(0.2) + 0.841621 * math.sqrt(0.2 - found**2)
    assert power.mcnemar_needed(found, 0.2) == pytest.approx((z / found) ** 2, rel=0.05)
    assert power.of_mcnemar(found, 0.2, power.mcnemar_needed(found, 0.2)) >= 0.8
    assert power.mcnemar_detectable(0.2, 5) == math.inf


def test_power_of_no_difference_is_the_level_at_most():
    assert power.of_t(0.0, 1.0, 7) == pytest.approx(0.05, abs=1e-9)
    assert 0.03 < power.of_mcnemar(0.0, 0.3, 500) < 0.06


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: power.minimum_detectable(0.1, 1), "at least 2"),
        (lambda: power.minimum_detectable(math.nan, 3), "nan: a spread"),
        (lambda: power.minimum_detectable(0.1, 3, power=1.0), "1: power lies"),
        (lambda: power.needed(0.0, 0.1), "difference of 0"),
        (lambda: power.needed(1e-6, 1.0), "more than 16 million"),
        (lambda: power.of_mcnemar(0.3, 0.2, 50), "0.3 of 0.2"),
        (lambda: power.of_t(0.3, 0.0, 50), "above 0"),
    ],
)
def test_refusals(call, says):
    with pytest.raises(Problem, match=says):
        call()


def test_t_power_by_simulation():
    differences = numpy.random.default_rng(0).normal(1.0, 1.0, (4000, 5))
    made = [tests.paired_t(one) for one in differences[:1500]]
    seen = numpy.mean([2 * min(one.p_above, one.p_below) <= 0.05 for one in made])
    assert power.of_t(1.0, 1.0, 5) == pytest.approx(seen, abs=0.03)
