"""One recipe being read, in order, into steps: its own keys, its blocks, its steps."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from temper import parts, tracking
from temper.parts import Problem, Scope, collect, nearest, plain, shown
from temper.recipe.editing import TOP, substituted
from temper.recipe.places import BLOCKS, Follows
from temper.recipe.plans import Condition, Plan, Step
from temper.recipe.references import References, unturned

STEP = ("name", "method", "seed", "about", "aim")
"""Keys that a step has besides its engine's own."""
_NAME = re.compile(r"[A-Za-z][\w.-]*\Z")


@dataclasses.dataclass
class Reader(References):
    """Reads a recipe; what is wrong is gathered, so that all of it is told at once."""

    problems: list[Problem] = dataclasses.field(default_factory=list)
    taken: dict[str, tuple[str | int, ...]] = dataclasses.field(default_factory=dict)
    seed: int = 0

    def read(self) -> Plan:
        for key in self.raw:
            if key not in TOP:
                self.problems.append(Problem(f"a recipe has no key `{key}`{nearest(str(key), TOP)}", (key,)))
        name = self._text("name", Path(self.file).stem)
        if not _NAME.match(name):
            self.problems.append(
                Problem(f"{shown(name)}: a name has letters, digits, dots and hyphens, and begins with a letter", ("name",))
            )
        self.seed = self._try(lambda: _seed(self.raw.get("seed", 0)), ()) or 0
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
        track = self._try(lambda: tracking.chosen(self.raw.get("track", "tensorboard")), ("track",)) or ()
        collect(self.problems)
        about = self._text("about", "")
        return Plan(name, tuple(self.steps), self.text, self.folder, export, self.seed, about, self.place, track)

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
        name = self._called(engine, body, path, branch)
        problems: list[Problem] = []

        def gathered(read: Callable[[], Any]) -> Any:
            try:
                return read()
            except Problem as problem:
                problems.extend(problem.all)
                return None

        seed = gathered(lambda: _seed(body.get("seed", self.seed)))
        method = body.get("method")
        base = gathered(lambda: parts.method(engine, str(method))) if method is not None else None
        inputs = {}
        for role, takes in module.INPUTS.items():
            inputs[role] = gathered(lambda role=role, takes=takes: self.input(role, takes, body, branch, engine, names))
        spec = gathered(lambda: self._spec(engine, module, body, base))
        about, aim = gathered(lambda: _about(body)), gathered(lambda: _aim(body))
        collect([problem.under(*path) for problem in problems])

        turn = int(loop.rpartition("#")[2]) if loop else 1
        alike = [i for i, step in enumerate(self.steps) if step.path == path and unturned(step.name) == name]
        earlier = alike[-1] if turn > 1 else None
        full = f"{name}#{turn}" if turn > 1 else name
        files = (*self.scope.files, *_files(spec))
        self.steps.append(Step(full, engine, str(method or ""), spec, inputs, seed, path, earlier, loop, None, files, about, aim))

    def _called(self, engine: str, body: Mapping[str, Any], path: tuple[str | int, ...], branch: str) -> str:
        """The step's name, its branch in brackets; each turn of a `repeat` has the same."""
        name = body.get("name", engine)
        if not isinstance(name, str) or not _NAME.match(name) or name in ("last", "model", "data", "house"):
            raise Problem(
                f"{shown(name)}: a step's name has letters, digits, dots and hyphens, and is none of last, model, data, house",
                (*path, "name"),
            )
        name = f"{name}[{branch}]" if branch else name
        if self.taken.setdefault(name, path) != path:
            raise Problem(f"two steps are called `{name}`; give this one a `name:`", path)
        return name

    def _spec(self, engine: str, module: Any, body: Mapping[str, Any], base: Any) -> Any:
        """The engine's spec from what a step says besides its name, method and inputs."""
        cls = parts.spec_of(module)
        known = [one for one in parts.settings(cls) if one != "paper"]
        others = {plain(one) for one in (*STEP, *module.INPUTS)}
        said = {key: value for key, value in body.items() if plain(str(key)) not in others}
        wrong = [key for key in said if plain(str(key)) not in set(map(plain, known))]
        problems = [
            Problem(f"`{engine}` has no slot or setting `{key}`{nearest(str(key), [*known, *module.INPUTS, *STEP])}", (key,))
            for key in wrong
        ]
        try:
            spec = parts.build(cls, {key: value for key, value in said.items() if key not in wrong}, base=base, scope=self.scope)
            parts.starting_order(spec, getattr(module, "PROVIDES", ()))
        except Problem as problem:
            problems.extend(problem.all)
        collect(problems)
        return spec


def _seed(seed: Any) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise Problem(f"{shown(seed)}: a seed is a whole number, 0 or more", ("seed",))
    return seed


def _about(body: Mapping[str, Any]) -> str:
    about = body.get("about", "")
    if not isinstance(about, str):
        raise Problem(f"{shown(about)}: a text is asked for", ("about",))
    return about


def _aim(body: Mapping[str, Any]) -> tuple[str, ...]:
    aim = body.get("aim", ())
    aim = (aim,) if isinstance(aim, str) else aim
    if not isinstance(aim, (list, tuple)) or not all(isinstance(one, str) for one in aim):
        raise Problem(f"{shown(aim)}: `aim` is a list of figures' names", ("aim",))
    return tuple(aim)


def _files(spec: Any) -> set[Path]:
    """The files of users' functions that stand in a spec's slots, and those that its parts name as their `files`."""
    held = [one for name in parts.slots(spec) for one in parts.held(getattr(spec, name))]
    functions = {Path(one.source.rpartition(":")[0]) for one in held if isinstance(one, parts.Function)}
    return functions.union(*(getattr(one, "files", ()) for one in held))
