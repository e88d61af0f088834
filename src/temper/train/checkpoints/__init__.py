"""A run's state on disk: copied in memory while the loop waits; written beside, synced and renamed while it goes on.

<folder>/00000500/  tensors-0.safetensors   the tensors that process 0 held; the header says where a shard lies in its tensor
                    tensors-1.safetensors   those that process 1 held, where the state is sharded
                    state.json              the rest of the state, and every file's checksum

Planned, written and read through `torch.distributed.checkpoint`, so that any number of processes reads what any other wrote. After
DataStates-LLM (P088): the copy's memory is made once, a GPU's copy may run until the weights change, files are written behind the loop.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import itertools
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from temper.context import sync
from temper.lazy import torch
from temper.parts import Problem
from temper.store import digest_file
from temper.train.distribution import is_sharded
from temper.train.threads import beside

if TYPE_CHECKING:
    Place = Callable[[tuple[str | int, ...], torch.Tensor], torch.Tensor]

_REST = "state.json"
_UNFINISHED, _REPLACED = ".unfinished-", ".replaced-"


class Torn(Exception):
    """A checkpoint is not what was written."""


# ----------------------------------------------------------------------------------------------- a run's checkpoints


class Checkpoints:
    """The checkpoints of one run in one folder; the newest `latest` are kept.

    A state is a tree of dicts (keys: text or whole numbers), lists, tuples, tensors and JSON values. note: takes a line for the
    reader when a checkpoint could not be written, or is damaged and passed over. group: the run's processes, which share the folder
    and call the same methods in the same order. Of a sharded tensor (DTensor) each process writes its shard; all else is process 0's.
    """

    def __init__(self, folder: Path, note: Callable[[str], None], latest: int = 2, group: Any = None):
        self._folder, self._note, self._latest = folder, note, latest
        self._group = _own(group)
        self._staging = _Staging(self._group)
        self._copied: Any = None  # the event after a GPU's copy
        self._pool = beside("checkpoint", _yield_to_others)
        self._behind: Future[None] | None = None
        self._update = 0

    def prepare(self, state: Mapping[str, Any]) -> None:
        """Makes the copy's memory in the background, so that the first checkpoint, too, costs the loop no more than a copy."""
        self.wait()
        parts = self._staging.parts(_split(state)[1])
        self._behind = self._pool.submit(self._staging.warm, parts)

    def save(self, update: int, state: Mapping[str, Any], lazy: Collection[str] = ()) -> None:
        """Copies the state after so many updates; a thread writes it, then removes all checkpoints but the newest.

        Waits for the write before it. lazy: entries of `state` that nothing changes until `staged()` is called; a GPU copies them
        while it computes. Raises TypeError for what cannot be kept.
        """
        self.wait()
        staged = self._staging.take(state, lazy)
        self._update, self._copied = update, staged.event
        self._behind = self._pool.submit(self._keep, staged)

    def staged(self) -> None:
        """From here on what was given to `save` may change. The host does not wait; a GPU does what follows after its copy."""
        if self._copied is not None:
            self._copied.wait()
            self._copied = None

    def wait(self) -> None:
        """Waits for the write under way. Where the disk failed it, that is noted and the checkpoints before it stand."""
        behind, self._behind = self._behind, None
        try:
            if behind is not None:
                behind.result()
        except OSError as error:
            why = error.strerror or str(error)
            stands = "there is none before it" if self.newest is None else f"the one after update {self.newest} stands"
            self._note(f"checkpoint after update {self._update} could not be written: {why[:1].lower()}{why[1:]}; {stands}")

    def close(self) -> None:
        """Waits, then gives back the copy's memory and what the processes shared."""
        self.wait()
        self._pool.shutdown()
        self._staging = _Staging(None)
        if self._group is not None:
            torch.distributed.destroy_process_group(self._group)
            self._group = None

    def load(self, place: Place | None = None) -> tuple[int, dict[str, Any]] | None:
        """The newest state that is whole, with its update; None where there is none.

        Every tensor is whole and on the CPU, or where `place` puts it: `place(path, tensor)` takes the keys that lead to a tensor and,
        on the device `meta`, its shape and number format, and gives the one to read it into; of a DTensor only the shard is read.
        Raises `Problem` where the processes do not share a folder.
        """
        self.wait()
        with _together(self._group):
            if _rank(self._group) == 0:
                mend(self._folder)
        seen = _gather(self._group, [path.name for path in self._all()])
        if any(one != seen[0] for one in seen):
            raise Problem(f"{self._folder}: the processes see different checkpoints there; give them a folder that they share")
        for name in seen[0]:
            saved, torn = _verify(self._folder / name, self._group)
            if not torn:
                return int(name), _read(self._folder / name, saved, place)
            self._note(f"checkpoint {name} is damaged ({torn}) and was passed over")
            if _rank(self._group) == 0:
                _remove(self._folder / name)
        return None

    @property
    def newest(self) -> int | None:
        """The last update whose checkpoint is written."""
        return int(found[0].name) if (found := self._all()) else None

    def _all(self) -> list[Path]:
        """Newest first."""
        return sorted((path for path in self._folder.glob("*") if path.name.isdigit()), key=lambda path: int(path.name), reverse=True)

    def _keep(self, staged: _Staged) -> None:
        with whole(self._folder / f"{self._update:08d}", self._group) as beside:
            _write(beside, staged, self._group)
        if _rank(self._group) == 0:
            for old in self._all()[self._latest :]:
                _remove(old)


# -------------------------------------------------------------------------------------------- a folder: all of it or none


@contextmanager
def whole(folder: Path, group: Any = None) -> Iterator[Path]:
    """Gives an empty folder to fill; on leaving, its files are synced and it takes its place as `folder`, or nothing does.

    A `folder` from before stands until then; if a kill comes between, `mend` puts it back. group: the processes that fill it together;
    what fails on one of them is raised on all.
    """
    beside, first = folder.with_name(f"{_UNFINISHED}{folder.name}"), _rank(group) == 0
    try:
        with _together(group):
            if first:
                shutil.rmtree(beside, ignore_errors=True)
                beside.mkdir(parents=True)
        with _together(group):
            yield beside
            for path in [*beside.rglob("*"), beside] if first else []:
                sync(path)
        with _together(group):
            if first:
                _replace(folder, beside)
    except BaseException:
        if first:
            shutil.rmtree(beside, ignore_errors=True)  # a full disk has room again
        raise


def mend(folder: Path) -> None:
    """Puts right what kills left in a folder of folders made by `whole`: none is half there, and an old one whose successor is missing
    is back."""
    for old in folder.glob(f"{_REPLACED}*"):
        home = old.with_name(old.name.removeprefix(_REPLACED))
        if home.exists():
            shutil.rmtree(old)
        else:
            old.rename(home)
    for path in folder.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)


def _replace(folder: Path, beside: Path) -> None:
    old = folder.with_name(f"{_REPLACED}{folder.name}")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    try:
        beside.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _remove(folder: Path) -> None:
    """Renames before it deletes: a deletion that is interrupted leaves nothing that looks like a checkpoint."""
    doomed = folder.with_name(f"{_UNFINISHED}old-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


# --------------------------------------------------------------------------------------------------- a state in a folder


def fill(folder: Path, state: Mapping[str, Any], group: Any = None) -> None:
    """Writes a state into a folder, now; the processes of `group` together."""
    _write(folder, _Staging(group).take(state), group)


def read(folder: Path, place: Place | None = None) -> dict[str, Any]:
    """The state in a folder; place: as for `Checkpoints.load`. Raises `Torn`."""
    saved, torn = _verify(folder, None)
    if torn:
        raise Torn(torn)
    return _read(folder, saved, place)


def _write(folder: Path, staged: _Staged, group: Any) -> None:
    from temper.train.checkpoints import storage

    if staged.event is not None:
        staged.event.synchronize()
    files = storage.write(folder, staged.planned, staged.held, group)
    if _rank(group) == 0:
        text = json.dumps({"state": staged.rest, "files": files})
        (folder / _REST).write_text(f"{_digest(text)}\n{text}", encoding="utf8")


def _verify(folder: Path, group: Any) -> tuple[dict[str, Any], str]:
    """What `state.json` holds, and what is wrong with the folder, if anything; the processes share the reading."""
    saved, torn = {}, ""
    try:
        digest, _, text = (folder / _REST).read_text(encoding="utf8").partition("\n")
        if digest != _digest(text):
            raise Torn(f"{_REST} does not match its checksum")
        saved = json.loads(text)
        for name, digest in list(saved["files"].items())[_rank(group) :: _size(group)]:
            if digest != digest_file(folder / name):
                raise Torn(f"{name} does not match its checksum")
    except (OSError, UnicodeDecodeError) as error:
        torn = f"{type(error).__name__} on reading"
    except Torn as error:
        torn = str(error)
    return saved, next(filter(None, _gather(group, torn)), "")


def _read(folder: Path, saved: Mapping[str, Any], place: Place | None) -> dict[str, Any]:
    from temper.train.checkpoints import storage

    paths = dict(_paths(saved["state"]))
    shapes = storage.shapes(folder) if paths else {}
    tensors = {name: place(paths[name], shapes[name]) if place else torch.empty_like(shapes[name], device="cpu") for name in paths}
    storage.read(folder, tensors)
    return _put_back(saved["state"], tensors)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# --------------------------------------------------------------------------------------------------- the copy in memory


@dataclasses.dataclass(frozen=True)
class _Staged:
    """A state's copy. rest: all but its tensors, as JSON. planned: the tensors that this process writes, a sharded one as the model has
    it, for its place in the whole. held: what it writes of them, on the CPU. event: after which a GPU has copied, or None."""

    rest: dict[str, Any]
    planned: dict[str, torch.Tensor]
    held: dict[str, torch.Tensor]
    event: Any


class _Staging:
    """Memory for one copy of this process's part of a state, used again and again: touching new memory takes ten times a copy."""

    def __init__(self, group: Any):
        self._group = group
        self._held: dict[str, torch.Tensor] = {}
        self._stream: Any = None

    def parts(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What this process writes of each tensor; where others do, its name is left out."""
        found = {}
        for name, tensor in tensors.items():
            if is_sharded(tensor):
                mesh = tensor.device_mesh  # type: ignore[attr-defined]
                if self._group is None and mesh.size() > 1:
                    raise ValueError(f"{name} is sharded over {mesh.size()} processes; give their group")
                if mesh.get_coordinate() is not None:
                    found[name] = tensor.to_local()  # type: ignore[attr-defined]
            elif _rank(self._group) == 0:
                found[name] = tensor
        return found

    def warm(self, parts: Mapping[str, torch.Tensor]) -> None:
        """Makes the memory."""
        self._held = _memory(parts)
        for held in self._held.values():
            held.zero_()

    def take(self, state: Mapping[str, Any], lazy: Collection[str] = ()) -> _Staged:
        """Copies a state; see `Checkpoints.save`."""
        rest, tensors = _split(state)
        later = {name for name, path in _paths(rest) if path[0] in lazy} if lazy else set()
        with torch.no_grad():
            parts = self.parts(tensors)
            if _layout(self._held) != _layout(parts):
                self._held = _memory(parts)
            event = self._copy(parts, later)
        planned = {name: tensors[name] if is_sharded(tensors[name]) else held for name, held in self._held.items()}
        return _Staged(rest, planned, self._held, event)

    def _copy(self, parts: Mapping[str, torch.Tensor], later: Collection[str]) -> Any:
        if not parts:
            return None
        device = next((part.device for part in parts.values() if part.is_cuda), None)
        if device is None:
            torch._foreach_copy_(list(self._held.values()), list(parts.values()))  # pyright: ignore[reportPrivateImportUsage]
            return None
        # Before anything else that the GPU is asked for.
        for name, part in parts.items():
            if name not in later:
                self._held[name].copy_(part, non_blocking=True)
        # Beside it.
        self._stream = self._stream or torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            for name in parts.keys() & later:
                self._held[name].copy_(parts[name], non_blocking=True)
                if parts[name].is_cuda:
                    parts[name].record_stream(self._stream)
        return self._stream.record_event()


def _layout(tensors: Mapping[str, torch.Tensor]) -> list[tuple[str, torch.Size, torch.dtype]]:
    return [(name, one.shape, one.dtype) for name, one in tensors.items()]


def _memory(parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Room on the CPU for each of some tensors, all in one piece; pinned where a GPU writes into it.

    Pieces of their own would each begin where a page does, as the tensors themselves do: copies between such took half as long again.
    """
    ends = list(itertools.accumulate((-(-part.nbytes // 64) * 64 for part in parts.values()), initial=0))
    whole = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=any(part.is_cuda for part in parts.values()))
    return {name: whole[at : at + part.nbytes].view(part.dtype).view(part.shape) for (name, part), at in zip(parts.items(), ends)}


# ------------------------------------------------------------------------------------------- a tree and its tensors


def _split(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A state as JSON, names in its tensors' places; and the tensors by name."""
    tensors: dict[str, torch.Tensor] = {}
    tensor = torch.Tensor  # looked up once: there may be thousands

    def take(value: Any, name: str) -> dict[str, Any]:
        if isinstance(value, tensor):
            key = f"{len(tensors)} {name}"  # the number keeps {"a.b": x} and {"a": {"b": y}} apart
            tensors[key] = value
            return {"tensor": key}
        if value is None or isinstance(value, (bool, int, float, str)):
            return {"value": value}
        if isinstance(value, Mapping):
            return {"dict": [[key, take(one, f"{name}.{key}".lstrip("."))] for key, one in value.items()]}
        if isinstance(value, (list, tuple)):
            return {"tuple" if isinstance(value, tuple) else "list": [take(one, f"{name}.{at}") for at, one in enumerate(value)]}
        raise TypeError(f"{name}: a {type(value).__name__} cannot be kept in a checkpoint; give tensors, numbers, texts, lists and dicts")

    return take(state, ""), tensors


def _paths(rest: Mapping[str, Any], path: tuple[str | int, ...] = ()) -> Iterator[tuple[str, tuple[str | int, ...]]]:
    """Each tensor's name and the keys that lead to it."""
    ((kind, held),) = rest.items()
    if kind == "tensor":
        yield held, path
    elif kind != "value":
        for key, one in held if kind == "dict" else enumerate(held):
            yield from _paths(one, (*path, key))


def _put_back(rest: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Any:
    ((kind, held),) = rest.items()
    match kind:
        case "tensor":
            return tensors[held]
        case "dict":
            return {key: _put_back(one, tensors) for key, one in held}
        case "list":
            return [_put_back(one, tensors) for one in held]
        case "tuple":
            return tuple(_put_back(one, tensors) for one in held)
        case _:
            return held


# -------------------------------------------------------------------------------------------- threads and processes


def _yield_to_others() -> None:
    """Lets this thread compute when others do not, where the system can tell threads apart."""
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


def _own(group: Any) -> Any:
    """A group of the same processes for the background alone, whose messages do not meet the loop's."""
    if group is None:
        return None
    ranks, patience = torch.distributed.get_process_group_ranks(group), datetime.timedelta(days=7)  # as in `world`
    return torch.distributed.new_group(ranks, timeout=patience, backend="gloo")


def _rank(group: Any) -> int:
    return 0 if group is None else torch.distributed.get_rank(group)


def _size(group: Any) -> int:
    return 1 if group is None else torch.distributed.get_world_size(group)


def _gather(group: Any, value: Any) -> list[Any]:
    """Every process's value, on each."""
    found = [value] * _size(group)
    if group is not None:
        torch.distributed.all_gather_object(found, value, group)
    return found


@contextmanager
def _together(group: Any) -> Iterator[None]:
    """At its end waits for the other processes; raises where one of them failed."""
    failed: BaseException | None = None
    try:
        yield
    except BaseException as error:
        failed = error
    told = _gather(group, "" if failed is None else repr(failed))
    if failed is not None:
        raise failed
    if any(told):
        raise OSError(f"on another process: {next(filter(None, told))}")
