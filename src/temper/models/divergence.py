"""How far apart two models' predictions are, and how far a trained adapter on an NF4 base is from each way of merging it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from temper.lazy import torch
from temper.parts import Problem

if TYPE_CHECKING:
    from torch import Tensor, nn

_CHUNK = 2**21
"""Logits turned to probabilities at once: what caches hold."""


@dataclasses.dataclass
class Divergence:
    """Sums over tokens. kl: KL(reference || other), nats. gap: the greatest absolute difference of two logits. tokens: how many."""

    kl: float = 0.0
    gap: float = 0.0
    tokens: int = 0

    @property
    def mean(self) -> float:
        """Nats a token."""
        return self.kl / self.tokens

    def add(self, reference: Tensor, logits: Tensor) -> None:
        """Takes in logits [N, V] of N tokens."""
        kl, gap = divergence(reference, logits)
        self.kl += kl.sum(dtype=torch.float64).item()
        self.gap = max(self.gap, gap.max().item() if len(gap) else 0.0)
        self.tokens += len(kl)


def divergence(reference: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Of two models' logits [N, V]: KL(reference || other) = sum q (ln q - ln p), nats, and the greatest |difference|, float32 [N] each.

    Rows are taken in pieces, so that probabilities are never whole in memory.
    """
    if reference.shape != logits.shape:
        raise Problem(
            f"vocabularies of {reference.shape[-1]} and {logits.shape[-1]} tokens cannot be compared; give models of one tokenizer"
        )
    step = max(1, _CHUNK // logits.shape[-1])
    kl, gap = list[Any](), list[Any]()
    for theirs, ours in zip(reference.float().split(step), logits.float().split(step)):
        q, p = theirs.log_softmax(-1), ours.log_softmax(-1)
        more, q = q - p, q.exp()
        exact = q * (torch.expm1(-more.clamp(-1, 1)) + more)  # the terms with p - q added, which sums to 0: none is below 0
        kl.append(torch.where(more.abs() < 1, exact, p.exp() - q + q * more).sum(-1))
        gap.append((theirs - ours).abs().amax(-1))
    return torch.cat(kl), torch.cat(gap)


def apart(
    model: nn.Module, batches: Iterable[Any], logits: Callable[[nn.Module, Any], Tensor], targets: Mapping[str, Any]
) -> dict[str, Divergence]:
    """How far an adapted model on an NF4 base is from what it would be merged to, for each target.

    logits: (model, batch) -> [N, V]. targets: name -> (layer's name, own floats, what the adapter adds) -> the matrix that it would
    compute with; see `merge_targets`. Batches come one after the other, matrices are made one layer at a time: no second model is held.
    """
    from temper.models.nf4 import merged
    from temper.models.sample import evaluating

    found = {name: Divergence() for name in targets}
    with torch.no_grad(), evaluating(model):
        for batch in batches:
            trained = logits(model, batch)
            for name, becomes in targets.items():
                with merged(model, becomes):
                    found[name].add(trained, logits(model, batch))
    return found


def merge_targets(model: nn.Module, original: nn.Module, dtype: torch.dtype) -> dict[str, Callable[[str, Tensor, Tensor], Tensor]]:
    """What an adapter on an NF4 base may be merged to, for `apart`.

    merged_dequantised: the values that the base computed with. merged_float: the weights that these were made of, which the adapter
    never saw; `original` is the plain model with them. requantised: the first, to nearest NF4 again. dtype: in which weights leave.
    """
    from temper.models.nf4 import layers, nearest

    held = dict(layers(model))

    def on_float(name: str, own: Tensor, added: Tensor) -> Tensor:
        weight: Any = original.get_submodule(name).weight
        return (weight.detach().to(own) + added).to(dtype)

    def again(name: str, own: Tensor, added: Tensor) -> Tensor:
        packed = held[name].packed
        return nearest(own + added, block=packed.block, double=packed.twice)

    return {
        "merged_dequantised": lambda _, own, added: (own + added).to(dtype),
        "merged_float": on_float,
        "requantised": again,
    }
