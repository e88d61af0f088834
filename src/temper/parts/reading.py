"""From what the user wrote to parts and specs, every problem with its path; and back, as canonical JSON."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import pydantic
from pydantic import TypeAdapter

from temper.parts.changes import Phased, Progress, Ramp, Ramped, Until
from temper.parts.marks import NOWHERE, STRICT, Count, Function, Scope, is_part, load_file, mark_of
from temper.parts.problems import Problem, Problems, collect, nearest, plain, shown
from temper.parts.protocols import Question, settings

T = TypeVar("T")


@functools.lru_cache(maxsize=1024)
def adapter(cls: type, name: str) -> TypeAdapter[Any]:
    """What validates one setting of a part or spec class, as strictly as construction does."""
    return TypeAdapter(settings(cls)[name].type, config=STRICT)


def _tuples(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(map(_tuples, value))
    if isinstance(value, Mapping):
        return {str(key): _tuples(one) for key, one in value.items()}
    return value


_RULES = {
    "int_type": "a whole number is asked for",
    "int_from_float": "a whole number is asked for",
    "float_type": "a number is asked for",
    "bool_type": "true or false is asked for",
    "string_type": "a text is asked for",
    "tuple_type": "a list is asked for",
    "list_type": "a list is asked for",
    "dict_type": "a mapping is asked for",
    "none_required": "only none is allowed",
    "finite_number": "a finite number is asked for",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "too_short": "must have at least {min_length} items",
    "too_long": "must have at most {max_length} items",
    "string_too_short": "must have at least {min_length} characters",
    "string_pattern_mismatch": "must match {pattern}",
    "multiple_of": "must be a multiple of {multiple_of}",
}


def _read_error(error: pydantic.ValidationError, path: tuple[str | int, ...]) -> Problem:
    """pydantic's findings in our words: the value and the rule. Of a union's arms, the one that got furthest speaks."""
    found = error.errors(include_url=False)
    if any(one["type"] != "none_required" for one in found):
        found = [one for one in found if one["type"] != "none_required"]
    problems = []
    for one in found:
        context = {key: f"{value:g}" if isinstance(value, float) else value for key, value in one.get("ctx", {}).items()}
        if one["type"] == "literal_error":
            known = re.findall(r"'([^']*)'", str(context["expected"]))
            if known and isinstance(one["input"], str):
                text = f"{shown(one['input'])} is not a choice{nearest(one['input'], known)}"
            else:
                text = f"{shown(one['input'])}: must be {context['expected']}"
        elif one["type"] in ("value_error", "part"):
            text = str(context.get("error", context.get("text", one["msg"])))
        else:
            text = f"{shown(one['input'])}: {_RULES.get(one['type'], one['msg']).format(**context)}"
        inner = [key for key in one["loc"] if isinstance(key, int)]
        problems.append(Problem(text, (*path, *inner)))
    unique = {str(problem): problem for problem in problems}
    return next(iter(unique.values())) if len(unique) == 1 else Problems(unique.values())


def build(cls: type[T], raw: Mapping[str, Any], *, base: T | None = None, scope: Scope = NOWHERE, ramps: bool = False) -> Any:
    """A part or spec from what the user wrote.

    raw: setting -> JSON value or part. base: an instance whose settings hold where `raw` is silent. ramps: whether
    numbers may be ramps. Raises `Problem`s, each with its path, all that are found.
    """
    known = settings(cls)
    kind = f"part `{mark_of(cls).name}`" if hasattr(cls, "__part__") else f"`{cls.__name__.lower()}`"
    values: dict[str, Any] = {}
    moving: list[tuple[str, Ramp]] = []
    problems: list[Problem] = []
    given = {plain(str(key)): key for key in raw}
    if len(given) < len(raw):
        twice = next(key for key in raw if given[plain(str(key))] != key)
        raise Problem(f"given twice, as `{twice}` and `{given[plain(str(twice))]}`; keep one", (str(twice),))
    by_plain = {plain(name): name for name in known}
    for word, key in given.items():
        if word not in by_plain:
            problems.append(Problem(f"{kind} has no setting `{key}`{nearest(str(key), known)}", (str(key),)))
    for name, setting in known.items():
        if plain(name) not in given:
            if base is not None:
                values[name] = getattr(base, name)
            elif setting.default is dataclasses.MISSING:
                problems.append(Problem(f"{kind} needs `{name}`, which is missing", ()))
            continue
        key = given[plain(name)]
        value = raw[key]
        try:
            if setting.question:
                before = getattr(base, name) if base is not None else None
                values[name] = fill(setting.question, value, scope=scope, base=before, optional=setting.optional, field=name)
            elif isinstance(value, Mapping) and "ramp" in value:
                ramp = _ramp(cls, name, value, ramps)
                moving.append((name, ramp))
                values[name] = ramp.at(Progress())
            else:
                if value == "none" and setting.optional:
                    value = None
                values[name] = adapter(cls, name).validate_python(_tuples(value))
        except pydantic.ValidationError as error:
            problems.extend(_read_error(error, (str(key),)).all)
        except Problem as problem:
            problems.extend(problem.under(str(key)).all)
    collect(problems)
    try:
        made = cls(**values)
        if moving:
            Ramped(made, tuple(moving)).at(Progress(1, 1))  # the far end must be a legal part too
    except pydantic.ValidationError as error:
        raise _read_error(error, ()) from error
    return Ramped(made, tuple(moving)) if moving else made


def _ramp(cls: type, name: str, value: Mapping[str, Any], allowed: bool) -> Ramp:
    part_name = mark_of(cls).name if hasattr(cls, "__part__") else cls.__name__.lower()
    if not allowed:
        raise Problem(f"`{name}` of `{part_name}` may not change over a run; give one number")
    if hasattr(cls, "start") and not mark_of(cls).updates:
        raise Problem(f"`{part_name}` keeps state and takes no new settings during a run; give one number")
    unknown = set(value) - {"ramp", "from", "until", "shape"}
    if unknown:
        word = sorted(map(str, unknown))[0]
        raise Problem(f"a ramp has no setting `{word}`{nearest(word, ('ramp', 'from', 'until', 'shape'))}", (word,))
    ends = value["ramp"]
    if not (
        isinstance(ends, (list, tuple)) and len(ends) == 2 and all(isinstance(e, (int, float)) and not isinstance(e, bool) for e in ends)
    ):
        raise Problem(f"{shown(ends)}: a ramp is written `ramp: [first, last]` with two numbers", ("ramp",))
    start, until, shape = value.get("from", 0.0), value.get("until", 1.0), value.get("shape", "linear")
    for key, share in (("from", start), ("until", until)):
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
            raise Problem(f"{shown(share)}: must be a share of the run, from 0 to 1", (key,))
    if shape not in ("linear", "cosine", "exponential"):
        raise Problem(f"{shown(shape)} is not a choice{nearest(str(shape), ('linear', 'cosine', 'exponential'))}", ("shape",))
    if shape == "exponential" and not (ends[0] > 0 and ends[1] > 0):
        raise Problem(f"{shown(ends)}: an exponential ramp needs numbers above 0", ("ramp",))
    whole = settings(cls)[name].type in (int, Count)
    for index, end in enumerate(ends):
        try:
            adapter(cls, name).validate_python(end)
        except pydantic.ValidationError as error:
            raise _read_error(error, ("ramp", index)) from error
    return Ramp(float(ends[0]), float(ends[1]), float(start), float(until), shape, whole)


def fill(question: Question, raw: Any, *, scope: Scope = NOWHERE, base: Any = None, optional: bool = False, field: str = "") -> Any:
    """What stands in a slot, from what the user wrote: a part, a tuple of parts, `Phased`, `Ramped`, or None."""
    name = field or question.protocol.__module__.rpartition(".")[2]
    if raw is None or (isinstance(raw, str) and plain(raw) == "none" and "none" not in question.parts(scope)):
        if optional:
            return None
        raise Problem(f"slot `{name}` cannot be empty{nearest('', question.parts(scope))}")
    if isinstance(raw, (list, tuple)):
        if question.combine is None:
            raise Problem(f"slot `{name}` takes one part, not a list")
        if not raw:
            raise Problem(f"slot `{name}`: an empty list; name a part" + (", or write none" if optional else ""))
        filled, problems = [], []
        for index, one in enumerate(raw):
            try:
                filled.append(fill(question, one, scope=scope, field=name))
            except Problem as problem:
                problems.extend(problem.under(index).all)
        collect(problems)
        return tuple(filled)
    if isinstance(raw, Mapping):
        if "phased" in raw:
            return _phased(question, raw, scope, name)
        if len(raw) != 1:
            raise Problem(f"a part is written `name` or `{{name: {{setting: value}}}}`, with one name; here are {len(raw)}")
        (word, given), *_ = raw.items()
        cls = _find(question, str(word), scope, name)
        if given is not None and not isinstance(given, Mapping):
            raise Problem(f"{shown(given)}: settings of `{word}` are a mapping such as {_example(cls)}", (str(word),))
        try:
            same = base if type(base) is cls else None
            return build(cls, given or {}, base=same, scope=scope, ramps=question.phased)
        except Problem as problem:
            raise problem.under(str(word)) from problem
    if isinstance(raw, str):
        if re.search(r"\.py:\w+$", raw):
            return _user_function(raw, scope)
        cls = _find(question, raw, scope, name)
        return base if type(base) is cls else build(cls, {}, scope=scope)
    if isinstance(raw, (Phased, Ramped)) or (is_part(raw) and question.admits(raw)):
        return raw
    if is_part(raw):
        raise Problem(f"part `{mark_of(raw).name}` does not answer slot `{name}`{nearest(mark_of(raw).name, question.parts(scope))}")
    raise Problem(f"{shown(raw)}: slot `{name}` takes the name of a part{nearest('', question.parts(scope))}")


def _find(question: Question, word: str, scope: Scope, name: str) -> type:
    parts = question.parts(scope)
    for known, cls in parts.items():
        if plain(known) == plain(word):
            return cls
    for known, why in getattr(sys.modules[question.protocol.__module__], "REFUSED", {}).items():
        if plain(known) == plain(word):
            raise Problem(f"`{known}` {why}")
    raise Problem(f"slot `{name}` has no part `{word}`{nearest(word, parts)}")


def _example(cls: type) -> str:
    first = next((one for one in settings(cls).values() if one.default is not dataclasses.MISSING), None)
    return f"{{{first.name}: {shown(dump(first.default))}}}" if first else "{}"


def _user_function(raw: str, scope: Scope) -> Function:
    path, _, name = raw.rpartition(":")
    full = (scope.folder / path).resolve()
    module = load_file(full)
    if not callable(getattr(module, name, None)):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise Problem(f"{full.name} has no function `{name}`{nearest(name, known)}")
    return Function(f"{full}:{name}", hashlib.sha256(full.read_bytes()).hexdigest())


def _phased(question: Question, raw: Mapping[str, Any], scope: Scope, name: str) -> Phased:
    if not question.phased:
        raise Problem(f"slot `{name}` may not change over a run; name one part", ("phased",))
    if len(raw) != 1:
        raise Problem("`phased` stands alone in its slot", ("phased",))
    pairs, problems, phases = raw["phased"], [], []
    if not isinstance(pairs, (list, tuple)) or not pairs:
        raise Problem(f"{shown(pairs)}: phases are written [[until, part], ...]", ("phased",))
    for index, pair in enumerate(pairs):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            problems.append(Problem(f"{shown(pair)}: a phase is written [until, part]", ("phased", index)))
            continue
        try:
            until = Until.read(pair[0])
        except Problem as problem:
            problems.append(problem.under("phased", index, 0))
            continue
        try:
            phases.append((until, fill(question, pair[1], scope=scope, field=name)))
        except Problem as problem:
            problems.append(problem.under("phased", index, 1))
    collect(problems)
    units = {until.unit for until, _ in phases} - {"end"}
    if len(units) > 1:
        raise Problem(f"phases count in {' and '.join(sorted(units))}; use one unit", ("phased",))
    for index, ((one, _), (two, _)) in enumerate(itertools.pairwise(phases)):
        if one.amount >= two.amount:
            raise Problem("phases must end one after another", ("phased", index + 1, 0))
    return Phased(tuple(phases))


def dump(value: Any) -> Any:
    """Canonical JSON of a part, a slot's value or a setting: what keys, descriptions and reports hold."""
    if isinstance(value, Function):
        return {"function": {"name": value.source.rpartition(":")[2], "digest": value.digest}}
    if isinstance(value, Ramped):
        ramped = {name: {"ramp": [r.first, r.last], "from": r.start, "until": r.until, "shape": r.shape} for name, r in value.ramps}
        return {mark_of(value.part).name: {**dump(value.part)[mark_of(value.part).name], **ramped}}
    if isinstance(value, Phased):
        return {"phased": [[until.dump(), dump(one)] for until, one in value.phases]}
    if is_part(value):
        return {mark_of(value).name: {name: dump(getattr(value, name)) for name in settings(type(value))}}
    if hasattr(type(value), "__spec__"):
        return {name: dump(getattr(value, name)) for name in settings(type(value))}
    if isinstance(value, (list, tuple)):
        return [dump(one) for one in value]
    if isinstance(value, Mapping):
        return {str(key): dump(one) for key, one in sorted(value.items())}
    if isinstance(value, Path):
        return value.as_posix()
    return value
