"""Cards: what was measured of a method's claim, by a rule written before; one JSON file a method, `cards/<engine>/<method>.json`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from temper import keys
from temper.context import write
from temper.papers import shipped
from temper.parts import Problem, nearest, plain
from temper.store import digest
from temper.study.conducting import Conducted
from temper.study.findings import overall, verdicts
from temper.study.reading import Study


def find(word: str) -> Path:
    """A study that ships with Temper, `tune.lora` or `lora`. Raises `Problem` with the nearest."""
    known = {f"{path.parent.name}.{path.stem}": path for path in sorted(shipped("studies").glob("*/*.yaml"))}
    wanted = plain(word.replace(" ", ".").removesuffix(".yaml"))
    same = [name for name in known if wanted in (plain(name), plain(name.partition(".")[2]))]
    if len(same) == 1:
        return known[same[0]]
    if same:
        raise Problem(f"several engines have a study `{word}`; say which: {', '.join(same)}")
    raise Problem(f"no study `{word}`{nearest(word, [*known, *(path.stem for path in known.values())])}")


def check(study: Study) -> None:
    """Raises `Problem` where a study claims nothing: a card needs a rule, and before the runs."""
    if not study.claims:
        raise Problem(f"{study.file} claims nothing, so it has no verdict; write `finding: {{claims: [...]}}` before running it")


def ground(engine: str) -> Path:
    """The study whose recipe an engine's methods are compared on where nothing else is given."""
    path = shipped("studies") / engine / "ground.yaml"
    if not path.is_file():
        raise Problem(f"no ground for `{engine}` ships with Temper; give `--study`, a study whose recipe has a step `{engine}`")
    return path


def card(done: Conducted, engine: str, method: str, before: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A study's result as a card. before: the card that it takes the place of, whose attempts are counted on.

    Raises `Problem` where the study claims nothing: a card needs a rule.
    """
    study, report = done.study, done.report
    check(study)
    attempt = {"created": report.created, "study": study.digest, "verdict": report.verdict, "seconds": report.seconds}
    costs = [run.costs for arm in report.arms for run in arm.runs]
    return {
        "engine": engine,
        "method": method,
        "paper": study.paper,
        "claim": study.claim,
        "experiment": study.about,
        "scale": {
            name: max(cost[name] for cost in costs if name in cost)
            for name in ("tokens", "updates", "flops", "bytes")
            if any(name in cost for cost in costs)
        },
        "baselines": sorted({claim.than for claim in study.claims if claim.than}),
        "verdict": report.verdict,
        "finding": report.finding,
        "level": study.finding.level,
        "correction": study.finding.correction,
        "seeds": list(study.seeds),
        "arms": {
            arm.name: {
                "figures": {name: figure.dump() for name, figure in arm.figures.items()},
                "seeds": {str(run.seed): run.figures for run in arm.runs},
                "costs": arm.costs,
                "tuned": arm.tuned,
            }
            for arm in report.arms
        },
        "comparisons": [
            {**dataclasses.asdict(one.comparison), "says": one.says, "p_above": one.p_above, "p_below": one.p_below} for one in done.judged
        ],
        "fits": [
            {"name": fit.name, "law": fit.law, "parameters": {name: one.dump() for name, one in fit.parameters.items()}}
            for fit in report.fits
        ],
        "cost": {"seconds": sum(cost.get("seconds", 0.0) for cost in costs), "runs": len(costs)},
        "notes": list(report.notes),
        "machine": report.machine,
        "versions": report.versions,
        "code": digest(
            {
                name: keys.source(name)
                for name in sorted({step.engine for some in done.data.cells.values() for step in some[0].steps.values()})
            }
        )[:16],
        "study": study.text,
        "attempts": [*(before or {}).get("attempts", []), attempt],
    }


def rederived(card: Mapping[str, Any]) -> str:
    """The verdict that a card's figures give by its rule."""
    sides = [
        (one["p_above"], one["p_below"]) if one["says"] == "above" else (one["p_below"], one["p_above"]) for one in card["comparisons"]
    ]
    return overall(verdicts(sides, card["level"], card["correction"]))


def save(made: Mapping[str, Any], folder: Path) -> Path:
    """Writes a card to `<folder>/<engine>/<method>.json`."""
    path = folder / str(made["engine"]) / f"{made['method']}.json"
    write(path, json.dumps(made, indent=1, ensure_ascii=False) + "\n")
    return path


def attempts(engine: str, method: str, folder: Path) -> Mapping[str, Any] | None:
    """The card that stands for a method so far."""
    path = folder / engine / f"{method}.json"
    return json.loads(path.read_text(encoding="utf8")) if path.is_file() else None
