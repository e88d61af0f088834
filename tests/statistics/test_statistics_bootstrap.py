"""The multi-bootstrap: one seed is scipy's bootstrap, two factors are drawn together, intervals cover what they should."""

from __future__ import annotations

import numpy
import pytest
from scipy import stats

from temper.parts import Problem
from temper.statistics.bootstrap import Arm, interval, multi_bootstrap, p_above, p_below


def mean(totals):
    return totals[..., 0] / totals[..., 1]


def scores(values):
    """[S, C] scores -> sums of scores and of ones."""
    return numpy.stack([values, numpy.ones_like(values)], -1)


def rng(seed=0):
    return numpy.random.default_rng(seed)


def test_one_seed_is_scipys_bootstrap_draw_by_draw():
    values = rng().normal(size=(1, 37))
    draws = multi_bootstrap([Arm(scores(values), mean)], samples=500, seed=4)
    peer = stats.bootstrap((values[0],), numpy.mean, n_resamples=500, method="percentile", rng=rng((4, 1, 0)))
    assert numpy.allclose(draws.values[:, 0], peer.bootstrap_distribution, rtol=1e-12)
    assert numpy.allclose(interval(draws.values[:, 0], 0.95), peer.confidence_interval, rtol=1e-12)
    assert draws.point == pytest.approx(values.mean())


def test_one_unit_resamples_seeds_alone():
    values = rng().normal(size=(6, 1, 1))
    draws = multi_bootstrap([Arm(values, lambda totals: totals[..., 0])], samples=4000)
    assert draws.values.std() == pytest.approx(values.std() / 6**0.5, rel=0.04)
    assert not multi_bootstrap([Arm(values[:1], lambda totals: totals[..., 0])], samples=9).values.std()


def test_equals_the_definition_with_loops():
    """Resampled seeds, each scored on the same resampled units, then their mean: a ratio of sums is no mean of ratios."""
    one, two = rng(1).random((2, 3, 5, 2)) + 0.5
    draws = multi_bootstrap([Arm(one, mean), Arm(two, mean)], samples=20, seed=7)
    seeds, units = rng((7, 0, 0)).integers(0, 3, (20, 3)), rng((7, 1, 0)).integers(0, 5, (20, 5))
    for row, (at, of) in enumerate(zip(seeds, units, strict=True)):
        for column, sums in enumerate((one, two)):
            expected = numpy.mean([sums[s, of, 0].sum() / sums[s, of, 1].sum() for s in at])
            assert draws.values[row, column] == pytest.approx(expected, rel=1e-12)


def test_pairing_is_whose_draws_are_shared():
    values = scores(rng().normal(size=(4, 30)))
    arms = [Arm(values, mean), Arm(values, mean)]
    assert (numpy.diff(multi_bootstrap(arms, samples=50).values) == 0).all()
    both = multi_bootstrap(arms, samples=4000, seeds="unpaired", units="unpaired").values
    assert abs(numpy.corrcoef(both.T)[0, 1]) < 0.05
    half = multi_bootstrap(arms, samples=4000, seeds="unpaired").values
    assert 0.1 < numpy.corrcoef(half.T)[0, 1] < 0.9
    named = [Arm(values, mean, "one"), Arm(values[:, :20], mean, "two"), Arm(values, mean, "one")]
    apart = multi_bootstrap(named, samples=50).values
    assert (apart[:, 0] == apart[:, 2]).all()
    assert (apart[:, 0] != apart[:, 1]).any()


def test_draws_follow_from_the_seed_and_not_from_the_pieces():
    arm = [Arm(scores(rng().normal(size=(3, 3000))), mean)]
    whole = multi_bootstrap(arm, samples=1500).values  # two pieces
    assert (multi_bootstrap(arm, samples=1500).values == whole).all()
    assert numpy.allclose(multi_bootstrap(arm, samples=40).values, whole[:40], rtol=1e-13)
    assert (multi_bootstrap(arm, samples=40, seed=1).values != whole[:40]).all()


def test_a_seed_that_was_not_drawn_does_not_count():
    """Of two seeds, one has no value: draws of the other alone still have theirs."""
    with numpy.errstate(invalid="ignore"):
        draws = multi_bootstrap([Arm(numpy.array([[[2.0, 4.0]], [[0.0, 0.0]]]), mean)], samples=64)
    known = draws.values[~numpy.isnan(draws.values)]
    assert len(known)
    assert (known == 0.5).all()
    with pytest.raises(Problem, match="no finite numbers"):
        interval(draws.values[:, 0])


@pytest.mark.parametrize(("seeds", "expected"), [(30, 0.95), (3, 0.78)])
def test_coverage_of_a_two_way_model(seeds, expected):
    """Figures with effects of seed, of unit and of both: 95% intervals cover that often at many seeds, too seldom at few."""
    covered, trials = 0, 300
    for trial in range(trials):
        generator = rng(1000 + trial)
        values = generator.normal(size=(seeds, 1)) + generator.normal(size=(1, 60)) + generator.normal(size=(seeds, 60))
        low, high = interval(multi_bootstrap([Arm(scores(values), mean)], samples=300, seed=trial).values[:, 0])
        covered += low <= 0 <= high
    assert covered / trials == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("seeds", [2, 5])
def test_the_spread_of_few_seeds_is_too_small_by_the_factor_documented(seeds):
    values = rng(3).normal(size=(seeds, 1, 1))
    draws = multi_bootstrap([Arm(values, lambda totals: totals[..., 0])], samples=40000)
    assert draws.values.var() / (values.var(ddof=1) / seeds) == pytest.approx((seeds - 1) / seeds, rel=0.03)
    assert len(numpy.unique(draws.values.round(12))) == 3 or seeds > 2


def test_p_values_count_draws_and_are_never_0():
    values = numpy.array([0.0, 1.0, 2.0, 3.0])
    assert p_above(values, 1.0) == 3 / 5
    assert p_below(values, 1.0) == 4 / 5
    assert p_above(values, -1.0) == 1 / 5
    assert interval(numpy.stack([values, values + 1], 1), 0.5)[0].tolist() == [0.75, 1.75]


@pytest.mark.parametrize(
    ("arms", "settings", "says"),
    [
        ([], {}, "at least one"),
        ([(2, 3), (3, 3)], {}, "paired seeds: arms have 2 and 3"),
        ([(2, 3), (2, 4)], {}, "paired units: arms have 3 and 4"),
        ([(2, 0)], {}, "sums of shape"),
        ([(2, 3)], {"seeds": "both"}, '"paired" or "unpaired"'),
        ([(2, 3)], {"samples": 0}, "0 samples"),
    ],
)
def test_refusals(arms, settings, says):
    with pytest.raises(Problem, match=says):
        multi_bootstrap([Arm(numpy.ones((*shape, 2)), mean) for shape in arms], **settings)


def test_refuses_what_is_no_number():
    with pytest.raises(Problem, match="1 of 12 sums are no finite numbers"):
        multi_bootstrap([Arm(numpy.where(numpy.arange(12) == 5, numpy.nan, 1.0).reshape(2, 3, 2), mean)])
    with pytest.raises(Problem, match="draws"):
        p_above([1.0, numpy.nan], 0.0)
    with pytest.raises(Problem, match="between 0 and 1"):
        interval([1.0, 2.0], 95)
