"""Engine `evaluate`: models and data -> figures with uncertainty.

Perturb the rows where asked. For each model: start it, let every metric (and probe) make its per-example records, label them by slice,
sum them by independent unit, resample the units. Then fit laws through all models.
Left behind: `figures.json`; `records/<metric>.parquet`, numbers and places of rows, no rows; `calibration.json`, reliability tables;
`laws.json`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from temper.evaluate import records
from temper.evaluate.fit import Fit, Fitting
from temper.evaluate.metric import Metric, Perplexity
from temper.evaluate.perturb import Perturb
from temper.evaluate.probe import Probe
from temper.evaluate.records import Sums, Table
from temper.evaluate.resample import Bootstrap, Resample
from temper.evaluate.slice import Slice
from temper.evaluate.subject import Subject
from temper.lazy import numpy
from temper.models.io import load_model, load_tokenizer
from temper.parts import Count, Live, Problem, Slot, Spec, held, mark_of, spec
from temper.passport import UNKNOWN, Artefact, Figure, Input, Inputs, Output, Passport, family
from temper.tasks.rows import Rows, group_of

if TYPE_CHECKING:
    from temper.context import Context

INPUTS = {
    "model": Input(
        ("model", "adapter"),
        many=True,
        default="last",
        about="the models to measure, one or several; a classifier by its answers",
        families=("causal", "classifier"),
    ),
    "data": Input(("text", "completion", "chat"), optional=True, default="data", about="what to measure them on"),
    "reference": Input(("model", "adapter"), optional=True, about="the model that they are compared with, on the same rows"),
}
GIVES = "figures"
PROVIDES = ("reference",)


@spec
class Evaluate(Spec):
    """Figures of models on held-out data. Neither `batch` nor padding moves a figure beyond rounding."""

    metric: Slot[Metric] = Perplexity()
    probe: Slot[Probe] | None = None
    perturb: Slot[Perturb] | None = None
    slice: Slot[Slice] | None = None
    resample: Slot[Resample] | None = Bootstrap()
    fit: Slot[Fit] | None = None
    split: Literal["test", "train"] = "test"
    """Held-out rows, or those trained on."""
    limit: Count | None = None
    """Rows at most, spread evenly over the data."""
    length: Count = 2048
    """Tokens seen at once, at most, where a model has as many positions. Longer texts are read in windows, each from its own start;
    anything else loses its right end, but a prompt before choices its left."""
    answer: Count = 64
    """Tokens of a generated answer, at most."""
    batch: Count = 4096
    """Tokens computed together: memory and time, no figure."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Number format of the computation; bfloat16 moves figures."""


def passport(spec: Evaluate, parents: Mapping[str, Any]) -> Passport:
    """What it gives: figures. Refuses metrics without what they measure on, and chats without a template."""
    data: Passport | None = parents.get("data")
    labelling = [one for one in parents["model"] if family(one.architecture) == "classifier"]
    for one in records.measures(spec):
        _measurable(one, data)
        if labelling and not getattr(one, "labels", False):
            raise Problem(
                f"{labelling[0].origin or 'the model'} is {labelling[0].architecture}, which gives labels, and `{mark_of(one).name}` reads "
                "what a model writes; measure `accuracy` or `exact-match`",
                ("metric",),
            )
    compared = [one for slot in (spec.metric, spec.probe, spec.slice) for one in held(slot)]
    comparing = [mark_of(one).name for one in compared if "reference" in mark_of(one).needs]
    if comparing and parents.get("reference") is None:
        raise Problem(f"`{comparing[0]}` compares with another model; name it, such as `reference: model`", ("reference",))
    if not comparing and parents.get("reference") is not None:
        raise Problem("nothing here compares with it; leave it out, or measure `forgetting` or `agreement`", ("reference",))
    if tokenwise := [mark_of(one).name for one in compared if getattr(one, "tokenwise", False)]:
        for one in parents["model"]:
            if len({one.tokenizer, parents["reference"].tokenizer} - {None, UNKNOWN}) > 1:
                raise Problem(
                    f"`{tokenwise[0]}` compares token by token, and {one.origin or 'the model'} has another tokenizer; give models of one",
                    ("reference",),
                )
    for role, one in [*(("model", one) for one in parents["model"]), ("reference", parents.get("reference"))]:
        if one is not None and data is not None and data.kind == "chat" and one.tokenizer is not None and one.template is None:
            raise Problem(
                f"{one.origin or 'the model'} has no chat template, and the data are chats; give rows with `prompt` and `completion` as "
                "texts, or put a chat_template.jinja into the model's folder",
                (role,),
            )
    return Passport("figures")


def _measurable(measure: Any, data: Passport | None) -> None:
    """Refuses what cannot be measured on such data, or leaves nothing to estimate from."""
    name = mark_of(measure).name
    if not hasattr(measure, "estimates"):
        raise Problem(
            "a function makes records and does not say what is estimated from them; write a class with `__call__` and `estimates`, marked "
            "@part, in a file that `use:` names",
            ("metric",),
        )
    if data is None and getattr(measure, "data", True):
        raise Problem(f"`{name}` measures on data, and there are none; add `data:`", ("data",))
    if data is not None and data.kind == "text" and getattr(measure, "asks", False):
        raise Problem(
            f"`{name}` needs questions and `text` data ask nothing; give completion or chat rows, or measure perplexity", ("metric",)
        )


def run(spec: Evaluate, inputs: Inputs, context: Context) -> Output:
    """Measures every model on the same rows.

    Figures are called `<model>.<figure>`, such as `tune.accuracy`; those of a slice `tune.accuracy[task=sort]`.
    """
    rows = thinned(inputs.data.load(spec.split), spec.limit) if inputs.data is not None else Rows("text", [], "no data", "")
    unit = units(rows.rows)
    rows = perturbed(rows, spec, context)
    reference = _reference(spec, inputs.reference, rows, context)
    live = context.start(spec)
    labels = _labels(live.slice(rows), len(rows)) if live.slice is not None else {}
    tables: list[Table] = []
    reliability: dict[str, dict[str, Any]] = {}
    models = named(inputs["model"])
    for index, (name, artefact) in enumerate(models.items()):
        model = load_model(artefact, dtype=spec.precision, device=context.device)
        subject = Subject(name, model, load_tokenizer(artefact), rows, spec, context, f"{index}", reference)
        for made in [*live.metric(subject), *(live.probe(subject) if live.probe is not None else [])]:
            row = made.records["row"]
            if made.unit is None:
                tables.append(Table(made.name, name, made.records, unit[row], {key: one[row] for key, one in labels.items()}))
            else:
                tables.append(Table(made.name, name, made.records, made.unit))
            if made.reliability is not None:
                reliability.setdefault(made.name, {})[name] = made.reliability
        del model, subject  # before the next one comes
    sums = records.figures(records.measures(spec), tables)
    figures = {name: figure(one, live.resample) for name, one in sums.items()}
    records.write(tables, context.out)
    if live.fit is not None:
        laws = live.fit([_fitting(name, artefact, sums) for name, artefact in models.items()])
        figures |= laws.figures
        (context.out / "laws.json").write_text(json.dumps(laws.tables, indent=1))
    (context.out / "figures.json").write_text(json.dumps({name: one.dump() for name, one in figures.items()}, indent=1))
    if reliability:
        (context.out / "calibration.json").write_text(json.dumps(reliability, indent=1))
    return Output(figures)


def figure(sums: Sums, resample: Any | None) -> Figure:
    """A figure with its interval; n counts independent units."""
    low, high = (resample(sums.sums, sums.statistic) if resample is not None else None) or (None, None)
    return Figure(sums.value, low, high, len(sums.units), sums.unit, sums.better)


def units(rows: Sequence[Mapping[str, Any]]) -> numpy.ndarray:
    """Which rows belong together, int [rows]: those of one `group`, else of one `module`; any other row stands alone."""
    keys = [group_of(row) or index for index, row in enumerate(rows)]
    places = {key: place for place, key in enumerate(dict.fromkeys(keys))}
    return numpy.array([places[key] for key in keys], numpy.int64)


def thinned(rows: Any, limit: int | None) -> Any:
    """At most `limit` rows, spread evenly."""
    count = len(rows)
    if limit is None or count <= limit:
        return rows
    return dataclasses.replace(rows, rows=[rows.rows[index * count // limit] for index in range(limit)])


def named(models: Sequence[Artefact]) -> dict[str, Artefact]:
    """Each model under its step's name; a name that comes again is numbered, `tune`, `tune-2`."""
    found: dict[str, Artefact] = {}
    for one in models:
        name, turn = one.name or one.path.name, 1
        while (full := name if turn == 1 else f"{name}-{turn}") in found:
            turn += 1
        found[full] = one
    return found


def perturbed(rows: Rows, spec: Evaluate, context: Context) -> Rows:
    """The rows as `perturb` makes them: as many, in the same order."""
    perturb = Live(spec, context, PROVIDES, ("perturb",)).perturb
    made = perturb(rows) if perturb is not None else rows
    if len(made) != len(rows):
        raise Problem(f"{len(rows)} rows became {len(made)}; a perturbation leaves every row where it stands", ("perturb",))
    return made


def _reference(spec: Evaluate, artefact: Artefact | None, rows: Rows, context: Context) -> Subject | None:
    """The model to compare with, given to the parts that need it."""
    if artefact is None:
        return None
    model = load_model(artefact, dtype=spec.precision, device=context.device)
    made = Subject(artefact.name or artefact.path.name, model, load_tokenizer(artefact), rows, spec, context, "reference")
    context.give("reference", made)
    return made


def _labels(slices: Mapping[str, Sequence[str | None]], count: int) -> dict[str, numpy.ndarray]:
    """Slice -> label of each row, empty where it is in no group."""
    for name, labels in slices.items():
        if len(labels) != count:
            raise Problem(f"`{name}` labels {len(labels)} of {count} rows; a slice says of every row where it belongs", ("slice",))
    return {name: numpy.array([label or "" for label in labels], numpy.str_) for name, labels in slices.items()}


def _fitting(name: str, artefact: Artefact, sums: Mapping[str, Sums]) -> Fitting:
    """What laws may be fitted through of one model: what is known of it, and its figures."""
    knows = {figure: one.value for figure, one in artefact.figures.items()}
    if artefact.passport.parameters is not None:
        knows["parameters"] = float(artefact.passport.parameters)
    mine = {figure.removeprefix(f"{name}."): one for figure, one in sums.items() if figure.startswith(f"{name}.")}
    return Fitting(name, knows, mine)
