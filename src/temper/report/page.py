"""The report's page: head, header, sections in order. Everything goes through `tag`, which escapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from temper.report.charts import tint
from temper.report.frame import again, document, facts
from temper.report.html import Html, join, tag
from temper.report.stages import Row, compared, figure_charts, figure_table, life
from temper.report.steps import choices, costs, details, lineage, training
from temper.report.words import count, duration, joined, size

if TYPE_CHECKING:
    from temper.report import RunReport


def page(run: RunReport) -> str:
    """The whole document."""
    rows = compared(run)
    tints = stage_tints(run, rows)
    hint = "With the same versions on the same machine, the same recipe and seed give the same weights."
    sections = {
        "Stages": ("What each stage did", life(rows, run.interval)),
        "Figures": ("Figures by stage", figure_table(rows, run.interval)),
        "Charts": ("Figures as charts", figure_charts(rows, run.interval)),
        "Training": ("Loss during training", training(run.steps)),
        "Costs": ("Time, memory and size", costs(run.steps, tints)),
        "Lineage": ("Where everything comes from", lineage(run.steps, tints)),
        "Choices": ("Choices made automatically", choices(run)),
        "Settings": ("Settings of every step", join([details(step) for step in run.steps])),
        "Again": ("Run it again", again(hint, run.rerun, run.recipe, "Recipe", run.versions, run.machine)),
    }
    foot = f"Made by Temper {run.versions.get('temper', '')} at {run.created}. The same content is in the JSON file beside this page."
    return document(run.name, header(run, rows), sections, foot)


def sentence(run: RunReport, rows: Sequence[Row]) -> str:
    """What ran, in a sentence or two."""
    kept = sum(step.status == "from the store" for step in run.steps)
    names = [row.stage.step for row in rows] or [step.name for step in run.steps]
    things = f"{len(names)} {'stage' if rows else 'step'}{'' if len(names) == 1 else 's'}"
    said = f"{'One model through ' if rows else ''}{things}: {' → '.join(names)}"
    if run.seconds is not None:
        said += f", in {duration(run.seconds)}"
    if kept == len(run.steps):
        return f"{said}. Nothing had to be made: every step came from the store."
    return f"{said}. {kept} of {len(run.steps)} steps came from the store." if kept else f"{said}."


def header(run: RunReport, rows: Sequence[Row]) -> Html:
    """The page's top: what was run, and the few numbers that sum it up."""
    kept = sum(step.status == "from the store" for step in run.steps)
    peak = max((step for step in run.steps if step.peak_memory), key=lambda step: step.peak_memory or 0, default=None)
    final = rows[-1].step if rows else None
    told: list[tuple[str, str, str]] = []
    if run.seconds is not None:
        made = sum(step.seconds for step in run.steps)
        told.append(("Time", duration(run.seconds), f"{duration(made)} to make it all" if kept else f"{len(run.steps)} steps"))
    if kept:
        told.append(("Steps", str(len(run.steps)), f"{kept} from the store"))
    if peak:
        told.append(("Peak memory", size(peak.peak_memory or 0), f"in {peak.name}"))
    if final and final.bytes:
        told.append(
            (
                "Final model",
                size(final.bytes),
                joined((f"{count(final.parameters)} parameters" if final.parameters else None, final.numbers)),
            )
        )
    told.append(("Seed", str(run.seed), f"{run.created.replace('T', ' ')[:16]} UTC"))
    return join(
        tag("p", "Temper report", class_="kicker"),
        tag("h1", run.name),
        tag("p", sentence(run, rows), class_="lead"),
        tag("p", run.about, class_="about") if run.about else None,
        facts(told),
        tag("ul", [tag("li", note) for note in run.notes], class_="notes about") if run.notes else None,
    )


def stage_tints(run: RunReport, rows: Sequence[Row]) -> dict[str, str]:
    """Step -> its stage's colour; steps that are no stage are grey."""
    colours = {row.stage.step: tint(at, len(rows)) for at, row in enumerate(rows)}
    return {step.name: colours.get(step.name, "var(--soft)") for step in run.steps}
