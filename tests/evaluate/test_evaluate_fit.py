"""Laws through the figures of models whose figures are known."""

from __future__ import annotations

import dataclasses
import json

import numpy
import pytest
from bigrams import Given, bigram, drawn_table, saved, texts
from scipy.optimize import curve_fit

from temper.context import Context
from temper.evaluate.engine import Evaluate, run
from temper.evaluate.fit import Fitting, Law, LearningCurve, each
from temper.evaluate.records import Sums, ratio
from temper.parts import Problem, build
from temper.passport import Figure, Inputs
from temper.statistics import fits

SIZES = numpy.array([1e3, 3e3, 1e4, 3e4, 1e5, 1e6])
UNITS = numpy.arange(60)


def model(name, x, values, units=UNITS, tokens=10.0):
    """A model whose figure `nats` is the mean over units of `values` [C]."""
    sums = numpy.stack([values * tokens, numpy.full(len(values), tokens)], axis=1)
    return Fitting(name, {"parameters": float(x)}, {"nats": Sums(units, sums, ratio, "nats", "lower")})


def models(means, difficulty=1.0, noise=0.0, seed=0):
    """The sizes' models, whose units are as difficult for all of them, but for noise."""
    rng = numpy.random.default_rng(seed)
    return [
        model(f"m{index}", x, y * difficulty * numpy.ones(len(UNITS)) + noise * rng.normal(size=len(UNITS)))
        for index, (x, y) in enumerate(zip(SIZES, means))
    ]


def laws(tmp_path, part, given, seed=0):
    return part.start(Context.scratch(tmp_path, seed=seed).at("fit"))(given)


def test_planted_parameters_come_back(tmp_path):
    for form, means, wanted in [
        ("power-law", 9.0 * SIZES**-0.12, {"factor": 9.0, "exponent": -0.12}),
        ("log-log-line", 9.0 * SIZES**-0.12, {"factor": 9.0, "exponent": -0.12}),
        ("power-law-offset", 9.0 * SIZES**-0.3 + 1.5, {"factor": 9.0, "exponent": -0.3, "offset": 1.5}),
        ("log-law", 5.0 - 0.2 * numpy.log(SIZES), {"factor": -0.2, "offset": 5.0}),
    ]:
        found = laws(tmp_path, Law(form=form, y="nats"), models(means)).figures
        assert set(found) == {f"law.{name}" for name in (*wanted, "r2")}
        for name, value in wanted.items():
            one = found[f"law.{name}"]
            assert (one.value, one.low, one.high) == pytest.approx((value,) * 3, rel=1e-5)
        assert found["law.r2"].value == pytest.approx(1)
        assert found["law.exponent" if "law.exponent" in found else "law.factor"].n == 6


def test_agrees_with_scipy_on_points_beside_the_law(tmp_path):
    means = (9.0 * SIZES**-0.3 + 1.5) * numpy.array([1.02, 0.99, 1.01, 0.97, 1.01, 1.0])
    found = laws(tmp_path, Law(form="power-law-offset", y="nats", predict=1e7), models(means)).figures
    theirs, _ = curve_fit(lambda x, a, b, c: a * x**b + c, SIZES, means, p0=(9, -0.3, 1.5), maxfev=20_000)
    mine = [found[f"law.{name}"].value for name in ("factor", "exponent", "offset")]
    assert mine == pytest.approx(list(theirs), rel=1e-4)
    assert found["law.predicted"].value == pytest.approx(theirs[0] * 1e7 ** theirs[1] + theirs[2], rel=1e-5)
    assert found["law.predicted"].unit == "nats"


def test_units_are_drawn_together(tmp_path):
    """What makes a unit difficult for all models alike moves the law's factor in each resample, and its exponent in none."""
    difficulty = numpy.random.default_rng(1).gamma(4, 0.25, len(UNITS))
    found = laws(tmp_path, Law(y="nats"), models(9.0 * SIZES**-0.12, difficulty)).figures
    exponent, factor = found["law.exponent"], found["law.factor"]
    assert (exponent.low, exponent.high) == pytest.approx((-0.12, -0.12), abs=1e-7)
    error = 9.0 * difficulty.std() / len(UNITS) ** 0.5
    assert (factor.low, factor.high) == pytest.approx((factor.value - 1.96 * error, factor.value + 1.96 * error), abs=0.5 * error)


def test_the_interval_covers_a_planted_exponent(tmp_path):
    covered = 0
    for seed in range(20):
        one = laws(tmp_path, Law(y="nats", samples=300), models(9.0 * SIZES**-0.12, noise=0.3, seed=seed), seed).figures["law.exponent"]
        covered += one.low <= -0.12 <= one.high
        assert one.high - one.low > 1e-4
    assert covered >= 16  # of 20 at 95 %: fewer in 0.3 % of cases


def test_the_largest_model_is_foretold_from_the_others(tmp_path):
    given = models(9.0 * SIZES**-0.3 + 1.5, noise=0.02)
    for form in ("power-law-offset", "log-log-line"):
        made = laws(tmp_path, Law(form=form, y="nats", predict="last"), list(reversed(given)))
        means = numpy.array([one.sums["nats"].value for one in given])
        predicted, error = fits.leave_last_out(form, SIZES, means)
        assert made.figures["law.predicted"].value == pytest.approx(predicted)
        assert made.figures["law.error"].value == pytest.approx(error)
        assert made.figures["law.error"].low < error < made.figures["law.error"].high
        assert made.figures["law.exponent"].n == 5
        (table,) = made.tables
        assert table["held_out"]["y"] == pytest.approx(means[-1])
        assert [one["arm"] for one in table["points"]] == [f"m{index}" for index in range(6)]
        assert (table["line"][0]["x"], table["line"][-1]["x"]) == pytest.approx((1e3, 1e6))
        assert json.loads(json.dumps(table, allow_nan=False)) == table
    straight = abs(laws(tmp_path, Law(form="log-log-line", y="nats", predict="last"), given).figures["law.error"].value)
    bent = abs(laws(tmp_path, Law(form="power-law-offset", y="nats", predict="last"), given).figures["law.error"].value)
    assert bent < straight, "the figures level off, and only one of the laws can"


def test_a_unit_that_one_model_lacks_counts_for_the_others(tmp_path):
    given = models(9.0 * SIZES**-0.12)
    given[2] = model("m2", SIZES[2], numpy.full(40, 9.0 * SIZES[2] ** -0.12), UNITS[20:])
    found = laws(tmp_path, Law(y="nats"), given).figures["law.exponent"]
    assert (found.value, found.low, found.high) == pytest.approx((-0.12, -0.12, -0.12), abs=1e-6)


def test_one_unit_gives_no_interval(tmp_path):
    given = [model(f"m{x}", x, numpy.array([9.0 * x**-0.12]), UNITS[:1]) for x in (10, 100, 1000)]
    made = laws(tmp_path, Law(y="nats"), given)
    assert (made.figures["law.exponent"].low, made.tables[0]["points"][0]["low"]) == (None, None)


def test_draws_depend_on_the_seed(tmp_path):
    given = models(9.0 * SIZES**-0.12, noise=0.3)
    one, again, other = (laws(tmp_path, Law(y="nats"), given, seed).figures["law.exponent"] for seed in (0, 0, 1))
    assert one == again
    assert (one.low, one.value) != (other.low, other.value)
    assert one.value == other.value


def test_a_learning_curve_is_foretold_from_its_beginning(tmp_path):
    means = 0.9 - 2.0 * SIZES**-0.5
    made = laws(tmp_path, LearningCurve(x="parameters", y="nats", threshold=1e-3, predict="last"), models(means))
    found = made.figures
    for name, value in {"asymptote": 0.9, "exponent": -0.5, "factor": -2.0, "predicted": means[-1], "error": 0.0}.items():
        assert found[f"curve.{name}"].value == pytest.approx(value, abs=1e-5)
    assert found["curve.enough"].value == SIZES[3]  # the first three points give one asymptote, and a fourth the next
    assert found["curve.asymptote"].n == 4
    assert "curve.offset" not in found


def test_a_curve_that_does_not_level_off_has_no_end(tmp_path):
    made = laws(tmp_path, LearningCurve(x="parameters", y="nats"), models(0.1 + 1e-5 * SIZES**0.7)).figures
    assert not {"curve.asymptote", "curve.enough"} & set(made)
    assert made["curve.exponent"].value == pytest.approx(0.7, abs=1e-4)


def test_several_fits_have_names_of_their_own(tmp_path):
    given, context = models(9.0 * SIZES**-0.12), Context.scratch(tmp_path).at("fit")
    both = each([Law(y="nats").start(context), Law(y="nats", form="log-log-line", name="line").start(context)])(given)
    assert {name.partition(".")[0] for name in both.figures} == {"law", "line"}
    assert [one["name"] for one in both.tables] == ["law", "line"]
    with pytest.raises(Problem, match="two fits give the figure `law"):
        each([Law(y="nats").start(context)] * 2)(given)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"x": "parameter", "y": "nats"}, "`parameter` of m0 is not known; did you mean `parameters`?"),
        ({"y": "nat"}, "m0 has no figure `nat`; did you mean `nats`?"),
    ],
)
def test_what_is_not_known_is_named(tmp_path, settings, message):
    with pytest.raises(Problem) as caught:
        laws(tmp_path, Law(**settings), models(SIZES))
    assert caught.value.text == message


def test_too_few_models(tmp_path):
    with pytest.raises(Problem, match="has 2 parameters"):
        laws(tmp_path, Law(y="nats"), models(SIZES)[:1])
    twins = [model("a", 10.0, numpy.ones(3), UNITS[:3]), *(model(name, 20.0, numpy.ones(3), UNITS[:3]) for name in "bc")]
    with pytest.raises(Problem, match="no one model has the greatest x of 3"):
        laws(tmp_path, Law(y="nats", predict="last"), twins)
    with pytest.raises(Problem, match="`lowest` is 2 and `highest` 1"):
        build(LearningCurve, {"lowest": 2.0})


def test_a_law_through_the_models_of_an_evaluation(tmp_path):
    """The figures and what is known of the steps that made the models, as the engine hands them over."""
    tokens = [100.0, 200.0, 400.0, 800.0]
    models_ = [
        dataclasses.replace(saved(tmp_path / name, bigram(drawn_table(seed)), name=name), figures={"tokens": Figure(count)})
        for seed, (name, count) in enumerate(zip("abcd", tokens))
    ]
    context = Context.scratch(tmp_path)
    made = run(Evaluate(fit=Law(x="tokens", predict="last")), Inputs(model=models_, data=Given("text", texts(30))), context).figures
    means = [made[f"{name}.nats_per_token"].value for name in "abcd"]
    assert made["law.exponent"].value == pytest.approx(fits.fit("power-law", tokens[:3], means[:3]).parameters["b"])
    assert made["law.predicted"].value == pytest.approx(fits.leave_last_out("power-law", tokens, means)[0])
    (table,) = json.loads((context.out / "laws.json").read_text())
    assert [one["y"] for one in table["points"]] == pytest.approx(means)
    assert made["a.nats_per_token"].low == pytest.approx(table["points"][0]["low"], rel=0.02)  # two bootstraps of one thing
