"""A model over several processes: copies that add up their gradients, or shards that are gathered when they compute.

An update is the same whatever the number of processes: its micro-batches are dealt out, gradients and counts are summed, and the
mean is taken over the whole. So a run goes on from its checkpoint with another number of processes.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from temper.lazy import torch
from temper.models import walk
from temper.parts import Problem
from temper.world import World

if TYPE_CHECKING:
    from temper.train.batching import Batch

Kind = Literal["replicate", "shard"]

_BUCKET = 2**23  # elements of gradients summed over processes at a time


# ------------------------------------------------------------------------------------------------------- the data


@dataclasses.dataclass(frozen=True)
class Piece:
    """A micro-batch of one process. number: names it within its update, for draws. counts: False where it only keeps step with
    the other processes and adds nothing."""

    batch: Batch
    number: int
    counts: bool = True


def deal(batches: Sequence[Batch], rank: int, size: int) -> list[Piece]:
    """This process's part of an update: as many pieces as every other process has, of about equal cost.

    Where an update has fewer micro-batches than processes, its largest are cut between rows (never between the two of a preference).
    """
    pieces = [Piece(batch, number) for number, batch in enumerate(batches)]
    if size == 1:
        return pieces
    while len(pieces) < size and (big := max(pieces, key=_rows)) and _rows(big) > 1:
        at, rows = pieces.index(big), len(big.batch.input_ids)
        middle = 2 * ((rows // 2 + 1) // 2)  # even: a preference's two rows stay together
        pieces[at : at + 1] = [Piece(_cut(big.batch, 0, middle), big.number), Piece(_cut(big.batch, middle, rows), len(pieces))]
    order = sorted(range(len(pieces)), key=lambda index: (-pieces[index].batch.input_ids.numel(), index))
    rounds = [order[start : start + size] for start in range(0, len(order), size)]
    # There and back again, so that nobody always has the largest.
    mine = [one[rank if turn % 2 == 0 else size - 1 - rank] for turn, one in enumerate(rounds) if len(one) == size]
    if len(rounds[-1]) < size:
        last = rounds[-1]
        spare = dataclasses.replace(pieces[last[-1]], counts=False)
        return [*(pieces[index] for index in mine), pieces[last[rank]] if rank < len(last) else spare]
    return [pieces[index] for index in mine]


def _rows(piece: Piece) -> int:
    """How many parts a piece could be cut into."""
    return (len(piece.batch.input_ids) + 1) // 2


def _cut(batch: Batch, first: int, last: int) -> Batch:
    """Rows `first` to `last` (not included) of a batch."""
    count = len(batch.input_ids)
    tensors = {name: value[first:last] for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    tokens = int(tensors["attention_mask"].sum()) if "attention_mask" in tensors else tensors["input_ids"].numel()
    rows = batch.rows[first:last] if len(batch.rows) == count else batch.rows
    return dataclasses.replace(
        batch, **tensors, rows=rows, keys=batch.keys[first:last], targets=int(tensors["supervised"].sum()), tokens=tokens
    )


# ------------------------------------------------------------------------------------------------------ the model


@dataclasses.dataclass(frozen=True)
class Spread:
    """A model as it trains. model: what the passes go through; under `shard` a twin of the caller's, whose parameters are DTensors."""

    model: Any
    world: World = dataclasses.field(default_factory=World)
    kind: Kind = "replicate"

    def syncs(self, last: bool) -> None:
        """Told before every backward pass: shards' gradients are summed over processes in an update's last one."""
        if self.kind == "shard":
            self.model.set_requires_gradient_sync(last)

    def reduce(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Sums over processes the gradients that are not yet: of whole parameters. Nobody's gradient stays nobody's."""
        whole = [one for one in parameters if not is_sharded(one)]
        if self.world.size == 1 or not whole:
            return
        has = self.world.sum(torch.tensor([float(one.grad is not None) for one in whole])).tolist()
        held = [one for one, some in zip(whole, has, strict=True) if some]
        for one in held:
            if one.grad is None:
                one.grad = torch.zeros_like(one)
        for some in _buckets([one.grad for one in held if one.grad is not None]):
            flat = self.world.sum(torch.cat([one.flatten() for one in some]))
            parts = flat.split([one.numel() for one in some])
            torch._foreach_copy_(some, [part.view_as(one) for part, one in zip(parts, some)])  # pyright: ignore[reportPrivateImportUsage]

    def norm(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        """Euclidean norm of all gradients together: a scalar tensor, on every process the same."""
        whole = [one for one in gradients if not is_sharded(one)]
        if len(whole) == len(gradients):
            return torch.nn.utils.get_total_norm(whole)
        squares = [torch.nn.utils.get_total_norm(local([one for one in gradients if is_sharded(one)])).square()]
        self.world.sum(squares[0])
        squares += [torch.nn.utils.get_total_norm(whole).square()] if whole else []
        return torch.stack(squares).sum().sqrt()

    def collect(self, model: Any) -> None:
        """Brings what was learnt home into the caller's model, on every process."""
        if model is self.model:
            return
        learnt = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        with torch.no_grad():
            for name, one in [*model.named_parameters(), *model.named_buffers()]:
                one.copy_(full(learnt[name]))


def spread(model: Any, world: World, kind: Kind, device: str) -> Spread:
    """Puts a model on several processes.

    replicate: the model itself, its state as on the main process. shard: a twin on `device` under FSDP2, block by block; weights stay
    in float32. Raises `Problem` where the blocks cannot be told, or shards are asked for and there is nobody to share with.
    """
    if kind == "shard" and world.size == 1:
        raise Problem("one process has nobody to share a model with; start several with `torchrun`, or use `distribute: replicate`")
    if world.size > 1 and kind == "replicate":
        with torch.no_grad():
            for one in [*model.parameters(), *model.buffers()]:
                torch.distributed.broadcast(one.detach(), 0)  # each loaded or drew the same; this makes sure
    if kind == "replicate":
        return Spread(model, world, kind)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    twin: Any = copy.deepcopy(model)
    mesh = init_device_mesh(device, (world.size,))
    parts: list[Any] = [*(block for _, block in walk.blocks(twin)), twin]
    for part in parts:
        fully_shard(part, mesh=mesh)
        part.set_force_sum_reduction_for_comms(True)  # gloo cannot scale as it sums
        part.set_gradient_divide_factor(1.0)  # the loop divides by the count of the whole update
    return Spread(twin, world, kind)


def choose(parameters: int, world: World, device: str) -> tuple[Kind, str]:
    """replicate or shard, and why; for `context.decide("distribute", ...)`. parameters: how many the model has."""
    if world.size == 1:
        return "replicate", "one process"
    need = 16 * parameters / 2**30  # weights, gradients and Adam's two means in float32
    if device == "cuda" and need > (room := torch.cuda.mem_get_info()[1] / 2**30) / 2:
        return "shard", f"weights, gradients and Adam's means may take {need:.1f} GiB, over half of a GPU's {room:.1f}"
    return "replicate", f"weights, gradients and Adam's means take at most {need:.2f} GiB"


def is_sharded(tensor: Any) -> bool:
    """Whether each process holds a part of it (a DTensor)."""
    return hasattr(tensor, "placements") and hasattr(tensor, "to_local")


def local(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """What this process holds of each tensor; writing to it writes to the tensor."""
    return [one.to_local() if is_sharded(one) else one for one in tensors]  # type: ignore[attr-defined]


def full(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor whole, on every process."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def like(tensor: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """A whole tensor, cut as `model` is where it has its shape."""
    if not is_sharded(model) or tensor.shape != model.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(model.device), model.device_mesh, model.placements, src_data_rank=None)  # type: ignore[attr-defined]


def _buckets(gradients: Sequence[torch.Tensor]) -> Iterable[list[torch.Tensor]]:
    """Gradients of one number format and about `_BUCKET` elements at a time."""
    some: list[torch.Tensor] = []
    for one in gradients:
        if some and (one.dtype != some[0].dtype or one.device != some[0].device or sum(map(torch.numel, some)) + one.numel() > _BUCKET):
            yield some
            some = []
        some.append(one)
    if some:
        yield some
