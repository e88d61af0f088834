"""A loss on how evenly the experts of an adapter are used, beside the loss of the tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from temper.lazy import F, torch
from temper.parts import Problem, Rate, part
from temper.train.objectives.base import Sum

if TYPE_CHECKING:
    from temper.context import Context
    from temper.train.batching import Batch


def balance(logits: torch.Tensor) -> torch.Tensor:
    """K sum_k f_k P_k of a router's logits [N, K]: f_k, the share of tokens whose largest gate is k's, P_k, the mean gate of k.

    1 where the experts are used evenly, up to K where one is used alone; it learns through P.  Fedus et al. 2021, eqs. 4-6.
    """
    gates = F.softmax(logits.float(), -1)
    count = gates.shape[-1]
    used = F.one_hot(gates.argmax(-1), count).float().mean(0)
    return count * (used * gates.mean(0)).sum()


@part(name="load-balance")
class LoadBalance:
    """How unevenly the low-rank experts of each layer are used, mean over the layers; stands in a list after the loss of the tokens.

    Chen et al. 2024, "LLaVA-MoLE", eq. 7, in the scale of Fedus et al. 2021.  Formula: weight K sum_k f_k P_k, f_k the share of a
    micro-batch's tokens that go to expert k, P_k its mean gate. Padding, and whatever else stands after a row's last target, does not
    count.
    """

    weight: Rate = 0.01
    """Multiplies the term, which is 1 where the experts of a layer are used evenly and K where one of K is used alone."""

    def start(self, context: Context) -> Balancing:
        return Balancing(self, context.want("model"))


class Balancing:
    """A load balance at work: the layers record their routers' logits, and it takes what the loss before it left there."""

    def __init__(self, part: LoadBalance, model: Any):
        from temper.models.deltas.tuners.low_rank_experts import layers

        self.part, self._layers = part, layers(model)
        if not self._layers:
            raise Problem("`load-balance` is about an adapter's experts, and the model has none; use delta `low-rank-experts`")
        for layer in self._layers:
            layer.recorded = {}

    def __call__(self, model: Any, batch: Batch) -> Sum:
        counts = _before_the_last_target(batch.supervised)
        terms = [balance(self._real(logits, counts)) for layer in self._layers for logits in (layer.recorded or {}).values()]
        if not terms:
            raise Problem("`load-balance` reads what the loss before it left, and there is none; write it last in a list of losses")
        for layer in self._layers:
            layer.recorded = {}
        return Sum(self.part.weight * batch.targets * torch.stack(terms).mean(), batch.targets)

    def close(self) -> None:
        for layer in self._layers:
            layer.recorded = None

    def _real(self, logits: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """The logits [N, K] of the tokens that count. Layers inside a mixture of experts see some of the tokens, laid flat: all of them."""
        if logits.shape[:-1] == counts.shape:
            return logits[counts]
        if logits.ndim == 2:
            return logits
        raise Problem(
            f"`load-balance` has a batch of shape {list(counts.shape)} and the loss before it made one of {list(logits.shape[:-1])} of it; "
            "use a loss that takes batches as they are, such as `causal`"
        )


def _before_the_last_target(supervised: torch.Tensor) -> torch.Tensor:
    """Which tokens stand at or before the last target of their row, bool [B, T]."""
    return supervised.flip(1).cumsum(1).flip(1) > 0
