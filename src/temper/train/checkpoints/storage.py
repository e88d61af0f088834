"""Checkpoints' files, through `torch.distributed.checkpoint`: it plans who writes what, and who reads what from where.

A file is safetensors; its header names each shard's offsets as torch's `HuggingFaceStorageWriter` does, so that torch's reader reads it.
That writer itself makes a file in memory first, in one piece, and keeps every other Python thread waiting while it does.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from temper.context import sync
from temper.store import digest_file

_FLAT: dict[str, Any] = {"flatten_state_dict": False, "flatten_sharded_tensors": False}


def write(folder: Path, planned: Mapping[str, torch.Tensor], held: Mapping[str, torch.Tensor], group: Any) -> dict[str, str]:
    """Writes this process's share of `planned`, with the content that `held` has; the processes of `group` together.

    Returns, on process 0, the SHA-256 of every file. Raises OSError on every process where one could not write.
    """
    writer = _Writer(folder, held, 0 if group is None else torch.distributed.get_rank(group))
    _alone_is_fine()
    try:
        with torch.no_grad():
            save({}, storage_writer=writer, planner=_Planner(planned), process_group=group, no_dist=group is None)
    except CheckpointException as error:
        raise next(cause for cause, _ in error.failures.values()) from error
    return writer.files


def shapes(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors in a folder by name, whole, on the device `meta`."""
    known = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    tensors = {name: one for name, one in known.items() if isinstance(one, TensorStorageMetadata)}
    return {name: torch.empty(one.size, dtype=one.properties.dtype, device="meta") for name, one in tensors.items()}


def read(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Fills tensors, or this process's shards of them, from a folder."""
    if tensors:
        _alone_is_fine()
        load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), planner=DefaultLoadPlanner(**_FLAT), no_dist=True)


class _Planner(DefaultSavePlanner):
    """Plans these tensors, instead of those given to `save`, which would log each."""

    def __init__(self, planned: Mapping[str, torch.Tensor]):
        super().__init__(dedup_save_to_lowest_rank=True, **_FLAT)
        self._planned = dict(planned)

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        super().set_up_planner(self._planned, storage_meta, is_coordinator)


class _Writer(HuggingFaceStorageWriter):
    """One file a process, written from memory as it lies there. files: their SHA-256 by name, on process 0, once all are written."""

    def __init__(self, folder: Path, held: Mapping[str, torch.Tensor], rank: int):
        super().__init__(str(folder), save_distributed=True)
        self._held, self._file = held, folder / f"tensors-{rank}.safetensors"
        self.files: dict[str, str] = {}

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        written: Future[list[WriteResult]] = Future()
        written.set_result([self._write(plan.items)] if plan.items else [])
        return written

    def _write(self, items: Sequence[WriteItem]) -> WriteResult:
        offsets = {item.index.fqn: {"saved_offsets": list(item.tensor_data.chunk.offsets)} for item in items if item.tensor_data}
        about = {"DCP_SHARDING_INFO": json.dumps(offsets)}  # one entry: safetensors writes several in any order
        try:
            save_file({name: self._held[name] for name in offsets}, self._file, about)
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            raise (OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(str(error))) from error
        sync(self._file)
        return WriteResult(items[0].index, self._file.stat().st_size, (self._file.name, digest_file(self._file)))

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        self.files = dict(one.storage_data for each in results for one in each)


def _alone_is_fine() -> None:
    """DCP warns at every call of a process without a group."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
