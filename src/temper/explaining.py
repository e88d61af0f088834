"""Why a step would run again, or would not."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from temper import keys, parts
from temper.parts import Problem
from temper.recipe import Plan
from temper.run import Made, gather, ingredients, stored
from temper.store import Store


@dataclasses.dataclass(frozen=True)
class Reason:
    """Why a step would run, or not."""

    step: str
    state: str
    because: list[str]


def why(plan: Plan, store: Store, name: str | None = None) -> list[Reason]:
    """For each step (or one): whether the store has it, else what changed since it was last made."""
    if name is not None:
        plan.step(name)
    by_index: dict[int, Made] = {}
    found = []
    for index, step in enumerate(plan.steps):
        missing = [plan.steps[one.index].name for one in step.given if one.index not in by_index]
        if missing:
            found.append(Reason(step.name, "will run", [f"its input `{one}` is made anew" for one in missing]))
            continue
        try:
            wanted = ingredients(step, gather(step, by_index, store))
        except Problem as problem:
            raise plan.locate(problem, step) from problem
        key = keys.key(wanted)
        made = stored(step, key, store, lambda text: None)
        if made is not None:
            by_index[index] = made
            when = made.record["created"]
            found.append(Reason(step.name, "from the store", [f"nothing changed since it was made ({when}, {key[:12]})"]))
            continue
        old = _latest(store, plan.name, step.name)
        if (store.work(key) / "scratch").is_dir():
            found.append(Reason(step.name, "will go on", ["an earlier run was interrupted; it goes on from its last checkpoint"]))
        elif old is None:
            found.append(Reason(step.name, "will run", ["it was never made"]))
        else:
            found.append(Reason(step.name, "will run", keys.difference(old["ingredients"], wanted)))
    return [one for one in found if name is None or parts.plain(one.step) == parts.plain(name)]


def _latest(store: Store, recipe: str, step: str) -> Mapping[str, Any] | None:
    for past in reversed(store.runs()):
        for made in past["steps"]:
            if past["name"] == recipe and made["name"] == step and store.has(made["key"]):
                return store.record(made["key"])
    return None
