"""A study's report as Markdown (the finding and the tables) and as CSV (a row per arm and seed)."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from temper.passport import Figure
from temper.report.html import plainly
from temper.report.study_charts import ranked
from temper.report.study_page import costs, example, held, level, named
from temper.report.words import NARROW, capital, chance, cost_name, direction, ends, interval, measure, number, prose, said, signed, spent

if TYPE_CHECKING:
    from temper.report.study import ArmReport, StudyReport


def markdown(study: StudyReport) -> str:
    """The finding, and every table but that of single runs, which the CSV holds."""
    verdict = f"**{capital(study.verdict)}.** " if study.verdict else ""
    parts = [f"# {_text(study.name)}", verdict + _text(study.finding), _text(study.about)]
    amount, more = held(study)
    parts.append(f"Held equal: {amount} ({more}). Seeds: {', '.join(map(str, study.seeds)) or 'one'}. Brackets: {level(study)}.")
    figures, spendings = named(study), costs(study)
    heads = ["arm", *(" ".join(filter(None, (prose(name), _brackets(direction(example(study, name)))))) for name in figures)]
    rows = [
        [
            arm.name,
            *(_figure(arm.figures.get(name)) for name in figures),
            *(spent(name, arm.costs[name]) if name in arm.costs else "" for name in spendings),
        ]
        for arm in study.arms
    ]
    parts += ["## Arms", _table([*heads, *map(cost_name, spendings)], rows)]
    changed = [[arm.name, setting, _plain(value), how] for arm in study.arms for setting, value, how in _settings(arm)]
    if changed:
        parts += ["## What differs", _table(["arm", "setting", "value", "by"], changed)]
    if study.alike:
        parts += ["## Alike in every arm", "\n".join(f"- {_text(one)}" for one in study.alike)]
    if study.comparisons:
        rows = [
            [
                one.claim,
                one.verdict,
                _with(signed(one.difference, one.unit, bool(one.better)), ends(one.low, one.high, one.unit, bool(one.better))),
                signed(one.margin, one.unit, bool(one.better)),
                one.test,
                chance(one.p),
                chance(one.p_adjusted),
                "" if one.effect is None else f"{number(one.effect, 2)} {one.effect_name}",
                "" if one.detectable is None else signed(one.detectable, one.unit, False),
            ]
            for one in study.comparisons
        ]
        heads = ["claim", "verdict", "difference", "margin", "test", "p", "p adjusted", "effect", "detectable"]
        parts += ["## Comparisons", _table(heads, rows)]
    if study.contributions:
        rows = [
            [
                one.replaced,
                one.by,
                prose(one.figure),
                _with(signed(one.difference, one.unit), ends(one.low, one.high, one.unit)),
                one.verdict,
            ]
            for one in ranked(study)
        ]
        parts += ["## Contributions", _table(["part", "replaced by", "figure", "the whole is better by", "verdict"], rows)]
    if study.fits:
        rows = [
            [fit.name, fit.law, fit.x, fit.y, "; ".join(f"{name} = {said(one)}" for name, one in fit.parameters.items())]
            for fit in study.fits
        ]
        parts += ["## Laws", _table(["name", "law", "of", "for", "parameters"], rows)]
        for fit in study.fits:
            if one := fit.held_out:
                foretold = Figure(one.predicted, one.low, one.high)
                parts.append(f"{_text(fit.name)}, held out at {number(one.x)}: predicted {_figure(foretold)}, found {number(one.y)}.")
    if study.trials:
        rows = [
            [one.arm, str(one.number), str(one.rung), ", ".join(f"{name} = {_plain(value)}" for name, value in one.settings.items())]
            + ["failed" if one.figure is None else number(one.figure), spent("seconds", one.seconds), "yes" if one.chosen else ""]
            for one in study.trials
        ]
        parts += ["## Trials", _table(["arm", "number", "rung", "settings", "figure", "time", "chosen"], rows)]
    if study.notes:
        parts += ["## Notes", "\n".join(f"- {_text(one)}" for one in study.notes)]
    parts += ["## Run it again" if study.rerun or study.text else "", _fenced(study.rerun), _fenced(study.text, "yaml")]
    return "\n\n".join(part for part in parts if part.strip()).replace(NARROW, " ") + "\n"


def _settings(arm: ArmReport) -> list[tuple[str, Any, str]]:
    return [(name, value, "study") for name, value in arm.changes.items()] + [(name, value, "trials") for name, value in arm.tuned.items()]


def _plain(value: Any) -> str:
    return number(value) if isinstance(value, float) else plainly(value)


def _figure(figure: Figure | None) -> str:
    return "" if figure is None else _with(measure(figure.value, figure.unit), interval(figure))


def _with(value: str, span: str | None) -> str:
    return f"{value} ({span})" if span else value


def _brackets(words: str | None) -> str | None:
    return f"({words})" if words else None


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose empty columns are left out."""
    kept = [at for at in range(len(heads)) if at == 0 or any(row[at] for row in rows)]
    lines = [[_text(row[at]) for at in kept] for row in (heads, *rows)]
    lines.insert(1, ["---"] * len(kept))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(words: str) -> str:
    """Words that Markdown takes as they are, on one line."""
    return re.sub(r"([\\`*<>\[\]|#])|((?<![^\W_])_|_(?![^\W_]))", r"\\\1\2", " ".join(words.split()))


def _fenced(text: str, language: str = "") -> str:
    """A block of code, its fence longer than any within."""
    if not text:
        return ""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def runs(study: StudyReport) -> str:
    """A row per arm and seed: `figure.*` and `cost.*` of the run, `change.*` and `tuned.*` of its arm; empty where there is none."""

    def columns(of: Any, each: Any) -> list[str]:
        return list(dict.fromkeys(name for one in each for name in of(one)))

    every = [(arm, run) for arm in study.arms for run in arm.runs]
    kinds = {
        "figure": columns(lambda pair: pair[1].figures, every),
        "cost": columns(lambda pair: pair[1].costs, every),
        "change": columns(lambda arm: arm.changes, study.arms),
        "tuned": columns(lambda arm: arm.tuned, study.arms),
    }
    made = io.StringIO()
    sheet = csv.writer(made, lineterminator="\n")
    sheet.writerow(["arm", "seed", "run", "status", *(f"{kind}.{name}" for kind, names in kinds.items() for name in names)])
    for arm, run in every:
        given = {"figure": run.figures, "cost": run.costs, "change": arm.changes, "tuned": arm.tuned}
        cells = [_exact(given[kind][name]) if name in given[kind] else "" for kind, names in kinds.items() for name in names]
        sheet.writerow([arm.name, run.seed, run.run, run.status, *cells])
    return made.getvalue()


def _exact(value: Any) -> str:
    """A value that reads back as itself: numbers in full, text as it is, the rest as JSON."""
    return value if isinstance(value, str) else repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)
