"""A study -> one self-contained HTML page, and the same content as JSON, Markdown and CSV beside it.

`StudyReport` and the dataclasses below it are the whole input, as `RunReport` is a run's.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from temper.context import write as write_whole
from temper.parts import Problem, nearest
from temper.passport import Figure
from temper.report import check, finite, shorten

_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=_STRICT)
class ArmRun:
    """One arm with one seed."""

    seed: int
    run: str = ""
    """The run's id."""
    status: Literal["made", "from the store"] = "made"
    figures: dict[str, float] = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=dict)
    """`seconds`, `tokens`, `updates`, `flops`, `peak_memory` and `bytes` (bytes), `trials`; absent where unknown."""
    curve: list[dict[str, Any]] = field(default_factory=list)
    """Rows as `Context.log` wrote them: `step`, `loss`, whatever else was measured."""


@dataclass(frozen=True, config=_STRICT)
class ArmReport:
    """One of the things compared."""

    name: str
    about: str = ""
    changes: dict[str, Any] = field(default_factory=dict)
    """Dotted setting -> value: how its recipe differs from the base recipe."""
    tuned: dict[str, Any] = field(default_factory=dict)
    """Dotted setting -> the value that its trials chose."""
    figures: dict[str, Figure] = field(default_factory=dict)
    """Over seeds and examples."""
    costs: dict[str, float] = field(default_factory=dict)
    """Means over seeds."""
    runs: list[ArmRun] = field(default_factory=list)


@dataclass(frozen=True, config=_STRICT)
class Comparison:
    """A claim and what became of it: how much better one arm is than another, or where a number lies.

    `difference` is oriented: positive where `better` is better, whichever way its figure runs. Of a claim about a number, `better` and
    `than` are empty, `difference` is the number and `margin` its bound.
    """

    claim: str
    """In words."""
    better: str
    than: str
    figure: str
    difference: float
    low: float | None = None
    high: float | None = None
    margin: float = 0.0
    unit: str = ""
    test: str = ""
    p: float | None = None
    p_adjusted: float | None = None
    effect: float | None = None
    effect_name: str = ""
    detectable: float | None = None
    """The least difference that so many seeds find."""
    verdict: str = ""


@dataclass(frozen=True, config=_STRICT)
class Point:
    """A point of a fit: an arm's figure, or a place of the law's line."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    arm: str = ""


@dataclass(frozen=True, config=_STRICT)
class HeldOut:
    """A point that the fit did not see, and what it predicted there."""

    x: float
    y: float
    predicted: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, config=_STRICT)
class FitReport:
    """A law through the arms' figures."""

    name: str
    law: str
    x: str
    y: str
    points: list[Point]
    line: list[Point] = field(default_factory=list)
    parameters: dict[str, Figure] = field(default_factory=dict)
    held_out: HeldOut | None = None


@dataclass(frozen=True, config=_STRICT)
class Trial:
    """One setting tried for an arm before it was measured."""

    arm: str
    number: int
    rung: int
    settings: dict[str, Any]
    figure: float | None
    """What chooses; None where the run failed."""
    seconds: float
    chosen: bool


@dataclass(frozen=True, config=_STRICT)
class Contribution:
    """What a part is worth: `difference` is how much better the whole is than with the part replaced, so positive where the part helps."""

    replaced: str
    """The part, or the parts that go together."""
    by: str
    difference: float
    low: float | None = None
    high: float | None = None
    verdict: str = ""
    figure: str = ""
    """Empty: the study's first."""
    unit: str = ""


@dataclass(frozen=True, config=_STRICT)
class StudyReport:
    """All that a study's report says."""

    name: str
    created: str
    """ISO 8601, UTC."""
    arms: list[ArmReport]
    """In the study's order."""
    measures: list[str]
    """Figures in order of importance; the first is the main one."""
    about: str = ""
    seconds: float | None = None
    rerun: str = ""
    """The command that repeats the study."""
    text: str = ""
    """The study file."""
    machine: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    level: float = 0.95
    """Of every interval."""
    seeds: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    held: Literal["updates", "tokens", "seconds", "flops", "memory", "trials", ""] = ""
    """What was held equal."""
    budget: float | None = None
    """How much of it."""
    alike: list[str] = field(default_factory=list)
    """Settings and inputs that were the same in all arms, in words."""
    verdict: Literal["holds here", "unclear", "does not hold here", ""] = ""
    finding: str = ""
    """A sentence."""
    comparisons: list[Comparison] = field(default_factory=list)
    fits: list[FitReport] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)
    contributions: list[Contribution] = field(default_factory=list)


def write(report: StudyReport | dict[str, Any], path: Path) -> None:
    """Writes the page to `path`, and `.json`, `.md` and `.csv` of the same name beside it.

    `report` is a `StudyReport` or a plain dict of the same shape. Raises `Problem` where the dict has another shape, or where
    something names an arm that the study has not.
    """
    from temper.report.study_page import page
    from temper.report.study_text import markdown, runs

    checked = read(shorten(dataclasses.asdict(report) if isinstance(report, StudyReport) else report))
    path = Path(path)
    write_whole(path, page(checked))
    write_whole(path.with_suffix(".json"), json.dumps(finite(dataclasses.asdict(checked)), indent=1, ensure_ascii=False) + "\n")
    write_whole(path.with_suffix(".md"), markdown(checked))
    write_whole(path.with_suffix(".csv"), runs(checked))


def read(plain: dict[str, Any]) -> StudyReport:
    """A plain dict, such as the content of the `.json`, checked into a `StudyReport`."""
    study = check(StudyReport, plain, "temper.report.study.StudyReport")
    known = [arm.name for arm in study.arms]
    for at, name in enumerate(known):
        if name in known[:at]:
            raise Problem(f"two arms are named `{name}`; every arm has a name of its own", ("arms", at, "name"))
    named = [(("comparisons", at, side), getattr(one, side)) for at, one in enumerate(study.comparisons) for side in ("better", "than")]
    named += [(("trials", at, "arm"), one.arm) for at, one in enumerate(study.trials)]
    named += [(("fits", at, "points", to, "arm"), point.arm) for at, fit in enumerate(study.fits) for to, point in enumerate(fit.points)]
    for place, name in named:
        if name and name not in known:
            raise Problem(f"`{name}` is no arm of this study{nearest(name, known)}", place)
    return study
