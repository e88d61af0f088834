"""Slot `objective`: which error of a layer is kept small."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from temper.parts import part, slot

if TYPE_CHECKING:
    from torch import Tensor


@slot(phased=False)
class Objective(Protocol):
    """Which error of a layer is kept small?

    `(inputs [N, C]) -> H [C, C]` float32, summed over the N tokens, or None for the identity. The error of a change D
    [R, C] of the weight is tr(D H D^T); the engine adds H up over the batches and divides by the tokens.
    """

    def __call__(self, inputs: Tensor) -> Tensor | None: ...


@part
class Weights:
    """The weights' own squared error, whatever comes in.  Formula: sum D^2."""

    def __call__(self, inputs: Tensor) -> None:
        return None


@part(needs=("inputs",))
class LayerOutput:
    """The squared error of the layer's output on the calibration inputs.  Formula: H = sum x x^T, error sum |D x|^2.

    Frantar & Alistarh 2022, "Optimal Brain Compression", eq. 1; the constant factor 2 of their H drops out.
    """

    def __call__(self, inputs: Tensor) -> Tensor:
        wide = inputs.float()
        return wide.T @ wide
