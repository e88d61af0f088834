"""YAML or Python -> a checked plan. Every error names file, line and column, step, slot, value, rule and the nearest right word.

    name: mine
    model: ./my-model          # a folder or a Hugging Face name
    data: rows.jsonl           # a file, or house:library
    steps:
      - tune: {method: lora, epochs: 2}
      - evaluate: {model: [model, tune]}

A step's inputs may be `model` and `data` (the recipe's own), a step's name, `tune@500` (a kept checkpoint), `tune[math]`
(a branch of `each`), `last`, a folder, a hub name, or `house:lm`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from temper import parts
from temper.parts import Problem, Problems, Scope, collect, nearest, plain, shown
from temper.passport import Input

TOP = ("name", "model", "data", "seed", "use", "env", "export", "steps", "about")
STEP = ("name", "method", "seed", "about", "aim")
BLOCKS = ("repeat", "each")
_NAME = re.compile(r"[A-Za-z][\w.-]*\Z")
_VARIABLE = re.compile(r"\$\{([\w.:-]+)\}")


# -------------------------------------------------------------------------------------------------------- a plan


@dataclasses.dataclass(frozen=True)
class FromStep:
    """What an earlier step of the plan gives; `checkpoint` one that it kept."""

    index: int
    checkpoint: int | None = None


@dataclasses.dataclass(frozen=True)
class Outside:
    """A model from a folder or a hub."""

    ref: str
    folder: Path


@dataclasses.dataclass(frozen=True)
class Condition:
    """`until: evaluate.accuracy >= 0.9`."""

    index: int
    figure: str
    above: bool
    strict: bool
    value: float

    def holds(self, figures: Mapping[str, Any]) -> bool:
        found = [one for name, one in figures.items() if name == self.figure or name.endswith("." + self.figure)]
        if len(found) != 1:
            raise Problem(f"`until` asks for the figure `{self.figure}`{nearest(self.figure, figures)}")
        have = found[0].value
        if self.strict:
            return have > self.value if self.above else have < self.value
        return have >= self.value if self.above else have <= self.value


@dataclasses.dataclass(frozen=True)
class Step:
    """An engine at work. `path` is where it stands in the recipe; `earlier` the same step one repetition before."""

    name: str
    engine: str
    method: str
    spec: Any
    inputs: Mapping[str, Any]
    seed: int
    path: tuple[str | int, ...]
    earlier: int | None = None
    loop: str = ""
    until: Condition | None = None
    files: tuple[Path, ...] = ()
    about: str = ""
    aim: tuple[str, ...] = ()

    @property
    def given(self) -> list[FromStep]:
        """The earlier steps that it reads."""
        flat = [one for value in self.inputs.values() for one in (value if isinstance(value, tuple) else (value,))]
        return [one for one in flat if isinstance(one, FromStep)]


@dataclasses.dataclass(frozen=True)
class Plan:
    """A recipe, checked and unrolled. `text` is what the user wrote."""

    name: str
    steps: tuple[Step, ...]
    text: str
    folder: Path
    export: tuple[str, ...]
    seed: int
    about: str
    place: Place

    def step(self, name: str) -> Step:
        for one in self.steps:
            if plain(one.name) == plain(name):
                return one
        raise Problem(f"no step `{name}`{nearest(name, [one.name for one in self.steps])}")

    def locate(self, problem: Problem, step: Step) -> Problem:
        """A problem found while a step was checked or run, with its line."""
        return self.place.locate(problem.under(*step.path), step.name)


# ------------------------------------------------------------------------------------------------------- places


@dataclasses.dataclass(frozen=True)
class Place:
    """Turns a trail of keys into file, line and column."""

    file: str
    raw: Any
    changed: tuple[tuple[str | int, ...], ...] = ()

    def locate(self, problem: Problem, step: str = "") -> Problem:
        found = [
            one if isinstance(one, Located) else Located(self._text(one, step or self._step(one.path)), one.path) for one in problem.all
        ]
        located = list({str(one): one for one in found}.values())
        return located[0] if len(located) == 1 else Problems(located)

    def _text(self, problem: Problem, step: str) -> str:
        words = [key for key in problem.path if key not in ("steps", *BLOCKS) and not isinstance(key, int)]
        words = words[1:] if step and words else words  # the engine's own key says nothing that the step's name does not
        where = f"step `{step}`, " if step and words else f"step `{step}`: " if step else ""
        at = ".".join(map(str, words))
        line = self._line(problem.path)
        changed = any(problem.path[: len(one)] == one for one in self.changed)
        source = "--set" if changed else f"{self.file}:{line}" if line else self.file
        return f"{source}: {where}{f'`{at}`: ' if at else ''}{problem.text}"

    def _step(self, path: Sequence[str | int]) -> str:
        """The name of the innermost step on a path."""
        node: Any = self.raw
        name = ""
        for depth, key in enumerate(path):
            if isinstance(node, (list, tuple)) and isinstance(key, int) and key < len(node) and depth and path[depth - 1] == "steps":
                entry: Any = node[key]
                engine = next(iter(entry), "") if isinstance(entry, Mapping) else entry
                body = entry.get(engine) if isinstance(entry, Mapping) else None
                if engine not in BLOCKS and len(path) > depth + 1:
                    name = str(body.get("name", engine)) if isinstance(body, Mapping) else str(engine)
            try:
                node = node[key]  # pyright: ignore[reportArgumentType, reportCallIssue]
            except (KeyError, IndexError, TypeError):
                break
        return name

    def _line(self, path: Sequence[str | int]) -> str:
        node: Any = self.raw
        line = ""
        for key in path:
            position = getattr(node, "lc", None)
            if position is None:
                break
            try:
                row, column = position.key(key) if isinstance(node, Mapping) else position.item(key)
                child = node[key]
            except (KeyError, IndexError, TypeError):
                break
            if isinstance(node, Mapping) and not isinstance(child, (Mapping, list)):
                row, column = position.value(key)
            line = f"{row + 1}:{column + 1}"
            node = child
        return line


class Located(Problem):
    """A problem whose text already says where it is."""

    def under(self, *keys: str | int) -> Problem:
        return self

    def __str__(self) -> str:
        return self.text


class Follows(Located):
    """A problem that another one brings with it, and that need not be told: a reference to a step that is itself in trouble."""


# ------------------------------------------------------------------------------------------------------ reading


def load(path: str | Path, sets: Sequence[str] = ()) -> Plan:
    """A plan from a YAML file. Raises `Problem`s with file, line and column."""
    path = Path(path)
    if not path.is_file():
        shipped = Path(__file__).parent / "recipes" / f"{path.name.removesuffix('.yaml')}.yaml"
        if not shipped.is_file():
            folder = path.parent
            near = [one.name for one in folder.glob("*.y*ml")] if folder.is_dir() else []
            near += [one.stem for one in shipped.parent.glob("*.yaml") if not one.stem.startswith("house-")]
            raise Problem(f"no recipe {shown(str(path))}{nearest(path.name, near)}")
        path = shipped
    return read(path.read_text(encoding="utf8"), path.name, path.parent, sets)


def read(text: str, file: str = "recipe.yaml", folder: Path = Path(), sets: Sequence[str] = ()) -> Plan:
    """A plan from YAML text; paths in it are relative to `folder`."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    yaml = YAML(typ="rt")  # the round-trip loader builds no objects, and knows lines
    try:
        raw = yaml.load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        what = str(error.problem or error.context).strip()
        if type(error).__name__ == "DuplicateKeyError":
            what = f"{what.splitlines()[0].split(' with value')[0]}; keep one"
        raise Located(f"{file}{at}: {what}") from error
    except YAMLError as error:
        raise Located(f"{file}: {error}") from error
    return plan(raw, file, folder, sets, text)


def recipe(steps: Sequence[Any], *, folder: str | Path = ".", **top: Any) -> Plan:
    """The same from Python: `recipe([{"tune": {"method": "lora"}}], model="house:lm", data="rows.jsonl", name="mine")`."""
    return plan({"name": "recipe", **top, "steps": list(steps)}, "recipe", Path(folder))


def plan(raw: Any, file: str, folder: Path, sets: Sequence[str] = (), text: str = "") -> Plan:
    """Checks a recipe's mapping and unrolls it."""
    if not isinstance(raw, Mapping):
        raise Located(f"{file}:1:1: a recipe is a mapping with `steps:`; this is {shown(raw)}")
    place = Place(file, raw)
    try:
        _no_tags(raw)
        changed = tuple(_set(raw, one) for one in sets)
        place = dataclasses.replace(place, changed=changed)
        return _Reader(raw, file, folder, place, text).read()
    except Problem as problem:
        raise place.locate(problem) from problem


def _no_tags(node: Any, path: tuple[str | int, ...] = ()) -> None:
    """YAML tags (`!!python/object`) have no place in a recipe."""
    tag = getattr(getattr(node, "tag", None), "value", None)
    if tag and str(tag).removeprefix("tag:yaml.org,2002:") not in ("map", "seq", "str", "int", "float", "bool", "null", "timestamp"):
        raise Problem(f"the tag {shown(str(tag))} is not allowed; write plain values", path)
    if isinstance(node, Mapping):
        for key, value in node.items():
            _no_tags(value, (*path, key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            _no_tags(value, (*path, index))


def _set(raw: Any, one: str) -> tuple[str | int, ...]:
    """Applies `step.key.more=value`. Returns the path that it changed."""
    from ruamel.yaml import YAML

    key, equals, value = one.partition("=")
    words = key.strip().split(".")
    if not equals or not all(words):
        raise Located(f"--set: {shown(one)}: write step.key=value, or key=value for the recipe's own keys")
    new = YAML(typ="safe").load(value)
    node: Any = raw
    path: list[str | int] = []
    if len(words) == 1 or words[0] in TOP:
        if words[0] not in TOP:
            raise Located(f"--set: no key `{words[0]}` in a recipe{nearest(words[0], TOP)}")
    else:
        names: dict[str, Any] = {}
        for where, entry in _entries(raw.get("steps") or [], ("steps",)):
            engine = next(iter(entry)) if isinstance(entry, Mapping) else entry
            body = entry[engine] if isinstance(entry, Mapping) else None
            names[str(body.get("name", engine)) if isinstance(body, Mapping) else str(engine)] = (where, engine)
        found = next((name for name in names if plain(name) == plain(words[0])), None)
        if found is None:
            raise Located(f"--set: no step `{words[0]}`{nearest(words[0], names)}")
        where, engine = names[found]
        parent: Any = raw
        for step in where[:-1]:
            parent = parent[step]
        if not isinstance(parent[where[-1]], Mapping) or not isinstance(parent[where[-1]][engine], Mapping):
            parent[where[-1]] = {engine: {}}
        node, path, words = parent[where[-1]][engine], [*where, engine], words[1:]
    for word in words[:-1]:
        if isinstance(node.get(word), str):
            node[word] = {node[word]: {}} if node[word] == words[words.index(word) + 1] else {}
        if not isinstance(node.get(word), Mapping):
            node[word] = {}
        node, path = node[word], [*path, word]
    node[words[-1]] = new
    return (*path, words[-1])


def _entries(steps: Any, path: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Every step that is written, blocks opened."""
    for index, entry in enumerate(steps if isinstance(steps, list) else []):
        block = next((one for one in BLOCKS if isinstance(entry, Mapping) and one in entry), None)
        if block and isinstance(entry[block], Mapping):
            yield from _entries(entry[block].get("steps"), (*path, index, block, "steps"))
        else:
            yield (*path, index), entry


def substituted(value: Any, names: Mapping[str, Any], path: tuple[str | int, ...] = ()) -> Any:
    """`${name}` replaced in every text; a text that is one `${name}` alone becomes its value."""
    if isinstance(value, str):
        try:
            if whole := re.fullmatch(_VARIABLE, value):
                return _value(whole[1], names)
            return re.sub(_VARIABLE, lambda found: str(_value(found[1], names)), value)
        except Problem as problem:
            raise problem.under(*path) from problem
    if isinstance(value, Mapping):
        return {key: substituted(one, names, (*path, key)) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [substituted(one, names, (*path, index)) for index, one in enumerate(value)]
    return value


def _value(name: str, names: Mapping[str, Any]) -> Any:
    if name not in names:
        if name.startswith("env:"):
            raise Problem(f"the variable {name[4:]} is not named under `env:`; add `env: [{name[4:]}]` to the recipe")
        raise Problem(f"nothing is called `${{{name}}}`{nearest(name, names)}")
    return names[name]


@dataclasses.dataclass
class _Reader:
    """One recipe being read, in order, into steps."""

    raw: Any
    file: str
    folder: Path
    place: Place
    text: str
    steps: list[Step] = dataclasses.field(default_factory=list)
    problems: list[Problem] = dataclasses.field(default_factory=list)
    modules: dict[str, Any] = dataclasses.field(default_factory=dict)
    scope: Scope = dataclasses.field(default_factory=Scope)
    names: dict[str, Any] = dataclasses.field(default_factory=dict)
    taken: dict[tuple[str, str], tuple[str | int, ...]] = dataclasses.field(default_factory=dict)
    troubled: list[str] = dataclasses.field(default_factory=list)

    def read(self) -> Plan:
        for key in self.raw:
            if key not in TOP:
                self.problems.append(Problem(f"a recipe has no key `{key}`{nearest(str(key), TOP)}", (key,)))
        name = self._text("name", Path(self.file).stem)
        if not _NAME.match(name):
            self.problems.append(
                Problem(f"{shown(name)}: a name has letters, digits, dots and hyphens, and begins with a letter", ("name",))
            )
        seed = self.raw.get("seed", 0)
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            self.problems.append(Problem(f"{shown(seed)}: a seed is a whole number, 0 or more", ("seed",)))
            seed = 0
        self.seed = seed
        self.names.update(self._environment())
        use = self.raw.get("use") or []
        if not isinstance(use, (list, tuple)) or not all(isinstance(one, str) for one in use):
            self.problems.append(Problem(f"{shown(use)}: `use` is a list of Python files", ("use",)))
        else:
            self._try(lambda: setattr(self, "scope", Scope.of(self.folder, use)), ("use",))
        self.scope = dataclasses.replace(self.scope, folder=self.folder)
        steps = self.raw.get("steps")
        if not isinstance(steps, (list, tuple)) or not steps:
            self.problems.append(Problem("a recipe needs `steps:`, a list of at least one step", ("steps",) if "steps" in self.raw else ()))
        else:
            self._block(steps, ("steps",), "", self.names, "")
        export = self._export()
        collect(self.problems)
        about = self._text("about", "")
        return Plan(name, tuple(self.steps), self.text, self.folder, export, seed, about, self.place)

    # ---------------------------------------------------------------------------------------------- top level

    def _try(self, work: Any, path: tuple[str | int, ...]) -> Any:
        try:
            return work()
        except Problem as problem:
            self.problems.append(problem.under(*path))
            return None

    def _text(self, key: str, default: str) -> str:
        value = self.raw.get(key, default)
        if not isinstance(value, str):
            self.problems.append(Problem(f"{shown(value)}: a text is asked for", (key,)))
            return default
        return value

    def _environment(self) -> dict[str, Any]:
        named = self.raw.get("env") or []
        if not isinstance(named, (list, tuple)) or not all(isinstance(one, str) for one in named):
            self.problems.append(Problem(f"{shown(named)}: `env` is a list of variables' names", ("env",)))
            return {}
        found = {}
        for index, name in enumerate(named):
            if name not in os.environ:
                self.problems.append(Problem(f"the variable {name} is not set; export {name}=... before the run", ("env", index)))
            else:
                found[f"env:{name}"] = os.environ[name]
        return found

    def _export(self) -> tuple[str, ...]:
        value = self.raw.get("export", "last")
        if value in ("last", "all", "none"):
            return (value,)
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, (list, tuple)) or not all(isinstance(one, str) for one in names):
            self.problems.append(Problem(f"{shown(value)}: `export` is last, all, none, or a list of steps", ("export",)))
            return ()
        known = [step.name for step in self.steps]
        for index, name in enumerate(names):
            if name not in known:
                where = ("export",) if isinstance(value, str) else ("export", index)
                self.problems.append(Problem(f"no step `{name}`{nearest(name, known)}", where))
        return tuple(names)

    # ------------------------------------------------------------------------------------------------- blocks

    def _block(self, steps: Any, path: tuple[str | int, ...], branch: str, names: Mapping[str, Any], loop: str) -> None:
        for index, entry in enumerate(steps):
            here = (*path, index)
            try:
                self._entry(entry, here, branch, names, loop)
            except Problem as problem:
                self.problems.extend(one for one in problem.all if not isinstance(one, Follows))
                body = next(iter(entry.values()), None) if isinstance(entry, Mapping) else None
                engine = next(iter(entry), "") if isinstance(entry, Mapping) else entry
                self.troubled.append(str(body.get("name", engine)) if isinstance(body, Mapping) else str(engine))

    def _entry(self, entry: Any, path: tuple[str | int, ...], branch: str, names: Mapping[str, Any], loop: str) -> None:
        if isinstance(entry, str):
            entry = {entry: None}
        if not isinstance(entry, Mapping) or len(entry) != 1:
            have = f"{len(entry)} keys: {', '.join(map(str, entry))}" if isinstance(entry, Mapping) else shown(entry)
            raise Problem(f"a step is written `engine: {{settings}}`, with one engine; here is {have}", path)
        (word, body), *_ = entry.items()
        if body is not None and not isinstance(body, Mapping):
            raise Problem(f"{shown(body)}: settings of a step are a mapping, `{{key: value}}`", (*path, word))
        body = body or {}
        if word == "repeat":
            self._repeat(body, (*path, word), branch, names, loop)
        elif word == "each":
            self._each(body, (*path, word), branch, names, loop)
        else:
            self._step(str(word), body, (*path, word), branch, names, loop)

    def _keys(self, body: Mapping[str, Any], allowed: Sequence[str], path: tuple[str | int, ...], what: str) -> None:
        for key in body:
            if key not in allowed:
                raise Problem(f"`{what}` has no key `{key}`{nearest(str(key), allowed)}", (*path, key))
        if not isinstance(body.get("steps"), (list, tuple)) or not body["steps"]:
            raise Problem(f"`{what}` needs `steps:`, a list of at least one step", path)

    def _repeat(self, body: Mapping[str, Any], path: tuple[str | int, ...], branch: str, names: Mapping[str, Any], loop: str) -> None:
        self._keys(body, ("times", "until", "steps"), path, "repeat")
        if loop:
            raise Problem("`repeat` does not stand in a `repeat`; give one of them more times", path)
        times = body.get("times")
        if isinstance(times, bool) or not isinstance(times, int) or times < 1:
            raise Problem(
                f"{shown(times)}: `times` is a whole number above 0, the most repetitions", (*path, "times") if "times" in body else path
            )
        mine = f"{path}"
        for turn in range(1, times + 1):
            before = len(self.steps)
            self._block(body["steps"], (*path, "steps"), branch, {**names, "turn": turn}, f"{mine}#{turn}")
            if "until" in body and len(self.steps) > before:
                condition = self._try(lambda: self._condition(body["until"], branch), (*path, "until"))
                self.steps[-1] = dataclasses.replace(self.steps[-1], until=condition)

    def _condition(self, value: Any, branch: str) -> Condition:
        found = re.fullmatch(r"\s*([\w\[\]-]+)\.([\w.\[\]@/-]+)\s*(>=|<=|>|<)\s*([-+\d.eE]+)\s*", str(value))
        if not found:
            raise Problem(f"{shown(value)}: write `until: step.figure >= number`")
        at = self._find(found[1], branch)
        return Condition(at.index, found[2], found[3][0] == ">", len(found[3]) == 1, float(found[4]))

    def _each(self, body: Mapping[str, Any], path: tuple[str | int, ...], branch: str, names: Mapping[str, Any], loop: str) -> None:
        self._keys(body, ("over", "as", "steps"), path, "each")
        items, name = body.get("over"), body.get("as", "item")
        if isinstance(items, Mapping):
            pairs = [(str(key), value) for key, value in items.items()]
        elif isinstance(items, (list, tuple)) and all(isinstance(one, (str, int, float)) for one in items):
            pairs = [(str(one), one) for one in items]
        else:
            raise Problem(
                f"{shown(items)}: `over` is a list of words or numbers, or a mapping of names to values",
                (*path, "over") if "over" in body else path,
            )
        if not pairs:
            raise Problem("`over` is empty; name at least one item", (*path, "over"))
        if len({key for key, _ in pairs}) < len(pairs):
            raise Problem(f"{shown(items)}: an item stands twice", (*path, "over"))
        if not isinstance(name, str) or not _NAME.match(name):
            raise Problem(f"{shown(name)}: `as` is a name", (*path, "as"))
        if branch:
            raise Problem("`each` does not stand in an `each`; list the combinations", path)
        for key, value in pairs:
            self._block(body["steps"], (*path, "steps"), key, {**names, name: value}, loop)

    # -------------------------------------------------------------------------------------------------- steps

    def _step(
        self, word: str, body: Mapping[str, Any], path: tuple[str | int, ...], branch: str, names: Mapping[str, Any], loop: str
    ) -> None:
        engines = parts.engines()
        engine = next((one for one in engines if plain(one) == plain(word)), None)
        if engine is None:
            raise Problem(f"no engine `{word}`{nearest(word, [*engines, *BLOCKS])}", path)
        module = self.modules.setdefault(engine, parts.engine(engine))
        try:
            body = substituted(body, names)
        except Problem as problem:
            raise problem.under(*path) from problem
        problems: list[Problem] = []
        name = body.get("name", engine)
        if not isinstance(name, str) or not _NAME.match(name) or name in ("last", "model", "data", "house"):
            raise Problem(
                f"{shown(name)}: a step's name has letters, digits, dots and hyphens, and is none of last, model, data, house",
                (*path, "name"),
            )
        if "[" not in name and branch:
            name = f"{name}[{branch}]"
        if (taken := self.taken.get((name, loop))) is not None and taken != path:
            raise Problem(f"two steps are called `{name}`; give this one a `name:`", path)
        for (other, turn), where in self.taken.items():
            if other == name and turn != loop and where != path:
                raise Problem(f"two steps are called `{name}`; give this one a `name:`", path)
        self.taken[(name, loop)] = path
        seed = body.get("seed", self.seed)
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            problems.append(Problem(f"{shown(seed)}: a seed is a whole number, 0 or more", ("seed",)))
        base, method = None, body.get("method")
        if method is not None:
            try:
                base = parts.method(engine, str(method))
            except Problem as problem:
                problems.append(problem)
        inputs: dict[str, Any] = {}
        for role, takes in module.INPUTS.items():
            try:
                inputs[role] = self._input(role, takes, body, branch, engine, names)
            except Problem as problem:
                problems.extend(problem.all)
        rest = {key: value for key, value in body.items() if plain(str(key)) not in {plain(one) for one in (*STEP, *module.INPUTS)}}
        cls = parts.spec_of(module)
        spec = None
        try:
            known = {plain(one) for one in parts.settings(cls)} - {"paper"}
            for key in rest:
                if plain(str(key)) not in known:
                    words = [*(one for one in parts.settings(cls) if one != "paper"), *module.INPUTS, *STEP]
                    problems.append(Problem(f"`{engine}` has no slot or setting `{key}`{nearest(str(key), words)}", (key,)))
            rest = {key: value for key, value in rest.items() if plain(str(key)) in known}
            spec = parts.build(cls, rest, base=base, scope=self.scope)
            parts.starting_order(spec, getattr(module, "PROVIDES", ()))
        except Problem as problem:
            problems.extend(problem.all)
        collect([problem.under(*path) for problem in problems])
        turn = int(loop.rpartition("#")[2]) if loop else 0
        earlier = next(
            (i for i in range(len(self.steps) - 1, -1, -1) if self.steps[i].path == path and self._base(self.steps[i].name) == name), None
        )
        full = f"{name}#{turn}" if turn > 1 else name
        held = self.scope.files + tuple(
            {
                Path(one.source.rpartition(":")[0])
                for setting in parts.slots(spec)
                for one in parts.held(getattr(spec, setting))
                if isinstance(one, parts.Function)
            }
        )
        about, aim = body.get("about", ""), body.get("aim", ())
        if not isinstance(about, str):
            raise Problem(f"{shown(about)}: a text is asked for", (*path, "about"))
        aim = (aim,) if isinstance(aim, str) else aim
        if not isinstance(aim, (list, tuple)) or not all(isinstance(one, str) for one in aim):
            raise Problem(f"{shown(aim)}: `aim` is a list of figures' names", (*path, "aim"))
        before = earlier if turn > 1 else None
        self.steps.append(Step(full, engine, str(method or ""), spec, inputs, seed, path, before, loop, None, held, about, tuple(aim)))

    @staticmethod
    def _base(name: str) -> str:
        return re.sub(r"#\d+\Z", "", name)

    def _input(self, role: str, takes: Input, body: Mapping[str, Any], branch: str, engine: str, names: Mapping[str, Any]) -> Any:
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
            return self._own("data", names, lambda value: source(value, self.folder))

        def own(value: Any) -> Any:
            """`data` stands for the recipe's own also inside a source that reads another."""
            if isinstance(value, Mapping):
                return {
                    key: self._data("data", takes, names) if one == "data" and key == "source" else own(one) for key, one in value.items()
                }
            return value

        return source(own(given), self.folder)

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
            found = [FromStep(i) for i, step in enumerate(self.steps) if self._base(step.name).startswith(word[:-2])]
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
                if plain(self._base(self.steps[index].name)) == plain(wanted) or plain(self.steps[index].name) == plain(wanted):
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
        saved = getattr(self.steps[index].spec, "keep", ())
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
        for step in house(word).steps:
            self.modules.setdefault(step.engine, parts.engine(step.engine))
            inputs = {role: _shifted(value, offset) for role, value in step.inputs.items()}
            self.steps.append(dataclasses.replace(step, inputs=inputs, path=()))
        return FromStep(len(self.steps) - 1)


def house(word: str) -> Plan:
    """The built-in recipe of a house model, `house:lm`; its last step is called that wherever it is asked for, so it is made once."""
    folder = Path(__file__).parent / "recipes"
    file = folder / f"house-{word[6:]}.yaml"
    if not file.is_file():
        raise Problem(f"no house model `{word}`{nearest(word, [f'house:{path.stem[6:]}' for path in folder.glob('house-*.yaml')])}")
    plan = load(file)
    *first, last = plan.steps
    named = [dataclasses.replace(one, name=f"{word}/{one.name}") for one in first]
    return dataclasses.replace(plan, steps=(*named, dataclasses.replace(last, name=word)))


def _shifted(value: Any, by: int) -> Any:
    if isinstance(value, tuple):
        return tuple(_shifted(one, by) for one in value)
    return dataclasses.replace(value, index=value.index + by) if isinstance(value, FromStep) else value


# -------------------------------------------------------------------------------------------------------- schema


def schema() -> dict[str, Any]:
    """JSON Schema of a recipe, for editors: `# yaml-language-server: $schema=temper.schema.json`."""
    definitions: dict[str, Any] = {}
    variants = []
    for name in parts.engines():
        module = parts.engine(name)
        made = parts.schema(parts.spec_of(module), definitions)
        made["properties"].pop("paper", None)
        methods = list(parts.methods(name))
        model = {"type": "string", "description": "a step, tune@500, last, model, a folder, a hub name, or house:lm"}
        for role, takes in module.INPUTS.items():
            one: dict[str, Any] = {"type": ["string", "object"]} if takes.is_data else model
            entry = {"anyOf": [one, {"type": "array", "items": one}]} if takes.many else dict(one)
            made["properties"][role] = {**entry, "description": takes.about or one.get("description", "")}
        made["properties"]["name"] = {"type": "string"}
        made["properties"]["seed"] = {"type": "integer", "minimum": 0}
        made["properties"]["method"] = {"enum": methods}
        definitions[f"engine.{name}"] = made
        settled = {"anyOf": [{"$ref": f"#/$defs/engine.{name}"}, {"type": "null"}]}
        variants.append({"type": "object", "properties": {name: settled}, "required": [name], "additionalProperties": False})
    steps = {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/step"}}
    repeat = {"type": "object", "properties": {"times": {"type": "integer", "minimum": 1}, "until": {"type": "string"}, "steps": steps}}
    each = {"type": "object", "properties": {"over": {"type": ["array", "object"]}, "as": {"type": "string"}, "steps": steps}}
    for block, made in (("repeat", repeat), ("each", each)):
        made.update(additionalProperties=False, required=["times" if block == "repeat" else "over", "steps"])
        variants.append({"type": "object", "properties": {block: made}, "required": [block], "additionalProperties": False})
    definitions["step"] = {"anyOf": [{"enum": parts.engines()}, *variants]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Temper recipe",
        "type": "object",
        "additionalProperties": False,
        "required": ["steps"],
        "properties": {
            "name": {"type": "string", "description": "what the run and its folder are called"},
            "about": {"type": "string", "description": "a sentence for the report"},
            "model": {"type": "string", "description": "new, a folder, a hub name, or house:lm"},
            "data": {"type": ["string", "object"], "description": "a file, a folder, a hub name, house:library, or a source with settings"},
            "seed": {"type": "integer", "minimum": 0},
            "use": {"type": "array", "items": {"type": "string"}, "description": "Python files with parts of your own"},
            "env": {"type": "array", "items": {"type": "string"}, "description": "environment variables that ${env:NAME} may read"},
            "export": {"anyOf": [{"enum": ["last", "all", "none"]}, {"type": "array", "items": {"type": "string"}}]},
            "steps": steps,
        },
        "$defs": definitions,
    }


def schema_text() -> str:
    return json.dumps(schema(), indent=1) + "\n"
