"""Engine `evaluate`: models and data -> figures with uncertainty.

For each model: start it, let every metric make its per-example records, sum them by independent unit, resample the units.
Left behind: `figures.json`; `records/<metric>.parquet`, numbers and places of rows, no rows; `calibration.json`, reliability tables.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from temper.evaluate.metric import Metric, Perplexity
from temper.evaluate.resample import Bootstrap, Resample
from temper.evaluate.subject import Subject
from temper.lazy import numpy
from temper.models.io import load_model, load_tokenizer
from temper.parts import Count, Problem, Slot, Spec, held, mark_of, spec
from temper.passport import Artefact, Figure, Input, Inputs, Output, Passport

if TYPE_CHECKING:
    from temper.context import Context
    from temper.evaluate.metric import Estimate, Measured

INPUTS = {
    "model": Input(("model", "adapter"), many=True, default="last", about="the models to measure, one or several"),
    "data": Input(("text", "completion", "chat"), default="data", about="what to measure them on"),
}
GIVES = "figures"


@spec
class Evaluate(Spec):
    """Figures of models on held-out data. Neither `batch` nor padding moves a figure beyond rounding."""

    metric: Slot[Metric] = Perplexity()
    resample: Slot[Resample] | None = Bootstrap()
    split: Literal["test", "train"] = "test"
    """Held-out rows, or those trained on."""
    limit: Count | None = None
    """Rows at most, spread evenly over the data."""
    length: Count = 2048
    """Tokens seen at once, at most, where a model has as many positions. Longer texts are read in windows, each from its own start;
    anything else loses its right end."""
    answer: Count = 64
    """Tokens of a generated answer, at most."""
    batch: Count = 4096
    """Tokens computed together: memory and time, no figure."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Number format of the computation; bfloat16 moves figures."""


def passport(spec: Evaluate, parents: Mapping[str, Any]) -> Passport:
    """What it gives: figures. Refuses metrics that ask where the data ask nothing, and chats without a template."""
    data: Passport = parents["data"]
    asking = [mark_of(one).name for one in held(spec.metric) if getattr(one, "asks", False)]
    if data.kind == "text" and asking:
        rule = f"`{asking[0]}` needs questions and `text` data ask nothing"
        raise Problem(f"{rule}; give completion or chat rows, or measure perplexity", ("metric",))
    for one in parents["model"]:
        if data.kind == "chat" and one.tokenizer is not None and one.template is None:
            raise Problem(
                f"{one.origin or 'the model'} has no chat template, and the data are chats; give rows with `prompt` and `completion` as "
                "texts, or put a chat_template.jinja into the model's folder",
                ("model",),
            )
    return Passport("figures")


def run(spec: Evaluate, inputs: Inputs, context: Context) -> Output:
    """Measures every model on the same rows. Figures are called `<model>.<figure>`, such as `tune.accuracy`."""
    rows = thinned(inputs["data"].load(spec.split), spec.limit)
    unit = units(rows.rows)
    live = context.start(spec)
    figures: dict[str, Figure] = {}
    tables: dict[str, list[tuple[str, Measured]]] = {}
    for index, (name, artefact) in enumerate(named(inputs["model"]).items()):
        model = load_model(artefact, dtype=spec.precision, device=context.device)
        for made in live.metric(Subject(name, model, load_tokenizer(artefact), rows, spec, context, f"{index}")):
            tables.setdefault(made.name, []).append((name, made))
            for one in made.estimates:
                if f"{name}.{one.name}" in figures:
                    raise Problem(f"two metrics give the figure `{one.name}`; put them in steps of their own", ("metric",))
                figures[f"{name}.{one.name}"] = figure(one, unit[made.records["row"]], live.resample)
        del model  # before the next one comes
    _write(tables, figures, context)
    return Output(figures)


def figure(estimate: Estimate, unit: numpy.ndarray, resample: Any | None) -> Figure:
    """An estimate with its interval. unit: int [N], which records are not independent of one another; n counts units."""
    different, where = numpy.unique(unit, return_inverse=True)
    sums = numpy.zeros((len(different), estimate.terms.shape[1]))
    numpy.add.at(sums, where, estimate.terms)
    value = float(estimate.statistic(estimate.terms.sum(0)))
    low, high = (resample(sums, estimate.statistic) if resample is not None else None) or (None, None)
    return Figure(value, low, high, len(different), estimate.unit, estimate.better)


def units(rows: Sequence[Mapping[str, Any]]) -> numpy.ndarray:
    """Which rows belong together, int [rows]: those of one `group`, else of one `module`; any other row stands alone."""
    keys = [next((f"{name} {row[name]}" for name in ("group", "module") if row.get(name) is not None), i) for i, row in enumerate(rows)]
    places = {key: place for place, key in enumerate(dict.fromkeys(keys))}
    return numpy.array([places[key] for key in keys])


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


def _write(tables: Mapping[str, list[tuple[str, Measured]]], figures: Mapping[str, Figure], context: Context) -> None:
    import pyarrow
    from pyarrow import parquet

    folder = context.out / "records"
    folder.mkdir()
    reliability: dict[str, dict[str, Any]] = {}
    for table, measured in tables.items():
        parts = []
        for model, made in measured:
            count = len(made.records["row"])
            column = pyarrow.DictionaryArray.from_arrays(pyarrow.array(numpy.zeros(count, numpy.int32)), [model])
            parts.append(pyarrow.table({"model": column, **made.records}))
            if made.reliability is not None:
                reliability.setdefault(table, {})[model] = made.reliability
        whole = pyarrow.concat_tables(parts).unify_dictionaries()
        parquet.write_table(whole, folder / f"{table}.parquet", compression="zstd")
    (context.out / "figures.json").write_text(json.dumps({name: one.dump() for name, one in figures.items()}, indent=1))
    if reliability:
        (context.out / "calibration.json").write_text(json.dumps(reliability, indent=1))
