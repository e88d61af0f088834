"""The processes that share a run's work, as `torchrun` and `accelerate launch` start them: which one this is, and how they agree.

Alone, every function here is the identity and torch is not imported.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from temper.lazy import torch

_PATIENCE = datetime.timedelta(days=7)  # others wait for the main process's work; the launcher ends them where one fails


@dataclasses.dataclass(frozen=True)
class World:
    """This process among `size` that run the same program. rank 0 is the main one: it alone writes what others read."""

    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def group(self) -> Any:
        """torch's group of all processes; None for one alone."""
        return torch.distributed.group.WORLD if self.size > 1 else None

    def tell(self, value: Any) -> Any:
        """What the main process gave, on every process. JSON values."""
        if self.size == 1:
            return value
        text = bytearray(json.dumps(value).encode()) if self.main else bytearray()
        length = torch.tensor([len(text)])
        torch.distributed.broadcast(length, 0)
        held = torch.frombuffer(text, dtype=torch.uint8).clone() if self.main else torch.empty(int(length), dtype=torch.uint8)
        torch.distributed.broadcast(held, 0)
        return json.loads(bytes(held.tolist()))

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over processes, in place."""
        if self.size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def agree(self, *flags: bool) -> tuple[bool, ...]:
        """Of each: whether it holds on some process."""
        return tuple(map(bool, self.sum(torch.tensor(flags, dtype=torch.float32)).tolist())) if self.size > 1 else flags

    def wait(self) -> None:
        """Until every process is here."""
        self.agree(False)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process goes through first, the others after it: they find what it wrote."""
        if not self.main:
            self.wait()
        yield
        if self.main:
            self.wait()


def is_main() -> bool:
    """Whether this process is the main one, or alone; before it joins, too."""
    return int(os.environ.get("RANK", "0")) == 0


def join() -> World:
    """The world that a launcher's environment describes; this process joins it. Alone where there is none."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World()
    if not torch.distributed.is_initialized():
        backend = "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            backend = "cpu:gloo,cuda:nccl"
        torch.distributed.init_process_group(backend, timeout=_PATIENCE)
    return World(torch.distributed.get_rank(), size)


def leave() -> None:
    """Ends this process's part, if it has joined."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
