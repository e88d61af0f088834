"""Slot `base`: on what a delta sits: what becomes of an adapter that the incoming model carries, and how the frozen weights are held."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Protocol

from pydantic import Field

from temper.parts import Count, part, slot

if TYPE_CHECKING:
    from torch import nn


@slot(phased=False)
class Base(Protocol):
    """On what does the delta sit? `(model) -> model`, the loaded model on which it is then put."""

    continues: ClassVar[bool]
    """Whether an adapter that comes in goes on training (and is what the step leaves), or is merged first."""

    @property
    def numbers(self) -> str | None: ...  # format in which the part holds frozen weights, as passports call it; None: as they came

    @property
    def whole(self) -> bool: ...  # whether the delta is merged before it leaves, so that the step leaves a model

    @property
    def compared(self) -> int | None: ...  # examples on which merged models are held against the trained one; None: no need to

    def __call__(self, model: nn.Module) -> nn.Module: ...


# ---------------------------------------------------------------------------------------------------------- parts


class _AsItCame:
    """What parts share that leave the weights' numbers alone."""

    numbers: ClassVar[str | None] = None
    whole: ClassVar[bool] = False
    compared: ClassVar[int | None] = None


@part
class AsLoaded(_AsItCame):
    """The model as it is. An adapter on it goes on training: it keeps its own places, rank and scale, and its base."""

    continues: ClassVar[bool] = True

    def __call__(self, model: nn.Module) -> nn.Module:
        return model


@part
class Merged(_AsItCame):
    """An adapter on the model is merged into it, and a new delta goes on top.

    With an adapter as delta no second copy of the base is written: the step leaves the new adapter, whose base is the
    incoming adapter's artefact, and loading it loads and merges that one first. With `full` it leaves a whole model.
    """

    continues: ClassVar[bool] = False

    def __call__(self, model: nn.Module) -> nn.Module:
        from temper.models.deltas.attach import merge

        return merge(model)


@part
class NF4:
    """Frozen linear weights in 4-bit NormalFloat, made floats in each product: an eighth of float32.  Dettmers et al. 2023, "QLoRA".

    Formula: y = deq(deq(c2, f), c) x + scale B A x; c the nearest of 16 quantiles of the normal in blocks, c2 the blocks' magnitudes in
    8 bits (eqs. 5-6; evenly spaced, as torchao has them). Embeddings, norms and the head stay as they are. An adapter that comes in is
    merged first. What leaves is the adapter: in a PEFT folder, which goes on the float base or on one held in NF4 by other libraries,
    and loads here on the very weights that it was trained on; or the merged model. The step reports how far each way of merging is from
    what was trained: KL(trained || merged) and the greatest difference of a logit, for the values that the base computed with
    (`merged_dequantised`), for the weights before they were quantised (`merged_float`), and for the former quantised again
    (`requantised`). There are no paged optimizer states, which are memory of a GPU.
    """

    continues: ClassVar[bool] = False

    block: Annotated[int, Field(ge=2, multiple_of=2)] = 64
    """Neighbouring weights that share a magnitude."""
    double: bool = True
    """Whether the magnitudes are quantised too, to 8 bits: 0.37 bits a weight less in blocks of 64."""
    merge: Literal["none", "dequantised"] = "none"
    """none: the adapter leaves, factored. dequantised: it is merged into the values that the base computed with, and a model of floats
    leaves. To quantise that again, give it to `quantize`."""
    compared: Count | None = 32
    """Held-out examples, else of those trained on, on which merged models are held against the trained one; none: not measured."""

    @property
    def numbers(self) -> str:
        return f"nf4-g{self.block}"

    @property
    def whole(self) -> bool:
        return self.merge == "dequantised"

    def __call__(self, model: nn.Module) -> nn.Module:
        from temper.models.deltas.attach import merge
        from temper.models.nf4 import quantise

        return quantise(merge(model), block=self.block, double=self.double)
