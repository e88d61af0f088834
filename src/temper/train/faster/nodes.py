"""A decoder layer as two nodes of the autograd graph, each with its gradient written out: attention, then the gated MLP.

Both are x + f(norm(x)) over tokens laid flat, x: [N, H]. They keep few tensors for the backward pass and take the others again.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from temper.train.faster import ops


@dataclasses.dataclass(frozen=True, eq=False)
class Linear:
    """A linear layer and what LoRA adds to it: y = h weight^T + bias + scale (d(h) down^T) up^T, d dropping a share of its numbers."""

    weight: Tensor
    bias: Tensor | None = None
    down: Tensor | None = None
    up: Tensor | None = None
    scale: float = 1.0
    dropout: float = 0.0

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.weight, self.bias, self.down, self.up


class Product:
    """Linear layers of one input as one matrix product, in the number format of the computation.

    weight: [O, I], those of the layers below one another; down: [R, I] likewise; up: [O, R], block-diagonal, scales included.
    """

    def __init__(self, linears: Sequence[Linear], weight: Tensor, kind: torch.dtype):
        self.linears, self.weight = linears, weight
        self.rows = _slices([one.weight.shape[0] for one in linears])
        self.ranks = _slices([0 if one.down is None else one.down.shape[0] for one in linears])
        self.bias: Tensor | None = None
        self.down: Tensor | None = None
        self.up: Tensor | None = None
        if any(one.bias is not None for one in linears):
            self.bias = torch.cat([weight.new_zeros(one.weight.shape[0]) if one.bias is None else one.bias.to(kind) for one in linears])
        if downs := [one.down for one in linears if one.down is not None]:
            self.down = torch.cat(downs).to(kind)
            self.up = weight.new_zeros(weight.shape[0], self.down.shape[0])
            for one, rows, rank in zip(linears, self.rows, self.ranks, strict=True):
                if one.up is not None:
                    self.up[rows, rank] = one.scale * one.up
        # Masks are functions of a seed and made again in the backward pass. Seeds come from torch's generator, as its dropout does.
        self.seeds = [int(torch.randint(2**63 - 1, ())) if one.dropout else 0 for one in linears]

    @property
    def tensors(self) -> list[Tensor | None]:
        return [tensor for one in self.linears for tensor in one.tensors]

    def split(self, y: Tensor, size: int) -> ops.Three:
        """[N, O] -> the layers' outputs, each in heads of `size`."""
        return y.view(y.shape[0], -1, size).split([(rows.stop - rows.start) // size for rows in self.rows], 1)  # type: ignore[return-value]

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor | None]:
        """y [N, O], and d(h) down^T [N, R] for the backward pass."""
        y = torch.mm(h, self.weight.t()) if self.bias is None else torch.addmm(self.bias, h, self.weight.t())
        if self.down is None or self.up is None:
            return y, None
        low = torch.cat([torch.mm(dropped, self.down[rank].t()) for dropped, rank in self._dropped(h)], 1)
        return y.addmm_(low, self.up.t()), low

    def backward(self, dy: Tensor, wanted: bool = True) -> tuple[Tensor | None, Tensor | None]:
        """dh [N, I], if wanted, and dy up [N, R]."""
        dlow = None if self.up is None else torch.mm(dy, self.up)
        dh = torch.mm(dy, self.weight) if wanted else None
        if dh is not None and dlow is not None and self.down is not None:
            for rank, dropout, seed in self._drops():
                if dropout:
                    dh += ops.drop(torch.mm(dlow[:, rank], self.down[rank]), dropout, seed)
                else:
                    dh.addmm_(dlow[:, rank], self.down[rank])
        return dh, dlow

    def gradients(self, needed: Sequence[bool], dy: Tensor, h: Tensor, low: Tensor | None, dlow: Tensor | None) -> list[Tensor | None]:
        """The gradients of `tensors`, where needed."""
        dweight = torch.mm(dy.t(), h) if any(needed[0::4]) else None
        ddown = dup = None
        if low is not None and dlow is not None and any(needed[2::4]):
            ddown = torch.cat([torch.mm(dlow[:, rank].t(), dropped) for dropped, rank in self._dropped(h)])
            dup = torch.mm(dy.t(), low)
        found: list[Tensor | None] = []
        for place, (one, rows, rank) in enumerate(zip(self.linears, self.rows, self.ranks, strict=True)):
            of = needed[4 * place : 4 * place + 4]
            found += (
                dweight[rows].to(one.weight.dtype) if dweight is not None and of[0] else None,
                dy[:, rows].sum(0, dtype=one.bias.dtype) if one.bias is not None and of[1] else None,
                ddown[rank].to(one.down.dtype) if ddown is not None and one.down is not None and of[2] else None,
                dup[rows, rank].to(one.up.dtype).mul_(one.scale) if dup is not None and one.up is not None and of[3] else None,
            )
        return found

    def _drops(self) -> list[tuple[slice, float, int]]:
        """Which ranks share one mask of their input: rank, dropout, seed. All do where nothing is dropped."""
        each = [(rank, one.dropout, seed) for rank, one, seed in zip(self.ranks, self.linears, self.seeds, strict=True)]
        return each if any(self.seeds) else [(slice(0, self.ranks[-1].stop), 0.0, 0)]

    def _dropped(self, h: Tensor) -> Iterator[tuple[Tensor, slice]]:
        """What the adapters of some ranks take: d(h), rank."""
        for rank, dropout, seed in self._drops():
            yield (ops.drop(h, dropout, seed) if dropout else h), rank


def _slices(lengths: list[int]) -> list[slice]:
    ends = [0, *itertools.accumulate(lengths)]
    return [slice(begin, end) for begin, end in itertools.pairwise(ends)]


@dataclasses.dataclass(frozen=True, eq=False)
class Norm:
    """A root-mean-square norm: x rsqrt(mean(x^2) + eps) (weight + offset)."""

    weight: Tensor
    eps: float
    offset: float


class Attend(torch.autograd.Function):
    """x + o(attention(qkv(norm(x)))). size: of a head. q_weight, k_weight: those of `turn`, for their gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        norm: Norm,
        size: int,
        scale: float,
        turn: ops.Turn,
        sequences: ops.Sequences,
        qkv: Product,
        o: Product,
        *tensors: Tensor | None,
    ) -> Tensor:
        h, r = ops.norm(x, norm_weight, norm.eps, norm.offset, qkv.weight.dtype)
        mixed, low = qkv.forward(h)
        attended, log = ops.attention(qkv.split(mixed, size), scale, turn, sequences)
        y, o_low = o.forward(attended.flatten(1))
        ctx.save_for_backward(x, norm_weight, r, mixed, low, attended, log, o_low)
        ctx.norm, ctx.size, ctx.scale, ctx.turn, ctx.sequences, ctx.qkv, ctx.o = norm, size, scale, turn, sequences, qkv, o
        return ops.add(x, y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, norm_weight, r, mixed, low, attended, log, o_low = ctx.saved_tensors
        qkv, o, size, needed = ctx.qkv, ctx.o, ctx.size, ctx.needs_input_grad
        dout = dout.contiguous()
        g = dout.to(mixed.dtype)
        dattended, do_low = o.backward(g)
        of_o = o.gradients(needed[-len(o.tensors) :], g, attended.flatten(1), o_low, do_low)
        dmixed = torch.empty_like(mixed)
        three, into = qkv.split(mixed, size), qkv.split(dmixed, size)
        dq, dk = ops.attention_backward(three, ctx.scale, ctx.turn, ctx.sequences, attended, log, dattended.view_as(attended), into)
        h = ops.normed(x, norm_weight, r, ctx.norm.offset, mixed.dtype)
        dh, dlow = qkv.backward(dmixed, needed[0] or needed[1])
        of_qkv = qkv.gradients(needed[11 : 11 + len(qkv.tensors)], dmixed, h, low, dlow)
        dx, dweight = (None, None) if dh is None else ops.norm_backward(x, norm_weight, r, ctx.norm.offset, dh, dout)
        return dx, dweight, dq, dk, *(None,) * 7, *of_qkv, *of_o


class GatedMLP(torch.autograd.Function):
    """x + down(act(gate(norm(x))) up(norm(x)))."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm_weight: Tensor, norm: Norm, act: ops.Act, into: Product, outof: Product, *tensors: Tensor | None
    ) -> Tensor:
        h, r = ops.norm(x, norm_weight, norm.eps, norm.offset, into.weight.dtype)
        both, low = into.forward(h)
        y, out_low = outof.forward(ops.gate(both, act))
        ctx.save_for_backward(x, norm_weight, r, both, low, out_low)
        ctx.norm, ctx.act, ctx.into, ctx.outof = norm, act, into, outof
        return ops.add(x, y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, norm_weight, r, both, low, out_low = ctx.saved_tensors
        into, outof, needed = ctx.into, ctx.outof, ctx.needs_input_grad
        dout = dout.contiguous()
        g = dout.to(both.dtype)
        dmade, dout_low = outof.backward(g)
        dboth, made = ops.gate_backward(both, dmade, ctx.act)
        of_outof = outof.gradients(needed[-len(outof.tensors) :], g, made, out_low, dout_low)
        h = ops.normed(x, norm_weight, r, ctx.norm.offset, both.dtype)
        dh, dlow = into.backward(dboth, needed[0] or needed[1])
        of_into = into.gradients(needed[6 : 6 + len(into.tensors)], dboth, h, low, dlow)
        dx, dweight = (None, None) if dh is None else ops.norm_backward(x, norm_weight, r, ctx.norm.offset, dh, dout)
        return dx, dweight, *(None,) * 4, *of_into, *of_outof


class Normed(torch.autograd.Function):
    """A norm alone, in x's format."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, norm: Norm) -> Tensor:
        h, r = ops.norm(x, weight, norm.eps, norm.offset, x.dtype)
        ctx.save_for_backward(x, weight, r)
        ctx.norm = norm
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, r = ctx.saved_tensors
        return *ops.norm_backward(x, weight, r, ctx.norm.offset, dh.contiguous(), torch.zeros_like(x)), None


class Attention(torch.autograd.Function):
    """Attention alone: of q [N, heads, size], k and v [N, kv_heads, size]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, sequences: ops.Sequences) -> Tensor:
        out, log = ops.attention((q, k, v), scale, ops.Turn(), sequences)
        ctx.save_for_backward(q, k, v, out, log)
        ctx.scale, ctx.sequences = scale, sequences
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        *qkv, out, log = ctx.saved_tensors
        into: Any = tuple(one.new_empty(one.shape) for one in qkv)
        ops.attention_backward(tuple(qkv), ctx.scale, ops.Turn(), ctx.sequences, out, log, dout.contiguous(), into)  # type: ignore[arg-type]
        return *into, None, None
