"""Slot `surgery`: what is changed in a model's body before a delta goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from temper.lazy import torch
from temper.models.classifiers import plain
from temper.models.sample import evaluating
from temper.parts import Problem, part, slot

if TYPE_CHECKING:
    from torch import nn


@slot(phased=False)
class Surgery(Protocol):
    """What is changed in the body? `(model) -> model`. What is changed must be in what the model's folder says of itself."""

    def __call__(self, model: nn.Module) -> nn.Module: ...


@part
class Bidirectional:
    """Every token sees every other, those after it too.  Li et al. 2023, "Label Supervised LLaMA Finetuning", section 3.2

    Formula: softmax(Q K^T / sqrt(d)) V without the causal mask; padding stays hidden. In the folder: `is_causal: false` of config.json,
    which transformers 5 obeys.
    """

    def __call__(self, model: nn.Module) -> nn.Module:
        inner: Any = plain(model)
        inner.config.get_text_config().is_causal = False
        body, ids = inner.base_model, torch.tensor([[1, 2], [1, 3]], device=next(inner.parameters()).device)
        with torch.no_grad(), evaluating(inner):
            first, second = body(input_ids=ids, use_cache=False).last_hidden_state[:, 0].double()
        if torch.equal(first, second):
            raise Problem(f"{type(inner).__name__} sees nothing of what comes next, whatever its config.json says", ("surgery",))
        return model
