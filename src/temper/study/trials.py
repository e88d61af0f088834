"""Tuning: every arm gets the same number of trials, at the same shares of its ranges, before it is measured."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from temper.parts import Problem
from temper.report.study import Trial
from temper.study.budgets import held
from temper.study.reading import Study
from temper.study.running import Cell, Job, Ways, runs
from temper.study.search import best, shares


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What the trials of all arms came to. chosen: arm -> settings."""

    chosen: Mapping[str, Mapping[str, Any]]
    trials: Sequence[Trial] = ()


def tune(study: Study, ways: Ways) -> Tuned:
    """Runs every arm's trials. Raises `Problem` where not one trial of an arm gave a number."""
    if study.tuning is None:
        return Tuned({arm.name: {} for arm in study.arms})
    chosen, told = {}, []
    for arm in study.arms:
        settings, training = candidates(study, arm.name), held(study, study.plan(arm, study.tuning.seed))
        cells: list[Cell] = []

        def run(
            wanted: Sequence[tuple[int, float]], arm: str = arm.name, settings: Any = settings, cells: list[Cell] = cells
        ) -> list[float]:
            assert study.tuning is not None
            by = (study.tuning.by,)
            jobs = [Job(arm, study.tuning.seed, settings[number], by, effort, trial=True) for number, effort in wanted]
            made = runs(study, jobs, ways)
            cells.extend(made)
            return [_score(one, study.tuning.by) for one in made]

        search: Any = study.tuning.search
        tried = search(study.tuning.trials, run)
        winner = best(tried)
        if winner is None:
            raise Problem(
                f"arm `{arm.name}`: no trial of {len(tried)} gave a number ({cells[0].failed or 'not finite'}); try other ranges", ("tune",)
            )
        chosen[arm.name] = settings[winner.number]
        for one, cell in zip(tried, cells, strict=True):
            value = cell.figures[study.tuning.by].value if cell.figures else None
            seconds = sum(cell.steps[name].costs["seconds"] for name in training if name in cell.steps)
            told.append(Trial(arm.name, one.number, one.rung, dict(settings[one.number]), value, seconds, one == winner))
    return Tuned(chosen, told)


def candidates(study: Study, arm: str) -> list[dict[str, Any]]:
    """The settings of an arm's trials: setting -> value."""
    assert study.tuning is not None
    ranges = study.ranges[arm]
    rows = shares(study.tuning.trials, len(ranges), study.tuning.seed)
    return [{name: one(share) for (name, one), share in zip(ranges.items(), row, strict=True)} for row in rows]


def _score(cell: Cell, figure: str) -> float:
    """What chooses: less is better."""
    if not cell.figures:
        return math.nan
    found = cell.figures[figure]
    if found.better is None:
        raise Problem(f"which way `{figure}` is better is not known; choose trials by a loss, an accuracy or the like", ("tune", "by"))
    return found.value if found.better == "lower" else -found.value
