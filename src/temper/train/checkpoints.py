"""A run's state on disk: written beside, synced, renamed; read back only when every checksum holds.

<folder>/00000500/  tensors.safetensors   every tensor of the state
                    state.json            the rest of the state, and the checksum of both
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from temper.context import sync
from temper.lazy import safetensors_torch, torch
from temper.store import digest_file

if TYPE_CHECKING:
    from collections.abc import Iterator

_TENSORS, _REST = "tensors.safetensors", "state.json"
_HIDDEN = ".unfinished-"


class Checkpoints:
    """The checkpoints of one run in one folder; the newest `latest` are kept.

    A state is a tree of dicts (keys: text or whole numbers), lists, tuples, tensors and JSON values. note: takes a line for the
    reader when a damaged checkpoint is passed over.
    """

    def __init__(self, folder: Path, note: Callable[[str], None], latest: int = 2):
        self._folder, self._note, self._latest = folder, note, latest

    def save(self, update: int, state: Mapping[str, Any]) -> None:
        """Writes the state after so many updates, then removes all but the newest."""
        with whole(self._folder / f"{update:08d}") as beside:
            fill(beside, state)
        for old in self._all()[self._latest :]:
            _remove(old)

    def load(self) -> tuple[int, dict[str, Any]] | None:
        """The newest state that is whole, with its update; None where there is none."""
        for path in self._folder.glob(f"{_HIDDEN}*"):
            shutil.rmtree(path, ignore_errors=True)
        for path in self._all():
            try:
                return int(path.name), read(path)
            except Torn as error:
                self._note(f"checkpoint {path.name} is damaged ({error}) and was passed over")
                _remove(path)
        return None

    def _all(self) -> list[Path]:
        """Newest first."""
        return sorted((path for path in self._folder.glob("*") if path.name.isdigit()), key=lambda path: int(path.name), reverse=True)


class Torn(Exception):
    """A checkpoint is not what was written."""


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """Gives an empty folder to fill; on leaving, its files are synced and it takes its place as `folder`, or nothing does."""
    beside = folder.with_name(f"{_HIDDEN}{folder.name}")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    yield beside
    for path in [*beside.rglob("*"), beside]:
        sync(path)
    _remove(folder)
    beside.rename(folder)
    sync(folder.parent)


def fill(folder: Path, state: Mapping[str, Any]) -> None:
    """Writes a state's two files into a folder."""
    tensors: dict[str, torch.Tensor] = {}
    rest = _take(state, "", tensors, set())
    safetensors_torch.save_file(tensors, folder / _TENSORS)
    text = json.dumps({"state": rest, "tensors": digest_file(folder / _TENSORS)})
    (folder / _REST).write_text(f"{_digest(text)}\n{text}", encoding="utf8")


def read(folder: Path) -> dict[str, Any]:
    """The state in a folder, tensors on the CPU. Raises `Torn`."""
    try:
        digest, _, text = (folder / _REST).read_text(encoding="utf8").partition("\n")
        if digest != _digest(text):
            raise Torn(f"{_REST} does not match its checksum")
        saved = json.loads(text)
        if saved["tensors"] != digest_file(folder / _TENSORS):
            raise Torn(f"{_TENSORS} does not match its checksum")
    except (OSError, UnicodeDecodeError) as error:
        raise Torn(f"{type(error).__name__} on reading") from error
    return _put_back(saved["state"], safetensors_torch.load_file(folder / _TENSORS))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _remove(folder: Path) -> None:
    """Renames before it deletes: a deletion that is interrupted leaves nothing that looks like a checkpoint."""
    if folder.exists():
        doomed = folder.with_name(f"{_HIDDEN}old-{folder.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed)


def _take(value: Any, name: str, tensors: dict[str, torch.Tensor], seen: set[int]) -> Any:
    """The JSON side of a state; its tensors go to `tensors`. seen: addresses of their storages."""
    if isinstance(value, torch.Tensor):
        key = f"{len(tensors)} {name}"  # the number keeps {"a.b": x} and {"a": {"b": y}} apart
        held = value.detach().cpu().contiguous()
        storage = held.untyped_storage().data_ptr()
        tensors[key] = held.clone() if storage in seen else held  # safetensors refuses shared storage
        seen.add(storage)
        return {"tensor": key}
    if isinstance(value, Mapping):
        return {"dict": [[key, _take(one, f"{name}.{key}".lstrip("."), tensors, seen)] for key, one in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [_take(one, f"{name}.{index}", tensors, seen) for index, one in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    raise TypeError(f"{name}: a {type(value).__name__} cannot be kept in a checkpoint; give tensors, numbers, texts, lists and dicts")


def _put_back(value: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Any:
    (kind, held), *_ = value.items()
    match kind:
        case "tensor":
            return tensors[held].clone()  # what is loaded may be a view of the file
        case "dict":
            return {key: _put_back(one, tensors) for key, one in held}
        case "list":
            return [_put_back(one, tensors) for one in held]
        case "tuple":
            return tuple(_put_back(one, tensors) for one in held)
        case _:
            return held
