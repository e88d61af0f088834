"""From a run to what `report` shows of it."""

from __future__ import annotations

import datetime
import json
from typing import TYPE_CHECKING, Any

from temper import keys, parts, report
from temper.machine import machine
from temper.passport import Figure, whose
from temper.store import RECORD

if TYPE_CHECKING:
    from temper.run import Result


def report_input(result: Result) -> Any:
    """What `report.write` takes, from a run."""
    by_key = {made.artefact.id: name for name, made in result.made.items()}
    steps = []
    for name, made in result.made.items():
        record, passport = made.record, made.artefact.passport
        files = record["files"]
        curve_file = made.artefact.path / RECORD / "curve.jsonl"
        rows = [json.loads(line) for line in curve_file.read_text().splitlines()] if curve_file.exists() else []
        content = {file: one for file, one in files.items() if file.startswith("model/")} or files
        settings = {k: v for k, v in parts.dump(made.step.spec).items() if k not in parts.slots(made.step.spec) and k != "paper"}
        steps.append(
            report.StepReport(
                name=name,
                engine=made.step.engine,
                status="made" if made.status == "made" else "from the store",
                seconds=record["seconds"],
                method=made.step.method,
                paper=made.step.spec.paper,
                kind=passport.kind,
                artefact=made.artefact.id,
                parents={role: by_key.get(parent.partition("@")[0], parent[:12]) for role, parent in passport.parents.items()},
                peak_memory=record["peak_memory"],
                bytes=sum(one["bytes"] for one in content.values()),
                parameters=passport.parameters,
                numbers=passport.numbers or "",
                passport=passport.dump(),
                spec=parts.describe(made.step.spec, getattr(parts.engine(made.step.engine), "PROVIDES", ())),
                settings=settings,
                curve=rows,
                figures=dict(made.artefact.figures),
                notes=list(record["notes"]),
                decisions={k: report.Decision(v["value"], v["reason"]) for k, v in record["decisions"].items()},
            )
        )
    return report.RunReport(
        name=result.plan.name,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        seed=result.plan.seed,
        recipe=result.plan.text,
        steps=steps,
        stages=_stages(result),
        about=result.plan.about,
        rerun=f"temper run {result.plan.place.file}",
        seconds=result.seconds,
        machine=machine(),
        versions=dict(keys.versions()),
    )


def _stages(result: Result) -> list[Any]:
    """The models that were evaluated, in order, with all figures that evaluation steps gave of them."""
    found: dict[str, dict[str, Figure]] = {}
    for made in result.made.values():
        if made.artefact.passport.kind != "figures":
            continue
        label = made.step.name
        for name, figure in made.artefact.figures.items():
            stage, metric = whose(name)
            if stage in result.made:
                found.setdefault(stage, {})[f"{label} {metric}"] = figure
    stages = []
    for name, made in result.made.items():
        if name in found:
            stages.append(report.StageReport(step=name, figures=found[name], purpose=made.step.about, aim=list(made.step.aim)))
    return stages
