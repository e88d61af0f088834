"""Slot `likelihood`: how the log-probabilities of a response's tokens become one number."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from temper.parts import part, slot

if TYPE_CHECKING:
    from temper.lazy import torch


@slot
class Likelihood(Protocol):
    """How likely is a response? `(logprobs [R, T], mask [R, T]) -> [R]`, from its tokens' log-probabilities in nats.

    mask: True on the response's tokens; elsewhere `logprobs` is 0. The same part reads the policy and the reference.
    """

    def __call__(self, logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor: ...


@part(name="sum")
class Whole:
    """The log-probability of the whole response.  Formula: log p(y | x) = sum_t log p(y_t | x, y_<t)."""

    def __call__(self, logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return logprobs.sum(-1)


@part(name="mean")
class PerToken:
    """The mean over the response's tokens, in which length does not count.  Formula: log p(y | x) / |y|.

    Under DPO it is the length-normalised DPO of Lambert et al. 2024, "Tülu 3".
    """

    def __call__(self, logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return logprobs.sum(-1) / mask.sum(-1)
