"""Attention that an objective decides on: the mask that says which token sees which, and whether a model keeps to it."""

from __future__ import annotations

from typing import Any

from temper.lazy import torch
from temper.models.sample import evaluating
from temper.parts import Problem


def full_mask(model: Any, seen: torch.Tensor) -> torch.Tensor:
    """What a model of transformers takes as `attention_mask` [B, 1, T, T] where token t sees those in seen[b, t], bool [B, T, T].

    Raises `Problem` where the model would not keep to it: its attention has no place for a mask, or a window that the row exceeds.
    """
    implementation = getattr(model.config, "_attn_implementation", None) or "eager"
    if "flash" in implementation or "flex" in implementation:
        raise Problem(f"{implementation} takes no mask that says who sees whom; load the model with attn_implementation sdpa or eager")
    windows = (getattr(model.config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    if (window := min((one for one in windows if one), default=None)) and seen.shape[-1] > window:
        raise Problem(f"rows of {seen.shape[-1]} tokens exceed the model's attention window of {window}; make them no longer than that")
    if implementation != "eager":
        return seen[:, None]
    return torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None]


def check_mask(model: Any, name: str) -> None:
    """Refuses a model that does not keep to a mask, by trying it on two documents of two tokens that see all of themselves.

    A change of a token must show at its document's other token, on either side, and nowhere in the other document. A state-space model
    fails here, a mixed one too.
    """
    device = next(model.parameters()).device
    document = torch.tensor([0, 0, 1, 1], device=device)
    mask = full_mask(model, (document[:, None] == document)[None])
    rows = [[0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]]
    try:
        with torch.no_grad(), evaluating(model):
            logits = (model(input_ids=torch.tensor([row], device=device), attention_mask=mask, use_cache=False).logits for row in rows)
            plain, first, last = (one[0] for one in logits)
    except Exception as error:
        raise Problem(f"`{name}` needs attention with a mask [B, 1, T, T], and {type(model).__name__} fails on one: {error}") from error
    after, before = ((one - plain).abs().amax(-1).tolist() for one in (first, last))
    forward, backward, leak = after[1], before[2], max(*after[2:], *before[:2])
    tiny = 1e-5 * after[0]  # what rounding may do where experts are chosen; a fresh model may not mix tokens at all yet
    if leak > 0.01 * forward + tiny or (forward > tiny and backward < 0.01 * forward):
        raise Problem(
            f"`{name}` needs attention that sees both sides, and {type(model).__name__} does not keep to a mask [B, 1, T, T] that says so "
            "(a state-space or linear-attention model reads from left to right); use `causal`"
        )
