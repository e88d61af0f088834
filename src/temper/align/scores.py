"""What policy and reference say of the pairs of a batch: the numbers that losses and figures are made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from temper.lazy import torch


@dataclasses.dataclass(frozen=True, eq=False)
class Compared:
    """P pairs of responses under two policies.

    chosen, rejected, reference_chosen, reference_rejected: [P], what slot `likelihood` makes of each response under the policy
    (with gradient) and under the reference. logprobs, reference: [2P, T], of each token, 0 outside the responses; mask: bool
    [2P, T], the responses' tokens. Row 2i is a chosen response and row 2i + 1 the rejected one of the same prompt.
    """

    chosen: torch.Tensor
    rejected: torch.Tensor
    reference_chosen: torch.Tensor
    reference_rejected: torch.Tensor
    logprobs: torch.Tensor
    reference: torch.Tensor
    mask: torch.Tensor

    @property
    def margin(self) -> torch.Tensor:
        """[P]: how much more than the reference the policy prefers the chosen response; DPO's implicit reward over beta."""
        return margin(self.chosen, self.rejected, self.reference_chosen, self.reference_rejected)

    @property
    def drift(self) -> torch.Tensor:
        """[P]: `drift` from the reference on both responses of each pair."""
        return drift(self.logprobs, self.reference, self.mask).view(-1, 2).mean(-1)


def compare(logprobs: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor, likelihood: Callable[..., torch.Tensor]) -> Compared:
    """From token log-probabilities [2P, T] to what is compared."""
    policy, other = likelihood(logprobs, mask), likelihood(reference, mask)
    return Compared(policy[0::2], policy[1::2], other[0::2], other[1::2], logprobs, reference, mask)


def margin(
    policy_chosen: torch.Tensor, policy_rejected: torch.Tensor, reference_chosen: torch.Tensor, reference_rejected: torch.Tensor
) -> torch.Tensor:
    """(log p - log p_ref)(chosen) - (log p - log p_ref)(rejected), [P]. Exactly 0 where the policy is the reference."""
    return (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)


def drift(logprobs: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """How far a policy is from its reference on given tokens: [R], nats per token, an estimate of the KL divergence.

    Half the mean square of the tokens' log-ratio (Schulman 2020, "Approximating KL Divergence", k2): at least 0, exactly 0 where the
    policy is the reference, finite on any response, and equal to the KL in both directions to second order where the
    responses are either policy's samples. Pairs are chosen among such samples, or come from elsewhere: it is an estimate.
    """
    return (logprobs - reference).square().sum(-1) / (2 * mask.sum(-1))
