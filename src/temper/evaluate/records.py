"""Per-example records and what is estimated from them.

Figures, their intervals and every later comparison of two models are functions of records alone: `read` makes them again from an
artefact's folder and the spec that made it, without any model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from temper.lazy import numpy
from temper.parts import Problem, held

if TYPE_CHECKING:
    from temper.evaluate.engine import Evaluate
    from temper.evaluate.resample import Statistic
    from temper.evaluate.subject import Subject

Records = Mapping[str, Any]
"""Columns of equal length [N]; `row` int64 is the example's place among the rows measured."""
FOLDER = "records"
"""Where an artefact has its tables, one Parquet file each."""
SLICE = "slice."
"""Begins the names of columns that hold a slice's labels."""


@dataclasses.dataclass(frozen=True, eq=False)
class Estimate:
    """A figure as a function of sums over records. terms: float64 [N, K]; the figure is `statistic(terms.sum(0))`."""

    name: str
    terms: numpy.ndarray
    statistic: Statistic
    unit: str
    better: Literal["lower", "higher"]


@dataclasses.dataclass(frozen=True, eq=False)
class Measured:
    """One table of records. unit: int [N], which records are not independent of one another; None where `row` is a row of the data,
    which says so itself. reliability: a reliability diagram's numbers, as `reliability` makes them."""

    name: str
    records: Records
    unit: numpy.ndarray | None = None
    reliability: dict[str, Any] | None = None


def together(measures: Sequence[Callable[[Subject], list[Measured]]]) -> Callable[[Subject], list[Measured]]:
    """How a list of metrics or probes acts as one: side by side. They share the subject's passes."""
    return lambda subject: [one for measure in measures for one in measure(subject)]


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """One model's records in one table. unit: int [N]. labels: slice -> label of each record [N], empty where it is in no group."""

    name: str
    model: str
    records: Records
    unit: numpy.ndarray
    labels: Mapping[str, numpy.ndarray] = dataclasses.field(default_factory=dict)

    def groups(self) -> Iterator[tuple[str, Records, numpy.ndarray]]:
        """All records, and those of each label: what is put behind a figure's name, records, units."""
        yield "", self.records, self.unit
        for name, labels in self.labels.items():
            for label in sorted(set(labels.tolist()) - {""}):
                inside = labels == label
                yield f"[{name}={label}]", {column: values[inside] for column, values in self.records.items()}, self.unit[inside]


@dataclasses.dataclass(frozen=True, eq=False)
class Sums:
    """A figure's sums over each independent unit of data: its value is `statistic(sums.sum(0))`. units: int [C]; sums: float64 [C, K]."""

    units: numpy.ndarray
    sums: numpy.ndarray
    statistic: Statistic
    unit: str
    better: Literal["lower", "higher"]

    @property
    def value(self) -> float:
        return float(self.statistic(self.sums.sum(0)))


def measures(spec: Evaluate) -> list[Any]:
    """The parts of a spec that make records."""
    return [*held(spec.metric), *held(spec.probe)]


def figures(measures: Sequence[Any], tables: Iterable[Table]) -> dict[str, Sums]:
    """`<model>.<figure>`, or `<model>.<figure>[<slice>=<label>]`, -> its sums. A figure that is no number, such as a share of nothing,
    is left out."""
    found: dict[str, Sums] = {}
    for table in tables:
        for group, records, unit in table.groups():
            for estimate in [one for measure in measures for one in measure.estimates(table.name, records)]:
                name = f"{table.model}.{estimate.name}{group}"
                if name in found:
                    raise Problem(f"two metrics give the figure `{estimate.name}{group}`; put them in steps of their own", ("metric",))
                made = summed(estimate, unit)
                if numpy.isfinite(made.value):
                    found[name] = made
    return found


def summed(estimate: Estimate, unit: numpy.ndarray) -> Sums:
    """An estimate's terms [N, K] by unit, int [N]."""
    units, where = numpy.unique(unit, return_inverse=True)
    sums = numpy.zeros((len(units), estimate.terms.shape[1]))
    numpy.add.at(sums, where, estimate.terms)
    return Sums(units, sums, estimate.statistic, estimate.unit, estimate.better)


# ---------------------------------------------------------------------------------------------------------- files


def write(tables: Sequence[Table], folder: Path) -> None:
    """Each table as `records/<table>.parquet`: `model`, `row`, `unit`, the metric's own columns, a column for each slice."""
    import pyarrow
    from pyarrow import parquet

    (folder / FOLDER).mkdir()
    parts: dict[str, list[Any]] = {}
    for one in tables:
        model = pyarrow.DictionaryArray.from_arrays(pyarrow.array(numpy.zeros(len(one.unit), numpy.int32)), [one.model])
        labels = {f"{SLICE}{name}": pyarrow.array(labels.tolist(), pyarrow.string()) for name, labels in one.labels.items()}
        columns = {name: numpy.asarray(values) for name, values in one.records.items()}
        parts.setdefault(one.name, []).append(pyarrow.table({"model": model, "unit": one.unit, **columns, **labels}))
    for name, some in parts.items():
        whole = pyarrow.concat_tables(some).unify_dictionaries()
        parquet.write_table(whole, folder / FOLDER / f"{name}.parquet", compression="zstd")


def load(folder: Path) -> list[Table]:
    """What `write` left."""
    from pyarrow import parquet

    tables = []
    for file in sorted((folder / FOLDER).glob("*.parquet")):
        whole = parquet.read_table(file)
        owner = numpy.array(whole["model"].to_pylist())
        for model in dict.fromkeys(owner.tolist()):
            mine = whole.drop_columns("model").filter(owner == model)
            found = {name: mine[name].to_numpy() for name in mine.column_names}
            labels = {name.removeprefix(SLICE): values for name, values in found.items() if name.startswith(SLICE)}
            records = {name: values for name, values in found.items() if name != "unit" and not name.startswith(SLICE)}
            tables.append(Table(file.stem, model, records, found["unit"], labels))
    return tables


def read(folder: Path, spec: Evaluate) -> dict[str, Sums]:
    """The figures of an evaluate step, each as sums over independent units, made again from its artefact's folder.

    Of figures of several steps, units with equal numbers are the same data where the steps read the same rows. Figures that are no
    functions of records (laws through several models) are not among them.
    """
    return figures(measures(spec), load(folder))


# ------------------------------------------------------------------------------------------- records -> estimates


def ratio(totals: numpy.ndarray) -> numpy.ndarray:
    """[..., 2] -> [...]: the first total over the second; no number where that is 0."""
    with numpy.errstate(divide="ignore", invalid="ignore"):
        return totals[..., 0] / totals[..., 1]


def mean(name: str, values: numpy.ndarray, unit: str, better: Literal["lower", "higher"]) -> Estimate:
    """The mean of one number a record, [N]."""
    return Estimate(name, columns(values, numpy.ones(len(values))), ratio, unit, better)


def likelihood(records: Records) -> tuple[Estimate, ...]:
    """Perplexity, nats per token and bits per byte, from `nll` (nats), `tokens` and `bytes` of each example."""
    by_token, by_byte = (columns(records["nll"], records[unit]) for unit in ("tokens", "bytes"))
    return (
        Estimate("perplexity", by_token, lambda totals: numpy.exp(ratio(totals)), "", "lower"),
        Estimate("nats_per_token", by_token, ratio, "nats", "lower"),
        Estimate("bits_per_byte", by_byte, lambda totals: ratio(totals) / numpy.log(2), "bits", "lower"),
    )


def equal_mass(confidence: numpy.ndarray, bins: int) -> numpy.ndarray:
    """The bin, from 0, of each of [N] confidences: by rank, as many in each as possible. Equal confidences share a bin."""
    _, where, counts = numpy.unique(confidence, return_inverse=True, return_counts=True)
    middle = numpy.cumsum(counts) - counts / 2  # ranks from 0 to N that a group's middle has
    return (middle * bins / len(confidence)).astype(numpy.int64)[where]


def calibration_error(name: str, records: Records, bins: int) -> Estimate:
    """The expected calibration error of `confidence` and `correct`, as a figure that can be resampled.

    Each record's gap, confidence - correct, enters with the sign of its bin's gap, so that a plain mean is the error. Bins and
    signs are those of all records: resamples with absolute values of their own would add the noise of a bin a second time and
    lie above the error itself.
    """
    gap, bin_ = _gaps(records, bins)
    signed = numpy.sign(numpy.bincount(bin_, gap))[bin_] * gap
    terms = columns(signed, numpy.ones(len(signed)))
    return Estimate(name, terms, lambda totals: numpy.maximum(ratio(totals), 0), "share", "lower")


def reliability(records: Records, bins: int) -> dict[str, Any]:
    """The reliability diagram: of each bin its count, range and mean of confidence, accuracy; and the error's `floor`.

    The floor is what a perfectly calibrated model would show on as many independent records: in a bin, |mean gap| is then near
    |Normal(0, v)| with v = sum c (1 - c) / n^2, whose mean is sqrt(2 v / pi).
    """
    _, bin_ = _gaps(records, bins)
    confidence, correct = (numpy.asarray(records[name], numpy.float64) for name in ("confidence", "correct"))
    count, sums, hits, noise = (numpy.bincount(bin_, one) for one in (None, confidence, correct, confidence * (1 - confidence)))
    rows = []
    for index in numpy.flatnonzero(count):
        inside = confidence[bin_ == index]
        rows.append(
            {
                "count": int(count[index]),
                "from": float(inside.min()),
                "to": float(inside.max()),
                "confidence": float(sums[index] / count[index]),
                "accuracy": float(hits[index] / count[index]),
            }
        )
    return {"floor": float(numpy.sqrt(2 * noise / numpy.pi).sum() / len(confidence)), "bins": rows}


def columns(*values: Any) -> numpy.ndarray:
    """Terms of an estimate: K times [N] -> float64 [N, K]."""
    return numpy.stack([numpy.asarray(one, numpy.float64) for one in values], axis=1)


def _gaps(records: Records, bins: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    confidence = numpy.asarray(records["confidence"], numpy.float64)
    return confidence - numpy.asarray(records["correct"], numpy.float64), equal_mass(confidence, bins)
