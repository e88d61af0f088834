"""A plan -> artefacts, in order, cached, resumable; every rerun explained.

A step's key is known once its inputs are there. What the store has is not made again; what is made is made under the
key's lock, in a work folder that survives a crash, and enters the store by one rename.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import resource
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from temper import keys, parts
from temper.context import Context, Track, silent, write
from temper.parts import Problem, nearest
from temper.passport import Artefact, Figure, Inputs, Output, Passport
from temper.recipe import FromStep, Outside, Plan, Step, plan
from temper.store import RECORD, Damaged, Store


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
) -> Result:
    """Runs a plan's steps in order. `out`: where reports and exported folders go; None for neither.

    Raises `Problem` for a request that cannot be met, `Failed` where a step's work broke.
    """
    started = time.monotonic()
    result = Result(plan, store.run_id(plan.name), {})
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
                key = keys.key(wanted)
                entry = {"name": step.name, "engine": step.engine, "key": key, "status": "running"}
                log["steps"].append(entry)
                store.save_run(result.run, log)
                made = _make(step, inputs, wanted, key, store, show, say)
            except Problem as problem:
                raise plan.locate(problem, step) from problem
            by_index[index] = result.made[step.name] = made
            entry["status"] = made.status
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
        store.save_run(result.run, log)
    if out is not None:
        result.folders = _export(result, Path(out), store)
        result.report = _report(result, Path(out), store)
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
    if out is not None:
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


def checkpoint(artefact: Artefact, number: int) -> Artefact:
    """What a step kept on its way: `tune@500`."""
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


def device() -> str:
    """`cuda` where torch would find a GPU. Asked of the system, not of torch: a key must not import it."""
    if os.environ.get("TEMPER_DEVICE"):
        return os.environ["TEMPER_DEVICE"]
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1")
    return "cuda" if Path("/proc/driver/nvidia/version").exists() and not hidden and keys.cuda_build() else "cpu"


# -------------------------------------------------------------------------------------------------------- making


def _make(step: Step, inputs: Inputs, wanted: Mapping[str, Any], key: str, store: Store, show: Any, say: Any) -> Made:
    made = _stored(step, key, store, say)
    if made is not None:
        return made
    with store.lock(key, waiting=lambda: say(f"{step.name}: another run is making it; waiting")):
        made = _stored(step, key, store, say)
        if made is not None:
            return made
        return _work(step, inputs, wanted, key, store, show, say)


def _stored(step: Step, key: str, store: Store, say: Any) -> Made | None:
    if not store.has(key):
        return None
    try:
        artefact = store.get(key)
    except Damaged as damage:
        moved = store.set_aside(key)
        say(f"{damage}; it is set aside in {moved.parent.name}/{moved.name[:12]} and made again")
        return None
    return Made(step, dataclasses.replace(artefact, name=step.name), "from the store", store.record(key))


def _work(step: Step, inputs: Inputs, wanted: Mapping[str, Any], key: str, store: Store, show: Any, say: Any) -> Made:
    module = parts.engine(step.engine)
    work = store.work(key)
    out, scratch = work / "out", work / "scratch"
    shutil.rmtree(out, ignore_errors=True)  # half a result of an earlier try; its checkpoints are in scratch
    resumed = scratch.is_dir() and any(scratch.iterdir())
    out.mkdir(parents=True)
    scratch.mkdir(exist_ok=True)
    write(work / "ingredients.json", json.dumps(wanted, indent=1))
    context = Context(step.name, step.seed, scratch, out, device(), show)
    if resumed:
        say(f"{step.name}: goes on from where an earlier run stopped")
    predicted = module.passport(step.spec, passports(inputs))
    before, reset = _clock(scratch), reset_peak()
    began = time.monotonic()
    try:
        output: Output = module.run(step.spec, inputs, context)
    except Problem:
        raise
    except (KeyboardInterrupt, SystemExit):
        _clock(scratch, before + time.monotonic() - began)
        raise
    except Exception as error:
        _clock(scratch, before + time.monotonic() - began)
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


def passports(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Role -> passport, or list of them; a data source's says its shape."""

    def one(value: Any) -> Any:
        if isinstance(value, Artefact):
            return value.passport
        if isinstance(value, list):
            return [one(each) for each in value]
        return Passport(value.load("train").shape, origin=value.load("train").name) if value is not None else None

    return {role: one(value) for role, value in inputs.items() if value is not None}


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


# ---------------------------------------------------------------------------------------------------- explaining


@dataclasses.dataclass(frozen=True)
class Reason:
    """Why a step would run, or not."""

    step: str
    state: str
    because: list[str]


def why(plan: Plan, store: Store, name: str | None = None) -> list[Reason]:
    """For each step (or one): whether the store has it, else what changed since it was last made."""
    if name is not None:
        plan.step(name)
    by_index: dict[int, Made] = {}
    found = []
    for index, step in enumerate(plan.steps):
        missing = [plan.steps[one.index].name for one in step.given if one.index not in by_index]
        if missing:
            found.append(Reason(step.name, "will run", [f"its input `{one}` is made anew" for one in missing]))
            continue
        try:
            wanted = ingredients(step, gather(step, by_index, store))
        except Problem as problem:
            raise plan.locate(problem, step) from problem
        key = keys.key(wanted)
        made = _stored(step, key, store, lambda text: None)
        if made is not None:
            by_index[index] = made
            when = made.record["created"]
            found.append(Reason(step.name, "from the store", [f"nothing changed since it was made ({when}, {key[:12]})"]))
            continue
        old = _latest(store, plan.name, step.name)
        if (store.work(key) / "scratch").is_dir():
            found.append(Reason(step.name, "will go on", ["an earlier run was interrupted; it goes on from its last checkpoint"]))
        elif old is None:
            found.append(Reason(step.name, "will run", ["it was never made"]))
        else:
            found.append(Reason(step.name, "will run", keys.difference(old["ingredients"], wanted)))
    return [one for one in found if name is None or parts.plain(one.step) == parts.plain(name)]


def _latest(store: Store, recipe: str, step: str) -> Mapping[str, Any] | None:
    for past in reversed(store.runs()):
        for made in past["steps"]:
            if past["name"] == recipe and made["name"] == step and store.has(made["key"]):
                return store.record(made["key"])
    return None


# ------------------------------------------------------------------------------------------------------- machine


def machine() -> dict[str, Any]:
    """The machine by its processor's flags, cores and memory. No host name."""
    flags: set[str] = set()
    info = Path("/proc/cpuinfo")
    if info.exists():
        line = next((one for one in info.read_text().splitlines() if one.startswith(("flags", "Features"))), "")
        flags = {one for one in line.split() if one.startswith(("avx", "amx", "asimd", "sve", "bf16"))}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count(), "memory": memory, "flags": sorted(flags)}


def reset_peak() -> bool:
    """Starts the count of peak memory afresh where the system can (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_memory() -> int:
    """Greatest resident memory of this process since `reset_peak`, bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(one for one in status.read_text().splitlines() if one.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _clock(scratch: Path, seconds: float | None = None) -> float:
    """Seconds that interrupted tries of a step took, kept beside its checkpoints."""
    file = scratch / "seconds"
    if seconds is not None:
        write(file, f"{seconds:.3f}")
        return seconds
    return float(file.read_text()) if file.exists() else 0.0


# -------------------------------------------------------------------------------------------------------- export


def _export(result: Result, out: Path, store: Store) -> dict[str, Path]:
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


# -------------------------------------------------------------------------------------------------------- report


def _report(result: Result, out: Path, store: Store) -> Path:
    from temper import report

    path = out / "report.html"
    report.write(report_input(result, store), path)
    return path


def report_input(result: Result, store: Store) -> Any:
    """What `report.write` takes, from a run."""
    from temper import report

    by_key = {made.artefact.id: name for name, made in result.made.items()}
    steps = []
    for name, made in result.made.items():
        record, passport = made.record, made.artefact.passport
        files = record["files"]
        curve_file = made.artefact.path / RECORD / "curve.jsonl"
        rows = [json.loads(line) for line in curve_file.read_text().splitlines()] if curve_file.exists() else []
        content = {file: one for file, one in files.items() if file.startswith("model/")} or files
        settings = {k: v for k, v in parts.dump(made.step.spec).items() if k not in parts.slots(made.step.spec) and k != "paper"}
        steps.append(
            report.StepReport(
                name=name,
                engine=made.step.engine,
                status="made" if made.status == "made" else "from the store",
                seconds=record["seconds"],
                method=made.step.method,
                paper=made.step.spec.paper,
                kind=passport.kind,
                artefact=made.artefact.id,
                parents={role: by_key.get(parent.partition("@")[0], parent[:12]) for role, parent in passport.parents.items()},
                peak_memory=record["peak_memory"],
                bytes=sum(one["bytes"] for one in content.values()),
                parameters=passport.parameters,
                numbers=passport.numbers or "",
                passport=passport.dump(),
                spec=parts.describe(made.step.spec, getattr(parts.engine(made.step.engine), "PROVIDES", ())),
                settings=settings,
                curve=rows,
                figures=dict(made.artefact.figures),
                notes=list(record["notes"]),
                decisions={k: report.Decision(v["value"], v["reason"]) for k, v in record["decisions"].items()},
            )
        )
    return report.RunReport(
        name=result.plan.name,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        seed=result.plan.seed,
        recipe=result.plan.text,
        steps=steps,
        stages=_stages(result),
        about=result.plan.about,
        rerun=f"temper run {result.plan.place.file}",
        seconds=result.seconds,
        machine=machine(),
        versions=dict(keys.versions()),
    )


def _stages(result: Result) -> list[Any]:
    """The models that were evaluated, in order, with all figures that evaluation steps gave of them."""
    from temper import report

    found: dict[str, dict[str, Figure]] = {}
    for made in result.made.values():
        if made.artefact.passport.kind != "figures":
            continue
        label = made.step.name
        for name, figure in made.artefact.figures.items():
            stage, _, metric = name.rpartition(".")
            if stage in result.made:
                found.setdefault(stage, {})[f"{label} {metric}"] = figure
    stages = []
    for name, made in result.made.items():
        if name in found:
            stages.append(report.StageReport(step=name, figures=found[name], purpose=made.step.about, aim=list(made.step.aim)))
    return stages


__all__ = ["Failed", "Made", "Reason", "Result", "gather", "machine", "run", "why"]
