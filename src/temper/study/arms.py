"""What a study varies: its arms, each a recipe of its own, made from the base recipe by changes."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from temper.parts import Problem, shown
from temper.recipe import Plan, plan

Changes = Mapping[str, Any]
"""`step.setting.more` (or a key of the recipe) -> value."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """One of the things compared. at: axis -> this arm's value there, for laws over an axis; `arm` its name where arms are a list."""

    name: str
    changes: Changes
    at: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def arms(vary: Any) -> tuple[Arm, ...]:
    """The arms of a study's `vary`: a mapping of names to changes, or `grid:`, whose axes are combined.

    An axis is a setting with a list of values, or a name with a mapping of names to changes. Raises `Problem`.
    """
    if not isinstance(vary, Mapping) or not vary:
        raise Problem(f"{shown(vary)}: `vary` maps arms' names to changes (`lora: {{tune.method: lora}}`), or is `grid:` of axes")
    if "grid" not in vary:
        return tuple(Arm(str(name), _changes(one, (name,)), {"arm": str(name)}) for name, one in vary.items())
    if len(vary) > 1:
        other = next(key for key in vary if key != "grid")
        raise Problem(f"`{other}` stands beside `grid`; give named arms, or a grid, not both", (other,))
    grid = vary["grid"]
    if not isinstance(grid, Mapping) or not grid:
        raise Problem(f"{shown(grid)}: a grid maps axes to their values", ("grid",))
    axes = [_axis(str(name), values, ("grid", name)) for name, values in grid.items()]
    made = []
    for combined in itertools.product(*axes):
        changes = {key: value for _, _, some in combined for key, value in some.items()}
        made.append(Arm(" ".join(word for word, _, _ in combined), changes, {axis: at for axis, (_, at, _) in zip(grid, combined)}))
    return tuple(made)


def _axis(name: str, values: Any, path: tuple[str | int, ...]) -> list[tuple[str, Any, Changes]]:
    """An axis' places: (word, value, changes)."""
    if isinstance(values, Mapping) and values:
        return [(str(word), word, _changes(one, (*path, word))) for word, one in values.items()]
    if isinstance(values, (list, tuple)) and values:
        short = name.rpartition(".")[2]
        return [(one if isinstance(one, str) else f"{short}={_word(one)}", one, {name: one}) for one in values]
    raise Problem(f"{shown(values)}: an axis is a list of a setting's values, or a mapping of names to changes", path)


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(next(iter(value))) if isinstance(value, Mapping) and value else str(value)


def _changes(value: Any, path: tuple[str | int, ...]) -> Changes:
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise Problem(f"{shown(value)}: an arm is a mapping of settings to values, such as `{{tune.method: lora}}`", path)
    return dict(value)


def recipe_of(base: Any, changes: Sequence[Changes], file: str, folder: Path, text: str, arm: str) -> Plan:
    """The base recipe with changes applied in order, checked. Raises `Problem` with the arm or the line that is wrong."""
    ordered = [(key, some[key]) for some in changes for key in sorted(some, key=lambda key: key.count("."))]  # wholes before their settings
    return plan(copy.deepcopy(base), file, folder, text=text, changes=copy.deepcopy(ordered), by=f"arm `{arm}`")
