"""What law the figures of several models follow: the slot `Fit`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from pydantic import Field

from temper.lazy import numpy
from temper.parts import Count, Problem, Rate, Share, nearest, part, slot
from temper.passport import Figure
from temper.statistics import bootstrap, fits

if TYPE_CHECKING:
    from temper.context import Context
    from temper.evaluate.records import Sums
    from temper.statistics.fits import Fitted


@dataclasses.dataclass(frozen=True, eq=False)
class Fitting:
    """One model. knows: `parameters`, and the figures of the step that made it. sums: its figures as sums over units of data."""

    name: str
    knows: Mapping[str, float]
    sums: Mapping[str, Sums]


@dataclasses.dataclass(frozen=True, eq=False)
class Laws:
    """figures: name -> figure. tables: a fit each, `name`, `law`, `x`, `y`, `points`, `line`, `parameters`, `held_out`, as JSON."""

    figures: dict[str, Figure]
    tables: list[dict[str, Any]]


def each(several: Sequence[Callable[[Sequence[Fitting]], Laws]]) -> Callable[[Sequence[Fitting]], Laws]:
    """How a list of fits acts as one: each for itself."""

    def laws(models: Sequence[Fitting]) -> Laws:
        made = Laws({}, [])
        for found in (one(models) for one in several):
            for name in found.figures.keys() & made.figures.keys():
                raise Problem(f"two fits give the figure `{name}`; give each a `name` of its own", ("fit",))
            made.figures.update(found.figures)
            made.tables.extend(found.tables)
        return made

    return laws


@slot(combine=each, phased=False)
class Fit(Protocol):
    """What law do the models' figures follow?

    `(models) -> Laws`. Intervals are over resampled units of data, the same for all models; they say nothing of other seeds.
    """

    def __call__(self, models: Sequence[Fitting]) -> Laws: ...


Name = Annotated[str, Field(min_length=1)]


@part
class Law:
    """A law through a point for each model.  Kaplan et al. 2020, section 3; with offset Henighan et al. 2020; foretelling OpenAI 2023,
    "GPT-4 Technical Report", section 3

    Formula: `power-law` y = a x^b; `power-law-offset` y = a x^b + c; `log-law` y = a ln x + c; least squares of y. `log-log-line`: least
    squares of ln y = ln a + b ln x.
    Figures: `law.factor` a, `law.exponent` b, `law.offset` c, `law.r2`; where a value is foretold, `law.predicted`; where it is known,
    `law.error` = predicted / measured - 1.
    """

    form: Literal["power-law", "power-law-offset", "log-law", "log-log-line"] = "power-law"
    """Which law."""
    x: str = "parameters"
    """`parameters` of the model, or a figure of the step that made it, such as `tokens`."""
    y: str = "nats_per_token"
    """One of the figures measured."""
    predict: Rate | Literal["last"] | None = None
    """The x at which a value is foretold. `last`: the model of the greatest x is left out of the fit, and foretold."""
    samples: Count = 1000
    """Resamples drawn."""
    level: Share = 0.95
    """Share of resamples inside an interval."""
    name: Name = "law"
    """Begins the names of the figures."""

    def start(self, context: Context) -> Callable[[Sequence[Fitting]], Laws]:
        seed = context.stream().seed()

        def laws(models: Sequence[Fitting]) -> Laws:
            points = _points(models, self.x, self.y, self.samples, seed)
            shown, last = points.split(self.predict)
            fitted = fits.fit(self.form, shown.x, shown.y)
            drawn = fits.fit(self.form, shown.x, shown.draws) if shown.draws is not None else None
            found = _parameters(fitted, drawn, shown, self.level)
            return _laws(self, self.form, found, fitted, drawn, points, last)

        return laws


@part
class LearningCurve:
    """Where a learning curve ends, foretold from its beginnings, and when these suffice.  Vilares Ferro et al. 2017, "Modeling of learning
    curves with applications to POS tagging"

    Formula: y = a x^b + c through the first l points, l = 3, 4, ...; c is where it ends, if b < 0. Enough is the first l with
    |c_l - c_(l-1)| < threshold, both between `lowest` and `highest`; the curve is then the one through these l points.
    The paper's anchors, which hold the first curves down, are not built: forecasts outside the bounds wait instead.
    Figures: `curve.asymptote` c, `curve.exponent` b, `curve.factor` a, `curve.r2`; `curve.enough`, the x that suffices, where one does;
    `curve.predicted` and `curve.error` as those of a law.
    """

    x: str = "tokens"
    """`parameters` of the model, or a figure of the step that made it, such as `tokens`."""
    y: str = "accuracy"
    """One of the figures measured."""
    threshold: Rate = 0.01
    """How far apart two forecasts in a row may be, in the units of y."""
    lowest: float = 0.0
    """The least that y can be."""
    highest: float = 1.0
    """The most that y can be."""
    predict: Rate | Literal["last"] | None = None
    """The x at which a value is foretold. `last`: the model of the greatest x is left out, and foretold."""
    samples: Count = 1000
    """Resamples drawn."""
    level: Share = 0.95
    """Share of resamples inside an interval."""
    name: Name = "curve"
    """Begins the names of the figures."""

    def __post_init__(self) -> None:
        if not self.lowest < self.highest:
            raise Problem(f"`lowest` is {self.lowest:g} and `highest` {self.highest:g}; the first must be below the second")

    def start(self, context: Context) -> Callable[[Sequence[Fitting]], Laws]:
        seed = context.stream().seed()

        def laws(models: Sequence[Fitting]) -> Laws:
            points = _points(models, self.x, self.y, self.samples, seed)
            shown, last = points.split(self.predict)
            found = fits.forecast(shown.x, shown.y, self.threshold, lowest=self.lowest, highest=self.highest)
            enough = shown.first(found.stop)
            drawn = fits.fit("power-law-offset", enough.x, enough.draws) if enough.draws is not None else None
            parameters = _parameters(found.fitted, drawn, enough, self.level)
            ends = parameters.pop("offset")
            if found.fitted.parameters["b"] < 0:
                flat = drawn is not None and bool((drawn.parameters["b"] < 0).all())
                parameters["asymptote"] = ends if flat else dataclasses.replace(ends, low=None, high=None)
            if found.stop is not None:
                parameters["enough"] = Figure(float(enough.x[-1]), n=len(enough.x))
            return _laws(self, "power-law-offset", parameters, found.fitted, drawn, points, last)

        return laws


@dataclasses.dataclass(frozen=True, eq=False)
class _Points:
    """N models in the order of x. x, y: [N]. draws: y over resampled units [B, N]; None where one unit is all there is."""

    names: list[str]
    x: numpy.ndarray
    y: numpy.ndarray
    draws: numpy.ndarray | None
    unit: str

    def first(self, count: int | None) -> _Points:
        draws = self.draws[:, :count] if self.draws is not None else None
        return _Points(self.names[:count], self.x[:count], self.y[:count], draws, self.unit)

    def split(self, predict: Any) -> tuple[_Points, tuple[float, float | None] | None]:
        """The points to fit to, and the place to foretell: its x, and its y where that is known."""
        if predict == "last":
            if len(self.x) < 2 or self.x[-1] == self.x[-2]:
                raise Problem(
                    f"no one model has the greatest x of {len(self.x)}; give `predict` a number, or other models", ("fit", "predict")
                )
            return self.first(-1), (float(self.x[-1]), float(self.y[-1]))
        return self, None if predict is None else (float(predict), None)


def _points(models: Sequence[Fitting], x: str, y: str, samples: int, seed: int) -> _Points:
    """The figure `y` of each model against its `x`, on the same resampled units for all."""
    for one in models:
        if x not in one.knows:
            raise Problem(f"`{x}` of {one.name} is not known{nearest(x, one.knows)}", ("fit", "x"))
        if y not in one.sums:
            raise Problem(f"{one.name} has no figure `{y}`{nearest(y, one.sums)}", ("fit", "y"))
    models = sorted(models, key=lambda one: one.knows[x])
    sums = [one.sums[y] for one in models]
    units = numpy.unique(numpy.concatenate([one.units for one in sums]))
    arms = []
    for one in sums:
        whole = numpy.zeros((1, len(units), one.sums.shape[1]))  # a unit that a model has no record of adds nothing
        whole[0, numpy.searchsorted(units, one.units)] = one.sums
        arms.append(bootstrap.Arm(whole, one.statistic))
    drawn = bootstrap.multi_bootstrap(arms, samples=samples, seed=seed)
    xs = numpy.array([float(one.knows[x]) for one in models])
    return _Points([one.name for one in models], xs, drawn.point, drawn.values if len(units) > 1 else None, sums[0].unit)


def _parameters(fitted: Fitted, drawn: Fitted | None, points: _Points, level: float) -> dict[str, Figure]:
    """Name -> figure of a law's parameters."""
    words = {"a": "factor", "b": "exponent", "c": "offset"}
    made = {}
    for name, value in {**fitted.parameters, "r2": fitted.r2}.items():
        draws = None if drawn is None else drawn.r2 if name == "r2" else drawn.parameters[name]
        made[words.get(name, name)] = _figure(float(value), draws, level, len(points.x))
    return made


def _laws(
    settings: Law | LearningCurve,
    form: str,
    parameters: dict[str, Figure],
    fitted: Fitted,
    drawn: Fitted | None,
    points: _Points,
    last: tuple[float, float | None] | None,
) -> Laws:
    """Figures and table of one fit."""
    level, count = settings.level, len(fitted.residual)

    def at(x: float) -> Figure:
        return _figure(float(fitted.predict(x)), drawn.predict(x) if drawn is not None else None, level, count, points.unit)

    figures = dict(parameters)
    if last is not None:
        where, measured = last
        figures["predicted"] = at(where)
        if measured is not None:
            truth = points.draws[:, -1] if points.draws is not None else None
            errors = drawn.predict(where) / truth - 1 if drawn is not None and truth is not None else None
            figures["error"] = _figure(figures["predicted"].value / measured - 1, errors, level, count, "share")
    places = numpy.geomspace(points.x[0], max(points.x[-1], last[0] if last else 0), 50)
    shown = [_figure(float(y), None if points.draws is None else points.draws[:, index], level, count) for index, y in enumerate(points.y)]
    table = {
        "name": settings.name,
        "law": form,
        "x": settings.x,
        "y": settings.y,
        "points": [{**_place(x, one), "arm": name} for x, one, name in zip(points.x, shown, points.names)],
        "line": [_place(x, at(float(x))) for x in places],
        "parameters": {name: one.dump() for name, one in parameters.items()},
        "held_out": None,
    }
    if last is not None and last[1] is not None:
        told = figures["predicted"]
        table["held_out"] = {"x": last[0], "y": last[1], "predicted": told.value, "low": told.low, "high": told.high}
    return Laws({f"{settings.name}.{name}": one for name, one in figures.items()}, [table])


def _place(x: float, y: Figure) -> dict[str, Any]:
    return {"x": float(x), "y": y.value, "low": y.low, "high": y.high}


def _figure(value: float, draws: Any, level: float, count: int, unit: str = "") -> Figure:
    low, high = bootstrap.interval(draws, level) if draws is not None else (None, None)
    return Figure(value, low, high, count, unit)
