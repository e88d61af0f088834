"""Parts and specs: frozen dataclasses of strict settings, marked; and a user's own code in their place."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, dataclass_transform

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as pydantic_dataclass

from temper.parts.problems import Problem, collect, shown

Share = Annotated[float, Field(ge=0, le=1)]
"""A number from 0 to 1."""
Count = Annotated[int, Field(gt=0)]
"""A whole number above 0."""
Rate = Annotated[float, Field(gt=0)]
"""A number above 0."""

STRICT = ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)


def _kebab(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", name).lower()


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
        made = pydantic_dataclass(frozen=True, config=STRICT)(cls)
        setattr(made, "__part__", Mark(name or _kebab(cls.__name__), tuple(needs), tuple(gives), updates, tuple(cost)))  # noqa: B010
        return made

    return mark if cls is None else mark(cls)


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field, Field))
def spec(cls: Any) -> Any:
    """Makes a class an engine's spec: a frozen, keyword-only dataclass with a sensible default in every field."""
    made = pydantic_dataclass(frozen=True, kw_only=True, config=STRICT)(cls)
    setattr(made, "__spec__", True)  # noqa: B010
    return made


@spec
class Spec:
    """What every spec has."""

    paper: str = ""
    """Title of the paper that a method comes from."""


def is_part(thing: Any) -> bool:
    """Whether a thing is a part: an instance of a class marked `@part`, not the class."""
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


NOWHERE = Scope()
"""No recipe: no code of its own."""
