"""The corpus that every machine has: the sources and docstrings of this Python's own standard library."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from temper.parts import Count, Problem, Share, dump, part
from temper.tasks.rows import Rows, held_out

_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "ensurepip", "encodings", "pydoc_data", "entities", "stringprep", "sitecustomize"}
"""Tests, programs that come with Python, what builds or installs it, and tables that a program wrote."""


@part
class Library:
    """Python's standard library, in pieces of whole statements. Whole modules are held out, and none of their text is trained on.

    A row has `text` and `module`. Which modules are held out depends on their names alone.
    """

    limit: Count = 4_000_000
    """Bytes of training text, at most. Modules come in an order drawn by their names; one that no longer fits is passed over."""
    holdout: Share = 0.1
    """Share of modules held out; their text is at most this share of `limit`."""
    piece: Count = 2_000
    """Characters of a row, about: statements are joined up to it, and a class above it is cut between its methods."""

    def load(self, split: Literal["train", "test"]) -> Rows:
        """Rows of whole statements, module after module. Raises a `Problem` where this Python has no library sources."""
        modules = self._modules(split)
        seen: set[str] = set()
        if split == "test":  # licence texts and shared boilerplate that training saw are no test of anything
            seen = {text for name, path in self._modules("train") for text in _pieces(_read(path), self.piece)}
        rows = []
        for name, path in modules:
            for text in _pieces(_read(path), self.piece):
                if text not in seen:
                    seen.add(text)
                    rows.append({"text": text, "module": name})
        kind = "held-out modules" if split == "test" else "modules"
        return Rows("text", rows, "house:library", f"{len(modules)} {kind} of Python {platform.python_version()}'s own library")

    def digest(self) -> str:
        """sha256 of these settings, the Python version, and the name and bytes of every module that may be read."""
        made = hashlib.sha256(json.dumps([dump(self), platform.python_version()], sort_keys=True).encode())
        for name, path in _found():
            made.update(f"\0{name}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
        return made.hexdigest()

    def _modules(self, split: Literal["train", "test"]) -> list[tuple[str, Path]]:
        room = self.limit * (self.holdout if split == "test" else 1)
        chosen = []
        for name, path in sorted(_found(), key=lambda one: hashlib.sha256(f"order {one[0]}".encode()).digest()):
            size = path.stat().st_size
            if held_out(name, self.holdout) == (split == "test") and size <= room:
                chosen.append((name, path))
                room -= size
        if not chosen:
            raise Problem(
                f"no library module is left for `{split}` with limit {self.limit} and holdout {self.holdout}; raise them, "
                "or check that this Python's library has its sources"
            )
        return chosen


def modules() -> Iterator[tuple[str, str]]:
    """Name and source of every module that may be read, in the order of names."""
    return ((name, _read(path)) for name, path in _found())


def _found() -> list[tuple[str, Path]]:
    """Name and path of every module that may be read, in the order of names."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, folders, files in os.walk(root):
        # site-packages or config-3.11-x86_64 are no names of packages; not walking into them saves a second
        folders[:] = [one for one in folders if one.isidentifier() and one not in _SKIPPED]
        for file in files:
            path = Path(folder, file)
            stem = path.stem
            if path.suffix == ".py" and stem.isidentifier() and stem not in _SKIPPED and not stem.startswith("_sysconfigdata"):
                found.append((".".join(path.relative_to(root).with_suffix("").parts), path))
    return sorted(found)


def _read(path: Path) -> str:
    with tokenize.open(path) as file:  # a source file may declare its encoding
        return file.read()


# A definition at the left edge or one step in, with the comments and decorators above it, after an empty line.
_DEFINITION = re.compile(r"(?<=\n\n)(?=(?P<indent>(?: {4})?)(?:(?:#|@).*\n(?P=indent))*(?:def|class|async def) )")


def _pieces(source: str, size: int) -> Iterator[str]:
    """A source in pieces of about `size` characters that begin at definitions, or at an empty line where those are far apart."""
    blocks = []
    for block in _DEFINITION.split(source)[::2]:
        blocks += [block] if len(block) <= 2 * size else re.split(r"(?<=\n\n)", block)
    piece = ""
    for block in [*blocks, ""]:
        if piece and (not block or len(piece) + len(block) > size):
            if piece.strip():
                yield piece.strip("\n") + "\n"
            piece = ""
        piece += block
