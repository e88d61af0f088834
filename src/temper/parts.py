"""Slots, parts, specs: the one mechanism by which methods are made.

A slot is a `typing.Protocol` that asks one question; a part is a small frozen dataclass that answers it; a spec
is an engine's dataclass with a field per slot. From these dataclasses alone come validation with errors that
name the nearest right word, descriptions, JSON Schema, ablations and canonical settings for cache keys.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import itertools
import math
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, dataclass_transform

import pydantic
from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic_core import core_schema

T = TypeVar("T")
C = TypeVar("C", bound=type)

Share = Annotated[float, Field(ge=0, le=1)]
"""A number from 0 to 1."""
Count = Annotated[int, Field(gt=0)]
"""A whole number above 0."""
Rate = Annotated[float, Field(gt=0)]
"""A number above 0."""

_STRICT = ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True)


# ------------------------------------------------------------------------------------------------------- errors


class Problem(ValueError):
    """A request that cannot be met: the value, the rule and the remedy, and where it was written.

    `path` is the trail of keys and list positions from the thing being checked down to the bad value; whoever
    knows the file turns it into a line and a column.
    """

    def __init__(self, text: str, path: Sequence[str | int] = ()):
        super().__init__(text)
        self.text = text
        self.path = tuple(path)

    @property
    def all(self) -> tuple[Problem, ...]:
        return (self,)

    def under(self, *keys: str | int) -> Problem:
        """The same problem seen from further out."""
        return Problem(self.text, (*keys, *self.path))

    def __str__(self) -> str:
        return f"{trail(self.path)}{self.text}"


class Problems(Problem):
    """Several problems found in one reading."""

    def __init__(self, problems: Iterable[Problem]):
        self._all = tuple(one for problem in problems for one in problem.all)
        super().__init__("\n".join(str(problem) for problem in self._all))

    @property
    def all(self) -> tuple[Problem, ...]:
        return self._all

    def under(self, *keys: str | int) -> Problem:
        return Problems(problem.under(*keys) for problem in self._all)


def trail(path: Sequence[str | int]) -> str:
    """`("delta", "lora", "rank")` -> "`delta.lora.rank`: "."""
    return f"`{'.'.join(map(str, path))}`: " if path else ""


def collect(problems: Sequence[Problem]) -> None:
    """Raises what was found, if anything was."""
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise Problems(problems)


def plain(name: str) -> str:
    """Names match regardless of case, hyphens, underscores and spaces."""
    return re.sub(r"[-_\s]", "", name).lower()


def nearest(word: str, known: Iterable[str]) -> str:
    """`"; did you mean `lora`?"`, or the whole list where nothing is near; nothing where there is nothing to choose."""
    known = sorted(known)
    by_plain = {plain(name): name for name in known}
    close = difflib.get_close_matches(plain(word), by_plain, n=1, cutoff=0.6)
    if close:
        return f"; did you mean `{by_plain[close[0]]}`?"
    return f"; there is {' · '.join(f'`{name}`' for name in known)}" if known else ""


def shown(value: Any) -> str:
    """A value as the user wrote it, in JSON's words, cut at 60 characters."""
    match value:
        case None:
            text = "null"
        case bool():
            text = str(value).lower()
        case str():
            text = f'"{value}"'
        case Mapping():
            text = "{" + ", ".join(f"{key}: {shown(one)}" for key, one in value.items()) + "}"
        case list() | tuple():
            text = "[" + ", ".join(map(shown, value)) + "]"
        case _:
            text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _kebab(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", name).lower()


# -------------------------------------------------------------------------------------------------------- parts


@dataclasses.dataclass(frozen=True)
class Mark:
    """What `@part` knows of a part."""

    name: str
    needs: tuple[str, ...] = ()
    gives: tuple[str, ...] = ()
    updates: bool = False
    cost: tuple[str, ...] = ()


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field, Field))
def part(
    cls: Any = None,
    /,
    *,
    name: str | None = None,
    needs: Sequence[str] = (),
    gives: Sequence[str] = (),
    updates: bool = False,
    cost: Sequence[str] = (),
) -> Any:
    """Makes a class a part: a frozen dataclass of strict settings.

    name: as users write it (default: the class name in kebab case). needs, gives: what it takes from and leaves in
    the context when started. updates: its live thing takes new settings through `update(part)`, so ramps are
    allowed. cost: settings that change time or memory and nothing else.
    """

    def mark(cls: Any) -> Any:
        made = pydantic_dataclass(frozen=True, config=_STRICT)(cls)
        setattr(made, "__part__", Mark(name or _kebab(cls.__name__), tuple(needs), tuple(gives), updates, tuple(cost)))  # noqa: B010
        return made

    return mark if cls is None else mark(cls)


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field, Field))
def spec(cls: Any) -> Any:
    """Makes a class an engine's spec: a frozen, keyword-only dataclass with a sensible default in every field."""
    made = pydantic_dataclass(frozen=True, kw_only=True, config=_STRICT)(cls)
    setattr(made, "__spec__", True)  # noqa: B010
    return made


@spec
class Spec:
    """What every spec has."""

    paper: str = ""
    """Title of the paper that a method comes from."""


def is_part(thing: Any) -> bool:
    return isinstance(getattr(type(thing), "__part__", None), Mark)


def mark_of(thing: Any) -> Mark:
    """The mark of a part or of a part's class."""
    return thing.__part__


@part(name="function")
class Function:
    """A user's function in a slot, written `file.py:name`. Its source is part of the cache key."""

    source: str
    digest: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _function(self.source)(*args, **kwargs)


@functools.lru_cache(maxsize=64)
def _function(source: str) -> Callable[..., Any]:
    path, _, name = source.rpartition(":")
    return getattr(load_file(Path(path)), name)


def load_file(path: Path) -> Any:
    """Imports a Python file that a recipe names."""
    if not path.is_file():
        raise Problem(f"no file {shown(str(path))}; give the path of a Python file, relative to the recipe")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    name = f"temper_user_{path.stem}_{digest}"
    if name not in sys.modules:
        made = importlib.util.spec_from_file_location(name, path)
        assert made is not None
        assert made.loader is not None
        module = importlib.util.module_from_spec(made)
        sys.modules[name] = module
        try:
            made.loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            raise Problem(f"{path.name} does not import: {type(error).__name__}: {error}") from error
    return sys.modules[name]


@dataclasses.dataclass(frozen=True)
class Scope:
    """Where a recipe's own code comes from: the recipe's folder and the files under its `use:`."""

    folder: Path = Path()
    modules: tuple[Any, ...] = ()
    files: tuple[Path, ...] = ()

    @staticmethod
    def of(folder: Path, use: Sequence[str]) -> Scope:
        files, modules, problems = [], [], []
        for index, name in enumerate(use):
            path = (folder / name).resolve()
            try:
                modules.append(load_file(path))
                files.append(path)
            except Problem as problem:
                problems.append(problem.under(index))
        collect(problems)
        return Scope(folder, tuple(modules), tuple(files))


# -------------------------------------------------------------------------------------------------------- slots


@dataclasses.dataclass(frozen=True)
class Question:
    """What `@slot` knows of a slot."""

    protocol: type
    phased: bool
    combine: Callable[[list[Any]], Any] | None

    def parts(self, scope: Scope = Scope()) -> dict[str, type]:
        """Name -> part class: those in the protocol's module, from entry points, and from the recipe's `use:`."""
        module = sys.modules[self.protocol.__module__]
        found = {mark_of(one).name: one for one in vars(module).values() if isinstance(getattr(one, "__part__", None), Mark)}
        for one in _plugged(self.protocol.__module__):
            found[mark_of(one).name] = one
        for module in scope.modules:
            for one in vars(module).values():
                if isinstance(one, type) and self.protocol in one.__mro__ and "__part__" in vars(one):
                    found[mark_of(one).name] = one
        found.pop("function", None)
        return dict(sorted(found.items()))

    def admits(self, value: Any) -> bool:
        cls = type(value)
        return isinstance(value, Function) or self.protocol in cls.__mro__ or cls in self.parts().values()

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        def check(value: Any) -> Any:
            try:
                return fill(self, value)
            except Problem as problem:
                raise pydantic_core_error(problem) from problem

        return core_schema.no_info_plain_validator_function(check)


@functools.cache
def _plugged(group: str) -> tuple[type, ...]:
    """Parts that installed packages add to a slot through entry points named for its module, `temper.adapt.gate`."""
    loaded = []
    for _, _, point in plugins():
        if point.group == group:
            try:
                loaded.append(point.load())
            except Exception as error:
                raise Problem(
                    f"the plug-in {shown(point.value)} does not load: {type(error).__name__}: {error}; mend or uninstall it"
                ) from error
    return tuple(loaded)


@functools.cache
def plugins() -> tuple[tuple[str, str, Any], ...]:
    """(distribution, version, entry point) of everything installed that adds parts."""
    import importlib.metadata

    found = []
    for one in importlib.metadata.distributions():
        found += [(one.name, one.version, point) for point in one.entry_points if point.group.startswith("temper.")]
    return tuple(found)


def pydantic_core_error(problem: Problem) -> Exception:
    from pydantic_core import PydanticCustomError

    return PydanticCustomError("part", "{text}", {"text": str(problem)})


def slot(cls: Any = None, /, *, combine: Callable[[list[Any]], Any] | None = None, phased: bool = True) -> Any:
    """Makes a protocol a slot.

    combine: how a list of live parts acts as one; without it lists are refused. phased: whether the part may change
    over a run.
    """

    def mark(cls: Any) -> Any:
        cls.__slot__ = Question(cls, phased, combine)
        return cls

    return mark if cls is None else mark(cls)


if typing.TYPE_CHECKING:
    Slot = Union[T, Sequence[T], "Phased", "Ramped"]  # noqa: UP007
else:

    class Slot:
        """`Slot[Gate]`: the type of a spec's or a part's field that holds an answer to `Gate`."""

        def __class_getitem__(cls, protocol: type) -> Any:
            if not isinstance(getattr(protocol, "__slot__", None), Question):
                raise TypeError(f"{protocol.__name__} is not marked @slot")
            return Annotated[Any, protocol.__slot__]


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a run is: updates done, of how many, tokens seen."""

    step: int = 0
    steps: int = 1
    tokens: int = 0

    @property
    def share(self) -> float:
        return min(1.0, self.step / max(1, self.steps))


@dataclasses.dataclass(frozen=True)
class Until:
    """A point of a run: a share of it, a number of updates or of tokens, or its end."""

    amount: float
    unit: str

    @staticmethod
    def read(value: Any) -> Until:
        if value == "end":
            return Until(math.inf, "end")
        if isinstance(value, float) and 0 <= value <= 1:
            return Until(value, "share")
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return Until(value, "steps")
        if isinstance(value, str) and (found := re.fullmatch(r"([\d.]+)\s*([kMG]?)\s*(steps|tokens)", value.strip())):
            return Until(float(found[1]) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}[found[2]], found[3])
        raise Problem(f'{shown(value)} is no point of a run; write a share such as 0.5, steps such as 200, "2M tokens", or end')

    def passed(self, progress: Progress) -> bool:
        at = {"end": -1.0, "share": progress.share, "steps": progress.step, "tokens": progress.tokens}[self.unit]
        return at >= self.amount

    def dump(self) -> Any:
        return {"end": "end", "share": self.amount, "steps": int(self.amount or 0) if self.unit == "steps" else 0}.get(
            self.unit, f"{self.amount:g} {self.unit}"
        )


@dataclasses.dataclass(frozen=True)
class Ramp:
    """A number that moves over a run, from `first` to `last` between two shares of it."""

    first: float
    last: float
    start: float = 0.0
    until: float = 1.0
    shape: str = "linear"
    whole: bool = False

    def at(self, progress: Progress) -> float | int:
        x = min(1.0, max(0.0, (progress.share - self.start) / max(1e-12, self.until - self.start)))
        match self.shape:
            case "cosine":
                value = self.first + (self.last - self.first) * (1 - math.cos(math.pi * x)) / 2
            case "exponential":
                value = self.first * (self.last / self.first) ** x
            case _:
                value = self.first + (self.last - self.first) * x
        return round(value) if self.whole else value


@dataclasses.dataclass(frozen=True)
class Ramped:
    """A part some of whose settings move; the run asks for the part at its progress, the part sees plain numbers."""

    part: Any
    ramps: tuple[tuple[str, Ramp], ...]

    def at(self, progress: Progress) -> Any:
        return dataclasses.replace(self.part, **{name: ramp.at(progress) for name, ramp in self.ramps})


@dataclasses.dataclass(frozen=True)
class Phased:
    """Parts that follow one another in a slot: `[[until, part], ...]`."""

    phases: tuple[tuple[Until, Any], ...]

    def index(self, progress: Progress) -> int:
        for index, (until, _) in enumerate(self.phases):
            if not until.passed(progress):
                return index
        return len(self.phases) - 1


# ------------------------------------------------------------------------------------------- reading settings


@dataclasses.dataclass(frozen=True)
class Setting:
    """A field of a part or a spec. `question` is there when it is a slot."""

    name: str
    type: Any
    question: Question | None
    optional: bool
    default: Any


@functools.lru_cache(maxsize=1024)
def settings(cls: type) -> dict[str, Setting]:
    """Name -> setting of a part or spec class, in order."""
    hints = typing.get_type_hints(cls, include_extras=True)
    found = {}
    for field in dataclasses.fields(cls):
        if not field.init or field.name.startswith("_"):
            continue
        hint, optional = hints[field.name], False
        arms = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else ()
        if type(None) in arms and len(arms) == 2:
            optional, inner = True, next(arm for arm in arms if arm is not type(None))
        else:
            inner = hint
        question = next((one for one in getattr(inner, "__metadata__", ()) if isinstance(one, Question)), None)
        default = field.default
        if isinstance(default, pydantic.fields.FieldInfo):
            default = default.get_default(call_default_factory=True)
        elif default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        found[field.name] = Setting(field.name, hint, question, optional, default)
    return found


@functools.lru_cache(maxsize=1024)
def _adapter(cls: type, name: str) -> TypeAdapter[Any]:
    return TypeAdapter(settings(cls)[name].type, config=_STRICT)


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


def build(cls: type[T], raw: Mapping[str, Any], *, base: T | None = None, scope: Scope = Scope(), ramps: bool = False) -> Any:
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
                values[name] = _adapter(cls, name).validate_python(_tuples(value))
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
            _adapter(cls, name).validate_python(end)
        except pydantic.ValidationError as error:
            raise _read_error(error, ("ramp", index)) from error
    return Ramp(float(ends[0]), float(ends[1]), float(start), float(until), shape, whole)


def fill(question: Question, raw: Any, *, scope: Scope = Scope(), base: Any = None, optional: bool = False, field: str = "") -> Any:
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


def slots(thing: Any) -> dict[str, Setting]:
    """The slots of a spec (or of its class), in order."""
    cls = thing if isinstance(thing, type) else type(thing)
    return {name: setting for name, setting in settings(cls).items() if setting.question}


def held(value: Any) -> Iterator[Any]:
    """Every part that stands in a slot's value, at any time of the run."""
    if isinstance(value, Phased):
        for _, one in value.phases:
            yield from held(one)
    elif isinstance(value, Ramped):
        yield value.part
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from held(one)
    elif value is not None:
        yield value


# ---------------------------------------------------------------------------------------------------- live slots


def starting_order(spec: Any, provided: Iterable[str] = ()) -> list[str]:
    """Slots in the order of their needs. Raises on a need that nobody meets, or a circle."""
    needs = {name: {need for one in held(getattr(spec, name)) for need in mark_of(one).needs} for name in slots(spec)}
    gives = {name: {gift for one in held(getattr(spec, name)) for gift in mark_of(one).gives} for name in slots(spec)}
    have, order, waiting = set(provided), [], list(needs)
    for name, wanted in needs.items():
        for need in sorted(wanted - have - set().union(*gives.values(), set())):
            raise Problem(f"the part in slot `{name}` needs `{need}`, which no other part gives", (name,))
    while waiting:
        ready = [name for name in waiting if needs[name] <= have | gives[name]]
        if not ready:
            circle = ", ".join(f"`{name}` needs {' and '.join(f'`{n}`' for n in sorted(needs[name] - have))}" for name in waiting)
            raise Problem(f"these slots wait for one another: {circle}", (waiting[0],))
        for name in ready:
            have |= gives[name]
            order.append(name)
            waiting.remove(name)
    return order


class LiveSlot:
    """What stands in one slot during a run. Calls go to the live thing of the current phase."""

    def __init__(self, name: str, value: Any, question: Question, context: Any):
        self._name, self._value, self._question, self._context = name, value, question, context
        self._progress = Progress()
        self._phase = -1
        self._enter(0)

    def _enter(self, phase: int) -> None:
        self._phase = phase
        value = self._value.phases[phase][1] if isinstance(self._value, Phased) else self._value
        self._members = list(value) if isinstance(value, (tuple, list)) else [value]
        self._parts = [self._at(member) for member in self._members]
        self._live = [self._start(one) for one in self._parts]
        self._join()

    def _at(self, member: Any) -> Any:
        return member.at(self._progress) if isinstance(member, Ramped) else member

    def _start(self, one: Any) -> Any:
        return one.start(self._context) if hasattr(one, "start") else one

    def _join(self) -> None:
        several = isinstance(self._value, (tuple, list)) or len(self._live) > 1
        self.live = self._question.combine(self._live) if several and self._question.combine else self._live[0]

    def advance(self, progress: Progress) -> None:
        """Moves to `progress`: switches phase, asks ramped parts for their settings of now."""
        self._progress = progress
        if isinstance(self._value, Phased) and (phase := self._value.index(progress)) != self._phase:
            self.close()
            self._enter(phase)
            return
        for index, member in enumerate(self._members):
            if isinstance(member, Ramped) and (now := member.at(progress)) != self._parts[index]:
                self._parts[index] = now
                if hasattr(now, "start"):
                    self._live[index].update(now)
                else:
                    self._live[index] = now
                    self._join()

    def close(self) -> None:
        for one in self._live:
            if hasattr(one, "close"):
                one.close()

    def parameters(self) -> list[Any]:
        return [p for one in self._live if hasattr(one, "parameters") for p in one.parameters()]

    def state_dict(self) -> dict[str, Any]:
        states = {str(i): one.state_dict() for i, one in enumerate(self._live) if hasattr(one, "state_dict")}
        return {"phase": self._phase, "live": states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["phase"] != self._phase:
            self.close()
            self._enter(state["phase"])
        for index, one in state["live"].items():
            self._live[int(index)].load_state_dict(one)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.live(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "live":
            raise AttributeError(name)
        return getattr(self.live, name)


class Live:
    """Every slot of a spec, started. An empty slot is None; plain settings are read through."""

    def __init__(self, spec: Any, context: Any, provided: Iterable[str] = (), only: Sequence[str] | None = None):
        self._spec = spec
        self._slots: dict[str, LiveSlot] = {}
        questions = slots(spec)
        for name in starting_order(spec, provided):
            value = getattr(spec, name)
            if value is not None and (only is None or name in only):
                question = questions[name].question
                assert question
                self._slots[name] = LiveSlot(name, value, question, context.at(name))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name in self._slots:
            return self._slots[name]
        if name in slots(self._spec) and getattr(self._spec, name) is not None:
            raise AttributeError(f"slot {name} was not started")
        return getattr(self._spec, name)

    def advance(self, progress: Progress) -> None:
        for one in self._slots.values():
            one.advance(progress)

    def parameters(self) -> list[Any]:
        return [p for one in self._slots.values() for p in one.parameters()]

    def state_dict(self) -> dict[str, Any]:
        return {name: one.state_dict() for name, one in self._slots.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, one in self._slots.items():
            one.load_state_dict(state[name])

    def close(self) -> None:
        for one in self._slots.values():
            one.close()


# ------------------------------------------------------------------------------------------- engines and methods


def engines() -> list[str]:
    """The engines: the folders of this package that hold an `engine.py`."""
    return sorted(path.parent.name for path in Path(__file__).parent.glob("*/engine.py"))


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
    """Setting -> the text written below it in the source."""
    found: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(owner):
            continue
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


# ------------------------------------------------------------------------------------------------------- schema


def schema(cls: type, definitions: dict[str, Any]) -> dict[str, Any]:
    """JSON Schema of a part or spec; slots go to `definitions`, keyed by their module, each written once."""
    properties = {}
    required = []
    meanings = documented(cls)
    for name, setting in settings(cls).items():
        if setting.question:
            reference = _slot_schema(setting.question, definitions)
            entry: dict[str, Any] = {"anyOf": [reference, {"enum": [None, "none"]}]} if setting.optional else {"allOf": [reference]}
        else:
            entry = _adapter(cls, name).json_schema()
            for key, value in entry.pop("$defs", {}).items():
                definitions[key] = value
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


def _slot_schema(question: Question, definitions: dict[str, Any]) -> dict[str, Any]:
    key = question.protocol.__module__
    reference = {"$ref": f"#/$defs/{key}"}
    if key in definitions:
        return reference
    definitions[key] = {}  # parts may hold the same slot: mark it before descending
    parts = question.parts()
    names = {"enum": list(parts), "description": summary(question.protocol)}
    settled = {
        "type": "object",
        "minProperties": 1,
        "maxProperties": 1,
        "additionalProperties": False,
        "properties": {name: {"anyOf": [schema(cls, definitions), {"type": "null"}]} for name, cls in parts.items()},
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
