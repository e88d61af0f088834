"""Laws are recovered, agree with scipy's fits, draw by draw, and look ahead."""

from __future__ import annotations

import math
import time

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from scipy import optimize, stats

from temper.parts import Problem
from temper.statistics import fits
from temper.statistics.bootstrap import interval

X = 1e5 * 2.0 ** numpy.arange(8)
OFFSET = [(30, -0.25, 1.7), (-2, -0.5, 0.9), (3e-4, 0.4, -1), (5, -0.02, 0.3), (2e-8, 1.0, 0.1), (-1e-12, 2.0, 3.0)]


@pytest.mark.parametrize("planted", OFFSET)
def test_a_planted_law_is_recovered_in_float64(planted):
    a, b, c = planted
    made = fits.fit("power-law-offset", X, a * X**b + c)
    assert list(made.parameters.values()) == pytest.approx(planted, rel=1e-10)
    assert made.predict(1e8) == pytest.approx(a * 1e8**b + c, rel=1e-10)
    assert (made.r2, abs(made.residual).max() < 1e-13) == (pytest.approx(1.0), True)


@pytest.mark.parametrize("law", ["power-law", "log-log-line"])
@pytest.mark.parametrize("planted", [(30, -0.25), (1e-20, 3.3), (0.5, 0.001)])
def test_a_planted_power_is_recovered(law, planted):
    made = fits.fit(law, X, planted[0] * X ** planted[1])
    assert [made.parameters[name] for name in "ab"] == pytest.approx(planted, rel=1e-10)
    assert fits.fit("power-law", X, -planted[0] * X ** planted[1]).parameters["a"] == pytest.approx(-planted[0], rel=1e-10)


def test_a_planted_logarithm_is_recovered_and_is_where_powers_go():
    y = 0.3 * numpy.log(X) - 2
    made = fits.fit("log-law", X, y)
    assert made.parameters == {"a": pytest.approx(0.3), "c": pytest.approx(-2)}
    power = fits.fit("power-law-offset", X, y)
    assert abs(power.parameters["b"]) < 1e-5
    assert power.predict(X) == pytest.approx(y, abs=1e-7)


def noisy(draws, spread=0.01):
    return 30 * X**-0.25 + 1.7 + numpy.random.default_rng(0).normal(0, spread, (draws, 8))


def test_noisy_fits_are_scipys():
    y = noisy(6)
    weights = numpy.linspace(1, 3, 8)
    curves = {
        "power-law-offset": (lambda x, a, b, c: a * x**b + c, (1, -0.3, 1.7)),
        "power-law": (lambda x, a, b: a * x**b, (3, -0.1)),
        "log-law": (lambda x, a, c: a * numpy.log(x) + c, (-1, 2)),
    }
    for law, (curve, start) in curves.items():
        made = fits.fit(law, X / 1e6, y, weights)
        for row in range(6):
            peer, _ = optimize.curve_fit(curve, X / 1e6, y[row], p0=start, sigma=weights**-0.5, xtol=1e-14, ftol=1e-14)
            assert [one[row] for one in made.parameters.values()] == pytest.approx(peer, rel=1e-5), law
            assert made.residual[row] == pytest.approx(y[row] - curve(X / 1e6, *peer), abs=1e-7)
    line = fits.fit("log-log-line", X, y[0])
    peer = stats.linregress(numpy.log(X), numpy.log(y[0]))
    assert (line.parameters["b"], math.log(line.parameters["a"])) == pytest.approx((peer.slope, peer.intercept))
    assert line.r2 == pytest.approx(peer.rvalue**2)


def test_draws_are_fitted_together_as_alone_and_fast():
    y = noisy(2000)
    start = time.process_time()
    made = fits.fit("power-law-offset", X, y)
    assert time.process_time() - start < 2
    for row in (0, 1, 999, 1999):
        alone = fits.fit("power-law-offset", X, y[row])
        assert {name: value[row] for name, value in made.parameters.items()} == pytest.approx(alone.parameters)
    assert made.predict(1e8).shape == (2000,)
    assert made.predict([1e7, 1e8]).shape == (2000, 2)
    low, high = interval(made.predict(1e9))
    assert low < 30 * 1e9**-0.25 + 1.7 < high


@given(some.integers(0, 10**6), some.sampled_from(list(fits.LAWS)))
@settings(max_examples=25, deadline=None)
def test_no_other_parameters_leave_less(seed, law):
    """Against scipy from the fit itself and from elsewhere: noise of any size never traps the search."""
    generator = numpy.random.default_rng(seed)
    x = numpy.sort(generator.uniform(0.1, 50, 6))
    y = generator.uniform(0.2, 3) * x ** generator.uniform(-2, 2) + generator.uniform(0, 1) + generator.normal(0, 0.05, 6) ** 2
    made = fits.fit(law, x, y)
    offset = "c" in made.law.parameters

    def left(values):
        a, b, c = values[0], values[1] if "b" in made.parameters else 0.0, values[-1] if offset else 0.0
        curve = a * (x**b if "b" in made.parameters else numpy.log(x)) + c
        return numpy.log(y) - numpy.log(numpy.maximum(curve, 1e-9)) if made.law.logs else y - curve

    best = (made.residual**2).sum()
    for _ in range(2):
        start = [generator.normal(0, 2), *([generator.uniform(-2, 2)] if "b" in made.parameters else []), *([0.5] if offset else [])]
        bounds = [(-fits.STEEPEST, fits.STEEPEST) if name == "b" else (-math.inf, math.inf) for name in made.law.parameters]
        other = optimize.least_squares(left, start, bounds=tuple(zip(*bounds)), max_nfev=300)
        assert best <= 2 * other.cost * (1 + 1e-6) + 1e-12


def test_draws_may_have_x_and_weights_of_their_own():
    y = noisy(2)
    both = fits.fit("power-law-offset", numpy.stack([X, 3 * X]), y, numpy.stack([numpy.ones(8), numpy.arange(8.0)]))
    assert both.parameters["c"][0] == pytest.approx(fits.fit("power-law-offset", X, y[0]).parameters["c"])
    assert both.parameters["c"][1] == pytest.approx(fits.fit("power-law-offset", 3 * X[1:], y[1, 1:], numpy.arange(1.0, 8)).parameters["c"])


def test_however_noisy_the_exponent_is_where_squares_are_least():
    """There residuals are at right angles to how the curve moves with b, and to the rest of it."""
    made = fits.fit("power-law-offset", X / 1e6, noisy(50, 0.3))
    inside = abs(made.parameters["b"]) < fits.STEEPEST
    assert inside.sum() > 10
    curves = (X / 1e6) ** made.parameters["b"][inside, None]
    for direction in (curves * numpy.log(X / 1e6), curves, numpy.ones_like(curves)):
        lengths = numpy.linalg.norm(direction, axis=1) * numpy.linalg.norm(made.residual[inside], axis=1)
        assert abs((made.residual[inside] * direction).sum(1) / lengths).max() < 1e-8


def test_the_units_of_x_do_not_matter():
    y = noisy(1)[0]
    one, other = fits.fit("power-law-offset", X, y), fits.fit("power-law-offset", X * 1e15, y)
    assert (one.parameters["b"], one.parameters["c"]) == pytest.approx((other.parameters["b"], other.parameters["c"]))


def test_a_bootstrap_covers_the_planted_law():
    covered, truth = numpy.zeros(3), (4.0, -0.5, 1.0)
    for trial in range(40):
        generator = numpy.random.default_rng(trial)
        runs = 4 * numpy.arange(1, 9.0) ** -0.5 + 1 + generator.normal(0, 0.05, (20, 8))
        draws = fits.fit("power-law-offset", numpy.arange(1, 9.0), runs[generator.integers(0, 20, (150, 20))].mean(1)).parameters
        covered += [low <= true <= high for true, (low, high) in zip(truth, map(interval, draws.values()))]
    assert (covered / 40 > 0.8).all()


def test_leave_last_out():
    y = 30 * X**-0.25 + 1.7
    order = numpy.random.default_rng(1).permutation(8)
    predicted, error = fits.leave_last_out("power-law-offset", X[order], y[order])
    assert (predicted, error) == (pytest.approx(y[-1]), pytest.approx(0, abs=1e-12))
    predicted, error = fits.leave_last_out("log-log-line", X, numpy.stack([y, 2 * y]))
    assert error[0] == pytest.approx(predicted[0] / y[-1] - 1)
    assert error[0] == pytest.approx(error[1]) != 0


def test_a_forecast_stops_early_and_near_the_end_of_the_curve():
    x = numpy.arange(1, 31) * 1000.0
    exact = fits.forecast(x, 0.95 - 3 * x**-0.4, 1e-3, lowest=0, highest=1)
    assert (exact.prediction_level, exact.stop) == (3, 4)
    assert exact.asymptotes == pytest.approx(numpy.full(28, 0.95))
    assert exact.fitted.predict(1e6) == pytest.approx(0.95 - 3 * 1e6**-0.4)
    y = 0.95 - 3 * x**-0.4 + numpy.random.default_rng(3).normal(0, 2e-4, 30)
    made = fits.forecast(x, y, 2e-3, lowest=0, highest=1)
    assert made.stop < 30
    assert made.fitted.parameters["c"] == pytest.approx(0.95, abs=0.03)
    closer = fits.forecast(x, y, 2e-4, lowest=0, highest=1)
    assert closer.stop > made.stop
    for level in (3, 10, 30):
        alone = fits.fit("power-law-offset", x[:level], y[:level]).parameters
        assert alone["b"] > 0 or made.asymptotes[level - 3] == pytest.approx(alone["c"], rel=1e-6)


def test_a_forecast_waits_for_asymptotes_that_can_be():
    x = numpy.arange(1, 9.0)
    straight = fits.forecast(x, 0.1 * x, 0.1)
    assert (straight.prediction_level, straight.stop) == (None, None)
    assert (straight.asymptotes == math.inf).all()
    many = numpy.arange(1, 16.0)
    bent = 0.9 - 0.5 * many**-0.5 + 0.1 * (many == 4)
    setback = fits.forecast(many, bent, 0.01, lowest=0, highest=1)  # level 3 had an asymptote that can be, level 4 has none
    assert numpy.isfinite(setback.asymptotes[:2]).tolist() == [True, False]
    assert 4 < setback.prediction_level < setback.stop < 15
    late = fits.forecast(x, numpy.where(x < 4, 0.1 * x, 0.6 - 0.8 * x**-0.7), 0.5, lowest=0, highest=1)
    assert late.prediction_level > 3
    assert late.stop > late.prediction_level


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: fits.fit("power", X, X), "no law `power`; did you mean `power-law`"),
        (lambda: fits.fit("power-law-offset", [1, 1, 2, 2], [1, 1, 2, 2]), "2 different x: .* has 3 parameters"),
        (lambda: fits.fit("power-law", [1, 2, 3], [1, 2, 3], [1, 0, 0]), "1 different x"),
        (lambda: fits.fit("power-law", [0, 2, 3], [1, 2, 3]), "needs x above 0"),
        (lambda: fits.fit("log-log-line", [1, 2, 3], [-1, 2, 3]), "needs x and y above 0"),
        (lambda: fits.fit("power-law", [1, 2, 3], [1, math.nan, 3]), "1 of 3 y are no finite"),
        (lambda: fits.fit("power-law", [1, 2, 3], [1, 2]), "3 x and 2 y"),
        (lambda: fits.fit("power-law", [1, 2, 3], [1, 2, 3], [1, 1, -1]), "a weight of -1"),
        (lambda: fits.forecast([1, 3, 2], [1, 2, 3], 0.1), "each x greater"),
    ],
)
def test_refusals(call, says):
    with pytest.raises(Problem, match=says):
        call()
