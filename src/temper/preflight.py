"""Everything knowable before compute is spent: inputs that exist and fit, supervised tokens, disk space, peak memory."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from temper import parts
from temper.explaining import why
from temper.parts import Problem, collect
from temper.passport import Artefact, Input, Passport
from temper.recipe import FromStep, Outside, Plan, Step
from temper.run import outside
from temper.store import Store

SAMPLE = 64
"""Rows that are tokenised to see whether anything is supervised."""


@dataclasses.dataclass(frozen=True)
class StepCheck:
    """One step as the check sees it. memory: bytes at the peak, estimated; None where the shape is not known."""

    name: str
    engine: str
    takes: str
    gives: str
    state: str
    memory: int | None = None
    parameters: int | None = None

    @property
    def memory_text(self) -> str:
        return f"~{self.memory / 2**20:,.0f} MiB" if self.memory else ""


@dataclasses.dataclass(frozen=True)
class Checked:
    """What the check found in a plan that can run."""

    steps: list[StepCheck]
    warnings: list[str]


@dataclasses.dataclass
class _Known:
    """What is known of a step's result before it runs."""

    passport: Passport
    folder: Path | None = None
    config: Mapping[str, Any] | None = None


def check(plan: Plan, store: Store) -> Checked:
    """Checks a plan step by step. Raises `Problem`s, located, for all steps whose inputs could be followed."""
    states = {reason.step: reason.state for reason in why(plan, store)}
    known: dict[int, _Known] = {}
    problems: list[Problem] = []
    found, warnings, saved = [], [], 0
    for index, step in enumerate(plan.steps):
        if any(one.index not in known for one in step.given):
            continue  # its input is in trouble already, and said so
        try:
            known[index], made = _step(step, known, store, plan, states[step.name])
        except Problem as problem:
            problems.append(plan.locate(problem, step))
            continue
        found.append(made)
        if states[step.name] != "from the store" and made.parameters and known[index].passport.kind == "model":
            saved += 2 * 4 * made.parameters  # beside its checkpoint, for a moment
    collect(problems)
    free = shutil.disk_usage(store.root).free
    if saved > free:
        text = f"the results take about {saved / 1e9:.1f} GB and {free / 1e9:.1f} GB are free at the store; free some, or give --store"
        raise plan.place.locate(Problem(text))
    room = _memory()
    warnings += [
        f"{one.name}: about {one.memory / 2**30:.1f} GiB at its peak, {room / 2**30:.1f} GiB are there; make its micro-batches smaller"
        for one in found
        if one.memory and room and one.memory > room and one.state != "from the store"
    ]
    return Checked(found, warnings)


def _step(step: Step, known: Mapping[int, _Known], store: Store, plan: Plan, state: str) -> tuple[_Known, StepCheck]:
    module = parts.engine(step.engine)
    parents: dict[str, Any] = {}
    models: list[_Known] = []
    rows: Any = None
    for role, takes in module.INPUTS.items():
        value: Any = step.inputs.get(role)
        if value is None:
            continue
        if takes.is_data:
            try:
                rows = value.load("train")
            except Problem as problem:
                raise problem.under(role) from problem
            parents[role] = _accepted(takes, role, Passport(rows.shape, origin=rows.name))
            continue
        read = [
            known[one.index] if isinstance(one, FromStep) else _outside(one, store)
            for one in (value if isinstance(value, tuple) else (value,))
        ]
        for one in read:
            _accepted(takes, role, one.passport)
        parents[role] = [one.passport for one in read] if takes.many else read[0].passport
        models += read
    predicted = module.passport(step.spec, parents)
    first = models[0] if models else None
    config = first.config if first is not None else _fresh(step.spec)
    if rows is not None and first is not None and first.folder is not None and state != "from the store":
        _supervised(rows, first.folder, getattr(step.spec, "max_length", None))
    memory, parameters = _peak(step, config, predicted)
    takes_text = ", ".join(f"{role} {_said(one)}" for role, one in parents.items())
    gives = " ".join(
        one for one in (predicted.kind, predicted.numbers or "", f"mask {predicted.mask:.2f}" if predicted.mask else "") if one
    )
    made = StepCheck(step.name, step.engine, takes_text, gives, state, memory if state != "from the store" else None, parameters)
    if predicted.kind == "figures":
        return _Known(predicted), made
    return _Known(predicted, None, config), made


def _accepted(takes: Input, role: str, passport: Passport) -> Passport:
    takes.accept(role, passport)
    return passport


def _said(passport: Any) -> str:
    return (
        " + ".join(map(_said, passport))
        if isinstance(passport, list)
        else " ".join(one for one in (passport.kind, passport.numbers or "") if one)
    )


def _outside(ref: Outside, store: Store) -> _Known:
    artefact = outside(ref, store)
    under: Artefact = artefact
    while under.base is not None:
        under = under.base
    file = under.model / "config.json"
    config = json.loads(file.read_text(encoding="utf8")) if file.is_file() else None
    return _Known(artefact.passport, artefact.model, config)


def _supervised(rows: Any, folder: Path, max_length: int | None) -> None:
    """Raises where a first sample of rows leaves nothing to learn, or the tokenizer lacks a template."""
    from temper.models.io import load_tokenizer
    from temper.train.examples import encode

    encode(dataclasses.replace(rows, rows=rows.rows[:SAMPLE]), load_tokenizer(folder), max_length=max_length)


def _fresh(spec: Any) -> Mapping[str, Any] | None:
    """The shape of a model that a step begins itself, in the words of a config."""
    shape, tokenizer = getattr(spec, "shape", None), getattr(spec, "tokenizer", None)
    if not hasattr(shape, "hidden") or not hasattr(tokenizer, "vocabulary"):
        return None
    wide = getattr(shape, "feed_forward", None) or 4 * shape.hidden  # type: ignore[union-attr]
    return {"hidden_size": shape.hidden, "num_hidden_layers": shape.layers, "vocab_size": tokenizer.vocabulary, "intermediate_size": wide}  # type: ignore[union-attr]


def _peak(step: Step, config: Mapping[str, Any] | None, predicted: Passport) -> tuple[int | None, int | None]:
    """Peak memory of a learning step and the parameters of its model, from the model's shape."""
    from temper.models.memory import estimate

    wanted = ("hidden_size", "num_hidden_layers", "vocab_size")
    if config is None or any(name not in config for name in wanted):
        return None, predicted.parameters
    hidden, layers, vocabulary = (config[name] for name in wanted)
    wide = config.get("intermediate_size") or 4 * hidden
    parameters = predicted.parameters or vocabulary * hidden + layers * (4 * hidden * hidden + 3 * hidden * wide)
    batching = getattr(step.spec, "batching", None)
    learns = batching is not None
    adapter = predicted.kind == "adapter"
    length = getattr(batching, "length", None) or getattr(step.spec, "max_length", 512)
    tokens = getattr(batching, "tokens", None) or length * getattr(batching, "size", 8)
    memory = estimate(
        parameters=parameters,
        trainable=0 if not learns else parameters // 50 if adapter else parameters,
        optimizer=2.0,
        batch_tokens=int(tokens),
        hidden=hidden,
        layers=layers,
        vocabulary=vocabulary,
        intermediate=wide,
    )
    return memory.total, parameters


def _memory() -> int | None:
    """Memory that is free now, bytes (Linux)."""
    info = Path("/proc/meminfo")
    if not info.exists():
        return None
    line = next((one for one in info.read_text().splitlines() if one.startswith("MemAvailable")), "")
    return int(line.split()[1]) * 1024 if line else None
