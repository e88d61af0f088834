"""YAML or Python -> a checked plan. Every error names file, line and column, step, slot, value, rule and the nearest right word.

    name: mine
    model: ./my-model          # a folder or a Hugging Face name
    data: rows.jsonl           # a file, or house:library
    steps:
      - tune: {method: lora, epochs: 2}
      - evaluate: {model: [model, tune]}

A step's inputs may be `model` and `data` (the recipe's own), a step's name, `tune@500` and `tune@best` (kept checkpoints), `tune[math]`
(a branch of `each`), `last`, a folder, a hub name, or `house:lm`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from temper.parts import Problem, nearest, shown
from temper.recipe.editing import assign, change, no_tags
from temper.recipe.places import Located, Place
from temper.recipe.plans import Condition, FromStep, Outside, Plan, Step
from temper.recipe.reader import Reader
from temper.recipe.schemas import schema, schema_text

Changes = Sequence[tuple[str, Any]]
"""`step.setting.more`, or a key of the recipe, and its value."""
SHIPPED = Path(__file__).parents[1] / "recipes"
"""Recipes that come with Temper, house models' among them."""


def load(path: str | Path, sets: Sequence[str] = ()) -> Plan:
    """A plan from a YAML file. Raises `Problem`s with file, line and column."""
    path = Path(path)
    if not path.is_file():
        shipped = SHIPPED / f"{path.name.removesuffix('.yaml')}.yaml"
        if not shipped.is_file():
            folder = path.parent
            near = [one.name for one in folder.glob("*.y*ml")] if folder.is_dir() else []
            near += [one.stem for one in shipped.parent.glob("*.yaml") if not one.stem.startswith("house-")]
            raise Problem(f"no recipe {shown(str(path))}{nearest(path.name, near)}")
        path = shipped
    return read(path.read_text(encoding="utf8"), path.name, path.parent, sets)


def read(text: str, file: str = "recipe.yaml", folder: Path = Path(), sets: Sequence[str] = ()) -> Plan:
    """A plan from YAML text; paths in it are relative to `folder`."""
    return plan(parsed(text, file), file, folder, sets, text)


def parsed(text: str, file: str) -> Any:
    """YAML text as mappings that know their lines. Raises `Problem` with file, line and column."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    yaml = YAML(typ="rt")  # the round-trip loader builds no objects, and knows lines
    try:
        return yaml.load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        what = str(error.problem or error.context).strip()
        if type(error).__name__ == "DuplicateKeyError":
            what = f"{what.splitlines()[0].split(' with value')[0]}; keep one"
        raise Located(f"{file}{at}: {what}") from error
    except YAMLError as error:
        raise Located(f"{file}: {error}") from error


def recipe(steps: Sequence[Any], *, folder: str | Path = ".", **top: Any) -> Plan:
    """The same from Python: `recipe([{"tune": {"method": "lora"}}], model="house:lm", data="rows.jsonl", name="mine")`."""
    return plan({"name": "recipe", **top, "steps": list(steps)}, "recipe", Path(folder))


def plan(raw: Any, file: str, folder: Path, sets: Sequence[str] = (), text: str = "", changes: Changes = (), by: str = "--set") -> Plan:
    """Checks a recipe's mapping and unrolls it. sets, changes: what is put in first, as texts or as keys and values; by: who does so."""
    if not isinstance(raw, Mapping):
        raise Located(f"{file}:1:1: a recipe is a mapping with `steps:`; this is {shown(raw)}")
    place = Place(file, raw)
    try:
        no_tags(raw)
        changed = [change(raw, one) for one in sets] + [assign(raw, key, value) for key, value in changes]
        place = replace(place, changed=tuple(changed), by=by)
        return Reader(raw, file, folder, place, text).read()
    except Problem as problem:
        raise place.locate(problem) from problem


def house(word: str) -> Plan:
    """The built-in recipe of a house model, `house:lm`; its last step is called that wherever it is asked for, so it is made once."""
    file = SHIPPED / f"house-{word[6:]}.yaml"
    if not file.is_file():
        raise Problem(f"no house model `{word}`{nearest(word, [f'house:{path.stem[6:]}' for path in SHIPPED.glob('house-*.yaml')])}")
    plan = load(file)
    *first, last = plan.steps
    named = [replace(one, name=f"{word}/{one.name}") for one in first]
    return replace(plan, steps=(*named, replace(last, name=word)))


__all__ = [
    "Condition",
    "FromStep",
    "Located",
    "Outside",
    "Plan",
    "Step",
    "house",
    "load",
    "parsed",
    "plan",
    "read",
    "recipe",
    "schema",
    "schema_text",
]
