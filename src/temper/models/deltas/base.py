"""Slot `base`: what becomes of an adapter that the incoming model already carries."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Protocol

from temper.parts import part, slot

if TYPE_CHECKING:
    from torch import nn


@slot(phased=False)
class Base(Protocol):
    """On what does the delta sit? `(model) -> model`, the loaded model on which it is then put."""

    continues: ClassVar[bool]
    """Whether an adapter that comes in goes on training (and is what the step leaves), or is merged first."""

    def __call__(self, model: nn.Module) -> nn.Module: ...


# ---------------------------------------------------------------------------------------------------------- parts


@part
class AsLoaded:
    """The model as it is. An adapter on it goes on training: it keeps its own places, rank and scale, and its base."""

    continues: ClassVar[bool] = True

    def __call__(self, model: nn.Module) -> nn.Module:
        return model


@part
class Merged:
    """An adapter on the model is merged into it, and a new delta goes on top.

    With an adapter as delta no second copy of the base is written: the step leaves the new adapter, whose base is the
    incoming adapter's artefact, and loading it loads and merges that one first. With `full` it leaves a whole model.
    """

    continues: ClassVar[bool] = False

    def __call__(self, model: nn.Module) -> nn.Module:
        from temper.models.deltas.attach import merge

        return merge(model)
