"""What a learning step leaves for the model that comes in: its passport, or a refusal before anything is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from temper.parts import Problem, mark_of
from temper.passport import UNKNOWN, Passport, child

if TYPE_CHECKING:
    from temper.models.deltas.base import Base
    from temper.models.deltas.delta import Delta

_FLOATS = ("float64", "float32", "bfloat16", "float16")


def adapted(model: Passport, delta: Delta, base: Base) -> Passport:
    """The passport of what training `delta` on `base` of a model leaves.

    - An adapter that comes in and goes on is what leaves, on its own base. Merged first, it stays in the lineage.
    - A mask holds: what an adapter learns inside it is merged into a whole model, since a PEFT folder holds no mask.
    - A grid holds under a delta that trains the weights. An adapter on quantised weights stays beside them.
    - On a base that the step itself holds in few bits the adapter stays beside it, or is merged into the values that these stand for.

    Raises `Problem` where the chain would lose what one of them is.
    """
    name, goes_on = mark_of(delta).name, model.kind == "adapter" and base.continues
    if goes_on and delta.kind != "adapter":
        raise Problem(f"an adapter comes in, and delta `{name}` trains the weights under it; write `base: merged`", ("base",))
    if not goes_on and (fits := getattr(delta, "fits", None)) is not None:
        fits(model)
    if delta.kind == "adapter" and model.mask is not None and model.quantised:
        raise Problem(
            f"the model is both pruned (density {model.mask:g}) and quantised ({model.numbers}); merged inside the mask `{name}` would "
            "leave the grid, and kept beside it the mask; use delta `full`, which holds both",
            ("delta",),
        )
    if model.kind == "adapter" and not base.continues and model.quantised:
        raise Problem(
            f"merging an adapter into {model.numbers} weights would leave their grid; let it go on (`base: as-loaded`), "
            "or merge it before quantising",
            ("base",),
        )
    if base.numbers is not None:
        return _held(model, name, delta, base)
    if delta.kind == "model" or model.mask is not None:
        if model.numbers not in (*_FLOATS, None, UNKNOWN) and not model.quantised:
            raise Problem(
                f"weights in {model.numbers} cannot be trained and written back; use delta `lora`, which stays beside them", ("delta",)
            )
        return child(model, kind="model")
    return child(model, kind="adapter", base=model.base)


def _held(model: Passport, name: str, delta: Delta, base: Base) -> Passport:
    """What leaves where the step holds the frozen weights in the base's own numbers."""
    if delta.kind == "model":
        raise Problem(f"weights held in {base.numbers} stand still, and delta `{name}` trains them; use delta `lora`", ("delta",))
    if model.mask is not None or model.quantised:
        what = f"pruned (density {model.mask:g})" if model.mask is not None else f"in {model.numbers}"
        raise Problem(f"{base.numbers} is made of dense floats, and the model is {what}; write `base: as-loaded`", ("base",))
    if base.whole:
        return child(model, kind="model")
    return child(model, kind="adapter", base=model.base, numbers=base.numbers)
