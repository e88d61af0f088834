"""What `model: tune@500` or `data: rows.jsonl` stand for."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from temper import parts
from temper.parts import Problem, Scope, collect, nearest, plain, shown
from temper.passport import Input
from temper.recipe.editing import substituted
from temper.recipe.places import Follows, Place
from temper.recipe.plans import FromStep, Outside, Step


def unturned(name: str) -> str:
    """A step's name without its repetition: `tune#2` -> `tune`."""
    return re.sub(r"#\d+\Z", "", name)


@dataclasses.dataclass
class References:
    """Words that stand for models and data, resolved against the steps read so far."""

    raw: Any
    file: str
    folder: Path
    place: Place
    text: str
    steps: list[Step] = dataclasses.field(default_factory=list)
    modules: dict[str, Any] = dataclasses.field(default_factory=dict)
    names: dict[str, Any] = dataclasses.field(default_factory=dict)
    troubled: list[str] = dataclasses.field(default_factory=list)
    scope: Scope = dataclasses.field(default_factory=Scope)

    def input(self, role: str, takes: Input, body: Mapping[str, Any], branch: str, engine: str, names: Mapping[str, Any]) -> Any:
        given = body.get(role)
        if given == "none" or (given is None and not takes.default):
            if not takes.optional:
                raise Problem(f"`{engine}` needs `{role}`, of kind {' or '.join(f'`{kind}`' for kind in takes.kinds)}", (role,))
            return None
        given = takes.default if given is None else given
        if takes.is_data:
            try:
                return self._data(given, takes, names)
            except Problem as problem:
                raise problem.under(role) from problem
        if isinstance(given, (list, tuple)):
            if not takes.many:
                raise Problem(f"`{role}` takes one, not a list", (role,))
            found: list[Any] = []
            problems = []
            for index, one in enumerate(given):
                try:
                    found.extend(self._models(one, branch, takes, engine, names))
                except Problem as problem:
                    problems.append(problem.under(role, index))
            collect(problems)
            return tuple(found)
        try:
            found = self._models(given, branch, takes, engine, names)
        except Problem as problem:
            raise problem.under(role) from problem
        if takes.many:
            return tuple(found)
        if len(found) != 1:
            if not found:
                return None
            raise Problem(f"`{given}` names {len(found)} branches; `{role}` takes one", (role,))
        return found[0]

    def _own(self, key: str, names: Mapping[str, Any], read: Any) -> Any:
        """The recipe's own `model:` or `data:`; what is wrong with it is told where it stands."""
        try:
            return read(substituted(self.raw[key], names))
        except Problem as problem:
            raise self.place.locate(problem.under(key)) from problem

    def _data(self, given: Any, takes: Input, names: Mapping[str, Any]) -> Any:
        from temper.tasks.source import source

        if given == "data":
            if self.raw.get("data") is None:
                if takes.optional:
                    return None
                raise Problem("the recipe has no `data:` of its own; add one, or name a file here")
            return self._own("data", names, lambda value: source(value, self.folder, self.scope))

        def own(value: Any) -> Any:
            """`data` stands for the recipe's own also inside a source that reads another."""
            if isinstance(value, Mapping):
                return {
                    key: self._data("data", takes, names) if one == "data" and key == "source" else own(one) for key, one in value.items()
                }
            return value

        return source(own(given), self.folder, self.scope)

    def _models(self, word: Any, branch: str, takes: Input, engine: str, names: Mapping[str, Any]) -> list[Any]:
        if not isinstance(word, str):
            raise Problem(f"{shown(word)}: name a step, a folder, a hub model or house:lm")
        if word == "model":
            if self.raw.get("model") in (None, "new"):
                if takes.optional:
                    return []
                raise Problem("the recipe has no `model:` of its own; add one, or name a step")
            inner = dataclasses.replace(takes, optional=False)
            return self._own("model", names, lambda own: self._models(own, branch, inner, engine, names) if own != "model" else [])
        if word == "last":
            return [self._last(branch, takes)]
        if word.endswith("[*]"):
            found = [FromStep(i) for i, step in enumerate(self.steps) if unturned(step.name).startswith(word[:-2])]
            if not found:
                raise Problem(f"no step `{word[:-3]}` with branches before this one{nearest(word, [s.name for s in self.steps])}")
            return found
        if word.startswith("house:"):
            return [self._house(word)]
        if self._named(word, branch) is not None:
            return [self._find(word, branch)]
        folder = (self.folder / word).expanduser()
        if folder.is_dir():
            return [Outside(word, folder)]
        if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", word) and not word.startswith("."):
            return [Outside(word, folder)]
        return [self._find(word, branch)]

    def _named(self, word: str, branch: str) -> int | None:
        base = word.partition("@")[0]
        for wanted in (f"{base}[{branch}]", base) if branch else (base,):
            for index in range(len(self.steps) - 1, -1, -1):
                if plain(unturned(self.steps[index].name)) == plain(wanted) or plain(self.steps[index].name) == plain(wanted):
                    return index
        return None

    def _find(self, word: str, branch: str) -> FromStep:
        base, _, kept = word.partition("@")
        index = self._named(word, branch)
        if index is None:
            if any(plain(one) == plain(base.partition("[")[0]) for one in self.troubled):
                raise Follows("")
            branches = [step.name for step in self.steps if step.name.startswith(f"{base}[")]
            if branches:
                raise Problem(f"`{base}` has branches; write {' or '.join(f'`{one}`' for one in branches)}")
            known = [step.name for step in self.steps]
            near = nearest(base, known) if known else "; no step comes before this one"
            raise Problem(f"`{base}` is neither a step before this one nor a folder{near}")
        if not kept:
            return FromStep(index)
        spec = self.steps[index].spec
        if kept == "best":
            if not getattr(spec, "keep_best", False):
                raise Problem(f"`{base}` keeps no best model; add `keep_best: true` to it")
            return FromStep(index, kept)
        saved = getattr(spec, "keep", ())
        if not kept.isdigit() or int(kept) not in saved:
            if saved:
                raise Problem(f"`{base}` keeps no checkpoint {kept}{nearest(kept, [str(one) for one in saved])}")
            raise Problem(f"`{base}` keeps no checkpoints; add `keep: [{kept if kept.isdigit() else 500}]` to it")
        return FromStep(index, int(kept))

    def _last(self, branch: str, takes: Input) -> Any:
        mine = [
            i
            for i, step in enumerate(self.steps)
            if self._gives_model(step) and (not branch or "[" not in step.name or step.name.endswith(f"[{branch}]"))
        ]
        if self.troubled:
            raise Follows("")  # the step that is meant may be the one in trouble
        if not mine:
            return next(iter(self._models("model", branch, dataclasses.replace(takes, optional=False), "", self.names)))
        index = mine[-1]
        name = self.steps[index].name
        if "[" in name and not branch:
            raise Problem(f"`last` has branches here; name one, such as `{name}`")
        return FromStep(index)

    def _gives_model(self, step: Step) -> bool:
        return getattr(self.modules.get(step.engine), "GIVES", "model") == "model"

    def _house(self, word: str) -> FromStep:
        """A house model: the steps of a built-in recipe come first; they are cached like any other."""
        for index, step in enumerate(self.steps):
            if step.name == word:
                return FromStep(index)
        offset = len(self.steps)
        from temper.recipe import house  # which reads a recipe in its turn

        for step in house(word).steps:
            self.modules.setdefault(step.engine, parts.engine(step.engine))
            inputs = {role: _shifted(value, offset) for role, value in step.inputs.items()}
            self.steps.append(dataclasses.replace(step, inputs=inputs, path=()))
        return FromStep(len(self.steps) - 1)


def _shifted(value: Any, by: int) -> Any:
    if isinstance(value, tuple):
        return tuple(_shifted(one, by) for one in value)
    return dataclasses.replace(value, index=value.index + by) if isinstance(value, FromStep) else value
