"""Which models keep documents apart that stand side by side in a row."""

from __future__ import annotations

from typing import Any

from temper.lazy import torch
from temper.models.sample import evaluating

_EACH = 5  # tokens of each of the two documents that are tried


def can_separate(model: Any, rows: int = 2) -> bool:
    """Whether positions that start anew within a row start attention anew, tried out on `model` with `rows` rows in a batch.

    What is said of a document must not depend on the one before it, and be what is said of it alone, both up to rounding. A state-space
    model carries its state across. Under flash attention one row alone is kept apart: for layout `flat` ask with one row, for `packed`
    with several. Takes three passes over 10 tokens a row.
    """
    device, vocabulary = next(model.parameters()).device, model.config.get_text_config().vocab_size
    first, second = (torch.arange(begin, begin + 2 * _EACH, device=device).remainder(vocabulary).expand(rows, -1) for begin in (0, 1))
    second = torch.cat([second[:, :_EACH], first[:, _EACH:]], 1)
    alone = torch.arange(_EACH, device=device).expand(rows, -1)

    def said(tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return model(input_ids=tokens, position_ids=positions, use_cache=False).logits[:, -_EACH:]

    with torch.no_grad(), evaluating(model):
        try:
            one, two = (said(tokens, alone.repeat(1, 2)) for tokens in (first, second))
            own = said(first[:, _EACH:], alone)
        except TypeError:  # it takes no positions
            return False
    eps, most = torch.finfo(own.dtype).eps, own.abs().max()
    # The first two passes differ in nothing but the document before; another shape rounds otherwise.
    return bool((one - two).abs().max() <= 16 * eps * most) and bool((one - own).abs().max() <= eps**0.5 * most)
