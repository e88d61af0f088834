"""What is measured of a model: the slot `Metric`.

A metric first makes records, a few numbers for each example; its figures, their intervals and every later comparison of two
models are functions of these records alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from temper.lazy import numpy
from temper.parts import Count, Problem, part, slot

if TYPE_CHECKING:
    from temper.evaluate.resample import Statistic
    from temper.evaluate.subject import Subject

Records = Mapping[str, Any]
"""Columns of equal length [N]; `row` int64 is the example's place among the rows measured."""


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
    """One table of records and what is estimated from it. reliability: a reliability diagram's numbers, as `reliability` makes them."""

    name: str
    records: Records
    estimates: tuple[Estimate, ...]
    reliability: dict[str, Any] | None = None


def together(metrics: Sequence[Callable[[Subject], list[Measured]]]) -> Callable[[Subject], list[Measured]]:
    """How a list of metrics acts as one: side by side. They share the subject's passes."""
    return lambda subject: [one for metric in metrics for one in metric(subject)]


@slot(combine=together, phased=False)
class Metric(Protocol):
    """What is measured?

    `(subject) -> [Measured]`: tables of per-example records of one model on the data, each with its figures as functions of
    sums over them. `asks` says whether the data must ask something (completion or chat rows).
    """

    def __call__(self, subject: Subject) -> list[Measured]: ...


# ---------------------------------------------------------------------------------------------------------- parts


@part
class Perplexity:
    """How well the text (or the completions) is predicted.  Formula: exp(sum of - ln p(token) / tokens).

    The same as nats per token, and as bits per byte of text, which compares models of different tokenizers. End marks count as
    tokens and their nats count; they spell no byte. A text's first token counts where the tokenizer opens with a mark.
    """

    def __call__(self, subject: Subject) -> list[Measured]:
        made = subject.predictions
        row, where, tokens = numpy.unique(made.row, return_inverse=True, return_counts=True)
        records = {"row": row, "nll": numpy.bincount(where, made.nll), "tokens": tokens, "bytes": subject.bytes[row]}
        return [Measured("perplexity", records, likelihood(records))]


@part
class Accuracy:
    """Share of questions answered right, greedily.  Formula: mean [answer is right].

    Right is what the row's own checker says, else what equals the row's answer, give or take white space around it.
    """

    asks: ClassVar[bool] = True

    def __call__(self, subject: Subject) -> list[Measured]:
        made = subject.answers
        records = {"row": made.row, "correct": made.correct, "finished": made.finished}
        return [Measured("accuracy", records, (mean("accuracy", made.correct, "share", "higher"),))]


@part
class Calibration:
    """Whether confidence is the chance of being right.  Formula: sum over bins b of (n_b / N) |accuracy_b - confidence_b|.

    The expected calibration error with bins of equal mass (Naeini et al. 2015; Nguyen and O'Connor 2015 for equal mass) and the
    Brier score (Brier 1950). Of tokens: the largest probability against whether that token comes next, Brier over the whole
    vocabulary, 0 to 2. Of answers: the probability of the whole greedy answer against whether it is right, Brier 0 to 1.
    """

    of: Literal["tokens", "answers"] = "tokens"
    """Next tokens (of text or completions), or greedy answers to questions."""
    bins: Count = 15
    """Bins, of as many records each as equal confidences allow."""

    @property
    def asks(self) -> bool:
        return self.of == "answers"

    def __call__(self, subject: Subject) -> list[Measured]:
        if self.of == "tokens":
            made = subject.predictions
            confidence, brier = made.confidence, made.brier
        else:
            made = subject.answers
            confidence = numpy.exp(made.logprob)
            brier = (confidence - made.correct) ** 2
        records = {"row": made.row, "confidence": confidence, "correct": made.correct, "brier": brier}
        name = self.of.removesuffix("s")
        estimates = (
            calibration_error(f"{name}_ece", records, self.bins),
            mean(f"{name}_brier", brier, "", "lower"),
        )
        return [Measured(f"{name}_calibration", records, estimates, reliability(records, self.bins))]


# ------------------------------------------------------------------------------------------- records -> estimates


def ratio(totals: numpy.ndarray) -> numpy.ndarray:
    """[..., 2] -> [...]: the first total over the second."""
    return totals[..., 0] / totals[..., 1]


def mean(name: str, values: numpy.ndarray, unit: str, better: Literal["lower", "higher"]) -> Estimate:
    """The mean of one number a record, [N]."""
    return Estimate(name, _columns(values, numpy.ones(len(values))), ratio, unit, better)


def likelihood(records: Records) -> tuple[Estimate, ...]:
    """Perplexity, nats per token and bits per byte, from `nll` (nats), `tokens` and `bytes` of each example.

    Raises `Problem` where no byte is predicted.
    """
    if not numpy.sum(records["bytes"]):
        raise Problem("the predicted tokens spell no byte of text; give longer texts or completions")
    by_token, by_byte = (_columns(records["nll"], records[unit]) for unit in ("tokens", "bytes"))
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
    terms = _columns(signed, numpy.ones(len(signed)))
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


def _gaps(records: Records, bins: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    confidence = numpy.asarray(records["confidence"], numpy.float64)
    return confidence - numpy.asarray(records["correct"], numpy.float64), equal_mass(confidence, bins)


def _columns(*values: numpy.ndarray) -> numpy.ndarray:
    return numpy.stack([numpy.asarray(one, numpy.float64) for one in values], axis=1)
