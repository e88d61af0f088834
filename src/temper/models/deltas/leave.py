"""What training leaves in a folder: an adapter beside its base, or a whole model that keeps its mask and its grid."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from temper.lazy import torch
from temper.models import folders, io
from temper.models.deltas.attach import is_adapted, merge
from temper.models.hub import revision_of
from temper.passport import Artefact


def leave(model: Any, tokenizer: Any, folder: Path, *, given: Artefact, under: Artefact | None, spare: bool) -> None:
    """Writes a trained model into a folder.

    given: the artefact that came in: weights keep its number format, and a quantised folder is written in its format again.
    under: what the adapter sits on, and a PEFT folder leaves; None: a whole model leaves, adapters merged, constraints folded and
    kept beside it. spare: whether the model must stay as it is and go on training; without it, merging is done in place.
    """
    from temper.models import compressed
    from temper.models.constraints import Mask, OnGrid, part_of, save_constraints
    from temper.models.parametrizations import fold

    if under is not None:
        name = under.passport.origin if revision_of(under.model) else under.name
        io.save_adapter(model, tokenizer, folder, name or under.id[:12])
        return
    packed = given.passport.kind == "model" and compressed.is_compressed(given.model)
    if spare and (is_adapted(model) or packed):
        model = copy.deepcopy(model)
    model = merge(model)
    if not packed:
        io.save_model(model, tokenizer, folder, dtype=stored(given))
        return
    held = fold(model)
    grids = {name: one for name, part in held.items() if (one := part_of(part, OnGrid)) is not None}
    with io.quiet():
        compressed.write(folder, model.to(getattr(torch, stored(given))), grids)
    save_constraints(folder, {name: one for name, part in held.items() if (one := part_of(part, Mask)) is not None})
    tokenizer.save_pretrained(folder)


def stored(given: Artefact) -> str:
    """The number format of a model's weights; of a quantised one, of its scales and all that is not quantised."""
    if given.passport.numbers and not given.passport.quantised:
        return given.passport.numbers
    config = folders.read_json(given.model / "config.json")
    return config.get("dtype") or config.get("torch_dtype") or "float32"
