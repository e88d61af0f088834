"""A study file -> a checked `Study`. Every error names file, line, key, value, rule and the nearest right word."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from temper.parts import Count, Problem, Rate, Share, Slot, build, collect, nearest, plain, shown, spec
from temper.recipe import Plan, parsed
from temper.recipe.places import Place
from temper.store import digest
from temper.study.arms import Arm, arms, recipe_of
from temper.study.ranges import Range
from temper.study.search import Random, Search
from temper.study.significance import MultiBootstrap, Test

TOP = ("name", "about", "claim", "paper", "recipe", "vary", "baseline", "seeds", "budget", "tune", "measure", "fit", "finding")
"""A study's own keys."""
Kind = Literal["updates", "tokens", "seconds", "flops", "memory", "trials"]
KINDS: tuple[Kind, ...] = ("updates", "tokens", "seconds", "flops", "memory", "trials")
"""What can be held equal."""


@spec
class Budget:
    """What every arm may spend; one of them is given and enforced, the others are reported."""

    updates: Count | None = None
    """Updates of each training step."""
    tokens: Count | None = None
    """Tokens that each training step trains on."""
    seconds: Rate | None = None
    """Wall time of each training step. Such steps run alone and are never taken from earlier runs."""
    flops: Rate | None = None
    """Floating-point operations of each training step."""
    memory: Rate | None = None
    """Peak memory of a run, bytes: an arm that needs more is left out of the finding. Runs have a process of their own."""
    trials: Literal[True] | None = None
    """Trials of tuning alone, as `tune` gives them; runs may differ in everything else."""
    of: tuple[str, ...] = ()
    """The steps that it holds for; empty: every training step in which the arms differ, or that follows one."""

    def __post_init__(self) -> None:
        if len(given := [one for one in KINDS if getattr(self, one) is not None]) != 1:
            raise Problem(f"{' and '.join(given) or 'nothing'} given: one thing is held equal, one of {', '.join(KINDS)}")

    @property
    def kind(self) -> Kind:
        return next(one for one in KINDS if getattr(self, one) is not None)

    @property
    def amount(self) -> float:
        return float(getattr(self, self.kind))


@spec
class Tuning:
    """Trials that every arm gets before it is measured: as many for each, at the same shares of its ranges."""

    trials: Count = 8
    """Settings tried for each arm."""
    by: str = ""
    """The figure that chooses, `step.figure`; never one that the study measures."""
    search: Slot[Search] = Random()
    """How the trials are spent."""
    over: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Setting -> its range, for every arm that has the setting."""
    arms: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Arm -> ranges of its own, in place of those or beside them."""
    seed: int = 1_000_000
    """Of the trials' runs: none of the seeds that are measured."""


@spec
class Claim:
    """A statement about figures that can be wrong.

    Either two arms (`better`, `than`, `figure`), or a figure of a fit (`quantity`), or a sum of figures with weights (`of`:
    `{"arm figure": weight}`). The first holds where `better`'s figure is better than `than`'s by more than `margin`; the others where
    the number lies above `above`, or below `below`.
    """

    better: str = ""
    than: str = ""
    figure: str = ""
    """One of `measure`; empty: the first."""
    margin: float = 0.0
    """In the figure's own unit. Negative: it may be worse by so much."""
    quantity: str = ""
    of: dict[str, float] = dataclasses.field(default_factory=dict)
    above: float | None = None
    below: float | None = None
    says: str = ""
    """The claim in words."""
    test: Slot[Test] | None = None
    """In place of the finding's."""

    def __post_init__(self) -> None:
        kinds = [
            name for name, there in (("better and than", self.better or self.than), ("quantity", self.quantity), ("of", self.of)) if there
        ]
        if len(kinds) != 1:
            raise Problem(f"{' and '.join(kinds) or 'nothing'} given: a claim is of `better` and `than`, or a `quantity`, or `of` figures")
        if kinds[0] == "better and than":
            if not (self.better and self.than) or self.above is not None or self.below is not None:
                raise Problem("a claim of two arms has `better`, `than` and perhaps `margin`")
        elif (self.above is None) == (self.below is None):
            raise Problem("a claim of a number has `above` or `below`", ("above",) if self.above is not None else ())


@spec
class Fit:
    """A law through the arms' figures."""

    law: str = "power-law"
    x: str
    """An axis of the grid whose places are numbers, or a figure or cost of the arms."""
    y: str = ""
    """One of `measure`; empty: the first."""
    where: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Axis -> its place: only those arms."""
    predict: float | None = None
    """An x whose arm is left out and predicted from the others."""


@spec
class Finding:
    """The rule that turns figures into a finding, written before the first run."""

    claims: tuple[dict[str, Any], ...] = ()
    """What must hold. None: every arm is compared with the baseline, and no verdict is given."""
    test: Slot[Test] = MultiBootstrap()
    level: Share = 0.95
    """Of intervals; 1 - level is the chance of a wrong verdict, shared by all claims."""
    correction: Literal["holm", "bonferroni", "none"] = "holm"
    """How several claims share it."""


@dataclasses.dataclass(frozen=True)
class Study:
    """A recipe, what varies, what is measured, and the rule that turns figures into a finding."""

    name: str
    about: str
    claim: str
    paper: str
    base: Any
    folder: Path
    arms: tuple[Arm, ...]
    baseline: str
    seeds: tuple[int, ...]
    budget: Budget | None
    tuning: Tuning | None
    ranges: Mapping[str, Mapping[str, Range]]
    measure: Mapping[str, str]
    fits: Mapping[str, Fit]
    finding: Finding
    claims: tuple[Claim, ...]
    text: str
    file: str

    def arm(self, name: str) -> Arm:
        for one in self.arms:
            if plain(one.name) == plain(name):
                return one
        raise Problem(f"no arm `{name}`{nearest(name, [one.name for one in self.arms])}")

    def plan(self, arm: Arm, seed: int, *more: Mapping[str, Any]) -> Plan:
        """The arm's recipe with a seed and further changes: the budget, what trials chose."""
        return recipe_of(self.base, (arm.changes, *more, {"seed": seed}), self.file, self.folder, self.text, arm.name)

    @property
    def digest(self) -> str:
        """Of what decides its outcome and its rule: another digest is another attempt."""
        return digest({"study": self.text})


def load(path: str | Path) -> Study:
    """A study from a YAML file. Raises `Problem`s with file, line and column."""
    path = Path(path)
    if not path.is_file():
        near = [one.name for one in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise Problem(f"no study {shown(str(path))}{nearest(path.name, near)}")
    return read(path.read_text(encoding="utf8"), path.name, path.parent)


def read(text: str, file: str = "study.yaml", folder: Path = Path()) -> Study:
    """A study from YAML text; paths in it are relative to `folder`."""
    return study(parsed(text, file), file, folder, text)


def study(raw: Any, file: str, folder: Path, text: str = "") -> Study:
    """Checks a study's mapping, and every arm's recipe."""
    if not isinstance(raw, Mapping):
        raise Problem(f"{file}:1:1: a study is a mapping with `recipe:` and `vary:`; this is {shown(raw)}")
    try:
        return _study(raw, file, folder, text)
    except Problem as problem:
        raise Place(file, raw).locate(problem) from problem


def _study(raw: Mapping[str, Any], file: str, folder: Path, text: str) -> Study:
    problems: list[Problem] = [Problem(f"a study has no key `{key}`{nearest(str(key), TOP)}", (key,)) for key in raw if key not in TOP]
    problems += [Problem(f"a study needs `{key}:`") for key in ("recipe", "vary", "measure") if raw.get(key) is None]
    collect(problems)

    def gathered(key: str, make: Callable[[], Any]) -> Any:
        try:
            return make()
        except Problem as problem:
            problems.extend(problem.under(*([key] if key in raw else [])).all)
            return None

    texts = {key: gathered(key, lambda key=key: _text(raw.get(key, ""))) for key in ("name", "about", "claim", "paper", "baseline")}
    base = gathered("recipe", lambda: _recipe(raw["recipe"], folder))
    varied = gathered("vary", lambda: arms(raw["vary"]))
    seeds = gathered("seeds", lambda: _seeds(raw.get("seeds", 1)))
    budget = gathered("budget", lambda: build(Budget, _mapping(raw["budget"])) if raw.get("budget") is not None else None)
    tuning = gathered("tune", lambda: build(Tuning, _mapping(raw["tune"])) if raw.get("tune") is not None else None)
    measure = gathered("measure", lambda: _measure(raw["measure"]))
    fits = gathered(
        "fit", lambda: {str(name): _under(name, lambda one=one: build(Fit, _mapping(one))) for name, one in (raw.get("fit") or {}).items()}
    )
    finding = gathered("finding", lambda: build(Finding, _mapping(raw.get("finding") or {})))
    claims = (
        gathered(
            "finding", lambda: tuple(_under(("claims", at), lambda one=one: build(Claim, one)) for at, one in enumerate(finding.claims))
        )
        if finding
        else ()
    )
    collect(problems)
    ranges = gathered("tune", lambda: _ranges(tuning, varied))
    collect(problems)
    made = Study(
        name=texts["name"] or Path(file).stem,
        about=texts["about"],
        claim=texts["claim"],
        paper=texts["paper"],
        base=base,
        folder=folder,
        arms=varied,
        baseline=texts["baseline"] or varied[0].name,
        seeds=seeds,
        budget=budget,
        tuning=tuning,
        ranges=ranges,
        measure=measure,
        fits=fits,
        finding=finding,
        claims=claims,
        text=text,
        file=file,
    )
    gathered("baseline", lambda: made.arm(made.baseline))
    gathered("tune", lambda: _check_tuning(made))
    gathered("fit", lambda: [_under(name, lambda one=one: _check_fit(one, made)) for name, one in made.fits.items()])
    gathered("finding", lambda: [_under(("claims", at), lambda one=one: _check_claim(one, made)) for at, one in enumerate(made.claims)])
    gathered("vary", lambda: [_under(arm.name, lambda arm=arm: _check_arm(made, arm)) for arm in made.arms])
    collect(problems)
    return made


def _under(path: Any, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except Problem as problem:
        raise problem.under(*(path if isinstance(path, tuple) else (path,))) from problem


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise Problem(f"{shown(value)}: a text is asked for")
    return value


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise Problem(f"{shown(value)}: a mapping is asked for, `{{key: value}}`")
    return value


def _recipe(value: Any, folder: Path) -> Any:
    """The base recipe's mapping: written here, or in a file beside the study."""
    if isinstance(value, Mapping):
        return value
    file = folder / _text(value)
    if not file.is_file():
        raise Problem(f"no recipe {shown(value)}{nearest(str(value), [one.name for one in folder.glob('*.y*ml')])}")
    return parsed(file.read_text(encoding="utf8"), file.name)


def _seeds(value: Any) -> tuple[int, ...]:
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return tuple(range(value))
    given = list(value) if isinstance(value, (list, tuple)) else []
    if given and all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in given) and len(set(given)) == len(given):
        return tuple(given)
    raise Problem(f"{shown(value)}: `seeds` is how many, or a list of different whole numbers, 0 or more")


def _measure(value: Any) -> Mapping[str, str]:
    """Name -> `step.figure`; a list names each by its last word."""
    named = {str(one).rpartition(".")[2]: one for one in value} if isinstance(value, (list, tuple)) else _mapping(value)
    if not named or (isinstance(value, (list, tuple)) and len(named) < len(value)):
        raise Problem(f"{shown(value)}: `measure` maps names to figures, `accuracy: task.tune.accuracy`, each name once")
    for name, figure in named.items():
        if not isinstance(figure, str) or "." not in figure:
            raise Problem(f"{shown(figure)}: a figure is written `step.figure`, such as `task.tune.accuracy`", (name,))
    return {str(name): figure for name, figure in named.items()}


def _ranges(tuning: Tuning | None, varied: Sequence[Arm]) -> Mapping[str, Mapping[str, Range]]:
    """Arm -> setting -> its range."""
    if tuning is None:
        return {}

    @spec
    class One:
        range: Slot[Range]

    def read(over: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Range]:
        return {key: _under((*path, key), lambda one=one: build(One, {"range": one}).range) for key, one in over.items()}

    names = [arm.name for arm in varied]
    for name in tuning.arms:
        if name not in names:
            raise Problem(f"no arm `{name}`{nearest(name, names)}", ("arms", name))
    common = read(tuning.over, ("over",))
    return {name: {**common, **read(tuning.arms.get(name, {}), ("arms", name))} for name in names}


# ---------------------------------------------------------------------------------- what fits together, and what not


def _check_arm(study: Study, arm: Arm) -> None:
    from temper.study.budgets import budgeted

    made = budgeted(study, arm, study.seeds[0])
    for name, figure in study.measure.items():
        try:
            made.step(figure.partition(".")[0])
        except Problem as problem:
            raise Problem(f"measure `{name}`: {problem}") from problem


def _check_tuning(study: Study) -> None:
    if study.tuning is None:
        if study.budget is not None and study.budget.kind == "trials":
            raise Problem("a budget of trials needs `tune:`, which says how many and over what")
        return
    if not study.tuning.by:
        raise Problem("`by` is missing: the figure that chooses among trials, such as `tune.heldout_loss`")
    if study.tuning.by in study.measure.values():
        raise Problem(
            f"{shown(study.tuning.by)} is measured too: what chooses a setting flatters it; choose by another figure, or other rows",
            ("by",),
        )
    if study.tuning.seed in study.seeds:
        raise Problem(f"{study.tuning.seed} is a seed of the study; trials have one of their own", ("seed",))
    for arm in study.arms:
        if not study.ranges[arm.name]:
            raise Problem(f"nothing to try for arm `{arm.name}`; name settings under `over` or `arms.{arm.name}`")


def _check_fit(fit: Fit, study: Study) -> None:
    from temper.statistics.fits import LAWS

    if fit.law not in LAWS:
        raise Problem(f"no law `{fit.law}`{nearest(fit.law, LAWS)}", ("law",))
    if fit.y and fit.y not in study.measure:
        raise Problem(f"`{fit.y}` is not measured{nearest(fit.y, study.measure)}", ("y",))
    chosen = fitted(fit, study)
    if len(chosen) < 3:
        raise Problem(f"{len(chosen)} arms lie on it; a law needs at least 3", ("where",) if fit.where else ())
    axes = list(study.arms[0].at)
    for axis in fit.where:
        if axis not in axes:
            raise Problem(f"no axis `{axis}`{nearest(axis, axes)}", ("where", axis))
    if fit.x in axes and not all(_number(arm.at[fit.x]) for arm in chosen):
        raise Problem(f"`{fit.x}` is no axis of numbers", ("x",))


def fitted(fit: Fit, study: Study) -> list[Arm]:
    """The arms that a fit is about."""
    return [arm for arm in study.arms if all(arm.at.get(axis) == at for axis, at in fit.where.items())]


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def term(word: str, study: Study) -> tuple[str, str]:
    """`wide 4 accuracy` -> the arm `wide 4`, the figure `accuracy`. Raises `Problem`."""
    arm, _, figure = next(
        ((word.removesuffix(f" {name}"), "", name) for name in sorted(study.measure, key=len)[::-1] if word.endswith(f" {name}")),
        word.rpartition(" "),
    )
    if figure not in study.measure:
        raise Problem(f"`{figure}` is not measured{nearest(figure, study.measure)}; write `arm figure`", ("of", word))
    return study.arm(arm).name, figure


def _check_claim(claim: Claim, study: Study) -> None:
    for name in (claim.better, claim.than):
        if name:
            study.arm(name)
    if claim.figure and claim.figure not in study.measure:
        raise Problem(f"`{claim.figure}` is not measured{nearest(claim.figure, study.measure)}", ("figure",))
    for word in claim.of:
        term(word, study)
    if claim.quantity and claim.quantity.partition(".")[0] not in study.fits:
        raise Problem(
            f"no fit `{claim.quantity.partition('.')[0]}`{nearest(claim.quantity, study.fits)}; write `fit.parameter`", ("quantity",)
        )
