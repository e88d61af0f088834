"""Slots: protocols that ask one question each, and the parts that answer."""

from __future__ import annotations

import dataclasses
import functools
import sys
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, TypeVar, Union

import pydantic
from pydantic_core import PydanticCustomError, core_schema

from temper.parts.changes import Phased, Ramped
from temper.parts.marks import NOWHERE, Function, Mark, Scope, mark_of
from temper.parts.problems import Problem, shown

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Question:
    """What `@slot` knows of a slot."""

    protocol: type
    phased: bool
    combine: Callable[[list[Any]], Any] | None

    def parts(self, scope: Scope = NOWHERE) -> dict[str, type]:
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
        from temper.parts.reading import fill  # which reads settings through this module

        def check(value: Any) -> Any:
            try:
                return fill(self, value)
            except Problem as problem:
                raise PydanticCustomError("part", "{text}", {"text": str(problem)}) from problem

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
