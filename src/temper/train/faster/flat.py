"""Batches laid flat: the real tokens of all rows one after the other, and what each of them attends to."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from temper.train.faster import ops

STEP = 32
"""Rows of a matrix product are filled up to a multiple of it: the first product of a new shape costs as much as two."""


@dataclasses.dataclass(frozen=True, eq=False)
class Flat:
    """A batch [B, T] laid flat: its `count` tokens that are not padding, then a few more that nothing looks at, N in all.

    places: int64 [N], where each stood among the B T, or None where each stands there still. positions: int64 [1, N].
    """

    sequences: ops.Sequences
    positions: Tensor
    places: Tensor | None
    count: int

    def lay(self, x: Tensor) -> Tensor:
        """[B, T, H] -> [1, N, H]."""
        x = x.flatten(0, 1)
        return (x if self.places is None else x[self.places])[None]

    def stand(self, x: Tensor, shape: torch.Size) -> Tensor:
        """[1, N, H] -> [B, T, H], 0 on padding."""
        if self.places is None:
            return x.view(shape)
        return x.new_zeros(shape).flatten(0, 1).index_copy(0, self.places[: self.count], x[0, : self.count]).view(shape)


def flat(batch: int, length: int, mask: Any, positions: Tensor | None, device: torch.device) -> Flat | None:
    """How a batch is laid flat; None where attention does not consist of intervals.

    mask: [B, T], 0 on padding, or bool [B, 1, T, T], which query sees which key. positions: [B, T]; without a mask, attention
    starts anew wherever they do not go on by 1, as in `transformers`.
    """
    total, where = batch * length, torch.arange(length, device=device) if positions is None else positions
    known = mask is None or (isinstance(mask, Tensor) and mask.ndim in (2, 4) and mask.shape[-1] == length)
    if where.ndim > 2 or not known:
        return None
    where = where.expand(batch, length)
    kept, bounds, lengths = None, None, torch.full((batch,), length, device=device)
    if mask is not None and mask.ndim == 4:
        if (bounds := intervals(mask)) is None:
            return None
        kept, bounds = _seeing(*bounds)
        lengths = lengths if kept is None else kept.view(batch, length).sum(1)
    elif mask is not None and not bool((mask != 0).all()):
        kept, lengths = mask != 0, (mask != 0).sum(1)
    elif mask is None and positions is not None:
        anew = torch.cat((where.new_ones(batch, 1), where.diff(dim=1) != 1), 1).flatten().nonzero()[:, 0]
        lengths = torch.cat((anew, anew.new_tensor([total]))).diff()
    places = None if kept is None else kept.flatten().nonzero()[:, 0]
    count = total if places is None else places.shape[0]
    if fill := -count % STEP:
        places = torch.cat((torch.arange(total, device=device) if places is None else places, lengths.new_zeros(fill)))
        lengths = torch.cat((lengths, lengths.new_tensor([fill])))
    where = where.flatten()
    return Flat(causal(lengths, bounds), (where if places is None else where[places])[None], places, count)


def _seeing(first: Tensor, last: Tensor) -> tuple[Tensor | None, tuple[Tensor, Tensor]]:
    """Leaves out the tokens that see nothing, where no other sees them either: which stay (None: all), and the bounds among them."""
    kept = last > first
    rank = torch.cat((kept.new_zeros(1), kept)).cumsum(0)  # how many stay before each
    closer = rank[first[kept]], rank[last[kept]]
    whole = torch.equal(closer[1] - closer[0], (last - first)[kept])
    return (kept, closer) if whole and not bool(kept.all()) else (None, (first, last))


def causal(lengths: Tensor, bounds: tuple[Tensor, Tensor] | None = None) -> ops.Sequences:
    """Sequences of these lengths (int64 [S]), in which a token sees itself and all before it, or what `bounds` say of the first."""
    begins = torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
    first, last = begins[:-1].repeat_interleave(lengths), torch.arange(1, int(begins[-1]) + 1, device=lengths.device)
    if bounds is not None:
        first, last = (torch.cat((one, other[one.shape[0] :])) for one, other in zip(bounds, (first, last), strict=True))
    return ops.Sequences(first.int(), last.int(), begins.int(), fixed=bounds is not None)


def intervals(mask: Tensor) -> tuple[Tensor, Tensor] | None:
    """First and last + 1 of the keys that each query sees, counted over the batch, if they follow one another in every row.

    mask: bool [B, 1, T, T] -> int64 [B T] twice. None of another mask.
    """
    if mask.dtype != torch.bool or mask.shape[1] != 1:
        return None
    batch, _, length, _ = mask.shape
    first, count = mask[:, 0].byte().argmax(-1), mask[:, 0].sum(-1)
    place = torch.arange(length, device=mask.device)
    inside = (place >= first[..., None]) & (place < (first + count)[..., None])
    if not torch.equal(inside, mask[:, 0]):
        return None
    first = first + torch.arange(batch, device=mask.device)[:, None] * length
    return first.flatten(), (first + count).flatten()
