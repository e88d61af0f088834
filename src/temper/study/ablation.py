"""Which part of a method earns its keep: the study in which every part that is not the default is replaced by it in turn."""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping
from typing import Any

from temper import parts
from temper.methods import names
from temper.parts import Problem, ablations, dump, plain
from temper.recipe.editing import entries
from temper.report.study import Contribution
from temper.study.findings import Judged
from temper.study.reading import Study, read

WHOLE = "whole"
"""The arm in which nothing is replaced."""


def ablation(ground: Study, engine: str, method: str, *, pairs: bool = False) -> Study:
    """A method's ablation on the ground of another study: its recipe, measures, seeds, budget and test.

    pairs: also every two parts together. Raises `Problem` where the recipe has no step of the engine, or the method only defaults.
    """
    spec = parts.method(engine, method)
    step = _step(ground, engine)
    changed = ablations(spec)
    if not changed:
        raise Problem(f"`{engine} {method}` has defaults in every slot; there is nothing to replace")
    default = {name: dump(setting.default) for name, setting in parts.slots(type(spec)).items()}
    groups = {word: word.split("+") for word in changed}
    if pairs:
        for one, two in itertools.combinations(list(groups), 2):
            groups.setdefault(f"{one}+{two}", sorted({*groups[one], *groups[two]}))
    first: dict[str, Any] = {f"{step}.method": method}
    vary: dict[str, Any] = {WHOLE: first}
    for word, slots in groups.items():
        vary[f"without {word}"] = {**first, **{f"{step}.{slot}": "none" if default[slot] is None else default[slot] for slot in slots}}
    budget = {}
    if ground.budget is not None:
        kind = ground.budget.kind
        budget = {"budget": {kind: getattr(ground.budget, kind), "of": list(ground.budget.of)}}
    raw = {
        "name": f"ablate-{engine}-{method}",
        "about": f"Which part of {engine} {method} earns its keep",
        "recipe": _plain(ground.base),
        "vary": vary,
        "baseline": WHOLE,
        "seeds": list(ground.seeds),
        **budget,
        "measure": dict(ground.measure),
        "finding": {"level": ground.finding.level, "test": dump(ground.finding.test), "correction": ground.finding.correction},
    }
    return read(_yaml(raw), f"{raw['name']}.yaml", ground.folder)


def contributions(study: Study, judged: list[Judged]) -> list[Contribution]:
    """What each replaced part brought to the main figure: how much worse the method is without it."""
    main = next(iter(study.measure))
    words = {"better": "does harm here", "worse": "earns its keep", "unclear": "unclear"}
    step, whole = _changed(study, WHOLE)
    made = []
    for one in (one.comparison for one in judged if one.comparison.figure == main):
        _, without = _changed(study, one.better)
        slots = one.better.removeprefix("without ").split("+")
        replaced, by = (" + ".join(names(getattr(spec, slot)) for slot in slots) for spec in (whole, without))
        low, high = (None if end is None else -end for end in (one.high, one.low))
        made.append(
            Contribution(f"{step}.{'+'.join(slots)}: {replaced}", by, -one.difference, low, high, words[one.verdict], main, one.unit)
        )
    return made


def _changed(study: Study, arm: str) -> tuple[str, Any]:
    """The step that an arm of an ablation changes, and its spec."""
    name = next(iter(study.arm(arm).changes)).partition(".")[0]
    return name, study.plan(study.arm(arm), study.seeds[0]).step(name).spec


def _step(ground: Study, engine: str) -> str:
    """The name of the recipe's last step of an engine."""
    named = []
    for _, entry in entries(ground.base.get("steps") or [], ()):
        word = next(iter(entry)) if isinstance(entry, Mapping) else entry
        body = entry[word] if isinstance(entry, Mapping) else None
        if plain(str(word)) == plain(engine):
            named.append(str(body.get("name", word)) if isinstance(body, Mapping) else str(word))
    if not named:
        raise Problem(f"the recipe of {ground.file} has no `{engine}` step; give `--study` with one that has")
    return named[-1]


def _plain(value: Any) -> Any:
    """The same without what YAML knows of lines and of how numbers were written."""
    if isinstance(value, Mapping):
        return {_plain(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return next((kind(value) for kind in (bool, int, float, str) if isinstance(value, kind)), value)


def _yaml(raw: Any) -> str:
    from ruamel.yaml import YAML

    yaml, stream = YAML(typ="safe"), io.StringIO()
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[attr-defined]
    yaml.dump(_plain(raw), stream)
    return stream.getvalue()
