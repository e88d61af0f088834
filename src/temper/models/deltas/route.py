"""Slot `route`: which of several experts work on a token, and how much each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from temper.lazy import F
from temper.parts import part, slot

if TYPE_CHECKING:
    from torch import Tensor


@slot(phased=False)
class Route(Protocol):
    """Which experts work on a token? `(logits) -> weights`, both [..., K] over K experts: the factors of the experts' outputs.

    An expert of weight 0 does not work. The router's logits learn through the weights, and through a loss on how evenly the experts
    are used.
    """

    def __call__(self, logits: Tensor) -> Tensor: ...


@part(name="token-top1")
class TokenTop1:
    """The expert of the largest gate alone, gates being the softmax of the logits.  Chen et al. 2024, "LLaVA-MoLE", section 3.2.

    Formula: weight of expert k = softmax(logits)_k where k is the largest, else 0 (scaled, as in Fedus et al. 2021, eq. 2).
    """

    scaled: bool = True
    """Whether the expert's output is multiplied by its gate, through which the router learns from the loss; if not, it learns from the
    load balance alone."""

    def __call__(self, logits: Tensor) -> Tensor:
        gates = F.softmax(logits, -1)
        first = F.one_hot(gates.argmax(-1), gates.shape[-1]).to(gates.dtype)
        return gates * first if self.scaled else first + 0 * gates  # a gradient of 0, not none at all
