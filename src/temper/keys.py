"""A step's cache key: all that its result depends on, computable without torch.

Settings, the contents of its inputs, the seed, the Temper source that the step imports, the versions of the libraries
below. Two keys' ingredients can be compared, so that a rerun can be explained.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from temper import parts
from temper.parts import dump, shown
from temper.store import digest, digest_file

FORMAT = 1
"""Raised when artefacts of earlier Temper versions can no longer be read."""
LIBRARIES = ("torch", "transformers", "tokenizers", "peft", "compressed-tensors")
PACKAGE = Path(__file__).parent


@functools.cache
def _imports(path: Path) -> frozenset[Path]:
    """The files of this package that a file imports, at the top or inside functions."""
    found: set[Path] = set()
    package = ["temper", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(one for one in (base, node.module) if one)
            names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        for name in names:
            words = name.split(".")
            if words[0] != "temper":
                continue
            for depth in range(1, len(words) + 1):
                stem = PACKAGE.joinpath(*words[1:depth])
                for file in (stem.with_suffix(".py"), stem / "__init__.py"):
                    if file.is_file():
                        found.add(file)
    return frozenset(found)


@functools.cache
def source(engine: str) -> dict[str, str]:
    """File -> digest, for every file of this package that an engine reaches, and its own."""
    waiting = set((PACKAGE / engine).glob("*.py"))
    seen: set[Path] = set()
    while waiting:
        path = waiting.pop()
        if path not in seen:
            seen.add(path)
            waiting |= _imports(path) - seen
    return {path.relative_to(PACKAGE).as_posix(): digest_file(path)[:16] for path in sorted(seen)}


@functools.cache
def versions() -> dict[str, str]:
    """Library -> version, Python and plug-ins among them."""
    import platform

    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    found.update({name: version for name, version, _ in parts.plugins()})
    return found


def cuda_build() -> bool:
    """Whether the installed torch can use a GPU at all, from its version alone (`2.13.0+cpu` cannot)."""
    return "+cpu" not in versions()["torch"]


def ingredients(
    name: str, engine: str, spec: Any, inputs: Mapping[str, Any], seed: int, files: Sequence[Path], device: str
) -> dict[str, Any]:
    """What a step's result depends on. `inputs`: role -> content hash, or list of them."""
    return {
        "format": FORMAT,
        "step": name,
        "engine": engine,
        "settings": {key: value for key, value in dump(spec).items() if key != "paper"},
        "inputs": dict(inputs),
        "seed": seed,
        "device": device,
        "source": source(engine),
        "files": {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in sorted(files)},
        "versions": versions(),
    }


def key(ingredients: Mapping[str, Any]) -> str:
    """64 hexadecimal digits."""
    return digest(ingredients)


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """In words, what differs between two keys' ingredients."""
    found: list[str] = []
    words = {"source": "the code of Temper", "versions": "a library", "files": "your file", "inputs": "input", "settings": "setting"}

    def walk(one: Any, two: Any, trail: tuple[str, ...]) -> None:
        if one == two:
            return
        if isinstance(one, Mapping) and isinstance(two, Mapping):
            for name in sorted({*one, *two}, key=str):
                walk(one.get(name), two.get(name), (*trail, str(name)))
            return
        kind = words.get(trail[0], trail[0])
        place = ".".join(trail[1:])
        if trail[0] in ("source", "files", "inputs"):
            state = "is new" if one is None else "is gone" if two is None else "changed"
            found.append(f"{kind}: `{place}` {state}" if place else f"{kind} {state}")
        else:
            found.append(f"{kind}{f' `{place}`' if place else ''}: {shown(one)} -> {shown(two)}")

    walk(old, new, ())
    return found


__all__ = ["FORMAT", "difference", "ingredients", "key", "source", "versions"]
