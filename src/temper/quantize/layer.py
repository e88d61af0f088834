"""What the slots of this engine pass to one another: one layer's weight, and what is known about its inputs."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Layer:
    """One linear layer to be quantised.

    weight: [R, C], outputs by inputs, float32, zero where `keep` is False. dtype: in which the weight, and so its scales,
    are stored. curvature: H [C, C] of the objective's error tr(D H D^T) for a change D [R, C] of the weight; None: the
    identity. keep: bool [R, C] of a mask that must survive; None: all.
    """

    name: str
    weight: Tensor
    dtype: torch.dtype
    curvature: Tensor | None = None
    keep: Tensor | None = None

    def masked(self, weight: Tensor) -> Tensor:
        """`weight` [R, C] with zeros where the mask wants them."""
        return weight if self.keep is None else weight.masked_fill(~self.keep, 0)

    def columns(self, cut: slice, weight: Tensor) -> Layer:
        """The layer that some columns make alone, with `weight` [R, len(cut)] in place of their own."""
        keep = None if self.keep is None else self.keep[:, cut]
        curvature = None if self.curvature is None else self.curvature[cut, cut]
        part = dataclasses.replace(self, weight=weight, curvature=curvature, keep=keep)
        return dataclasses.replace(part, weight=part.masked(weight))


def error(change: Tensor, curvature: Tensor | None) -> float:
    """tr(D H D^T), or the sum of squares where H is None; D [R, C], H [C, C]."""
    moved = change if curvature is None else change @ curvature.to(change.dtype)
    return float(moved.mul(change).double().sum())
