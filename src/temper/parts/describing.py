"""Engines and methods by name, and all that is told of them from their dataclasses: documentation, ablations, JSON Schema."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import itertools
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from temper.parts.live import starting_order
from temper.parts.marks import mark_of
from temper.parts.problems import Problem, nearest, plain
from temper.parts.protocols import Question, held, settings, slots
from temper.parts.reading import adapter, dump


def engines() -> list[str]:
    """The engines: the folders of this package that hold an `engine.py`."""
    return sorted(path.parent.name for path in Path(__file__).parents[1].glob("*/engine.py"))


def engine(name: str) -> Any:
    """An engine's module, with `run`, `passport`, `INPUTS` and its spec."""
    known = engines()
    for one in known:
        if plain(one) == plain(name):
            return importlib.import_module(f"temper.{one}.engine")
    raise Problem(f"no engine `{name}`{nearest(name, known)}")


def spec_of(module: Any) -> type:
    """The spec class that an engine's module defines."""
    return next(
        one for one in vars(module).values() if isinstance(one, type) and "__spec__" in vars(one) and one.__module__ == module.__name__
    )


def methods(name: str) -> dict[str, Any]:
    """An engine's published methods, name -> spec: the upper-case values of its `methods.py`."""
    cls = spec_of(engine(name))
    module = importlib.import_module(f"temper.{engine(name).__name__.split('.')[1]}.methods")
    return {key.lower().replace("_", "-"): value for key, value in vars(module).items() if isinstance(value, cls)}


def method(engine_name: str, name: str) -> Any:
    """One method's spec."""
    known = methods(engine_name)
    for one, value in known.items():
        if plain(one) == plain(name):
            return value
    raise Problem(f"engine `{engine_name}` has no method `{name}`{nearest(name, known)}", ("method",))


def documented(cls: type) -> dict[str, str]:
    """Setting -> the text written below it in the source; for a class made at run time, its field's `meaning`."""
    found: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(owner):
            continue
        found.update({field.name: field.metadata["meaning"] for field in dataclasses.fields(owner) if "meaning" in field.metadata})
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(owner)))
        except (OSError, TypeError, SyntaxError):
            continue
        body = tree.body[0].body if tree.body and isinstance(tree.body[0], ast.ClassDef) else []
        for field, text in itertools.pairwise(body):
            told = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
            if told and isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                found[field.target.id] = inspect.cleandoc(text.value.value)  # type: ignore[attr-defined]
    return found


def summary(thing: Any) -> str:
    """The first paragraph of a docstring on one line."""
    text = inspect.getdoc(thing) or ""
    return " ".join(text.split("\n\n")[0].split())


@dataclasses.dataclass(frozen=True)
class Described:
    """One slot of a spec as a reader sees it: what stands in it, with settings and their meaning."""

    slot: str
    question: str
    part: str
    doc: str
    settings: dict[str, Any]
    meanings: dict[str, str]
    changed: bool


def describe(spec: Any, provided: Iterable[str] = ()) -> list[Described]:
    """A spec's slots in the order in which they start, each part with its resolved settings and formula."""
    rows = []
    questions = slots(spec)
    for name in starting_order(spec, provided):
        value, setting = getattr(spec, name), questions[name]
        assert setting.question
        changed = value != setting.default
        question = summary(setting.question.protocol)
        if value is None:
            rows.append(Described(name, question, "none", "", {}, {}, changed))
        for one in held(value):
            given = {key: dump(getattr(one, key)) for key in settings(type(one))}
            rows.append(Described(name, question, mark_of(one).name, inspect.getdoc(one) or "", given, documented(type(one)), changed))
    return rows


def ablations(spec: Any) -> dict[str, Any]:
    """Slot -> the spec with that slot at its default; slots that need one another's gifts are swapped together."""
    changed = [name for name, setting in slots(spec).items() if getattr(spec, name) != setting.default]
    made: dict[str, Any] = {}
    for name in changed:
        group = {name}
        while True:
            gifts = {gift for slot_name in group for one in held(getattr(spec, slot_name)) for gift in mark_of(one).gives}
            more = {other for other in changed if any(gifts & set(mark_of(one).needs) for one in held(getattr(spec, other)))}
            if more <= group:
                break
            group |= more
        without = {one: slots(spec)[one].default for one in sorted(group)}
        made["+".join(sorted(group))] = dataclasses.replace(spec, **without)
    return made


def schema(cls: type, definitions: dict[str, Any], ramps: bool = False) -> dict[str, Any]:
    """JSON Schema of a part or spec; slots go to `definitions`, keyed by their module, each written once.

    ramps: whether numbers may move over a run.
    """
    properties = {}
    required = []
    meanings = documented(cls)
    for name, setting in settings(cls).items():
        if setting.question:
            reference = _slot_schema(setting.question, definitions)
            entry: dict[str, Any] = {"anyOf": [reference, {"enum": [None, "none"]}]} if setting.optional else {"allOf": [reference]}
        else:
            entry = adapter(cls, name).json_schema()
            for key, value in entry.pop("$defs", {}).items():
                definitions[key] = value
            if ramps and {"integer", "number"} & {arm.get("type") for arm in (entry, *entry.get("anyOf", ()))}:
                definitions["ramp"] = _RAMP
                entry = {"anyOf": [entry, {"$ref": "#/$defs/ramp"}]}
        if setting.default is dataclasses.MISSING:
            required.append(name)
        else:
            entry["default"] = dump(setting.default)
        if name in meanings:
            entry["description"] = meanings[name]
        properties[name.replace("_", "-") if hasattr(cls, "__spec__") else name] = entry
        if "_" in name and hasattr(cls, "__spec__"):
            properties[name] = entry
    made = {"type": "object", "additionalProperties": False, "properties": properties, "description": summary(cls)}
    return {**made, "required": required} if required else made


_RAMP = {
    "type": "object",
    "properties": {
        "ramp": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2},
        "from": {"type": "number", "minimum": 0, "maximum": 1},
        "until": {"type": "number", "minimum": 0, "maximum": 1},
        "shape": {"enum": ["linear", "cosine", "exponential"]},
    },
    "required": ["ramp"],
    "additionalProperties": False,
    "description": "a number that moves over the run, from the first to the last",
}


def _slot_schema(question: Question, definitions: dict[str, Any]) -> dict[str, Any]:
    key = question.protocol.__module__
    reference = {"$ref": f"#/$defs/{key}"}
    if key in definitions:
        return reference
    definitions[key] = {}  # parts may hold the same slot: mark it before descending
    parts = question.parts()
    names = {"enum": list(parts), "description": summary(question.protocol)}
    moves = {name: question.phased and (not hasattr(cls, "start") or mark_of(cls).updates) for name, cls in parts.items()}
    settled = {
        "type": "object",
        "minProperties": 1,
        "maxProperties": 1,
        "additionalProperties": False,
        "properties": {name: {"anyOf": [schema(cls, definitions, moves[name]), {"type": "null"}]} for name, cls in parts.items()},
    }
    one = [names, settled, {"type": "string", "pattern": r"\.py:\w+$"}]
    choices = list(one)
    if question.combine:
        choices.append({"type": "array", "items": {"anyOf": one}, "minItems": 1})
    if question.phased:
        pair = {"type": "array", "prefixItems": [{"type": ["number", "string"]}, {"anyOf": one}], "minItems": 2, "maxItems": 2}
        phased = {"type": "array", "items": pair, "minItems": 1}
        choices.append({"type": "object", "properties": {"phased": phased}, "required": ["phased"], "additionalProperties": False})
    definitions[key] = {"anyOf": choices}
    return reference
