"""The report's first half: what each stage of the model's life gained, what it cost elsewhere, and its figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from temper.passport import Figure
from temper.report.charts import dots, tint
from temper.report.html import Html, heads, join, table, tag
from temper.report.words import cost, direction, evidence, examples, interval, joined, measure, method, prose

if TYPE_CHECKING:
    from temper.report import RunReport, StageReport, StepReport

SIZE = "size"
"""Name of the figure that every stage has: bytes on disk, exact."""


def label(name: str) -> str:
    """A figure's name as the page writes it."""
    return "size on disk" if name == SIZE else prose(name)


@dataclass(frozen=True)
class Change:
    """How a figure moved between two stages; `word` is better, worse, higher, lower, or "no clear change"."""

    word: str
    before: Figure

    def html(self, now: Figure) -> Html:
        if self.word == "no clear change":
            return tag("span", "no clear change", class_="change unclear")
        arrow = "↑" if now.value > self.before.value else "↓"
        return tag("span", f"{arrow} {self.word}", class_=f"change {self.word if self.word in {'better', 'worse'} else 'moved'}")


def change(before: Figure | None, now: Figure) -> Change | None:
    """What may be said of two figures: a direction only where their intervals do not overlap; None where there is nothing to compare.

    Two figures without intervals are exact and differ where they are more than 1 % apart. Below 1e-9 there is only rounding.
    """
    if before is None or not (math.isfinite(before.value) and math.isfinite(now.value)):
        return None
    ends = (before.low, before.high, now.low, now.high)
    if all(end is None for end in ends):
        differ = abs(now.value - before.value) > 0.01 * max(abs(before.value), abs(now.value))
    elif before.low is None or before.high is None or now.low is None or now.high is None:
        return None
    else:
        differ = now.low > before.high or now.high < before.low
    if not differ or abs(now.value - before.value) < 1e-9:
        return Change("no clear change", before)
    higher = now.value > before.value
    if now.better is None:
        return Change("higher" if higher else "lower", before)
    return Change("better" if higher == (now.better == "higher") else "worse", before)


@dataclass(frozen=True)
class Row:
    """A stage with all that is said of it: its figures (size among them) and how each moved since the stage before."""

    stage: StageReport
    step: StepReport
    figures: dict[str, Figure]
    changes: dict[str, Change | None]


def compared(run: RunReport) -> list[Row]:
    """Stages in order. A figure is compared with the stage before; a size with the last stage that was a whole model too."""
    steps = {step.name: step for step in run.steps}
    rows: list[Row] = []
    whole: Figure | None = None
    for stage in run.stages:
        step, figures = steps[stage.step], dict(stage.figures)
        before = rows[-1].figures if rows else {}
        changes = {name: change(before.get(name), figure) for name, figure in figures.items()}
        if step.bytes is not None:
            figures[SIZE] = Figure(float(step.bytes), unit="bytes", better="lower")
            changes[SIZE] = change(whole, figures[SIZE]) if step.kind != "adapter" else None
            whole = whole if step.kind == "adapter" else figures[SIZE]
        rows.append(Row(stage, step, figures, changes))
    return rows


def life(rows: Sequence[Row], what: str) -> Html | None:
    """One entry a stage: what it is for and how that moved, then what moved elsewhere, then its cost."""
    if not rows:
        return None
    entries = []
    for index, row in enumerate(rows):
        aims = [name for aim in row.stage.aim for name in row.figures if _meant(aim, name)]
        others = {name: row.changes[name] for name in row.figures if name not in aims}
        groups: dict[str, list[Html]] = {}
        for name, moved in others.items():
            if moved is None:
                continue
            now = row.figures[name]
            values = f"{label(name)} {measure(moved.before.value, now.unit)} → {measure(now.value, now.unit)}"
            still = moved.word == "no clear change"
            groups.setdefault(moved.word.capitalize(), []).append(tag("span", label(name) if still else values))
        elsewhere = [
            (
                tag("dt", word, class_=word.lower() if word in {"Better", "Worse"} else None),
                tag("dd", [(item, " ") for item in groups[word]]),
            )
            for word in ("Better", "Worse", "Higher", "Lower", "No clear change")
            if word in groups
        ]
        entries.append(
            tag(
                "li",
                tag(
                    "div",
                    tag("h3", row.stage.step, tag("small", method(row.step))),
                    tag("p", row.stage.purpose, class_="purpose") if row.stage.purpose else None,
                    tag("p", cost(row.step), class_="cost"),
                ),
                tag(
                    "div",
                    tag("div", [_aim(name, row) for name in aims], class_="aims") if aims else None,
                    tag("dl", elsewhere, class_="elsewhere") if elsewhere else None,
                ),
                style=f"--tint:{tint(index, len(rows))};--next:{tint(min(index + 1, len(rows) - 1), len(rows))}",
            )
        )
    hint = f"Large: what the stage is for. Below: what changed elsewhere since the stage before. {_rule(what)}"
    return join(tag("p", hint, class_="hint"), tag("ol", entries, class_="life"))


def _meant(aim: str, name: str) -> bool:
    """Whether an aim names a figure: by its whole name, or by the last words of it (`accuracy` for `sorting accuracy`)."""
    return name == aim or name.endswith((f" {aim}", f".{aim}", f"/{aim}"))


def _rule(what: str) -> str:
    rule = f"Two figures count as different only where their intervals ({what}) do not overlap"
    return f"{rule}; “no clear change” means that this run cannot tell."


def _aim(name: str, row: Row) -> Html:
    figure, moved = row.figures[name], row.changes[name]
    was = f"from {measure(moved.before.value, figure.unit)}" if moved else None
    return tag(
        "div",
        tag("span", label(name), class_="what"),
        tag("span", measure(figure.value, figure.unit), class_="now num"),
        moved.html(figure) if moved else None,
        tag("span", joined((was, evidence(figure))), class_="was"),
        class_="aim",
    )


def _names(rows: Sequence[Row]) -> dict[str, Figure]:
    """All figures of all stages in order of first appearance, size last."""
    found = {name: figure for row in reversed(rows) for name, figure in row.figures.items()}
    order = [name for name in dict.fromkeys(name for row in rows for name in row.figures) if name != SIZE]
    return {name: found[name] for name in [*order, *([SIZE] if SIZE in found else [])]}


def _cell(name: str, row: Row) -> Html:
    figure, moved = row.figures.get(name), row.changes.get(name)
    if figure is None:
        return tag("td", tag("small", "not measured"), class_="num", data_v="")
    return tag(
        "td",
        tag("b", measure(figure.value, figure.unit)),
        tag("small", interval(figure)) if interval(figure) else None,
        moved.html(figure) if moved else None,
        tag("small", "adapter alone") if name == SIZE and row.step.kind == "adapter" else None,
        class_="num",
        data_v=figure.value,
    )


def figure_table(rows: Sequence[Row], what: str) -> Html | None:
    """Every figure of every stage in one table; None where nothing was measured."""
    names = _names(rows)
    if not names:
        return None
    body = [
        tag(
            "tr",
            tag("th", tag("span", class_="swatch", style=f"--tint:{tint(at, len(rows))}"), row.stage.step, scope="row", data_v=at),
            [_cell(name, row) for name in names],
        )
        for at, row in enumerate(rows)
    ]
    head = heads(("Stage", None, False), *((label(name), direction(figure), True) for name, figure in names.items()))
    return join(
        tag("p", f"Below each figure: {what}, and its change since the stage before.", class_="hint"),
        table(head, body, "Figures by stage"),
    )


def figure_charts(rows: Sequence[Row], what: str) -> Html | None:
    """A chart per figure that at least two stages have; sizes only where no stage is an adapter, whose size says nothing of the model's."""
    drawn = []
    for name, figure in _names(rows).items():
        here = [(row.stage.step, *_drawable(row.figures[name])) for row in rows if name in row.figures]
        here = [dot for dot in here if math.isfinite(dot[1])]
        if len(here) > 1 and not (name == SIZE and any(row.step.kind == "adapter" for row in rows)):
            facts = joined((direction(figure), examples(figure)))
            title = tag("figcaption", label(name), tag("small", facts))
            drawn.append(tag("figure", title, dots(f"{label(name)} by stage", here, figure.unit)))
    return join(tag("p", f"Dots are the figures, bars the {what}.", class_="hint"), tag("div", drawn, class_="charts")) if drawn else None


def _drawable(figure: Figure) -> tuple[float, float | None, float | None]:
    """Value and interval without what is only rounding; no interval where an end is missing or infinite."""
    value, low, high = round(figure.value, 9), figure.low, figure.high
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return value, None, None
    return value, round(low, 9), round(high, 9)
