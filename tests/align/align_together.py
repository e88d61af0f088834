"""One of the processes that align a policy together: `align_together.py POLICY FOLDER`; its figures go to FOLDER/figures-RANK.json."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from align_toys import Data, artefact, one_letter

from temper.align import engine
from temper.align.engine import Align
from temper.align.source import Attempts
from temper.context import Context
from temper.passport import Inputs
from temper.train.batching import Bucketed
from temper.train.optimizers import AdamW
from temper.world import World, join, leave


def align(policy: Path, folder: Path, world: World) -> dict[str, float]:
    """A run on attempts that the policy makes itself."""
    spec = Align(
        source=Attempts(count=32, max_new_tokens=2),
        batching=Bucketed(size=8, tokens=120),
        optimizer=AdamW(lr=1e-2, weight_decay=0.0),
        updates=6,
        precision="float32",
    )
    context = dataclasses.replace(Context.scratch(folder), world=world)
    if not world.main:
        context = dataclasses.replace(context, out=folder / "thrown away")
    inputs = Inputs(model=artefact(policy, "policy-id"), data=Data("completion", one_letter(), 16))
    return {name: figure.value for name, figure in engine.run(spec, inputs, context).figures.items() if figure.unit != "s"}


if __name__ == "__main__":
    world = join()
    found = align(Path(sys.argv[1]), Path(sys.argv[2]), world)
    Path(sys.argv[2], f"figures-{world.rank}.json").write_text(json.dumps(found))
    leave()
