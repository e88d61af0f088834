"""A linear layer and the log-probabilities of its softmax as one node of the autograd graph, some rows of logits at a time.

hidden: [N, H]; weight: [V, H]; bias: [V] or None; targets: int64 [N]. kind: format of the matrix products; rows: of logits at a time;
learning: whether gradients are wanted.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from temper.train.faster import ops
from temper.train.faster.flat import STEP


@dataclasses.dataclass
class Pass:
    """What a pass over the rows gives. found: log softmax(hidden weight^T + bias)[target], [N]. gradients: with slopes [N], those of
    sum(slopes x found) by hidden, weight and bias, where `wanted`."""

    found: Tensor
    gradients: list[Tensor | None]


def _pass(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, kind: torch.dtype, rows: int, slopes: Tensor | None, wanted: Any
) -> Pass:
    count, fill = targets.shape[0], -targets.shape[0] % STEP
    h, targets = F.pad(hidden.detach().to(kind), (0, 0, 0, fill)), F.pad(targets, (0, fill))
    w, b = weight.detach().to(kind), None if bias is None else bias.detach().to(kind)
    slopes = None if slopes is None else F.pad(slopes, (0, fill))
    found = h.new_empty(count + fill, dtype=torch.promote_types(kind, torch.float32))
    dh, dw, db = torch.empty_like(h) if wanted[0] else None, None, None
    for begin in range(0, count + fill, rows):
        part = slice(begin, begin + rows)
        logits = torch.mm(h[part], w.t()) if b is None else torch.addmm(b, h[part], w.t())
        found[part] = ops.log_probabilities(logits, targets[part], None if slopes is None else slopes[part])
        if slopes is None:
            continue
        if dh is not None:
            torch.mm(logits, w, out=dh[part])
        if wanted[1]:
            more = torch.mm(logits.t(), h[part])
            dw = more.to(weight.dtype) if dw is None else dw.add_(more)
        if bias is not None and wanted[2]:
            more = logits.sum(0, dtype=bias.dtype)
            db = more if db is None else db.add_(more)
    return Pass(found[:count], [None if dh is None else dh[:count].to(hidden.dtype), dw, db])


class Each(torch.autograd.Function):
    """The log-probabilities, [N]. Where the layer stands still the forward pass takes each one's gradient by its row of hidden, which
    the backward pass scales; else logits are computed again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, kind: torch.dtype, rows: int, learning: bool
    ) -> Tensor:
        ctx.kind, ctx.rows = kind, rows
        ctx.fixed = learning and ctx.needs_input_grad[0] and not any(ctx.needs_input_grad[1:3])
        slopes = _ones(targets, kind) if ctx.fixed else None
        made = _pass(hidden, weight, bias, targets, kind, rows, slopes, (ctx.fixed, False, False))
        ctx.save_for_backward(*(made.gradients[:1] if ctx.fixed else (hidden, weight, bias, targets)))
        return made.found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slopes: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.fixed:
            (each,) = ctx.saved_tensors
            return each * slopes[:, None].to(each.dtype), *(None,) * 6
        hidden, weight, bias, targets = ctx.saved_tensors
        made = _pass(hidden, weight, bias, targets, ctx.kind, ctx.rows, slopes, ctx.needs_input_grad)
        return *made.gradients, *(None,) * 4


def _ones(targets: Tensor, kind: torch.dtype) -> Tensor:
    return targets.new_ones(targets.shape, dtype=torch.promote_types(kind, torch.float32))


class Summed(torch.autograd.Function):
    """- their sum. Its gradients are taken in the forward pass, which has the logits."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, kind: torch.dtype, rows: int, learning: bool
    ) -> Tensor:
        wanted = ctx.needs_input_grad if learning else (False,) * 3
        slopes = -_ones(targets, kind) if any(wanted) else None
        made = _pass(hidden, weight, bias, targets, kind, rows, slopes, wanted)
        ctx.save_for_backward(*made.gradients)
        return -made.found.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        as_is = slope.is_cpu and slope.item() == 1  # as a rule; a large vocabulary's gradient is not copied then
        return *(one if one is None or as_is else one * slope.to(one.dtype) for one in ctx.saved_tensors), *(None,) * 4
