"""The report's second half: how each step went, what it cost, where its inputs came from, its settings, and how to run it again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from temper.report.charts import curves, lanes
from temper.report.html import Html, heads, join, pairs, plainly, table, tag
from temper.report.words import count, duration, joined, method, number, prose, said, size

if TYPE_CHECKING:
    from temper.report import RunReport, StepReport


def _losses(curve: Sequence[dict[str, Any]]) -> list[tuple[str, list[tuple[float, float]]]]:
    """The curve's losses by name (the trained one first), finite values only."""
    names = [name for name in dict.fromkeys(key for row in curve for key in row) if name == "loss" or name.endswith("loss")]
    names.sort(key=lambda name: name != "loss")
    found = [
        (name, [(float(row["step"]), float(row[name])) for row in curve if _finite(row.get(name)) and _finite(row.get("step"))])
        for name in names
    ]
    return [(name, line) for name, line in found if line][:4]


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _by_step(curve: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a step: what was logged of the update and what was evaluated after it."""
    rows: dict[Any, dict[str, Any]] = {}
    for row in curve:
        rows.setdefault(row.get("step"), {}).update(row)
    return list(rows.values())


def training(steps: Sequence[StepReport]) -> Html | None:
    """The loss curves of the steps that trained; None where none did."""
    drawn = []
    for step in steps:
        series = _losses(step.curve)
        if not series:
            continue
        tokens = [row["tokens"] for row in step.curve if _finite(row.get("tokens"))]
        facts = joined((method(step), f"{count(tokens[-1])} tokens" if tokens else None, duration(step.seconds)))
        keys = None
        if len(series) > 1:
            line = [
                tag(
                    "span",
                    tag("svg", tag("polyline", points="0,4 26,4", class_=f"line s{at}"), viewBox="0 0 26 8", aria_hidden="true"),
                    prose(name),
                )
                for at, (name, _) in enumerate(series)
            ]
            keys = tag("div", line, class_="legend")
        drawn.append(
            tag(
                "figure",
                tag("figcaption", step.name, tag("small", facts)),
                curves(f"Loss of {step.name} over its steps", series),
                keys,
                _sampled(step.curve),
            )
        )
    hint = "Line: mean loss; shade behind it: least to greatest loss of neighbouring updates; at the right: where it ended."
    return join(tag("p", hint, class_="hint"), tag("div", drawn, class_="charts")) if drawn else None


def _sampled(curve: Sequence[dict[str, Any]], most: int = 12) -> Html:
    """At most `most` evenly spaced rows as a table, for readers who cannot see or hover; evaluated rows where there are some."""
    rows = _by_step(curve)
    names = list(dict.fromkeys(key for row in rows for key, value in row.items() if _finite(value)))
    full = [row for row in rows if all(name in row for name in names)]
    chosen = full if len(full) > 2 else rows
    if len(chosen) > most:
        chosen = [chosen[round(at * (len(chosen) - 1) / (most - 1))] for at in range(most)]
    body = [
        tag("tr", [tag("td", number(row[name], 4) if _finite(row.get(name)) else "", class_="num") for name in names]) for row in chosen
    ]
    drawn = tag("table", tag("thead", tag("tr", [tag("th", prose(name), class_="num", scope="col") for name in names])), tag("tbody", body))
    some = f"{len(chosen)} of {len(rows)}" if len(chosen) < len(rows) else str(len(rows))
    return tag("details", tag("summary", f"Numbers ({some} rows)"), tag("div", drawn, class_="wide"), class_="small")


def costs(steps: Sequence[StepReport], tints: dict[str, str]) -> Html:
    """What each step took and left: time, memory, disk, parameters."""
    columns = {
        "Time": (lambda step: step.seconds, duration),
        "Peak memory": (lambda step: step.peak_memory, size),
        "On disk": (lambda step: step.bytes, size),
        "Parameters": (lambda step: step.parameters, count),
    }
    most = {title: max((of(step) or 0 for step in steps), default=0) for title, (of, _) in columns.items()}
    body = []
    for at, step in enumerate(steps):
        cells = []
        for title, (of, words) in columns.items():
            value = of(step)
            width = f"--w:{100 * value / most[title]:.1f}" if value else None
            bar = tag("span", class_="bar", style=width, aria_hidden="true") if width and title != "Parameters" else None
            cells.append(tag("td", words(value) if value is not None else "", bar, class_="num", data_v="" if value is None else value))
        body.append(
            tag(
                "tr",
                tag(
                    "th",
                    tag("span", class_="swatch", style=f"--tint:{tints[step.name]}"),
                    step.name,
                    tag("small", joined((method(step), step.status))),
                    scope="row",
                    data_v=at,
                ),
                cells,
                tag("td", step.numbers),
            )
        )
    head = heads(("Step", None, False), *((title, None, True) for title in columns), ("Numbers", None, False))
    hint = "Times are those of making a result, also where it came from the store this time. Bars are shares of the largest."
    return join(tag("p", hint, class_="hint"), table(head, body, "Time, memory and size of every step"))


def lineage(steps: Sequence[StepReport], tints: dict[str, str]) -> Html:
    """A lane graph of the artefacts beside a list that says the same in words."""
    index = {key: at for at, step in reversed(list(enumerate(steps))) for key in (step.name, step.artefact) if key}
    above, items = [], []
    for at, step in enumerate(steps):
        known = {role: index[parent] for role, parent in step.parents.items() if index.get(parent, at) < at}
        above.append(sorted(set(known.values())))
        sources: dict[str, list[str]] = {}  # `model.0` and `model.1` are one role
        for role, parent in step.parents.items():
            sources.setdefault(prose(role.partition(".")[0]), []).append(steps[known[role]].name if role in known else _brief(parent))
        told = ", ".join(f"{role} from {' and '.join(names)}" for role, names in sources.items())
        kind = joined((step.kind, step.numbers, _brief(step.artefact)))
        items.append(
            tag(
                "li",
                tag("span", tag("b", step.name), f" {kind}", title=step.artefact or None),
                tag("small", told or "from nothing but its settings"),
            )
        )
    graph = lanes(above, [tints[step.name] for step in steps])
    return tag("div", graph, tag("ol", items), class_="lineage")


def _brief(identity: str) -> str:
    """The first ten characters of a hash; other names whole."""
    return identity[:10] if len(identity) >= 32 and all(letter in "0123456789abcdef" for letter in identity) else identity


def choices(run: RunReport) -> Html | None:
    """What was chosen automatically, and why; None where nothing was."""
    made = [(step.name, name, choice) for step in run.steps for name, choice in step.decisions.items()]
    rows = [
        (tag("dt", tag("b", step), f" {prose(name)}: ", tag("b", plainly(choice.value))), tag("dd", choice.reason))
        for step, name, choice in made
    ]
    return tag("dl", rows, class_="choices") if made else None


def details(step: StepReport) -> Html:
    """One step in full: slots and their parts, plain settings, its own figures, notes, passport."""
    inside: list[object] = []
    if step.paper:
        inside.append(tag("p", step.paper))
    for row in step.spec:
        title = tag(
            "h3",
            f"{prose(row.slot)}: {row.part}",
            tag("small", " not the default", class_="unclear") if row.changed else None,
        )
        inside.append(tag("div", title, tag("p", row.doc.split("\n\n")[0], class_="hint") if row.doc else None, pairs(row.settings)))
    for title, values in (("Settings", step.settings), ("Figures", {name: said(figure) for name, figure in step.figures.items()})):
        if values:
            inside.append(tag("div", tag("h3", title), pairs(values)))
    if step.notes:
        inside.append(tag("div", tag("h3", "Notes"), tag("ul", [tag("li", note) for note in step.notes], class_="notes")))
    known = {name: value for name, value in step.passport.items() if value not in (None, "", [], {}, ())}
    if known:
        inside.append(tag("div", tag("h3", "Passport"), pairs(known)))
    if step.artefact:
        inside.append(tag("p", "Artefact ", tag("code", step.artefact)))
    return tag(
        "details",
        tag("summary", tag("b", step.name), tag("small", joined((method(step), step.status)))),
        tag("div", inside, class_="inside"),
    )
