"""What a decoder's layer does between its matrix products, forward and backward: by a kernel where there is one, else by torch.

torch's version of each is the formula itself; float64 and other devices use it, and the tests hold the kernels to it.
x: [N, H], one row a token. Sums and roots are taken in float32 (float64 where the numbers are).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F

from temper.train.faster import native

_BLOCK = 64  # rows whose gradients of a norm's weight are summed in one go


def _threads() -> int:
    return torch.get_num_threads()


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def computing(x: torch.Tensor) -> torch.dtype:
    """In which format matrix products of `x` are taken: autocast's where it is on."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


def add(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x + y, in x's format."""
    if x.dtype != torch.float32 or not native.suits(x, y):
        return x + y.to(x.dtype)
    out = torch.empty_like(x)
    native.call("add", y.dtype, x, y, out, x.numel(), _threads())
    return out


# ---------------------------------------------------------------------------------------------------------- norm


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, kind: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Root-mean-square norm: h = x r (weight + offset), r = rsqrt(mean(x^2) + eps). Gives h in format `kind`, and r [N]."""
    if not _suits_norm(x, weight):
        r = torch.rsqrt(_wide(x).square().mean(-1) + eps)
        return normed(x, weight, r, offset, kind), r
    h, r = x.new_empty(x.shape, dtype=kind), x.new_empty(x.shape[0])
    native.call("norm", kind, x, weight, h, r, *x.shape, 0, _threads(), float(eps), float(offset))
    return h, r


def normed(x: torch.Tensor, weight: torch.Tensor, r: torch.Tensor, offset: float, kind: torch.dtype) -> torch.Tensor:
    """h once more, from r."""
    if not _suits_norm(x, weight):
        return (_wide(x) * r[:, None] * (_wide(weight) + offset)).to(kind)
    h = x.new_empty(x.shape, dtype=kind)
    native.call("norm", kind, x, weight, h, r, *x.shape, 1, _threads(), 0.0, float(offset))
    return h


def norm_backward(
    x: torch.Tensor, weight: torch.Tensor, r: torch.Tensor, offset: float, dh: torch.Tensor, dout: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """dout + the gradient that reaches x through h, and the weight's gradient."""
    if not _suits_norm(x, weight, dh, dout):
        n, g = _wide(x) * r[:, None], _wide(dh)
        slope = g * (_wide(weight) + offset)
        dx = (slope - n * (slope * n).mean(-1, keepdim=True)) * r[:, None]
        return (_wide(dout) + dx).to(x.dtype), (g * n).sum(0).to(weight.dtype)
    dx, sums = torch.empty_like(x), x.new_empty(-(-x.shape[0] // _BLOCK), x.shape[1])
    native.call("norm_backward", dh.dtype, x, r, weight, dh, dout, dx, sums, *x.shape, _BLOCK, _threads(), float(offset))
    return dx, sums.sum(0)


def _suits_norm(x: torch.Tensor, weight: torch.Tensor, *gradients: torch.Tensor) -> bool:
    """Whether the kernels take them, which keep hidden states and a norm's weight in float32."""
    return native.suits(x, weight, *gradients) and x.dtype == weight.dtype == torch.float32


# ------------------------------------------------------------------------------------------------------ gated MLP

Act = Literal["silu", "gelu"]
"""gelu: with the hyperbolic tangent."""


def _act(x: torch.Tensor, act: Act) -> torch.Tensor:
    return F.silu(x) if act == "silu" else F.gelu(x, approximate="tanh")


def gate(both: torch.Tensor, act: Act) -> torch.Tensor:
    """act(gate) up: [N, 2F] -> [N, F]; gate and up stand side by side."""
    if not native.suits(both):
        one, two = both.chunk(2, -1)
        return _act(one, act) * two
    made = both.new_empty(both.shape[0], both.shape[1] // 2)
    native.call(act, both.dtype, both, made, *made.shape, _threads())
    return made


def gate_backward(both: torch.Tensor, dmade: torch.Tensor, act: Act) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of `both`, and act(gate) up once more. Overwrites `dmade`."""
    if not native.suits(both, dmade):
        with torch.enable_grad():
            made = gate(own := both.detach().requires_grad_(), act)
        return torch.autograd.grad(made, own, dmade)[0], made.detach()
    dboth = torch.empty_like(both)
    native.call(f"{act}_backward", both.dtype, both, dmade, dboth, *dmade.shape, _threads())
    return dboth, dmade


# -------------------------------------------------------------------------------------------------------- dropout


def drop(x: torch.Tensor, share: float, seed: int) -> torch.Tensor:
    """x with a share of its numbers set to 0 and the others scaled by 1 / (1 - share): which ones, the seed (63 bits) says.

    Formula: number i stays where mix(mix(i + low half) ^ high half) >= share 2^32, mix being a hash of 32 bits.
    """
    low, high, least, scale = seed & _WORD, seed >> 32, min(round(share * 2**32), _WORD), 1 / (1 - share)
    if native.suits(x):
        made = torch.empty_like(x)
        native.call("drop", x.dtype, x, made, x.numel(), low, high, least, _threads(), scale)
        return made
    drawn = _mix(_mix(torch.arange(x.numel(), device=x.device) + low) ^ high)
    return (_wide(x) * ((drawn >= least) * scale).view(x.shape).to(_wide(x).dtype)).to(x.dtype)


_WORD = 2**32 - 1


def _mix(x: torch.Tensor) -> torch.Tensor:
    """A hash of 32 bits, which is kept in int64 here (C. Wellons 2018, "Prospecting for hash functions": lowbias32)."""
    x = x & _WORD
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> shift)) * factor) & _WORD
    return x ^ (x >> 16)


# ------------------------------------------------------------------------------------------------------ attention


@dataclasses.dataclass(frozen=True, eq=False)
class Sequences:
    """Sequences laid one after the other in N tokens. first, last: int32 [N], token i sees the tokens first[i] <= j < last[i] of
    its own sequence. begins: int32 [S + 1], where each begins; N at the end. fixed: whether no window narrows what is seen."""

    first: torch.Tensor
    last: torch.Tensor
    begins: torch.Tensor
    fixed: bool = False

    def within(self, window: int | None) -> Sequences:
        """The same where a token sees itself and the `window` - 1 tokens before it at most."""
        if window is None or self.fixed or int(self.begins.diff().max()) <= window:
            return self
        return dataclasses.replace(self, first=torch.maximum(self.first, self.last - window))


@dataclasses.dataclass(frozen=True, eq=False)
class Turn:
    """What queries and keys go through before they meet: a norm of each head, with weights [size] (or None), then a rotation by cos and
    sin [N, size] (or None): (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin) for the halves of a head. eps, offset: see `norm`.
    """

    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None
    q_weight: torch.Tensor | None = None
    k_weight: torch.Tensor | None = None
    eps: float = 0.0
    offset: float = 0.0

    def __call__(self, x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        """[N, h, size] in float32 (float64)."""
        x = _wide(x)
        if weight is not None:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (weight + self.offset)
        if self.cos is not None and self.sin is not None:
            low, high = x.chunk(2, -1)
            x = x * self.cos[:, None] + torch.cat((-high, low), -1) * self.sin[:, None]
        return x


Three = tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]
"""Queries [N, heads, size], keys and values [N, kv_heads, size]; each may be a view into rows of more."""


def attention(qkv: Three, scale: float, turn: Turn, sequences: Sequences) -> tuple[torch.Tensor, torch.Tensor | None]:
    """softmax(scale q k^T) v over what each token sees: [N, heads, size].

    Gives besides, where a kernel computes, the logarithm (base 2) of each sum of exponentials, [heads, N].
    """
    if not attends(*qkv, turn):
        return _attention(*qkv, scale, turn, sequences), None
    q = qkv[0]
    out, log = q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    native.call("attention", q.dtype, _described(qkv, scale, turn, sequences, o=out, lse=log))
    return out, log


def attention_backward(
    qkv: Three, scale: float, turn: Turn, sequences: Sequences, out: torch.Tensor, log: torch.Tensor | None, dout: torch.Tensor, into: Three
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Writes the gradients of q, k and v `into` tensors that stand as these do; gives those of q_weight and k_weight."""
    weights = turn.q_weight, turn.k_weight
    if log is None:
        given = [None if one is None else one.detach().requires_grad_() for one in (*qkv, *weights)]
        with torch.enable_grad():
            own = dataclasses.replace(turn, q_weight=given[3], k_weight=given[4])
            made = _attention(*given[:3], scale, own, sequences)  # type: ignore[arg-type]
        found = iter(torch.autograd.grad(made, [one for one in given if one is not None], dout))
        for one in into:
            one.copy_(next(found))
        first, second = (None if one is None else next(found) for one in weights)
        return first, second
    items = (sequences.begins.shape[0] - 1) * qkv[1].shape[1]
    sums = [None if one is None else one.new_zeros(items, one.shape[0]) for one in weights]
    native.call("attention_backward", dout.dtype, _described(qkv, scale, turn, sequences, o=out, lse=log, dout=dout, into=into, sums=sums))
    first, second = (None if one is None else one.sum(0) for one in sums)
    return first, second


def attends(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, turn: Turn) -> bool:
    """Whether the kernel takes them: heads of an even size up to 512, the numbers of one head side by side."""
    turned = all(one is None or one.dtype == torch.float32 for one in (turn.cos, turn.sin, turn.q_weight, turn.k_weight))
    sides = all(one.stride(-1) == 1 and one.shape[-1] == q.shape[-1] <= 512 for one in (q, k, v))
    return native.suits(q, k, v) and turned and sides and q.shape[-1] % 2 == 0


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, turn: Turn, sequences: Sequences) -> torch.Tensor:
    """The formula, a sequence at a time."""
    kind, group = q.dtype, q.shape[1] // k.shape[1]
    q, k = turn(q, turn.q_weight).to(kind), turn(k, turn.k_weight).to(kind)
    made, begins = [], sequences.begins.tolist()
    for begin, end in itertools.pairwise(begins):
        q_own, k_own, v_own = (one[begin:end].transpose(0, 1) for one in (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)))
        places = torch.arange(begin, end, device=q.device)
        sees = (places >= sequences.first[begin:end, None]) & (places < sequences.last[begin:end, None])
        scores = _wide(q_own @ k_own.transpose(1, 2)) * scale
        shares = scores.masked_fill(~sees, -torch.inf).softmax(-1).nan_to_num(0.0)  # where nothing is seen, nothing comes out
        made.append((shares.to(kind) @ v_own).transpose(0, 1))
    return torch.cat(made)


def _described(
    qkv: Three,
    scale: float,
    turn: Turn,
    sequences: Sequences,
    *,
    o: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor | None = None,
    into: Three | tuple[None, None, None] = (None, None, None),
    sums: Sequence[torch.Tensor | None] = (None, None),
) -> native.Attention:
    """The kernel's arguments."""
    (q, k, v), (dq, dk, dv), (dq_weight, dk_weight) = qkv, into, sums
    pointers = (q, k, v, o, dout, dq, dk, dv, turn.cos, turn.sin, turn.q_weight, turn.k_weight, lse, dq_weight, dk_weight)
    seen = sequences.first, sequences.last, sequences.begins
    steps = (step for one in qkv for step in one.stride()[:2])
    counts = sequences.begins.shape[0] - 1, q.shape[0], q.shape[1], k.shape[1], q.shape[2], _threads()
    given = (None if one is None else one.data_ptr() for one in (*pointers, *seen))
    return native.Attention(*given, *steps, *counts, scale, turn.eps, turn.offset)


# ------------------------------------------------------------------------------------------------ log-probabilities


def log_probabilities(logits: torch.Tensor, targets: torch.Tensor, slopes: torch.Tensor | None = None) -> torch.Tensor:
    """log softmax(logits)[target]: [n, V], int64 [n] -> [n] in float32 (float64).

    slopes: [n]; where given, logits are overwritten by the gradient of sum(slopes x result).
    """
    if not native.suits(logits):
        logs = _wide(logits).log_softmax(-1)
        found = logs.gather(1, targets[:, None])[:, 0]
        if slopes is not None:
            logits.copy_(logs.exp_().mul_(-slopes[:, None]))
            rows = torch.arange(logits.shape[0], device=logits.device)
            logits[rows, targets] = ((1 - found.exp()) * slopes).to(logits.dtype)
        return found
    found = logits.new_empty(logits.shape[0], dtype=torch.float32)
    native.call("cross", logits.dtype, logits, targets, slopes, found, *logits.shape, _threads())
    return found
