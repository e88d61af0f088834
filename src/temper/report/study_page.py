"""A study's page: the finding, then its arms, what was compared, charts, what was held equal, every run. `tag` escapes everything."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from temper.passport import Figure
from temper.report.frame import again, document, facts
from temper.report.html import Html, heads, join, plainly, table, tag
from temper.report.plots import key
from temper.report.study_charts import contributed, curves, forests, labels, laws, quality, scatter_of_seeds, tried
from temper.report.words import (
    capital,
    chance,
    cost_name,
    direction,
    duration,
    ends,
    interval,
    joined,
    measure,
    number,
    prose,
    signed,
    spent,
)

if TYPE_CHECKING:
    from temper.report.study import ArmReport, Comparison, StudyReport


def page(study: StudyReport) -> str:
    """The whole document."""
    rerun = "Runs that the store still holds are not made again. The same versions on the same machine give the same figures."
    sections = {
        "Arms": ("The arms", arms(study)),
        "Comparisons": ("What was compared", comparisons(study)),
        "Quality": ("Quality against cost", quality(study)),
        "Contributions": ("What each part contributes", contributed(study)),
        "Laws": ("Laws through the figures", laws(study)),
        "Curves": ("Curves over training", curves(study)),
        "Equal": ("What differs, and what was held equal", equal(study)),
        "Trials": ("Trials before the measurement", trials(study)),
        "Runs": ("Every seed", runs(study)),
        "Notes": ("Notes", tag("ul", [tag("li", note) for note in study.notes], class_="notes") if study.notes else None),
        "Again": ("Run it again", again(rerun, study.rerun, study.text, "Study", study.versions, study.machine)),
    }
    foot = f"Made by Temper {study.versions.get('temper', '')} at {study.created}. "
    foot += "The JSON, Markdown and CSV files beside this page hold the same content."
    return document(study.name, header(study), sections, foot, ("report.css", "study.css"))


# ---------------------------------------------------------------- the top


def header(study: StudyReport) -> Html:
    """The page's top: the verdict and the finding, and the few numbers that sum the study up."""
    verdict = tag("b", capital(study.verdict), class_=f"verdict {_tone(study.verdict)}") if study.verdict else None
    made = [run for arm in study.arms for run in arm.runs]
    kept = sum(run.status == "from the store" for run in made)
    told = [("Arms", str(len(study.arms)), f"{len(made)} runs" + (f", {kept} from the store" if kept else ""))]
    if study.seeds:
        told.append(("Seeds", str(len(study.seeds)), _seeds(study.seeds)))
    told.append(("Held equal", *held(study)))
    if study.seconds is not None:
        told.append(("Time", duration(study.seconds), f"{study.created.replace('T', ' ')[:16]} UTC"))
    return join(
        tag("p", "Temper study", class_="kicker"),
        tag("h1", study.name),
        tag("p", verdict, study.finding, class_="lead") if study.finding or verdict else None,
        tag("p", study.about, class_="about") if study.about else None,
        facts(told),
    )


def _tone(verdict: str) -> str:
    return {"holds here": "better", "does not hold here": "worse"}.get(verdict, "unclear")


def _seeds(seeds: Sequence[int]) -> str:
    """`0 to 4`, or a list."""
    whole = len(seeds) > 2 and list(seeds) == list(range(seeds[0], seeds[0] + len(seeds)))
    return f"{seeds[0]} to {seeds[-1]}" if whole else ", ".join(map(str, seeds))


def held(study: StudyReport) -> tuple[str, str]:
    """What every arm could spend, and a word on it."""
    if not study.held:
        return "nothing", "costs may differ"
    name = "peak memory" if study.held == "memory" else cost_name(study.held)
    if study.budget is None:
        return name, "the same for every arm"
    amount = spent(study.held, study.budget)
    bare = study.held in {"updates", "tokens", "trials"}
    return (f"{amount} {name}" if bare else amount), ("for every arm" if bare else f"{name}, for every arm")


# ---------------------------------------------------------------- arms


def named(study: StudyReport) -> list[str]:
    """All figures of all arms: the study's measures in order, then what else was measured."""
    found = dict.fromkeys(name for arm in study.arms for name in arm.figures)
    return [name for name in study.measures if name in found] + [name for name in found if name not in study.measures]


def costs(study: StudyReport) -> list[str]:
    """All costs that an arm has."""
    return list(dict.fromkeys(name for arm in study.arms for name in arm.costs))


def example(study: StudyReport, name: str) -> Figure:
    """Some arm's figure of that name, for its unit and direction."""
    return next((arm.figures[name] for arm in study.arms if name in arm.figures), Figure(0.0))


def level(study: StudyReport) -> str:
    """What the intervals are."""
    return f"{round(100 * study.level, 3):g}\u202f% interval"


def _figure(figure: Figure | None) -> Html:
    if figure is None:
        return _cell("", None, "not measured")
    return _cell(measure(figure.value, figure.unit), figure.value, interval(figure), strong=True)


def _cell(words: str, value: float | None, small: str | None = None, strong: bool = False) -> Html:
    """A number's cell; it is sorted by `value`, and one that is not finite counts as not measured."""
    key = value if value is not None and math.isfinite(value) else ""
    return tag("td", tag("b", words) if strong else words, tag("small", small) if small else None, class_="num", data_v=key)


def arms(study: StudyReport) -> Html:
    """Every arm's figures and costs, in the study's order."""
    figures, spendings = named(study), costs(study)
    body = [
        tag(
            "tr",
            tag("th", key(at), _numbered(study, at), tag("small", arm.about) if arm.about else None, scope="row", data_v=at),
            [_figure(arm.figures.get(name)) for name in figures],
            [_cost(name, arm.costs.get(name)) for name in spendings],
        )
        for at, arm in enumerate(study.arms)
    ]
    titles = [(capital(name), direction(example(study, name)), True) for name in figures]
    titles += [(capital(cost_name(name)), "mean", True) for name in spendings]
    hint = f"Below each figure: its {level(study)} over seeds and examples. Costs are means over the seeds. Press a heading to sort."
    drawn = table(heads(("Arm", None, False), *titles), body, "Arms")
    return join(tag("p", hint, class_="hint"), tag("div", drawn, class_="study"))


def _numbered(study: StudyReport, at: int) -> str:
    """An arm's name, after its number where charts have numbers."""
    name, label = study.arms[at].name, labels(study)[at]
    return name if name == label else f"{label} {name}"


def _cost(name: str, value: float | None) -> Html:
    return _cell("" if value is None else spent(name, value), value)


# ---------------------------------------------------------------- comparisons


def comparisons(study: StudyReport) -> Html | None:
    """Forest plots, and all that the tests said; columns that no comparison fills are left out."""
    if not study.comparisons:
        return None
    columns = {
        "Verdict": lambda one: tag("td", tag("b", one.verdict, class_=_tone(one.verdict)) if one.verdict else None),
        "Difference": lambda one: _cell(*_difference(one), strong=True),
        "Margin": lambda one: _cell(signed(one.margin, one.unit, bool(one.better)), one.margin),
        "Test": lambda one: tag("td", prose(one.test)),
        "p": lambda one: _cell(chance(one.p), one.p),
        "p adjusted": lambda one: _cell(chance(one.p_adjusted), one.p_adjusted),
        "Effect": lambda one: _cell("", None) if one.effect is None else _cell(number(one.effect, 2), one.effect, one.effect_name),
        "Detectable": lambda one: _cell("" if one.detectable is None else signed(one.detectable, one.unit, False), one.detectable),
    }
    fields = {"p": "p", "p adjusted": "p_adjusted", "Effect": "effect", "Detectable": "detectable"}
    empty = {name for name, field in fields.items() if all(getattr(one, field) is None for one in study.comparisons)}
    columns = {name: cell for name, cell in columns.items() if name not in empty}
    small = {"Difference": level(study), "Detectable": "least that can be found"}
    body = []
    for at, one in enumerate(study.comparisons):
        sides = joined((f"{one.better} against {one.than}" if one.better else None, prose(one.figure)))
        head = tag("th", one.claim, tag("small", sides) if sides else None, scope="row", data_v=at)
        body.append(tag("tr", head, [cell(one) for cell in columns.values()]))
    titles = [("Claim", None, False), *((name, small.get(name), name not in {"Verdict", "Test"}) for name in columns)]
    return join(forests(study), tag("div", table(heads(*titles), body, "Comparisons"), class_="study claims"))


def _difference(one: Comparison) -> tuple[str, float, str | None]:
    signs = bool(one.better)
    return signed(one.difference, one.unit, signs), one.difference, ends(one.low, one.high, one.unit, signs)


# ---------------------------------------------------------------- what differs, trials, runs


def equal(study: StudyReport) -> Html:
    """What was held equal, every arm's changes and tuned settings, and what was alike."""
    amount, _ = held(study)
    said = "Nothing was held equal: the table of arms says what each spent."
    if study.held:
        said = f"Every arm could spend the same: {amount}. What else it spent stands in the table of arms."
    columns = list(dict.fromkeys(name for arm in study.arms for name in (*arm.changes, *arm.tuned)))
    drawn = None
    if columns:
        body = [
            tag("tr", tag("th", key(at), _numbered(study, at), scope="row", data_v=at), [_setting(arm, name) for name in columns])
            for at, arm in enumerate(study.arms)
        ]
        head = heads(("Arm", None, False), *((name, None, False) for name in columns))
        drawn = tag("div", table(head, body, "Settings that differ"), class_="study settings")
    alike = tag("ul", [tag("li", one) for one in study.alike], class_="notes")
    alike = join(tag("h3", "Alike in every arm"), alike) if study.alike else None
    return join(tag("p", said, class_="hint"), drawn, alike)


def _setting(arm: ArmReport, name: str) -> Html:
    if name in arm.tuned:
        return tag("td", _plain(arm.tuned[name]), tag("small", "chosen by trials"))
    if name in arm.changes:
        return tag("td", _plain(arm.changes[name]))
    return tag("td", tag("small", "as in the recipe"), data_v="")


def _plain(value: Any) -> str:
    return number(value) if isinstance(value, float) else plainly(value)


def trials(study: StudyReport) -> Html | None:
    """What was tried for every arm, as charts and as a table."""
    if not study.trials:
        return None
    columns = list(dict.fromkeys(name for trial in study.trials for name in trial.settings))
    body = [
        tag(
            "tr",
            tag("th", trial.arm, scope="row"),
            _cell(str(trial.number), trial.number),
            _cell(str(trial.rung), trial.rung),
            [tag("td", _plain(value), class_="num", data_v=plainly(value)) for value in (trial.settings.get(name, "") for name in columns)],
            _cell("failed" if trial.figure is None else number(trial.figure), trial.figure),
            _cost("seconds", trial.seconds),
            tag("td", "chosen" if trial.chosen else ""),
        )
        for trial in study.trials
    ]
    head = heads(
        ("Arm", None, False),
        *((title, None, True) for title in ("Number", "Rung", *columns, "Figure", "Time")),
        ("Chosen", None, False),
    )
    return join(tried(study), _folded(f"All {len(body)} trials", table(head, body, "Trials")))


def runs(study: StudyReport) -> Html | None:
    """Each seed's figures as charts, and every run in a table."""
    rows = [(at, arm, run) for at, arm in enumerate(study.arms) for run in arm.runs]
    if not rows:
        return None
    figures = list(dict.fromkeys([*named(study), *(name for _, _, run in rows for name in run.figures)]))
    figures = [name for name in figures if any(name in run.figures for _, _, run in rows)]
    spendings = list(dict.fromkeys(name for _, _, run in rows for name in run.costs))
    body = [
        tag(
            "tr",
            tag("th", arm.name, scope="row", data_v=at),
            _cell(str(run.seed), run.seed),
            [_figure(Figure(run.figures[name], unit=example(study, name).unit) if name in run.figures else None) for name in figures],
            [_cost(name, run.costs.get(name)) for name in spendings],
            tag("td", run.status),
            tag("td", tag("code", run.run[:10], title=run.run) if run.run else ""),
        )
        for at, arm, run in rows
    ]
    head = heads(
        ("Arm", None, False),
        ("Seed", None, True),
        *((capital(name), None, True) for name in figures),
        *((capital(cost_name(name)), None, True) for name in spendings),
        ("Status", None, False),
        ("Run", None, False),
    )
    return join(scatter_of_seeds(study), _folded(f"All {len(body)} runs" if len(body) > 1 else "The run", table(head, body, "Runs")))


def _folded(title: str, drawn: Html) -> Html:
    return tag("details", tag("summary", tag("b", title)), drawn)
