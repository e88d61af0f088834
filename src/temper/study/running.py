"""Arms x seeds -> runs: here, in processes of their own, or on a Ray cluster; what the store has is not made again."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from temper import world
from temper.context import Track, silent
from temper.parts import Problem, nearest, plain, settings
from temper.passport import Figure
from temper.recipe import FromStep, Plan
from temper.recipe.plans import Step
from temper.run import Failed, Result, run
from temper.store import RECORD, Store
from temper.study.arms import Changes
from temper.study.budgets import LENGTHS, budgeted, held
from temper.study.reading import Study, read


@dataclasses.dataclass(frozen=True)
class Job:
    """One run that a study needs. figures: those asked of it; only the steps that they need are run. effort: share of its length."""

    arm: str
    seed: int
    changes: Changes
    figures: tuple[str, ...]
    effort: float = 1.0
    trial: bool = False


@dataclasses.dataclass(frozen=True)
class Stepped:
    """What a step of a run left, and what it spent."""

    key: str
    engine: str
    kind: str
    made: bool
    costs: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Cell:
    """A run that is done. failed: why, where a trial broke."""

    job: Job
    run: str = ""
    steps: Mapping[str, Stepped] = dataclasses.field(default_factory=dict)
    figures: Mapping[str, Figure] = dataclasses.field(default_factory=dict)
    curve: Sequence[Mapping[str, Any]] = ()
    failed: str = ""

    @property
    def made(self) -> bool:
        return any(one.made for one in self.steps.values())


Show = Callable[[Track], None]
Told = Callable[[Cell, int, int], None]


@dataclasses.dataclass(frozen=True)
class Ways:
    """How a study's runs are made. workers: processes; 0: in this one. ray: a cluster's address, `local` for one on this machine."""

    store: Store
    workers: int = 0
    ray: str | None = None
    show: Show = silent
    say: Callable[[str], None] = lambda text: None
    began: Callable[[Job, Step, int, int], None] = lambda job, step, index, count: None
    told: Told = lambda cell, done, count: None


def runs(study: Study, jobs: Sequence[Job], ways: Ways) -> list[Cell]:
    """All jobs' cells, in their order. Raises what the first broken run raised; the others are kept by the store."""
    if world.join().size > 1:
        raise Problem("a study runs under no launcher; give it `--workers` or `--ray`")
    kind = study.budget.kind if study.budget else ""
    if kind == "seconds" or (not ways.workers and ways.ray is None and kind != "memory"):
        if ways.workers or ways.ray is not None:
            ways.say("wall time is held equal: runs go one at a time")
        made = []
        for job in jobs:
            made.append(cell(study, job, ways.store, ways.show, ways.say, lambda step, i, n, job=job: ways.began(job, step, i, n)))
            ways.told(made[-1], len(made), len(jobs))
        return made
    found: dict[int, Cell] = {}
    with _ray(ways.ray) if ways.ray is not None else _processes(max(1, ways.workers)) as submit:
        for place, one in submit([(study.text, study.file, str(study.folder), job, str(ways.store.root)) for job in jobs]):
            found[place] = one
            ways.told(one, len(found), len(jobs))
    return [found[place] for place in range(len(jobs))]


def cell(
    study: Study,
    job: Job,
    store: Store,
    show: Show = silent,
    say: Callable[[str], None] = lambda text: None,
    began: Callable[[Step, int, int], None] = lambda step, index, count: None,
) -> Cell:
    """Makes one run, or takes it from the store. A trial that breaks loses; any other run that breaks raises."""
    whole = budgeted(study, study.arm(job.arm), job.seed, job.changes)
    plan = needed(shortened(study, whole, job.effort) if job.effort < 1 else whole, [one.partition(".")[0] for one in job.figures])
    apart = None
    if study.budget is not None and study.budget.kind == "seconds":
        apart = dict.fromkeys(held(study, plan), f"study {study.digest}")
    try:
        result = run(plan, store, show=show, say=say, began=began, apart=apart)
    except Failed as failed:
        if job.trial:
            return Cell(job, failed=str(failed))
        raise
    return Cell(
        job,
        result.run,
        {name: _stepped(made) for name, made in result.made.items()},
        {one: figure(result, one) for one in job.figures},
        [] if job.trial else _curve(result, held(study, plan)),
    )


def figure(result: Result, name: str) -> Figure:
    """`task.tune.accuracy`: the figure `tune.accuracy` of the step `task`. Raises `Problem` with the nearest name."""
    step, _, rest = name.partition(".")
    found = result[next(one for one in result.made if plain(one) == plain(step))].figures
    if rest not in found:
        raise Problem(f"step `{step}` gives no figure `{rest}`{nearest(rest, found)}", ("measure",))
    return found[rest]


def needed(plan: Plan, names: Sequence[str]) -> Plan:
    """The plan with the steps alone that these ones need, and they themselves."""
    kept: set[int] = set()
    waiting = [plan.steps.index(plan.step(name)) for name in names]
    while waiting:
        index = waiting.pop()
        if index not in kept:
            kept.add(index)
            step = plan.steps[index]
            waiting += [one.index for one in step.given]
            waiting += [step.until.index] if step.until else []
    order = sorted(kept)
    place = {old: new for new, old in enumerate(order)}

    def moved(value: Any) -> Any:
        if isinstance(value, FromStep):
            return dataclasses.replace(value, index=place[value.index])
        return tuple(map(moved, value)) if isinstance(value, tuple) else value

    steps = []
    for old in order:
        step = plan.steps[old]
        until = dataclasses.replace(step.until, index=place[step.until.index]) if step.until else None
        earlier = place.get(step.earlier) if step.earlier is not None else None
        steps.append(
            dataclasses.replace(step, inputs={role: moved(one) for role, one in step.inputs.items()}, until=until, earlier=earlier)
        )
    return dataclasses.replace(plan, steps=tuple(steps))


def shortened(study: Study, plan: Plan, effort: float) -> Plan:
    """The plan with the budgeted steps at a share of their length."""
    names = held(study, plan)
    steps = []
    for step in plan.steps:
        if step.name in names:
            given = {name: getattr(step.spec, name) for name in (*LENGTHS, "epochs") if getattr(step.spec, name) is not None} or {
                "epochs": 1.0
            }
            short = {name: max(1, round(value * effort)) if isinstance(value, int) else value * effort for name, value in given.items()}
            keep = (
                {"keep": tuple(one for one in step.spec.keep if one <= short.get("updates", math.inf))}
                if "keep" in settings(type(step.spec))
                else {}
            )
            step = dataclasses.replace(step, spec=dataclasses.replace(step.spec, **short, **keep))
        steps.append(step)
    return dataclasses.replace(plan, steps=tuple(steps))


def _stepped(made: Any) -> Stepped:
    record, figures, kind = made.record, made.artefact.figures, made.artefact.passport.kind
    spent = {"seconds": float(record["seconds"])}
    spent |= {name: float(figures[name].value) for name in ("tokens", "updates", "flops") if name in figures}
    if record["peak_memory"]:
        spent["peak_memory"] = float(record["peak_memory"])
    if kind in ("model", "adapter"):
        spent["bytes"] = float(sum(file["bytes"] for path, file in record["files"].items() if path.startswith("model/")))
    return Stepped(made.artefact.id, made.step.engine, kind, made.status == "made", spent)


def _curve(result: Result, names: Sequence[str]) -> list[dict[str, Any]]:
    """The learning curves of the steps that the budget holds for, one after another."""
    rows: list[dict[str, Any]] = []
    for name in names:
        file = result[name].path / RECORD / "curve.jsonl"
        before = rows[-1]["step"] if rows else 0
        for line in file.read_text(encoding="utf8").splitlines() if file.exists() else []:
            row = json.loads(line)
            rows.append({**row, "step": row["step"] + before})
    return rows


# ------------------------------------------------------------------------------------------------- elsewhere

Task = tuple[str, str, str, Job, str]
"""A job for another process: the study's text, file and folder, and the store's folder."""
Submit = Callable[[Sequence[Task]], Iterator[tuple[int, Cell]]]


def work(task: Task) -> Cell:
    """Makes a job's cell in another process, which may be on another machine that sees the same folders."""
    text, file, folder, job, root = task
    return cell(read(text, file, Path(folder)), job, Store(Path(root)))


def _ready(threads: int) -> None:
    """A worker's share of the processor."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)


@contextlib.contextmanager
def _processes(workers: int) -> Iterator[Submit]:
    """Processes on this machine, a fresh one for each job, so that its peak memory is its own."""
    threads = max(1, (os.cpu_count() or 1) // workers)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_ready, initargs=(threads,), max_tasks_per_child=1) as pool:

        def submit(tasks: Sequence[Task]) -> Iterator[tuple[int, Cell]]:
            waiting: dict[Future[Cell], int] = {pool.submit(work, task): place for place, task in enumerate(tasks)}
            try:
                for one in as_completed(waiting):
                    yield waiting[one], one.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

        yield submit


@contextlib.contextmanager
def _ray(address: str) -> Iterator[Submit]:
    """A Ray cluster whose machines see the same folders."""
    try:
        import ray
        from ray.exceptions import RayTaskError
    except ImportError:
        raise Problem("Ray is not installed; `pip install 'temper-ml[ray]'`, or give `--workers`") from None
    ours = not ray.is_initialized()
    if ours:
        ray.init(address=address, log_to_driver=False, include_dashboard=False, configure_logging=False)
    try:
        remote = ray.remote(max_retries=0)(work)

        def submit(tasks: Sequence[Task]) -> Iterator[tuple[int, Cell]]:
            waiting = {remote.remote(task): place for place, task in enumerate(tasks)}
            while waiting:
                (done, *_), _ = ray.wait(list(waiting))
                try:
                    yield waiting.pop(done), ray.get(done)
                except RayTaskError as error:
                    raise error.as_instanceof_cause() from error

        yield submit
    finally:
        if ours:
            ray.shutdown()
