"""The attention kernel in place of `transformers`' sdpa, for models whose layers keep their own code."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from temper.train.faster import ops
from temper.train.faster.flat import causal, intervals
from temper.train.faster.nodes import Attention


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **rest: Any,
) -> tuple[Tensor, Any]:
    """`transformers`' attention interface: [B, h, T, size] -> [B, T, heads, size]. What the kernel does not do is left to sdpa."""
    batch, heads, length, size = query.shape
    same = key.shape == value.shape == (batch, key.shape[1], length, size) and heads % key.shape[1] == 0 and length > 1
    asked = dropout > 0 or any(rest.get(name) is not None for name in ("position_bias", "cache", "softcap"))
    kind = ops.computing(query)
    ours = same and not asked and ops.attends(query, key, value, ops.Turn()) and kind in (torch.float32, torch.bfloat16)
    looks_back = getattr(module, "is_causal", True) if is_causal is None else is_causal
    sequences = _sequences(attention_mask, batch, length, looks_back) if ours else None
    if sequences is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **rest)
    flat = (one.transpose(1, 2).reshape(batch * length, -1, size).to(kind).contiguous() for one in (query, key, value))
    out: Any = Attention.apply(*flat, size**-0.5 if scaling is None else scaling, sequences)
    return out.view(batch, length, heads, size), None


def _sequences(mask: Tensor | None, batch: int, length: int, looks_back: bool) -> ops.Sequences | None:
    """What tokens see. All layers ask it of one mask, which keeps the answer."""
    if mask is None:
        return _rows(batch, length, looks_back)
    if not hasattr(mask, "seen"):
        bounds = intervals(mask) if mask.shape == (batch, 1, length, length) else None
        mask.seen = None if bounds is None else causal(torch.full((batch,), length), bounds)  # type: ignore[attr-defined]
    return mask.seen  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=8)
def _rows(batch: int, length: int, looks_back: bool) -> ops.Sequences:
    own = torch.arange(batch).repeat_interleave(length) * length
    return causal(torch.full((batch,), length), None if looks_back else (own, own + length))


@contextmanager
def kernel_for_sdpa() -> Iterator[None]:
    """Within, models of `transformers` that attend by sdpa attend by the kernel, by its own table of attention functions."""
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
        if before is not ALL_ATTENTION_FUNCTIONS["sdpa"]:
            ALL_ATTENTION_FUNCTIONS["sdpa"] = before
