"""Slot `loss`: what is minimised of a pair."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Protocol

from pydantic import Field

from temper.align.scores import margin
from temper.lazy import F
from temper.parts import Rate, part, slot

if TYPE_CHECKING:
    from temper.align.scores import Compared
    from temper.lazy import torch


def added(losses: Sequence[Callable[[Compared], torch.Tensor]]) -> Callable[[Compared], torch.Tensor]:
    """How a list of losses acts as one: their sum, each with its own weight."""
    return lambda compared: sum((loss(compared) for loss in losses[1:]), losses[0](compared))


@slot(combine=added)
class Loss(Protocol):
    """What is minimised? `(compared) -> [P]`, one number a pair; the skeleton averages over pairs. A list is summed.

    compared: what policy and reference say of P pairs, by response and by token (`scores.Compared`).
    """

    def __call__(self, compared: Compared) -> torch.Tensor: ...


# ------------------------------------------------------------------------------------------------- pure functions


def dpo(
    policy_chosen: torch.Tensor,
    policy_rejected: torch.Tensor,
    reference_chosen: torch.Tensor,
    reference_rejected: torch.Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Direct Preference Optimization, from log-probabilities [P] to losses [P].

    Rafailov et al. 2023, "Direct Preference Optimization: Your Language Model is Secretly a Reward Model", eq. 7:
    - log sigmoid(beta (log p(w) / p_ref(w) - log p(l) / p_ref(l))). With label_smoothing e it is (1 - e) times that and e times
    the loss of the pair the other way round: Mitchell 2023, "A note on DPO with noisy preferences & relationship to IPO".
    """
    preferred = beta * margin(policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    return -(1 - label_smoothing) * F.logsigmoid(preferred) - label_smoothing * F.logsigmoid(-preferred)


# ---------------------------------------------------------------------------------------------------------- parts


@part(name="dpo", needs=("reference",))
class DPO:
    """Direct preference optimisation.  Rafailov et al. 2023, eq. 7.

    Formula: - log sigmoid(beta m), m = log p(w)/p_ref(w) - log p(l)/p_ref(l) for a chosen w and a rejected l.
    """

    beta: Rate = 0.1
    """How closely the policy is held to the reference: a larger one is content with a smaller margin m. Per nat."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of pairs taken to be the wrong way round.  Mitchell 2023."""
    weight: Rate = 1.0
    """Factor of this loss among several."""

    def __call__(self, compared: Compared) -> torch.Tensor:
        one = compared
        losses = dpo(one.chosen, one.rejected, one.reference_chosen, one.reference_rejected, self.beta, self.label_smoothing)
        return self.weight * losses


@part(name="sft")
class SFT:
    """Learns the chosen responses as supervised tuning does, so that they do not become unlikely with the rejected ones.

    Formula: - log p(w) / |w|.  Pang et al. 2024, "Iterative Reasoning Preference Optimization", eq. 1.
    """

    weight: Rate = 1.0
    """Factor of this loss among several."""

    def __call__(self, compared: Compared) -> torch.Tensor:
        return -self.weight * compared.logprobs[0::2].sum(-1) / compared.mask[0::2].sum(-1)
