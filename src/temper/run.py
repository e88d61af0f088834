"""A plan -> artefacts, in order, cached, resumable; every rerun explained.

A step's key is known once its inputs are there. What the store has is not made again; what is made is made under the
key's lock, in a work folder that survives a crash, and enters the store by one rename.

Under a launcher every process runs the plan. The main one alone talks to the store; at a step whose engine can be `SHARED` the others
work along, at any other they wait.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from temper import keys, parts, tracking
from temper.context import Context, Track, silent, write
from temper.machine import clock, device, machine, peak_memory, reset_peak
from temper.parts import Problem, nearest
from temper.passport import Artefact, Inputs, Output, Passport
from temper.recipe import FromStep, Outside, Plan, Step, plan
from temper.store import RECORD, Damaged, Store
from temper.world import World, is_main, join


@dataclasses.dataclass(frozen=True)
class Made:
    """A step's artefact, and whether it was made in this run."""

    step: Step
    artefact: Artefact
    status: str
    record: Mapping[str, Any]


@dataclasses.dataclass
class Result:
    """What a run left. `made` holds a step's name -> artefact, in order."""

    plan: Plan
    run: str
    made: dict[str, Made]
    seconds: float = 0.0
    report: Path | None = None
    folders: dict[str, Path] = dataclasses.field(default_factory=dict)

    def __getitem__(self, name: str) -> Artefact:
        if name not in self.made:
            raise KeyError(f"no step {name}{nearest(name, self.made)}")
        return self.made[name].artefact

    @property
    def last(self) -> Artefact:
        return next(reversed(self.made.values())).artefact

    @property
    def anew(self) -> int:
        return sum(one.status == "made" for one in self.made.values())


class Failed(RuntimeError):
    """A step's work failed; what it had done up to its last checkpoint is kept."""


def run(
    plan: Plan,
    store: Store,
    *,
    out: Path | None = None,
    show: Callable[[Track], None] = silent,
    say: Callable[[str], None] = lambda text: None,
    began: Callable[[Step, int, int], None] = lambda step, index, count: None,
    ended: Callable[[Made], None] = lambda made: None,
    apart: Mapping[str, str] | None = None,
) -> Result:
    """Runs a plan's steps in order.

    out: where reports, exported folders and trackers' files go; None for none of them. apart: steps whose artefacts count for one purpose
    alone, and its name: what was made for another, or none, is not taken.

    Raises `Problem` for a request that cannot be met, `Failed` where a step's work broke.
    """
    started = time.monotonic()
    world = join()
    tracking.check(plan.track)

    def follow(context: Context) -> AbstractContextManager[None]:
        return tracking.following(context, plan.track, out, plan.name) if out is not None else contextlib.nullcontext()

    result = Result(plan, world.tell(store.run_id(plan.name) if world.main else None), {})
    by_index: dict[int, Made] = {}
    log: dict[str, Any] = {
        "name": plan.name,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "recipe": plan.text,
        "state": "running",
        "steps": [],
    }
    stopped: set[str] = set()
    try:
        for index, step in enumerate(plan.steps):
            if step.loop.rpartition("#")[0] in stopped:
                assert step.earlier is not None
                by_index[index] = by_index[step.earlier]
                continue
            began(step, index, len(plan.steps))
            try:
                inputs = gather(step, by_index, store)
                wanted = ingredients(step, inputs)
                if apart and step.name in apart:
                    wanted["apart"] = apart[step.name]
                key = keys.key(wanted)
                entry = {"name": step.name, "engine": step.engine, "key": key, "status": "running"}
                log["steps"].append(entry)
                if world.main:
                    store.save_run(result.run, log)
                made = _make(step, inputs, wanted, key, store, _Ways(show, say, follow, world))
            except Problem as problem:
                raise plan.locate(problem, step) from problem
            by_index[index] = result.made[step.name] = made
            entry["status"] = made.status
            if world.main:
                store.save_run(result.run, log)
            ended(made)
            if step.until is not None and step.until.holds(by_index[step.until.index].artefact.figures):
                stopped.add(step.loop.rpartition("#")[0])
                say(f"`until` holds after {step.name}: no further repetition")
        log["state"] = "done"
    except BaseException as error:
        log["state"] = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        raise
    finally:
        result.seconds = log["seconds"] = time.monotonic() - started
        if world.main:
            store.save_run(result.run, log)
    if out is not None and world.main:
        from temper import report
        from temper.reporting import report_input

        result.folders = _exports(result, Path(out), store)
        result.report = Path(out) / "report.html"
        report.write(report_input(result), result.report)
    return result


def one_step(
    engine: str,
    model: str | Path | Sequence[str] | None = None,
    data: Any = None,
    *,
    method: str | None = None,
    out: str | Path | None = None,
    seed: int = 0,
    name: str = "",
    store: Store | None = None,
    show: Callable[[Track], None] = silent,
    say: Callable[[str], None] = lambda text: None,
    sets: Sequence[str] = (),
    **settings: Any,
) -> Result:
    """One step without a recipe: `temper tune MODEL DATA --method M`, and `temper.tune(model, data, method=...)`.

    model: a folder, a hub name, house:lm, or an artefact that the store knows. settings: slots and settings of the
    engine's spec. out: where the model goes as a plain folder, with a report beside it; None leaves it in the store.
    """
    store = store or Store()
    body = {**settings, **({"method": method} if method else {}), **({"name": name} if name else {})}
    given = [model] if isinstance(model, (str, Path)) else list(model or ())
    if given:
        roles = parts.engine(engine).INPUTS
        found = [address(str(one), store) for one in given]
        body["model"] = found if roles["model"].many else found[0]
    if data is not None:
        body["data"] = str(data) if isinstance(data, Path) else data
    raw = {"name": engine, "seed": seed, "export": "none", "steps": [{engine: body}]}
    checked = plan(raw, f"temper {engine}", Path(), [f"{body.get('name', engine)}.{one}" for one in sets])
    result = run(checked, store, show=show, say=say)
    if out is not None and is_main():
        from temper.models.export import export

        result.folders = {engine: export(result.last, Path(out), store)}
    return result


def address(word: str, store: Store) -> str:
    """What a user calls a model: a folder or hub name as it is; else an artefact of the store, by its folder."""
    if word.startswith("house:") or Path(word).expanduser().is_dir():
        return str(Path(word).expanduser().resolve()) if Path(word).expanduser().is_dir() else word
    try:
        return str(store.get(store.find(word)).model)
    except Problem:
        if "/" in word and not word.startswith((".", "/", "~")):
            return word  # a hub name
        raise


# ------------------------------------------------------------------------------------------------- inputs and keys


def gather(step: Step, by_index: Mapping[int, Made], store: Store) -> Inputs:
    """A step's inputs: artefacts of earlier steps, models from outside, data sources."""

    def one(value: Any) -> Any:
        if isinstance(value, FromStep):
            made = by_index[value.index].artefact
            return checkpoint(made, value.checkpoint) if value.checkpoint is not None else made
        if isinstance(value, Outside):
            return outside(value, store)
        if isinstance(value, tuple):
            return [one(each) for each in value]
        return value

    return Inputs({role: one(value) for role, value in step.inputs.items()})


def checkpoint(artefact: Artefact, number: int | str) -> Artefact:
    """What a step kept on its way: `tune@500`, `tune@best`."""
    folder = artefact.path / "checkpoints" / str(number)
    if not folder.is_dir():
        kept = sorted(path.name for path in (artefact.path / "checkpoints").glob("*"))
        raise Problem(f"`{artefact.name}` has no checkpoint {number}{nearest(str(number), kept)}")
    name = f"{artefact.name}@{number}"
    return dataclasses.replace(artefact, id=f"{artefact.id}@{number}", path=folder, content=f"{artefact.content}@{number}", name=name)


def outside(ref: Outside, store: Store) -> Artefact:
    """A model from a folder or a hub, with a passport read off its files."""
    from temper.models import folders

    name, _, revision = ref.ref.partition("@")
    folder = ref.folder if ref.folder.is_dir() else folders.resolve(name, revision or None)
    passport = folders.passport(folder, ref.ref, store.remembered)
    base = None
    if passport.kind == "adapter":
        under = Path(folders.base_name(folder))
        base = outside(Outside(str(under), under if under.is_absolute() else folder.parent / under), store)
        mine, its = passport, base.passport
        passport = dataclasses.replace(
            mine,
            base=its.base,
            numbers=its.numbers,
            mask=its.mask,
            tokenizer=mine.tokenizer or its.tokenizer,
            template=mine.template or its.template,
            architecture=its.architecture,
            adapters=its.adapters,
        )
    content = folders.content(folder, store.remembered)
    return Artefact(content, folder, passport, base, {}, content, Path(ref.ref).name)


def ingredients(step: Step, inputs: Inputs) -> dict[str, Any]:
    """All that a step's result depends on."""

    def content(value: Any) -> Any:
        if isinstance(value, Artefact):
            under = [value.base.content] if value.base is not None else []
            return {"artefact": value.content, "name": value.name, **({"base": under} if under else {})}
        if isinstance(value, list):
            return [content(one) for one in value]
        return {"data": value.digest()} if value is not None else None

    found = {role: content(value) for role, value in inputs.items()}
    return keys.ingredients(step.name, step.engine, step.spec, found, step.seed, step.files, device())


# -------------------------------------------------------------------------------------------------------- making


@dataclasses.dataclass(frozen=True)
class _Ways:
    """How a step at work speaks to the outside, and who works on it."""

    show: Callable[[Track], None]
    say: Callable[[str], None]
    follow: Callable[[Context], AbstractContextManager[None]]
    world: World


def _make(step: Step, inputs: Inputs, wanted: Mapping[str, Any], key: str, store: Store, ways: _Ways) -> Made:
    world = ways.world
    if not world.main:
        if world.tell(None) == "make" and _is_shared(step):
            _work_along(step, inputs, key, store, world)
        world.wait()
        return Made(step, dataclasses.replace(store.get(key), name=step.name), "from the store", store.record(key))
    made = stored(step, key, store, ways.say)
    waiting = lambda: ways.say(f"{step.name}: another run is making it; waiting")  # noqa: E731
    with contextlib.nullcontext() if made else store.lock(key, waiting=waiting):
        made = made or stored(step, key, store, ways.say)
        world.tell("have" if made else "make")
        made = made or _work(step, inputs, wanted, key, store, ways)
        world.wait()
    return made


def _is_shared(step: Step) -> bool:
    """Whether several processes can work on the step together."""
    return getattr(parts.engine(step.engine), "SHARED", False)


def stored(step: Step, key: str, store: Store, say: Any) -> Made | None:
    """What the store has for a key. A damaged artefact is set aside, and said to be."""
    if not store.has(key):
        return None
    try:
        artefact = store.get(key)
    except Damaged as damage:
        moved = store.set_aside(key)
        say(f"{damage}; it is set aside in {moved.parent.name}/{moved.name[:12]} and made again")
        return None
    return Made(step, dataclasses.replace(artefact, name=step.name), "from the store", store.record(key))


def _work(step: Step, inputs: Inputs, wanted: Mapping[str, Any], key: str, store: Store, ways: _Ways) -> Made:
    module = parts.engine(step.engine)
    work = store.work(key)
    out, scratch = work / "out", work / "scratch"
    shutil.rmtree(out, ignore_errors=True)  # half a result of an earlier try; its checkpoints are in scratch
    resumed = scratch.is_dir() and any(scratch.iterdir())
    out.mkdir(parents=True)
    scratch.mkdir(exist_ok=True)
    write(work / "ingredients.json", json.dumps(wanted, indent=1))
    world = ways.world if _is_shared(step) else World()
    context = Context(step.name, step.seed, scratch, out, device(), ways.show, machine=store.root / "machine.json", world=world)
    if resumed:
        ways.say(f"{step.name}: goes on from where an earlier run stopped")
    world.wait()  # the folders are there
    predicted = module.passport(step.spec, passports(inputs))
    before, reset = clock(scratch), reset_peak()
    began = time.monotonic()
    try:
        with ways.follow(context):
            output: Output = module.run(step.spec, inputs, context)
    except Problem:
        raise
    except (KeyboardInterrupt, SystemExit):
        clock(scratch, before + time.monotonic() - began)
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise Failed(f"step `{step.name}` failed: the disk is full; free some room and run the same again") from error
        clock(scratch, before + time.monotonic() - began)
        raise Failed(f"step `{step.name}` failed: {type(error).__name__}: {error}") from error
    seconds = before + time.monotonic() - began
    record = out / RECORD
    record.mkdir(exist_ok=True)
    if context.curve_file.exists():
        write(record / "curve.jsonl", context.curve_file.read_bytes())
    base = output.base or _base(output.passport or predicted, inputs)
    passport = complete(output.passport or predicted, out, key, inputs, base)
    artefact = store.seal(
        key,
        out,
        {
            "name": step.name,
            "engine": step.engine,
            "method": step.method,
            "paper": step.spec.paper,
            "passport": passport.dump(),
            "figures": {name: figure.dump() for name, figure in output.figures.items()},
            "ingredients": wanted,
            "notes": context.notes,
            "decisions": context.decisions(),
            "seconds": seconds,
            "peak_memory": peak_memory() if reset else None,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": machine(),
        },
        base,
    )
    shutil.rmtree(work, ignore_errors=True)
    return Made(step, artefact, "made", store.record(key))


def _work_along(step: Step, inputs: Inputs, key: str, store: Store, world: World) -> None:
    """What the other processes do of a shared step: all of it but what is left behind."""
    with tempfile.TemporaryDirectory(prefix="temper-") as folder:
        out = Path(folder) / "out"
        out.mkdir()
        scratch, known = store.work(key) / "scratch", store.root / "machine.json"
        context = Context(step.name, step.seed, scratch, out, device(), machine=known, world=world)
        world.wait()
        parts.engine(step.engine).run(step.spec, inputs, context)


def passports(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Role -> passport, or list of them; a data source's says its shape."""

    def one(role: str, value: Any) -> Any:
        if isinstance(value, Artefact):
            return value.passport
        if isinstance(value, list):
            return [one(role, each) for each in value]
        try:
            rows = value.load("train")
        except Problem as problem:
            raise problem.under(role) from problem
        return Passport(rows.shape, origin=rows.name)

    return {role: one(role, value) for role, value in inputs.items() if value is not None}


def _base(passport: Passport, inputs: Inputs) -> Artefact | None:
    """The artefact that a new adapter sits on: that of the adapter it goes on from, or the model itself."""
    model = inputs.get("model")
    if passport.kind != "adapter" or not isinstance(model, Artefact):
        return None
    return model.base if model.passport.kind == "adapter" else model


def complete(passport: Passport, out: Path, key: str, inputs: Inputs, base: Artefact | None) -> Passport:
    """A predicted passport with what only the files can tell: hashes, number format, parameters; and its parents."""
    parents = {}
    for role, value in inputs.items():
        for index, one in enumerate(value if isinstance(value, list) else [value]):
            if one is not None:
                name = f"{role}.{index}" if isinstance(value, list) else role
                parents[name] = one.id if isinstance(one, Artefact) else one.digest()
    found: dict[str, Any] = {"parents": parents}
    if (out / "model").is_dir():
        from temper.models import folders

        read = folders.passport(out / "model", "")
        if read.kind != passport.kind:
            raise Failed(f"the step promised `{passport.kind}` and left `{read.kind}`")
        found |= {"tokenizer": read.tokenizer or passport.tokenizer, "template": read.template, "parameters": read.parameters}
        found |= {"architecture": read.architecture or passport.architecture}
        if passport.kind == "adapter":
            found |= {"base": base.passport.base if base is not None else None, "adapters": (*inputs["model"].passport.adapters, key)}
        else:
            found |= {"base": read.base, "numbers": read.numbers, "mask": read.mask}
    return dataclasses.replace(passport, **found)


# -------------------------------------------------------------------------------------------------------- export


def _exports(result: Result, out: Path, store: Store) -> dict[str, Path]:
    """The plain folders that the recipe asks for: `last`, `all`, `none`, or steps by name."""
    from temper.models.export import export

    models = [n for n, made in result.made.items() if made.artefact.passport.kind in ("model", "adapter") and not n.startswith("house:")]
    match result.plan.export:
        case ("all",):
            chosen = models
        case ("last",):
            chosen = models[-1:]
        case ("none",):
            chosen = []
        case names:
            chosen = [name for name in models if name in names]
    return {name: export(result[name], out / name, store) for name in chosen}
