"""Intervals against scipy, closed forms and what clusters must do to them."""

from __future__ import annotations

import numpy
import pytest
from scipy import stats

from temper.context import Context
from temper.evaluate.engine import figure, units
from temper.evaluate.records import Estimate, calibration_error, mean, ratio, summed
from temper.evaluate.resample import Bootstrap
from temper.parts import Problem, build


def started(tmp_path, seed=0, **settings):
    return Bootstrap(**settings).start(Context.scratch(tmp_path, seed=seed).at("resample"))


def data(units_=80, seed=0):
    rng = numpy.random.default_rng(seed)
    tokens = rng.integers(5, 60, units_)
    return numpy.stack([rng.gamma(2.0, 1.5, units_) * tokens, tokens], axis=1)


def test_agrees_with_scipy_on_a_ratio(tmp_path):
    sums = data()
    low, high = started(tmp_path, samples=20_000)(sums, ratio)
    theirs = stats.bootstrap(
        (sums[:, 0], sums[:, 1]),
        lambda a, b, axis: a.sum(axis) / b.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=20_000,
        method="percentile",
        rng=numpy.random.default_rng(1),
    )
    # a 2.5 % quantile of 20,000 draws has a standard error of 0.019 standard deviations, the difference of two 0.027
    within = 0.14 * theirs.standard_error
    assert (low, high) == pytest.approx(tuple(theirs.confidence_interval), abs=within)


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_mean_of_zeros_and_ones_has_binomial_quantiles(tmp_path, level):
    # the resampled mean of k ones among n is Binomial(n, k / n) / n exactly
    sums = numpy.stack([numpy.arange(200) < 60, numpy.ones(200)], axis=1).astype(float)
    low, high = started(tmp_path, samples=20_000, level=level)(sums, ratio)
    ends = stats.binom.ppf([(1 - level) / 2, (1 + level) / 2], 200, 0.3) / 200
    assert (low, high) == pytest.approx(tuple(ends), abs=0.0051)  # one step of the grid


def test_many_units_in_blocks(tmp_path):
    rng = numpy.random.default_rng(0)
    sums = numpy.stack([rng.normal(size=60_000), numpy.ones(60_000)], axis=1)  # 69 resamples a block
    low, high = started(tmp_path, samples=300)(sums, ratio)
    error = sums[:, 0].std() / numpy.sqrt(60_000)
    assert (low, high) == pytest.approx((sums[:, 0].mean() - 1.96 * error, sums[:, 0].mean() + 1.96 * error), abs=0.5 * error)


def test_draws_depend_on_seed_and_on_nothing_else(tmp_path):
    one, again, other = (started(tmp_path, seed=seed) for seed in (0, 0, 1))
    first = one(data(), ratio)
    assert one(data(), ratio) == first  # not on what was drawn before
    assert again(data(), ratio) == first
    assert other(data(), ratio) != first


def test_two_models_are_drawn_on_the_same_units(tmp_path):
    """The difference of a model and itself plus a constant has no width, because both see the same resample."""
    bootstrap, sums = started(tmp_path), data()
    shifted = sums + sums[:, 1:] * [0.25, 0]
    (low, high), (low_two, high_two) = bootstrap(sums, ratio), bootstrap(shifted, ratio)
    assert (low_two - low, high_two - high) == pytest.approx((0.25, 0.25))
    paired = bootstrap(numpy.concatenate([sums, shifted], 1), lambda t: ratio(t[..., 2:]) - ratio(t[..., :2]))
    assert paired == pytest.approx((0.25, 0.25))


def test_one_unit_tells_nothing(tmp_path):
    assert started(tmp_path)(data(1), ratio) is None
    estimate = mean("accuracy", numpy.array([1.0, 0.0]), "share", "higher")
    made = figure(summed(estimate, numpy.array([0, 0])), started(tmp_path))
    assert (made.value, made.low, made.high, made.n) == (0.5, None, None, 1)


def test_without_resampling_there_is_no_interval():
    made = figure(summed(mean("accuracy", numpy.array([1.0, 0.0]), "share", "higher"), numpy.arange(2)), None)
    assert (made.value, made.low, made.high, made.n) == (0.5, None, None, 2)


def test_resamples_in_which_there_is_no_figure_do_not_count(tmp_path):
    """A share among two of forty units: one resample in seven holds neither of them."""
    sums = numpy.zeros((40, 2))
    sums[0], sums[1] = (1, 1), (0, 1)
    assert started(tmp_path)(sums, ratio) == (0, 1)
    assert started(tmp_path)(numpy.zeros((40, 2)), ratio) is None


def test_a_clusters_copies_count_once(tmp_path):
    """Nine copies of each example, one cluster each, are as sure as the example alone; taken for independent, three times as sure."""
    sums, bootstrap = data(), started(tmp_path)
    single = figure(summed(Estimate("f", sums, ratio, "", "lower"), numpy.arange(80)), bootstrap)
    copies = Estimate("f", numpy.repeat(sums, 9, 0), ratio, "", "lower")
    clustered = figure(summed(copies, numpy.repeat(numpy.arange(80), 9)), bootstrap)
    assert (clustered.low, clustered.high, clustered.n) == (pytest.approx(single.low), pytest.approx(single.high), 80)
    apart = figure(summed(copies, numpy.arange(720)), bootstrap)
    assert (apart.high - apart.low) * 3 == pytest.approx(single.high - single.low, rel=0.15)


def test_calibration_error_lies_inside_its_interval_also_near_zero(tmp_path):
    """Resamples with absolute values of their own would all lie above the error of a calibrated model."""
    rng = numpy.random.default_rng(3)
    confidence = rng.uniform(0.2, 1, 300)
    made = {"confidence": confidence, "correct": rng.random(300) < confidence}
    found = figure(summed(calibration_error("ece", made, 10), numpy.arange(300)), started(tmp_path))
    assert 0 <= found.low < found.value < found.high
    below = (found.value - found.low) / (found.high - found.low)
    assert 0.3 < below < 0.7


def test_rows_of_a_module_or_group_are_one_unit():
    rows = [{"module": "a"}, {"module": "b"}, {"module": "a", "group": 1}, {"module": "b", "group": 1}, {}, {}, {"module": None}]
    assert units(rows).tolist() == [0, 1, 2, 2, 3, 4, 5]


def test_bad_settings_are_refused():
    with pytest.raises(Problem, match="must be at most 1"):
        build(Bootstrap, {"level": 95.0})
    with pytest.raises(Problem, match="must be above 0"):
        build(Bootstrap, {"samples": 0})
