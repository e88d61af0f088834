"""A study's charts, section by section; each gives None where it has nothing to draw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from temper.passport import Figure
from temper.report.charts import short
from temper.report.html import Html, join, tag
from temper.report.plots import LETTER, Line, Span, Spot, finite, front, key, plane, spans
from temper.report.words import (
    COSTS,
    SCALED,
    capital,
    cost_name,
    ends,
    interval,
    joined,
    measure,
    number,
    points,
    prose,
    said,
    signed,
    spent,
)

if TYPE_CHECKING:
    from temper.report.study import ArmReport, Contribution, FitReport, StudyReport


def _charts(hint: str, drawn: Sequence[Html], legend: Html | None = None) -> Html | None:
    return join(tag("p", hint, class_="hint"), legend, tag("div", drawn, class_="charts")) if drawn else None


def _figure(title: str, small: str, *inside: object) -> Html:
    return tag("figure", tag("figcaption", title, tag("small", small) if small else None), *inside)


def labels(study: StudyReport) -> list[str]:
    """What stands beside the arms' marks: their names, or numbers where there are many arms or long names."""
    names = [arm.name for arm in study.arms]
    return names if len(names) <= 8 and max(map(len, names), default=0) <= 14 else [str(at + 1) for at in range(len(names))]


def _legend(study: StudyReport) -> Html | None:
    """Which arm each number stands for."""
    rows = list(zip(study.arms, labels(study), strict=True))
    if all(arm.name == label for arm, label in rows):
        return None
    return tag("div", [tag("span", key(at), f"{label} ", arm.name) for at, (arm, label) in enumerate(rows)], class_="legend arms")


def _unit(study: StudyReport, name: str) -> str:
    """The unit of a figure, or of a cost."""
    figure = next((arm.figures[name] for arm in study.arms if name in arm.figures), None)
    return figure.unit if figure else COSTS.get(name, ("", ""))[1]


def _ends(low: float | None, high: float | None) -> tuple[float | None, float | None]:
    """An interval that can be drawn, or none."""
    return (low, high) if finite(low, high) else (None, None)


# ---------------------------------------------------------------- differences


def forests(study: StudyReport) -> Html | None:
    """A forest plot per figure: differences of arms on one axis, numbers of claims on another."""
    groups: dict[tuple[str, str, bool], list[Span]] = {}
    for one in study.comparisons:
        if finite(one.difference, one.margin):
            row = _span(one.claim, one.verdict, one.difference, *_ends(one.low, one.high), one.unit, one.margin, bool(one.better))
            groups.setdefault((one.figure, one.unit, bool(one.better)), []).append(row)
    drawn = []
    for (figure, unit, arms), rows in groups.items():
        name = points(0.0, unit)[1]
        across = f"← worse\u2003{name}\u2003better →" if arms else name
        chart = spans(f"{'Differences in ' if arms else ''}{prose(figure)}", rows, _axis(unit), across, zero=arms)
        drawn.append(_figure(capital(figure), "how much better, as each claim says" if arms else "", chart))
    hint = "Marks are differences, bars their intervals, dashed lines the margins that a claim must clear. Filled: the claim holds."
    return _charts(hint, drawn)


def _axis(unit: str) -> str:
    """A difference's unit on an axis that the unit stands beside."""
    return unit if unit in SCALED else ""


def _span(
    name: str, verdict: str, value: float, low: float | None, high: float | None, unit: str, bound: float | None, signs: bool = True
) -> Span:
    told = ends(low, high, unit, signs)
    words = joined((verdict, signed(value, unit, signs) + (f" ({told})" if told else "")))
    low, high, bound = (None if one is None else points(one, unit)[0] for one in (low, high, bound))
    return Span(name, words, points(value, unit)[0], low, high, bound, solid=verdict not in {"unclear", "does not hold here"})


def ranked(study: StudyReport) -> list[Contribution]:
    """Contributions, greatest first; those that are no number last."""
    return sorted(study.contributions, key=lambda one: math.inf if math.isnan(one.difference) else -one.difference)


def contributed(study: StudyReport) -> Html | None:
    """What each part is worth, greatest first, a chart per figure."""
    groups: dict[tuple[str, str], list[Span]] = {}
    for one in ranked(study):
        figure = one.figure or next(iter(study.measures), "")
        if finite(one.difference):
            row = _span(f"{one.replaced} → {one.by}", one.verdict, one.difference, *_ends(one.low, one.high), one.unit, None)
            groups.setdefault((figure, one.unit), []).append(row)
    drawn = []
    for (figure, unit), rows in groups.items():
        across = f"← hurts\u2003{points(0.0, unit)[1]}\u2003helps →"
        chart = spans(f"Contributions to {prose(figure)}", rows, _axis(unit), across, zero=True, bars=True)
        drawn.append(_figure(capital(figure), "by how much the whole is better than with the part replaced", chart))
    return _charts("Each row replaces a part by what stands behind the arrow. Bars to the right: the part helps.", drawn)


# ---------------------------------------------------------------- quality against cost


def quality(study: StudyReport) -> Html | None:
    """The main figure against every cost in which the arms differ by more than one per cent, with the Pareto front."""
    main = next(iter(study.measures), "")
    drawn = []
    for cost in dict.fromkeys(name for arm in study.arms for name in arm.costs):
        here = [(at, arm) for at, arm in enumerate(study.arms) if main in arm.figures and cost in arm.costs]
        here = [(at, arm) for at, arm in here if finite(arm.figures[main].value, arm.costs[cost])]
        spendings = [arm.costs[cost] for _, arm in here]
        if len(here) < 2 or max(spendings) - min(spendings) <= 0.01 * max(map(abs, spendings)):
            continue
        drawn.append(_against(main, cost, here, labels(study)))
    hint = (
        f"Each chart sets {prose(main)} against one cost. Filled marks, dashed line: the Pareto front, where no arm is cheaper and better."
    )
    return _charts(hint, drawn, _legend(study))


def _against(main: str, cost: str, arms: Sequence[tuple[int, ArmReport]], names: Sequence[str]) -> Html:
    figures = [arm.figures[main] for _, arm in arms]
    better, unit = figures[0].better, figures[0].unit
    best: list[int] = []
    if better:
        best = front([arm.costs[cost] for _, arm in arms], [figure.value if better == "higher" else -figure.value for figure in figures])
    spots = [
        Spot(
            arm.costs[cost],
            figure.value,
            f"{arm.name}: {said(figure)}, {spent(cost, arm.costs[cost])}",
            *_ends(figure.low, figure.high),
            name=names[at],
            look=at,
            solid=index in best or not better,
        )
        for index, ((at, arm), figure) in enumerate(zip(arms, figures, strict=True))
    ]
    name = cost_name(cost)
    chart = plane(f"{prose(main)} against {name}", name, _up(main, better), spots, stairs=best, units=(unit_of(cost), unit))
    on = f"on the front: {', '.join(names[arms[at][0]] for at in best)}" if best else ""
    return _figure(capital(name), on, chart)


def unit_of(cost: str) -> str:
    """A cost's unit."""
    return COSTS.get(cost, ("", ""))[1]


def _up(name: str, better: str | None) -> str:
    arrow = {"higher": " ↑ better", "lower": " ↓ better"}.get(better or "", "")
    return short(prose(name), 44) + arrow


# ---------------------------------------------------------------- curves

Band = list[tuple[float, float, float, float]]
"""(step, mean, least, greatest) over seeds."""


def band(runs: Sequence[Sequence[tuple[float, float]]], bins: int = 60) -> Band:
    """Seeds' curves together: at the steps that all have (else at all steps), the mean over seeds and their range.

    Where there are more steps than `bins`, neighbours of one seed are averaged first: the range is that of seeds, not of updates.
    """
    by_step = [dict(run) for run in runs if run]
    if not by_step:
        return []
    steps = sorted(set.intersection(*map(set, by_step)) or set.union(*map(set, by_step)))
    each = math.ceil(len(steps) / bins)
    made: Band = []
    for start in range(0, len(steps), each):
        group = steps[start : start + each]
        seeds = [[run[step] for step in group if step in run] for run in by_step]
        means = [sum(values) / len(values) for values in seeds if values]
        made.append((sum(group) / len(group), sum(means) / len(means), min(means), max(means)))
    return made


def curves(study: StudyReport, together: int = 4) -> Html | None:
    """A chart per measured loss, arms together while they are few."""
    names = dict.fromkeys(name for arm in study.arms for run in arm.runs for row in run.curve for name in row)
    names = [name for name in names if name == "loss" or name.endswith("loss")]
    drawn = []
    for name in names:
        found = [(at, arm, band([_line(run.curve, name) for run in arm.runs])) for at, arm in enumerate(study.arms)]
        found = [(at, arm, line) for at, arm, line in found if len(line) > 1]
        for start in range(0, len(found), together):
            some = found[start : start + together]
            lasts = [Spot(line[-1][0], line[-1][1], _over(name, arm, line), name=labels(study)[at], look=at) for at, arm, line in some]
            room = 16 + LETTER * max(len(spot.name) for spot in lasts)
            chart = plane(
                f"{prose(name)} over steps",
                "step",
                prose(name),
                lasts,
                [Line(line, at) for at, _, line in some],
                room=room,
                spread=math.inf,
            )
            small = joined((f"arms {start + 1} to {start + len(some)}" if len(found) > together else None, "mean and range over seeds"))
            drawn.append(_figure(capital(name), small, chart, _numbers(some)))
    return _charts("Lines are means over the seeds; the shade reaches from the lowest seed to the highest.", drawn, _legend(study))


def _line(curve: Sequence[dict], name: str) -> list[tuple[float, float]]:
    return [(float(row["step"]), float(row[name])) for row in curve if _number(row.get("step")) and _number(row.get(name))]


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _over(name: str, arm: ArmReport, line: Band) -> str:
    _, mean, low, high = line[-1]
    return f"{arm.name}: {prose(name)} ends at {number(mean)} ({number(low)} to {number(high)})"


def _numbers(some: Sequence[tuple[int, ArmReport, Band]], most: int = 8) -> Html:
    """A few evenly spaced places as a table, for readers who cannot see or hover."""
    steps = sorted({place[0] for _, _, line in some for place in line})
    if len(steps) > most:
        steps = [steps[round(at * (len(steps) - 1) / (most - 1))] for at in range(most)]
    lines = [{place[0]: place for place in line} for _, _, line in some]
    head = [tag("th", "step", scope="col", class_="num"), *(tag("th", arm.name, scope="col", class_="num") for _, arm, _ in some)]
    body = []
    for step in steps:
        cells = [tag("td", number(round(step)), class_="num")]
        for line in lines:
            told = "" if step not in line else number(line[step][1])
            small = "" if step not in line else f"{number(line[step][2])} to {number(line[step][3])}"
            cells.append(tag("td", told, tag("small", small), class_="num"))
        body.append(tag("tr", cells))
    drawn = tag("table", tag("thead", tag("tr", head)), tag("tbody", body))
    return tag("details", tag("summary", "Numbers"), tag("div", drawn, class_="wide", tabindex="0"), class_="small")


# ---------------------------------------------------------------- laws


def laws(study: StudyReport) -> Html | None:
    """A chart per fit: points with intervals, the law with its band, and what it predicted of a point that it did not see."""
    drawn = [chart for fit in study.fits if (chart := _law(study, fit))]
    hint = "Circles: what the law was fitted to, with intervals. Line and shade: the law and its interval. "
    hint += "Square: a figure kept out of the fit; diamond: what the law predicted of it."
    return _charts(hint, drawn)


def _law(study: StudyReport, fit: FitReport) -> Html | None:
    units = (_unit(study, fit.x), _unit(study, fit.y))
    names = dict(zip((arm.name for arm in study.arms), labels(study), strict=True))
    one = fit.held_out if fit.held_out and finite(fit.held_out.x, fit.held_out.y, fit.held_out.predicted) else None
    spots = [
        Spot(
            point.x, point.y, joined((point.arm, measure(point.y, units[1]))), *_ends(point.low, point.high), name=names.get(point.arm, "")
        )
        for point in fit.points
        if finite(point.x, point.y) and not (one and (point.x, point.y) == (one.x, one.y))
    ]
    told = None
    if one:
        foretold = Figure(one.predicted, *_ends(one.low, one.high), unit=units[1])
        found = measure(one.y, units[1])
        span = f" ({interval(foretold)})" if interval(foretold) else ""
        told = f"Held out: at {prose(fit.x)} {measure(one.x, units[0])} the law predicted {measure(one.predicted, units[1])}{span}, "
        told += f"and {found} was found."
        spots.append(Spot(one.x, one.predicted, f"predicted: {said(foretold)}", foretold.low, foretold.high, "predicted", 3, False, 7))
        spots.append(Spot(one.x, one.y, f"found: {found}", name="found", look=1, size=3.5))
    if not spots:
        return None
    line = Line([(place.x, place.y, *_ends(place.low, place.high)) for place in fit.line if finite(place.x, place.y)])
    title = f"{fit.name}: {prose(fit.y)} against {prose(fit.x)}"
    chart = plane(title, prose(fit.x), prose(fit.y), spots, [line] if line.places else (), units=units, spread=4)
    rows = [(tag("dt", name), tag("dd", said(figure))) for name, figure in fit.parameters.items()]
    under = (tag("p", told, class_="told") if told else None, tag("dl", rows, class_="pairs") if rows else None)
    return _figure(fit.name, prose(fit.law), chart, *under)


# ---------------------------------------------------------------- trials and seeds


def tried(study: StudyReport) -> Html | None:
    """A chart per arm and tuned setting: what each trial's setting gave, the chosen one filled."""
    drawn = []
    for arm in dict.fromkeys(trial.arm for trial in study.trials):
        here = [trial for trial in study.trials if trial.arm == arm]
        for name in dict.fromkeys(name for trial in here for name in trial.settings):
            some = [trial for trial in here if name in trial.settings and finite(trial.figure)]
            if not some:
                continue
            values = [trial.settings[name] for trial in some]
            numeric = all(_number(value) for value in values)
            words = [] if numeric else list(dict.fromkeys(map(_word, values)))
            spots = [
                Spot(
                    float(value) if numeric else words.index(_word(value)),
                    trial.figure or 0.0,
                    f"trial {trial.number}, rung {trial.rung}: {name} {_word(value)} gave {number(trial.figure or 0.0)}",
                    name="chosen" if trial.chosen else "",
                    look=trial.rung,
                    solid=trial.chosen,
                )
                for value, trial in zip(values, some, strict=True)
            ]
            lost = len([trial for trial in here if name in trial.settings]) - len(some)
            small = joined((name, f"{lost} gave no number" if lost else None))
            drawn.append(_figure(arm, small, plane(f"{arm}: figure against {name}", name, "figure that chooses", spots, words=words)))
    return _charts("Trials came before the measurement. Filled: chosen. Circles are the first rung, squares the second, and so on.", drawn)


def _word(value: object) -> str:
    return number(value) if isinstance(value, float) else str(value)


def scatter_of_seeds(study: StudyReport) -> Html | None:
    """A chart per measure: every arm's value with its interval, each seed's own as a small circle."""
    drawn = []
    for name in study.measures:
        here = [(at, arm) for at, arm in enumerate(study.arms) if name in arm.figures and finite(arm.figures[name].value)]
        rows = []
        for at, arm in here:
            figure = arm.figures[name]
            seeds = [run.figures[name] for run in arm.runs if finite(run.figures.get(name))]
            told = interval(figure)
            words = measure(figure.value, figure.unit) + (f" ({told})" if told else "")
            rows.append(Span(arm.name, words, figure.value, *_ends(figure.low, figure.high), points=seeds, look=at))
        if rows:
            unit = here[0][1].figures[name].unit
            chart = spans(f"{prose(name)} of every seed", rows, unit, "" if unit in {"share", "%", *SCALED} else unit)
            drawn.append(_figure(capital(name), "", chart))
    return _charts("Small circles are the seeds, large marks the arms' values, bars their intervals.", drawn)
