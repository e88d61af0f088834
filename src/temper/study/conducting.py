"""A study from its file to its report: trials, runs, figures, findings."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from temper import keys
from temper.lazy import numpy
from temper.machine import machine
from temper.parts import Problem
from temper.passport import Figure
from temper.recipe import FromStep, Plan
from temper.report import study as told
from temper.statistics import bootstrap
from temper.study.budgets import COSTS, budgeted, held, own, spent
from temper.study.evidence import SEEDS, Data
from temper.study.findings import Judged, judge, overall, sentence
from temper.study.reading import Claim, Fit, Study, fitted, term
from temper.study.running import Cell, Job, Ways, runs
from temper.study.trials import Tuned, tune


@dataclasses.dataclass(frozen=True)
class Conducted:
    """What a study came to."""

    study: Study
    report: told.StudyReport
    judged: Sequence[Judged]
    data: Data


def conduct(study: Study, ways: Ways, rerun: str = "") -> Conducted:
    """Runs a study: what the store has is not made again, and an interrupted one goes on."""
    began = time.monotonic()
    tuned = tune(study, ways)
    figures = tuple(study.measure.values())
    jobs = [Job(arm.name, seed, tuned.chosen[arm.name], figures) for arm in study.arms for seed in study.seeds]
    made = runs(study, jobs, ways)
    cells = {arm.name: [one for one in made if one.job.arm == arm.name] for arm in study.arms}
    notes = []
    asked = len(study.claims)
    if left := _over(study, cells):
        told_over = ", ".join(f"{arm} {peak:.4g}" for arm, peak in left.items())
        if len(left) == len(cells):
            raise Problem(f"every arm needs more bytes of memory than the budget: {told_over}; give more", ("budget", "memory"))
        notes.append(f"needed more bytes of memory than the budget and are left out: {told_over}")
        study = _only(study, [arm.name for arm in study.arms if arm.name not in left])
        cells = {arm: some for arm, some in cells.items() if arm not in left}
        if fallen := asked - len(study.claims):
            notes.append(f"{fallen} of {asked} claims fall away with them, so the whole cannot hold")
    data = Data(study, cells, ways.store)
    judged = judge(study, data)
    verdict = overall([one.comparison.verdict for one in judged]) if asked else ""  # type: ignore[misc]
    if len(study.claims) < asked and verdict != "does not hold here":
        verdict = "unclear"
    report = _report(study, tuned, data, judged, verdict, rerun, time.monotonic() - began, notes)
    return Conducted(study, report, judged, data)


def _over(study: Study, cells: Mapping[str, Sequence[Cell]]) -> dict[str, float]:
    """Arms whose runs needed more memory than the budget, and how much, bytes."""
    if study.budget is None or study.budget.memory is None:
        return {}
    most = {
        arm: max(step.costs.get("peak_memory", 0.0) for cell in some for step in cell.steps.values() if step.kind != "figures")
        for arm, some in cells.items()
    }
    return {arm: peak for arm, peak in most.items() if peak > study.budget.memory}


def _only(study: Study, arms: Sequence[str]) -> Study:
    """The study of some arms. Claims about others, and laws through them, fall away."""

    def about(claim: Claim) -> set[str]:
        law = [arm.name for arm in fitted(study.fits[claim.quantity.partition(".")[0]], study)] if claim.quantity else []
        return {claim.better, claim.than, *law, *(term(word, study)[0] for word in claim.of)} - {""}

    kept = [claim for claim in study.claims if {study.arm(name).name for name in about(claim)} <= set(arms)]
    fits = {name: fit for name, fit in study.fits.items() if {arm.name for arm in fitted(fit, study)} <= set(arms)}
    baseline = study.baseline if study.baseline in arms else arms[0]
    return dataclasses.replace(
        study, arms=tuple(arm for arm in study.arms if arm.name in arms), claims=tuple(kept), fits=fits, baseline=baseline
    )


def _report(
    study: Study, tuned: Tuned, data: Data, judged: Sequence[Judged], verdict: Any, rerun: str, seconds: float, notes: Sequence[str]
) -> told.StudyReport:
    budget = study.budget
    return told.StudyReport(
        name=study.name,
        about=study.about,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        seconds=seconds,
        rerun=rerun or f"temper study {study.file}",
        text=study.text,
        machine=machine(),
        versions={**keys.versions(), "temper": importlib.metadata.version("temper-ml")},
        level=study.finding.level,
        seeds=list(study.seeds),
        notes=[*notes, *_cautions(study, data)],
        held=budget.kind if budget else "",
        budget=(study.tuning.trials if study.tuning else None) if budget and budget.kind == "trials" else budget.amount if budget else None,
        alike=_alike(study),
        measures=list(study.measure),
        verdict=verdict,
        finding=sentence(study, judged),
        arms=_arms(study, tuned, data),
        comparisons=[one.comparison for one in judged],
        fits=[_fit(name, data, fit, study.finding.level) for name, fit in study.fits.items()],
        trials=list(tuned.trials),
        contributions=[],
    )


def _arms(study: Study, tuned: Tuned, data: Data) -> list[told.ArmReport]:
    by_seed = [own({arm: some[at].steps for arm, some in data.cells.items()}) for at in range(len(study.seeds))]
    made = []
    for arm in study.arms:
        runs = []
        for at, cell in enumerate(data.cells[arm.name]):
            figures = {name: cell.figures[figure].value for name, figure in study.measure.items()}
            costs = spent(cell.steps, by_seed[at][arm.name])
            status = "made" if cell.made else "from the store"
            runs.append(told.ArmRun(cell.job.seed, cell.run, status, figures, costs, [dict(row) for row in cell.curve]))
        costs = {name: sum(run.costs[name] for run in runs) / len(runs) for name in COSTS if all(name in run.costs for run in runs)}
        if study.tuning is not None:
            costs["trials"] = float(study.tuning.trials)
        figures = {name: data.figure(arm.name, name) for name in study.measure}
        made.append(told.ArmReport(arm.name, "", dict(arm.changes), dict(tuned.chosen[arm.name]), figures, costs, runs))
    return made


def _alike(study: Study) -> list[str]:
    """What all arms had in common: seeds, steps with the same settings and inputs, the budget."""
    plans = [budgeted(study, arm, study.seeds[0]) for arm in study.arms]
    said = [f"seeds {', '.join(map(str, study.seeds))}, and with them the order of data and every draw that both arms make"]
    same = [step.name for step in plans[0].steps if all(_same(step.name, plans[0], plan) for plan in plans[1:])]
    if same:
        said.append(f"steps with the same settings and inputs: {', '.join(same)}")
    if study.budget is not None and study.budget.kind not in ("trials", "memory"):
        said.append(f"{study.budget.amount:g} {study.budget.kind} in each of: {', '.join(held(study, plans[0]))}")
    if study.tuning is not None:
        said.append(f"{study.tuning.trials} trials of tuning for every arm, at the same shares of its ranges, chosen by {study.tuning.by}")
    return said


def _same(name: str, one: Plan, two: Plan) -> bool:
    """Whether a step is the same in two plans, with all that it comes from."""
    if name not in [step.name for step in two.steps]:
        return False
    first, second = one.step(name), two.step(name)
    if (first.engine, first.spec, first.seed) != (second.engine, second.spec, second.seed):
        return False

    def origin(plan: Plan, value: Any) -> Any:
        if isinstance(value, tuple):
            return [origin(plan, item) for item in value]
        return plan.steps[value.index].name if isinstance(value, FromStep) else value

    if {role: origin(one, value) for role, value in first.inputs.items()} != {
        role: origin(two, value) for role, value in second.inputs.items()
    }:
        return False
    return all(_same(one.steps[each.index].name, one, two) for each in first.given)


def _cautions(study: Study, data: Data) -> list[str]:
    """What a reader should know before believing the intervals."""
    said = []
    if len(study.seeds) == 1:
        said.append("one seed: intervals speak of the examples alone, not of another training run")
    elif len(study.seeds) < 5:
        share = (1 - 1 / len(study.seeds)) ** 0.5
        said.append(f"{len(study.seeds)} seeds: the bootstrap sees about {share:.2f} of the spread between seeds")
    lone = sorted({name for (_, name), one in data.measured.items() if one.arm.data == SEEDS and len(one.values) > 1})
    if lone:
        said.append(f"no records of single examples, or other examples at each seed: {', '.join(lone)} vary over seeds alone")
    return said


def _fit(name: str, data: Data, fit: Fit, level: float) -> told.FitReport:
    law = data.law(fit)

    def ends(draws: Any) -> tuple[float, float]:
        return bootstrap.interval(draws, level)

    points = [
        told.Point(float(x), float(y), *ends(drawn), arm)
        for arm, x, y, drawn, kept in zip(law.arms, law.x, law.value, law.drawn.T, law.keep, strict=True)
        if kept
    ]
    grid = numpy.geomspace(law.x.min(), law.x.max(), 40)
    line = zip(grid, law.point.predict(grid), law.cloud.predict(grid).T, strict=True)
    parameters = {one: Figure(float(value), *ends(law.cloud.parameters[one])) for one, value in law.point.parameters.items()}
    out = None
    if not law.keep.all():
        x, y = law.x[~law.keep], law.value[~law.keep]
        out = told.HeldOut(float(x[0]), float(y[0]), float(law.point.predict(x)[0]), *ends(law.cloud.predict(x)[:, 0]))
        off = data.of_law(fit, "error")
        parameters["error"] = Figure(off.value, *ends(off.draws(len(law.drawn))))
    band = [told.Point(float(x), float(y), *ends(drawn)) for x, y, drawn in line]
    return told.FitReport(name, law.fit.law, law.fit.x, law.y, points, band, parameters, out)


def ready(study: Study, ways: Ways) -> dict[str, Any]:
    """What can be said before a study runs: its runs, what the store has, and which differences it could find."""
    from temper.explaining import why
    from temper.statistics import power

    plans = {(arm.name, seed): budgeted(study, arm, seed) for arm in study.arms for seed in study.seeds}
    there = {key: sum(one.state == "from the store" for one in why(plan, ways.store)) for key, plan in plans.items()}
    found: dict[str, Any] = {
        "runs": len(plans),
        "trials": len(study.arms) * (study.tuning.trials if study.tuning else 0),
        "steps": sum(len(plan.steps) for plan in plans.values()),
        "steps in the store": sum(there.values()),
    }
    if len(study.seeds) > 1:
        spreads = power.minimum_detectable(1.0, len(study.seeds), level=study.finding.level, power=0.8)
        found["smallest difference found with power 0.8, in standard deviations of the paired difference over seeds"] = round(spreads, 3)
    return found


def out_of(study: Study) -> Path:
    """Where a study's report goes when nothing else is said."""
    return Path("temper-out") / study.name
