"""What is measured of a model: the slot `Metric`.

A metric first makes records, a few numbers for each example; its figures, their intervals and every later comparison of two
models are functions of these records alone.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Protocol

from pydantic import Field

from temper.evaluate.records import (
    Estimate,
    Measured,
    Records,
    calibration_error,
    columns,
    likelihood,
    mean,
    ratio,
    reliability,
    together,
)
from temper.lazy import numpy
from temper.parts import Count, Problem, Rate, part, slot
from temper.statistics.emergence import edit_distance

if TYPE_CHECKING:
    from temper.evaluate.subject import Subject


@slot(combine=together, phased=False)
class Metric(Protocol):
    """What is measured?

    `(subject) -> [Measured]`: tables of per-example records of one model on the data. `estimates(table, records)`: the figures of a
    table, as functions of sums over its records and of nothing else; none for a table of another metric. `asks` says whether the
    data must ask something (completion or chat rows), `data` whether any are needed. A metric that needs `reference` compares with
    the model given as `reference`; `tokenwise` says that both must have one tokenizer. `labels` says that a classifier, which gives
    labels and no text, can be measured too.
    """

    def __call__(self, subject: Subject) -> list[Measured]: ...

    def estimates(self, table: str, records: Records) -> tuple[Estimate, ...]: ...


# ------------------------------------------------------------------------------------------------------- likelihood


@part
class Perplexity:
    """How well the text (or the completions) is predicted.  Formula: exp(sum of - ln p(token) / tokens).

    The same as nats per token, and as bits per byte of text, which compares models of different tokenizers. End marks count as
    tokens and their nats count; they spell no byte. A text's first token counts where the tokenizer opens with a mark.
    """

    def __call__(self, subject: Subject) -> list[Measured]:
        row, nll, tokens = subject.nats
        spelled = subject.bytes[row]
        if not spelled.sum():
            raise Problem("the predicted tokens spell no byte of text; give longer texts or completions")
        return [Measured("perplexity", {"row": row, "nll": nll, "tokens": tokens, "bytes": spelled})]

    def estimates(self, table: str, records: Records) -> tuple[Estimate, ...]:
        return likelihood(records) if table == "perplexity" else ()


@part(needs=("reference",))
class Forgetting:
    """What a model lost against the one that it came from, on the same rows.

    Formula: sum over examples of (nats of the model - nats of the reference) / tokens.
    Below 0: it gained.
    """

    tokenwise: ClassVar[bool] = True

    def __call__(self, subject: Subject) -> list[Measured]:
        row, nll, tokens = subject.nats
        known = subject.compared.nats
        if not (numpy.array_equal(row, known[0]) and numpy.array_equal(tokens, known[2])):
            raise Problem(
                f"{subject.name} and the reference {subject.compared.name} read the rows as different tokens; compare models of one "
                "tokenizer, at a `length` that both have positions for",
                ("reference",),
            )
        return [Measured("forgetting", {"row": row, "nll": nll, "reference": known[1], "tokens": tokens})]

    def estimates(self, table: str, records: Records) -> tuple[Estimate, ...]:
        if table != "forgetting":
            return ()
        lost = numpy.asarray(records["nll"]) - numpy.asarray(records["reference"])
        return (Estimate("forgetting", columns(lost, records["tokens"]), ratio, "nats", "lower"),)


@part(needs=("reference",))
class Agreement:
    """How much a model predicts what its reference predicts.

    Formula: mean [argmax p = argmax q]; mean of KL(q || p) = sum q (ln q - ln p), q the reference's distribution.
    """

    of: Literal["tokens", "choices"] = "tokens"
    """The next token at every supervised place, or the answer among a row's `choices`."""

    @property
    def asks(self) -> bool:
        return self.of == "choices"

    @property
    def tokenwise(self) -> bool:
        return self.of == "tokens"

    def __call__(self, subject: Subject) -> list[Measured]:
        if self.of == "tokens":
            made = subject.divergences
            records = {"row": made.row, "same": made.same, "kl": made.kl}
        else:
            one, other = subject.choices, subject.compared.choices
            records = {"row": one.row, "same": one.predicted == other.predicted, "kl": one.divergence(other)}
        return [Measured(f"{self.of.removesuffix('s')}_agreement", records)]

    def estimates(self, table: str, records: Records) -> tuple[Estimate, ...]:
        name = self.of.removesuffix("s")
        if table != f"{name}_agreement":
            return ()
        return (mean(table, records["same"], "share", "higher"), mean(f"{name}_kl", records["kl"], "nats", "lower"))


# ---------------------------------------------------------------------------------------------------------- answers


@part
class Accuracy:
    """Share of questions answered right, greedily.  Formula: mean [answer is right].

    Right is what the row's own checker says, else what equals the row's answer, give or take white space around it.
    """

    asks: ClassVar[bool] = True
    labels: ClassVar[bool] = True

    def __call__(self, subject: Subject) -> list[Measured]:
        made = subject.answers
        return [Measured("accuracy", {"row": made.row, "correct": made.correct, "finished": made.finished})]

    def estimates(self, table: str, records: Records) -> tuple[Estimate, ...]:
        return (mean("accuracy", records["correct"], "share", "higher"),) if table == "accuracy" else ()


@part
class ExactMatch:
    """Share of greedy answers that equal one of a row's answers in its letters.  Rajpurkar et al. 2016 (SQuAD), section 6

    A row's answers are its list `answers`, else its completion.
    """

    asks: ClassVar[bool] = True
    labels: ClassVar[bool] = True
    normalise: Literal["squad", "space"] = "squad"
    """`squad`: lower case, without ASCII punctuation, without the articles a, an, the, runs of white space as one; `space`: runs of
    white space as one."""

    def __call__(self, subject: Subject) -> list[Measured]:
        made, read = subject.answers, _squad if self.normalise == "squad" else _spaced
        accepted = [{read(one) for one in some} for some in subject.accepted]
        matched = numpy.array([read(text) in some for text, some in zip(made.text.tolist(), accepted)], bool)
        return [Measured("exact_match", {"row": made.row, "matched": matched})]

    def estimates(self, table: str, records: Records) -> tuple[Estimate, ...]:
        return (mean("exact_match", records["matched"], "share", "higher"),) if table == "exact_match" else ()


@part
class TokenEdit:
    """How far greedy answers are from the rows', in tokens.  Schaeffer et al. 2023, section 3

    Formula: the least number of tokens put in, taken out or exchanged that make one the other; and that over the longer one's tokens.
    Of several `answers` the nearest counts. White space around an answer does not.
    """

    asks: ClassVar[bool] = True
    labels: ClassVar[bool] = True

    def __call__(self, subject: Subject) -> list[Measured]:
        made = subject.answers
        said, wanted = subject.tokens(made.text.tolist()), [subject.tokens(some) for some in subject.accepted]
        pairs = [min(_edited(one, other) for other in some) for one, some in zip(said, wanted)]
        share, edits = numpy.array(pairs, numpy.float64).reshape(-1, 2).T
        return [Measured("token_edit", {"row": made.row, "edits": edits.astype(numpy.int64), "share": share})]

    def estimates(self, table: str, records: Records) -> tuple[Estimate, ...]:
        if table != "token_edit":
            return ()
        return (mean("token_edit_distance", records["share"], "share", "lower"), mean("token_edits", records["edits"], "tokens", "lower"))


@part
class Format:
    """Answers that miss the form asked for, and those that have it and are wrong.

    Formula: of all answers the share not formed, and the share formed and not right; of those formed the share right.
    """

    asks: ClassVar[bool] = True
    labels: ClassVar[bool] = True

    def __call__(self, subject: Subject) -> list[Measured]:
        made = subject.answers
        return [Measured("format", {"row": made.row, "formed": made.formed, "correct": made.correct})]

    def estimates(self, table: str, records: Records) -> tuple[Estimate, ...]:
        if table != "format":
            return ()
        formed, correct = (numpy.asarray(records[name], bool) for name in ("formed", "correct"))
        return (
            mean("format_errors", ~formed, "share", "lower"),
            mean("wrong_answers", formed & ~correct, "share", "lower"),
            Estimate("accuracy_when_formed", columns(formed & correct, formed), ratio, "share", "higher"),
        )


@part
class PassUntil:
    """The chance that a sampled answer is right, down to chances that no fixed number of samples would see.  Hu et al. 2023, section 3

    Formula: a question's answers are sampled until `successes` are right, K in all, or K is the budget; its chance is right / K.
    `pass_probability` is the mean chance, `log_pass` the mean of its logarithm, which there is where every question passed.
    """

    asks: ClassVar[bool] = True
    successes: Count = 2
    """Right answers at which a question is left."""
    budget: Count = 1000
    """Answers sampled of a question, at most."""
    temperature: Rate = 1.0
    """Of sampling."""

    def __call__(self, subject: Subject) -> list[Measured]:
        made = subject.attempts(self.successes, self.budget, self.temperature)
        return [Measured("pass_until", {"row": made.row, "right": made.right, "samples": made.samples})]

    def estimates(self, table: str, records: Records) -> tuple[Estimate, ...]:
        if table != "pass_until":
            return ()
        chance = numpy.asarray(records["right"], numpy.float64) / numpy.asarray(records["samples"])
        with numpy.errstate(divide="ignore"):
            logs = numpy.log(chance)
        return (
            mean("pass_probability", chance, "share", "higher"),
            mean("log_pass", logs, "nats", "higher"),
            mean("never_passed", chance == 0, "share", "lower"),
        )


# ---------------------------------------------------------------------------------------------------------- choices


@part
class Choice:
    """Multiple choice by log-likelihood: rows with `choices`, a list of texts, and `answer`, the right one's place from 0.

    Formula: p(choice) = softmax over a row's choices of ln p(choice | prompt), the end mark left out. The choice of the greatest is the
    prediction; or, length-normalised, that of the greatest ln p / characters. Besides accuracy: the probability of the true choice,
    the entropy over choices, the expected calibration error of the prediction and the Brier score, 0 to 2.
    """

    asks: ClassVar[bool] = True
    bins: Count = 15
    """Bins of the calibration error, of as many rows each as equal confidences allow."""

    def __call__(self, subject: Subject) -> list[Measured]:
        made = subject.choices
        records = {
            "row": made.row,
            "correct": made.predicted == made.answer,
            "correct_normalised": made.normalised == made.answer,
            "truth": made.truth,
            "confidence": made.confidence,
            "entropy": made.entropy,
            "brier": made.brier,
        }
        return [Measured("choice", records, reliability=reliability(records, self.bins))]

    def estimates(self, table: str, records: Records) -> tuple[Estimate, ...]:
        if table != "choice":
            return ()
        return (
            mean("choice_accuracy", records["correct"], "share", "higher"),
            mean("choice_accuracy_normalised", records["correct_normalised"], "share", "higher"),
            mean("choice_truth", records["truth"], "share", "higher"),
            mean("choice_entropy", records["entropy"], "nats", "lower"),
            calibration_error("choice_ece", records, self.bins),
            mean("choice_brier", records["brier"], "", "lower"),
        )


# ------------------------------------------------------------------------------------------------------ calibration


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

    @property
    def labels(self) -> bool:
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
        return [Measured(f"{self.of.removesuffix('s')}_calibration", records, reliability=reliability(records, self.bins))]

    def estimates(self, table: str, records: Records) -> tuple[Estimate, ...]:
        name = self.of.removesuffix("s")
        if table != f"{name}_calibration":
            return ()
        return (calibration_error(f"{name}_ece", records, self.bins), mean(f"{name}_brier", records["brier"], "", "lower"))


# ---------------------------------------------------------------------------------------------------------- lm-eval


@part
class LmEval:
    """Tasks of EleutherAI's `lm-eval`, through its Python API; they bring data of their own.

    Formula: each task's own, of its own metrics those that are means over examples or perplexities.
    """

    data: ClassVar[bool] = False
    tasks: Annotated[tuple[str, ...], Field(min_length=1)]
    """Names that lm-eval knows, or YAML files with a task each."""
    limit: Count | None = None
    """Examples of each task, at most: its first ones."""
    shots: Annotated[int, Field(ge=0)] | None = None
    """Examples shown before each question; none: as the task says."""

    @property
    def files(self) -> set[Path]:
        """The YAML files among the tasks and the files that they name, on which the figures depend."""
        found = {Path(one) for one in self.tasks if Path(one).suffix in (".yaml", ".yml") and Path(one).is_file()}
        words = [(one.parent, word) for one in found for word in re.findall(r"[^\s'\"{}\[\],:]+", one.read_text(encoding="utf8"))]
        named = [path for folder, word in words for path in (Path(word), folder / word, folder / f"{word.partition('.')[0]}.py")]
        return found | {path for path in named if path.is_file()}

    def __call__(self, subject: Subject) -> list[Measured]:
        from temper.evaluate.lm_eval import measured

        return measured(subject, self.tasks, self.limit, self.shots)

    def estimates(self, table: str, records: Records) -> tuple[Estimate, ...]:
        from temper.evaluate.lm_eval import estimates

        return estimates(table, records)


# -------------------------------------------------------------------------------------------------- texts and tokens


def _squad(text: str) -> str:
    """As SQuAD's own evaluation reads an answer."""
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return _spaced(re.sub(r"\b(a|an|the)\b", " ", bare))


def _spaced(text: str) -> str:
    return " ".join(text.split())


def _edited(one: Sequence[int], other: Sequence[int]) -> tuple[float, int]:
    """The edit distance of two sequences over the longer one's length, and itself."""
    edits = edit_distance(one, other)
    return edits / max(len(one), len(other), 1), edits
