"""From a study's runs to numbers with uncertainty: one bootstrap of all arms together, over seeds and examples."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from temper.evaluate import records
from temper.lazy import numpy
from temper.parts import Problem, plain
from temper.passport import Figure
from temper.statistics import bootstrap, fits, tests
from temper.store import Store
from temper.study.reading import Fit, Study, fitted
from temper.study.running import Cell
from temper.study.significance import Evidence


@dataclasses.dataclass(frozen=True, eq=False)
class Measured:
    """One figure of one arm at all seeds; `arm.data` is the same word where the examples are the same, `SEEDS` where there are none."""

    arm: bootstrap.Arm
    values: numpy.ndarray
    unit: str
    better: str | None


SEEDS = "seeds alone"
_SAMPLES = 2000
"""Draws behind intervals that no test asked for."""
Key = tuple[str, str]
"""An arm's name and the name of a figure that is measured."""


class Data:
    """All that a study measured. cells: arm -> its runs, in the order of the seeds."""

    def __init__(self, study: Study, cells: Mapping[str, Sequence[Cell]], store: Store, seed: int = 0):
        self.study, self.cells, self._seed = study, cells, seed
        self.measured = {
            (arm, name): _measured(study, arm, name, figure, some, store)
            for arm, some in cells.items()
            for name, figure in study.measure.items()
        }

    def figure(self, arm: str, name: str) -> Figure:
        """A figure over seeds and examples, with its interval at the finding's level."""
        one = self.measured[arm, name]
        level, low, high = self.study.finding.level, None, None
        if one.arm.sums.shape[1] > 1:
            low, high = bootstrap.interval(self.draws(_SAMPLES)[arm, name], level)
        elif len(one.values) > 1:  # draws of a few seeds alone would be far too sure
            found = tests.paired_t(one.values, level=level)
            low, high = found.low, found.high
        return Figure(float(one.values.mean()), low, high, one.arm.sums.shape[1], one.unit, one.better)

    @functools.cache  # noqa: B019 as long-lived as the object
    def draws(self, samples: int) -> Mapping[Key, numpy.ndarray]:
        """Every figure over resampled seeds and examples, [samples]: one draw of seeds for all."""
        found = bootstrap.multi_bootstrap([one.arm for one in self.measured.values()], samples=samples, seed=self._seed)
        return dict(zip(self.measured, found.values.T, strict=True))

    def sum(self, weights: Mapping[Key, float]) -> Evidence:
        """The evidence on a sum of figures with weights."""
        terms = [(self.measured[key], weight) for key, weight in weights.items()]
        by_seed = sum(weight * one.values for one, weight in terms)
        pair = None
        if len(terms) == 2 and [weight for _, weight in terms] in ([1, -1], [-1, 1]):
            first, second = (one for one, _ in terms)
            if first.arm.data == second.arm.data and len(first.values) == 1 and all(map(_one_by_one, (first, second))):
                each = [one.arm.statistic(one.arm.sums[0]) for one in (first, second)]
                pair = (each[0], each[1]) if terms[0][1] > 0 else (each[1], each[0])

        def draws(samples: int) -> numpy.ndarray:
            found = self.draws(samples)
            return numpy.sum([weight * found[key] for key, weight in weights.items()], axis=0)

        examples = any(one.arm.sums.shape[1] > 1 for one, _ in terms)
        return Evidence(float(numpy.mean(by_seed)), draws, examples, numpy.asarray(by_seed), pair)

    def points(self, fit: Fit) -> tuple[list[str], numpy.ndarray, str]:
        """The arms that lie on a law, their x [A], and the figure that is y."""
        arms = fitted(fit, self.study)
        y = fit.y or next(iter(self.study.measure))
        if fit.x in arms[0].at:
            x = [float(arm.at[fit.x]) for arm in arms]
        elif fit.x in self.study.measure:
            x = [float(self.measured[arm.name, fit.x].values.mean()) for arm in arms]
        else:
            x = [self._cost(arm.name, fit.x) for arm in arms]
        return [arm.name for arm in arms], numpy.array(x), y

    def _cost(self, arm: str, name: str) -> float:
        from temper.study.budgets import own, spent

        runs = {one: some[0].steps for one, some in self.cells.items()}
        found = spent(runs[arm], own(runs)[arm])
        if name not in found:
            raise Problem(f"`{name}` is no axis of the grid, no figure that is measured and no cost: {', '.join(found)}", ("fit", "x"))
        return found[name]

    def law(self, fit: Fit, samples: int = _SAMPLES) -> Law:
        """A fit to the arms' figures, and to those of every draw."""
        arms, x, y = self.points(fit)
        keep = numpy.array([fit.predict is None or not numpy.isclose(at, fit.predict) for at in x])
        if fit.predict is not None and keep.all():
            raise Problem(f"predict {fit.predict:g}: no arm lies there; x are {', '.join(f'{one:g}' for one in x)}", ("fit", "predict"))
        seeds = numpy.stack([self.measured[arm, y].values for arm in arms], axis=1)
        drawn = numpy.stack([self.draws(samples)[arm, y] for arm in arms], axis=1)
        value = seeds.mean(0)
        point, cloud, each = (fits.fit(fit.law, x[keep], one[..., keep]) for one in (value, drawn, seeds))
        return Law(fit, arms, x, y, keep, value, drawn, seeds, point, cloud, each)

    def of_law(self, fit: Fit, parameter: str) -> Evidence:
        """The evidence on a parameter of a law, or on `error`: how far off its prediction of the arm left out is, relative."""
        law = self.law(fit)
        if parameter == "error" and law.keep.all():
            raise Problem("nothing is predicted; give the fit `predict:`, an x whose arm is left out", ("quantity",))
        if parameter != "error" and parameter not in law.point.parameters:
            raise Problem(f"the law has no parameter `{parameter}`; it has {', '.join([*law.point.parameters, 'error'])}", ("quantity",))

        def found(fitted: Any, y: numpy.ndarray) -> Any:
            if parameter != "error":
                return fitted.parameters[parameter]
            return numpy.abs(fitted.predict(law.x[~law.keep])[..., 0] / y[..., ~law.keep][..., 0] - 1)

        def draws(samples: int) -> numpy.ndarray:
            other = self.law(fit, samples)
            return numpy.asarray(found(other.cloud, other.drawn))

        examples = any(self.measured[arm, law.y].arm.sums.shape[1] > 1 for arm in law.arms)
        return Evidence(float(found(law.point, law.value)), draws, examples, numpy.asarray(found(law.each, law.seeds)))


@dataclasses.dataclass(frozen=True, eq=False)
class Law:
    """A fitted law. keep: which arms it was fitted to, bool [A]. value, drawn, seeds: their y, [A], [B, A] and [S, A]. point, cloud, each:
    the fits to these."""

    fit: Fit
    arms: list[str]
    x: numpy.ndarray
    y: str
    keep: numpy.ndarray
    value: numpy.ndarray
    drawn: numpy.ndarray
    seeds: numpy.ndarray
    point: Any
    cloud: Any
    each: Any


def _measured(study: Study, arm: str, name: str, figure: str, cells: Sequence[Cell], store: Store) -> Measured:
    """A figure at every seed: with its examples where an evaluation kept their records and they are the same at all seeds."""
    values = numpy.array([cell.figures[figure].value for cell in cells])
    like = cells[0].figures[figure]
    step, _, rest = figure.partition(".")
    found = [_sums(study, arm, cell, step, rest, store) for cell in cells]
    if all(one is not None for one in found):
        sums = [one for one in found if one is not None]
        if all(one[1] == sums[0][1] for one in sums):
            stacked = numpy.stack([one[0].sums for one in sums])
            return Measured(bootstrap.Arm(stacked, sums[0][0].statistic, sums[0][1]), values, like.unit, like.better)
    return Measured(bootstrap.Arm(values[:, None, None], lambda totals: totals[..., 0], SEEDS), values, like.unit, like.better)


def _one_by_one(one: Measured) -> bool:
    """Whether every unit is a single example, and the figure their mean."""
    sums = one.arm.sums
    return sums.shape[1] > 1 and sums.shape[2] == 2 and bool((sums[..., 1] == 1).all())


def _sums(study: Study, arm: str, cell: Cell, step: str, figure: str, store: Store) -> tuple[Any, str] | None:
    """What a run's evaluation summed for a figure, and a word for its examples; None for figures without records."""
    name = next(one for one in cell.steps if plain(one) == plain(step))
    made = cell.steps[name]
    if made.engine != "evaluate":
        return None
    artefact = store.get(made.key)
    spec = study.plan(study.arm(arm), cell.job.seed, cell.job.changes).step(name).spec
    one = records.read(artefact.path, spec).get(figure)
    if one is None:
        return None
    data = store.record(made.key)["ingredients"]["inputs"]["data"]
    return one, f"{data} {hash(one.units.tobytes())}"
