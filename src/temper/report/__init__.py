"""A run -> one self-contained HTML page, and the same content as JSON beside it; `study` does the same for a study.

The page opens from disk and asks the network for nothing: styles and a short sorting script are inside, and its
Content-Security-Policy forbids everything else. Charts are inline SVG from `charts.py` rather than plotly: plotly's
bundle adds 4.5 MB to every report and draws nothing without scripts, while three kinds of chart take some 200 lines, print, and
follow the reader's colour scheme.

`RunReport` and the dataclasses below it are the whole input. Reports hold no data rows and no host names (the input has no place
for them), and `shorten` reduces absolute paths to their last part.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from dataclasses import field
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from temper.context import write as write_whole
from temper.parts import Described, Problem, nearest
from temper.passport import Figure

T = TypeVar("T")

_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=_STRICT)
class Decision:
    """A choice that the program made: what, and why."""

    value: Any
    reason: str


@dataclass(frozen=True, config=_STRICT)
class StepReport:
    """One step: an engine at work."""

    name: str
    engine: str
    status: Literal["made", "from the store"]
    seconds: float
    """Time that making the artefact took, whenever that was."""
    method: str = ""
    paper: str = ""
    """Title of the paper that the method comes from."""
    kind: str = ""
    """The artefact's kind: model, adapter, data, figures."""
    artefact: str = ""
    """The artefact's id."""
    parents: dict[str, str] = field(default_factory=dict)
    """Role -> a step's name or an artefact's id."""
    peak_memory: int | None = None
    """Greatest resident memory while it ran, bytes."""
    bytes: int | None = None
    """Size of the artefact on disk."""
    parameters: int | None = None
    numbers: str = ""
    """Number format of the weights: float32, int4-g32-sym, ..."""
    passport: dict[str, Any] = field(default_factory=dict)
    spec: list[Described] = field(default_factory=list)
    """What stood in the slots: `temper.parts.describe(spec)`."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The spec's plain settings."""
    curve: list[dict[str, Any]] = field(default_factory=list)
    """Rows as `Context.log` wrote them: `step`, `loss`, whatever else was measured."""
    figures: dict[str, Figure] = field(default_factory=dict)
    """What the step itself measured."""
    notes: list[str] = field(default_factory=list)
    decisions: dict[str, Decision] = field(default_factory=dict)


@dataclass(frozen=True, config=_STRICT)
class StageReport:
    """A point of the model's life that was evaluated: the model that `step` left, and its figures."""

    step: str
    figures: dict[str, Figure] = field(default_factory=dict)
    purpose: str = ""
    """What the stage is for, in a sentence."""
    aim: list[str] = field(default_factory=list)
    """Figures that the stage is for, by name or its last words (`accuracy` for `sorting accuracy`); `size` means bytes on disk."""


@dataclass(frozen=True, config=_STRICT)
class RunReport:
    """All that a report says."""

    name: str
    created: str
    """ISO 8601, UTC."""
    seed: int
    recipe: str
    """The recipe's text."""
    steps: list[StepReport]
    """In order of work."""
    stages: list[StageReport] = field(default_factory=list)
    """In order of the model's life; comparisons are with the stage before."""
    about: str = ""
    """What the recipe is for, in a sentence."""
    rerun: str = ""
    """The command that repeats the run."""
    seconds: float | None = None
    """Time from start to end of this run; the steps' times are those of making."""
    machine: dict[str, Any] = field(default_factory=dict)
    """Processor flags, cores, threads, memory. No host name."""
    versions: dict[str, str] = field(default_factory=dict)
    interval: str = "95 % bootstrap interval"
    """What the figures' `low` and `high` are."""
    notes: list[str] = field(default_factory=list)


def write(run: RunReport | dict[str, Any], path: Path) -> None:
    """Writes the page to `path` and its content to the `.json` of the same name beside it.

    `run` is a `RunReport` or a plain dict of the same shape. Raises `Problem` where the dict has another shape, or where a stage
    names a step that is not among the steps.
    """
    from temper.report.page import page

    checked = read(shorten(dataclasses.asdict(run) if isinstance(run, RunReport) else run))
    path = Path(path)
    write_whole(path, page(checked))
    write_whole(path.with_suffix(".json"), json.dumps(finite(dataclasses.asdict(checked)), indent=1, ensure_ascii=False) + "\n")


def read(plain: dict[str, Any]) -> RunReport:
    """A plain dict, such as the content of `report.json`, checked into a `RunReport`."""
    run = check(RunReport, plain, "temper.report.RunReport")
    known = [step.name for step in run.steps]
    for at, stage in enumerate(run.stages):
        if stage.step not in known:
            raise Problem(f"`{stage.step}` is no step of this run{nearest(stage.step, known)}", ("stages", at, "step"))
    return run


def check(shape: type[T], plain: dict[str, Any], name: str) -> T:
    """A plain dict as a `shape`. Raises `Problem` with the first key that does not fit; `name` says where the shape is described."""
    try:
        return TypeAdapter(shape).validate_python(plain)
    except ValidationError as error:
        first = error.errors()[0]
        raise Problem(f"{first['msg']} (see {name})", tuple(first["loc"])) from error


_ABSOLUTE = re.compile(r"(?:file://|(?<![\w./:~\\…])(?:~|[A-Za-z]:)?)[/\\](?:[^\s/\\'\"<>|,;()\[\]{}]+[/\\])+([^\s/\\'\"<>|,;()\[\]{}]*)")


def shorten(value: Any) -> Any:
    """The same value with every absolute path in its strings cut to `…/last-part`."""
    match value:
        case str():
            return _ABSOLUTE.sub(r"…/\1", value)
        case Path():
            return shorten(str(value))
        case dict():
            return {shorten(key): shorten(one) for key, one in value.items()}
        case list() | tuple():
            return [shorten(one) for one in value]
        case _:
            return value


def finite(value: Any) -> Any:
    """The same value with `nan` and infinities, which JSON lacks, as text; `read` takes them back."""
    match value:
        case float() if not math.isfinite(value):
            return str(value)
        case dict():
            return {key: finite(one) for key, one in value.items()}
        case list() | tuple():
            return [finite(one) for one in value]
        case _:
            return value
