"""A model looked at through data: the passes that metrics share, each made once and kept through a crash."""

from __future__ import annotations

import dataclasses
import functools
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from temper.context import write
from temper.lazy import numpy, torch
from temper.models.classifiers import Words, said
from temper.models.sample import Sample, evaluating, own_stops, sample, virtual_tokens
from temper.parts import Problem, shown
from temper.tasks.questions import formed, questions, right
from temper.tasks.rows import Rows
from temper.train.batching import collate
from temper.train.examples import Encoded, Example, encode
from temper.train.logprobs import supervised_logits
from temper.train.objectives.base import family_of

if TYPE_CHECKING:
    from temper.context import Context, Track
    from temper.evaluate.engine import Evaluate
    from temper.train.batching import Batch

T = TypeVar("T")

_LOGITS = 2**26
"""Logits held at once, at most (where a single row stays below): 256 MiB in float32."""
_CHUNK = 2**21
"""Logits turned to probabilities at once: what caches hold."""
_TRIES = 4096
"""Answers sampled in one round of attempts, at most, where a question each leaves room: time, no figure."""


@dataclasses.dataclass(frozen=True)
class Predictions:
    """One entry for each of M predicted tokens, in the order of rows and, within a row, of its tokens.

    row: int64, the data's row, from 0. nll: float32, - log p(token), nats. confidence: float32, the largest probability.
    correct: bool, whether that is the token's own. brier: float32, sum over the vocabulary of (p - [is the token])^2, 0 to 2.
    """

    row: numpy.ndarray
    nll: numpy.ndarray
    confidence: numpy.ndarray
    correct: numpy.ndarray
    brier: numpy.ndarray


@dataclasses.dataclass(frozen=True)
class Answers:
    """One entry for each of N questions, in the order of rows.

    row: int64. text: str, the greedy answer; of a classifier the label, or its words' labels between spaces. correct: bool, by the row's
    own checker, else equal to its answer. formed: bool, whether it has the form that the question asks for. logprob: float64, that of the
    whole answer, end mark included. finished: bool, whether it ended of itself.
    """

    row: numpy.ndarray
    text: numpy.ndarray
    correct: numpy.ndarray
    formed: numpy.ndarray
    logprob: numpy.ndarray
    finished: numpy.ndarray


@dataclasses.dataclass(frozen=True)
class Attempts:
    """One entry for each of N questions. row: int64. samples: int64, answers sampled. right: int64, how many of them were."""

    row: numpy.ndarray
    samples: numpy.ndarray
    right: numpy.ndarray


@dataclasses.dataclass(frozen=True)
class Divergences:
    """One entry for each of M supervised tokens. row: int64. same: bool, whether both models' likeliest token is the same. kl: float32,
    sum q (ln q - ln p) over the vocabulary, q the reference's probabilities, nats."""

    row: numpy.ndarray
    same: numpy.ndarray
    kl: numpy.ndarray


@dataclasses.dataclass(frozen=True)
class Choices:
    """N rows with choices, M choices in all, one row's after the other's.

    row, answer, count: int64 [N], the data's row, the right choice's place, how many there are. logprob: float64 [M], of a choice after
    its prompt. characters: int64 [M], without the white space around it. Probabilities are shares among a row's choices.
    """

    row: numpy.ndarray
    answer: numpy.ndarray
    count: numpy.ndarray
    logprob: numpy.ndarray
    characters: numpy.ndarray

    @functools.cached_property
    def logs(self) -> list[numpy.ndarray]:
        """ln p of each row's choices: N times [count]."""
        return [one - numpy.logaddexp.reduce(one) for one in self._by_row(self.logprob)]

    @property
    def predicted(self) -> numpy.ndarray:
        return numpy.array([one.argmax() for one in self.logs], numpy.int64)

    @property
    def normalised(self) -> numpy.ndarray:
        """The prediction by log-likelihood a character."""
        return numpy.array([one.argmax() for one in self._by_row(self.logprob / self.characters)], numpy.int64)

    @property
    def truth(self) -> numpy.ndarray:
        """The right choice's probability, float64 [N]."""
        return numpy.exp([one[right] for one, right in zip(self.logs, self.answer)])

    @property
    def confidence(self) -> numpy.ndarray:
        return numpy.exp([one.max() for one in self.logs])

    @property
    def entropy(self) -> numpy.ndarray:
        """Nats, float64 [N]."""
        return numpy.array([-(numpy.exp(one) * one).sum() for one in self.logs])

    @property
    def brier(self) -> numpy.ndarray:
        """Sum over choices of (p - [is the right one])^2."""
        return numpy.array([numpy.square(numpy.exp(one)).sum() for one in self.logs]) - 2 * self.truth + 1

    def divergence(self, other: Choices) -> numpy.ndarray:
        """KL(other || this) among each row's choices, nats, float64 [N]."""
        return numpy.array([(numpy.exp(q) * (q - p)).sum() for p, q in zip(self.logs, other.logs, strict=True)])

    def _by_row(self, values: numpy.ndarray) -> list[numpy.ndarray]:
        return numpy.split(values, numpy.cumsum(self.count)[:-1])


class Subject:
    """One model, its tokenizer and the data's rows. Metrics ask it for what the model does with the rows: each pass is made once.

    reference: the model that it is compared with, on the same rows, where one is given.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        tokenizer: Any,
        rows: Rows,
        spec: Evaluate,
        context: Context,
        key: str,
        reference: Subject | None = None,
    ):
        self.name, self.model, self.tokenizer, self.rows = name, model, tokenizer, rows
        self.spec, self.context, self.reference = spec, context, reference
        self._key = key
        positions: int = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
        self.positions = positions - virtual_tokens(model)
        """Tokens that the model can see at once, besides the virtual ones of its adapter."""
        self.length = min(spec.length, self.positions)
        """Tokens that it is shown at once, at most."""

    @property
    def compared(self) -> Subject:
        """The reference. Raises `Problem` where there is none."""
        if self.reference is None:
            raise Problem("there is no model to compare with; name one as `reference`", ("reference",))
        return self.reference

    def check_writes(self) -> None:
        """Raises `Problem` on a classifier, which gives labels and no text."""
        if family_of(self.model) == "classifier":
            raise Problem(f"{self.name} gives labels, not text; measure its answers, by `accuracy` or `exact-match`", ("metric",))

    # -------------------------------------------------------------------------------------------------- likelihood

    @functools.cached_property
    def encoded(self) -> Encoded:
        """The rows as token sequences; what was lost is noted for the report."""
        made = encode(self.rows, self.tokenizer, max_length=self.length)
        if made.cut or made.dropped:
            self.context.note(f"{self.name}: {made.report}")
        return made

    @functools.cached_property
    def predictions(self) -> Predictions:
        """What the model predicts for every supervised token, in one pass without gradient."""
        return self._kept("predictions", Predictions, self._predict)

    @property
    def nats(self) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
        """Of every row with a supervised token: its number, the sum of - log p over such tokens, how many they are."""
        made = self.predictions
        row, where, tokens = numpy.unique(made.row, return_inverse=True, return_counts=True)
        return row, numpy.bincount(where, made.nll), tokens

    @functools.cached_property
    def bytes(self) -> numpy.ndarray:
        """Bytes of UTF-8 that each row's predicted tokens spell, special tokens left out: int64 [rows of the data]."""
        spelled: dict[int, list[int]] = {}
        for one in self.encoded:
            spelled.setdefault(one.source, []).extend(one.tokens[1:][one.supervised[1:]].tolist())
        made = numpy.zeros(len(self.rows), numpy.int64)
        texts = self.tokenizer.batch_decode(list(spelled.values()), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        made[list(spelled)] = [len(text.encode("utf8")) for text in texts]
        return made

    @functools.cached_property
    def divergences(self) -> Divergences:
        """How the model's next tokens differ from the reference's, for every supervised token."""
        return self._kept("divergences", Divergences, self._diverge)

    @functools.cached_property
    def choices(self) -> Choices:
        """What the model thinks of the choices of rows that have some."""
        made = self._kept("choices", Choices, self._choose)
        if without := len(self.rows) - len(made.row):
            self.context.note(f"{self.name}: {without} of {len(self.rows)} rows have no choices")
        return made

    def scored(self, examples: Sequence[Example], what: str) -> list[numpy.ndarray]:
        """`token_statistics` of each example's supervised tokens, [4, targets], in the order given. what: is shown."""
        parts = self._passed(examples, what, "sequence", lambda batch: token_statistics(*supervised_logits(self.model, batch)))
        nll = [one[0] for one in parts]
        if broken := sum(int((~numpy.isfinite(one)).sum()) for one in nll):
            raise _broken(self.name, broken, sum(map(len, nll)))
        return parts

    def _passed(self, examples: Sequence[Example], what: str, unit: str, score: Callable[[Batch], Sequence[Any]]) -> list[numpy.ndarray]:
        """What `score` says of batches, [columns, targets], as arrays of each example."""
        self.check_writes()
        vocabulary = self.model.config.get_text_config().vocab_size
        groups = neighbours([len(one) for one in examples], min(self.spec.batch, _LOGITS // vocabulary))
        found: list[Any] = [None] * len(examples)
        with torch.no_grad(), evaluating(self.model), self.context.track(len(examples), f"{self.name}: {what}", unit) as bar:
            for group in groups:
                batch = collate([examples[index] for index in group]).to(self.context.device)
                columns = numpy.stack(score(batch))
                ends = numpy.cumsum([examples[index].targets for index in group])
                for index, piece in zip(group, numpy.split(columns, ends[:-1], axis=1)):
                    found[index] = piece
                bar.advance(len(group), tokens=batch.tokens)
        return found

    def _predict(self) -> Predictions:
        nll, confidence, hit, brier = numpy.concatenate(self.scored(self.encoded, "predicting"), axis=1)
        return Predictions(_rows_of(self.encoded), nll, confidence, hit.astype(bool), brier)

    def _diverge(self) -> Divergences:
        other = self.compared

        def score(batch: Batch) -> Sequence[Any]:
            with evaluating(other.model):
                theirs, _ = supervised_logits(other.model, batch)
            return divergence(theirs, supervised_logits(self.model, batch)[0])

        if max(map(len, self.encoded)) > other.positions:
            raise Problem(f"the reference {other.name} has {other.positions} positions; give `length: {other.positions}`", ("length",))
        same, kl = numpy.concatenate(self._passed(self.encoded, "comparing", "sequence", score), axis=1)
        if broken := int((~numpy.isfinite(kl)).sum()):
            raise _broken(f"{self.name} or {other.name}", broken, len(kl))
        return Divergences(_rows_of(self.encoded), same.astype(bool), kl)

    def _choose(self) -> Choices:
        numbers = [number for number, row in enumerate(self.rows.rows) if "choices" in row]
        if not numbers:
            raise Problem(f"{self.rows.name} has no choices; give rows with `prompt`, `completion`, `choices` and `answer`", ("data",))
        rows = [self.rows.rows[number] for number in numbers]
        for number, row in zip(numbers, rows):
            _check_choices(row, f"{self.rows.name}, row {number + 1}")
        posed = [{**row, "completion": _as_turn(row, choice)} for row in rows for choice in row["choices"]]
        encoded = encode(dataclasses.replace(self.rows, rows=posed), self.tokenizer, max_length=None)
        examples = [self._unended(one, posed) for one in encoded]
        if shortened := sum(len(one) > self.length for one in examples):
            self.context.note(f"{self.name}: {shortened} of {len(examples)} prompts of choices cut on the left")
        nll = [one[0].sum(dtype=numpy.float64) for one in self.scored([one[-self.length :] for one in examples], "choosing")]
        return Choices(
            numpy.array(numbers),
            numpy.array([row["answer"] for row in rows]),
            numpy.array([len(row["choices"]) for row in rows]),
            -numpy.array(nll),
            numpy.array([len(choice.strip()) for row in rows for choice in row["choices"]]),
        )

    def _unended(self, example: Example, posed: Sequence[Mapping[str, Any]]) -> Example:
        """A choice without the end mark that rows of plain text get."""
        row = posed[example.source]
        ended = isinstance(row["completion"], str) and example.tokens[-1] == self.tokenizer.eos_token_id
        made = example[: len(example) - ended]
        first = int(made.supervised.argmax())
        if first == 0 or len(made) - first >= self.length:
            rule = "nothing stands before it" if first == 0 else f"it leaves no room for its prompt in {self.length} tokens"
            raise Problem(f"{self.rows.name}: the choice {shown(row['completion'])}: {rule}, and its first token cannot be predicted")
        return made

    # ----------------------------------------------------------------------------------------------------- answers

    @functools.cached_property
    def asked(self) -> tuple[list[int], Rows]:
        """The rows that ask something, and where each stands in the data."""
        return questions(self.rows)

    @functools.cached_property
    def answers(self) -> Answers:
        """The model's greedy answers. Needs rows that ask something: completion or chat."""
        made = self._kept("answers", Answers, self._answer)
        if unasked := len(self.rows) - len(made.row):
            self.context.note(f"{self.name}: {unasked} of {len(self.rows)} rows not asked, they hold no answer to compare with")
        if unfinished := int((~made.finished).sum()):
            self.context.note(f"{self.name}: {unfinished} of {len(made.row)} answers cut off before their end")
        return made

    @property
    def accepted(self) -> list[list[str]]:
        """The answers that each question accepts: the row's `answers`, else its completion."""
        return [list(row.get("answers") or ()) or [_said(row["completion"])] for row in self.asked[1].rows]

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Texts, without the white space around them, as this model's tokens."""
        return self.tokenizer([text.strip() for text in texts], add_special_tokens=False)["input_ids"]

    def attempts(self, successes: int, budget: int, temperature: float) -> Attempts:
        """Sampled answers to each question until `successes` of them are right, or `budget` are made.

        A question's n-th answer is a function of the seed, its row and n: other questions and batches do not move it.
        """
        return self._kept("attempts", Attempts, functools.partial(self._attempt, successes, budget, temperature))

    def generated(
        self, prompts: Sequence[Sequence[int]], room: int, bar: Track | None = None, seeds: Sequence[int] | None = None, **how: Any
    ) -> list[Sample]:
        """A completion of each prompt of up to `room` tokens, fewer where the model's positions end first. how: as `sample` takes it."""
        self.check_writes()
        ends = sorted({*own_stops(self.model), self.tokenizer.eos_token_id} - {None})
        # Prompts near the end of the model's positions leave less room; they are sampled apart, so that they take none from the
        # others. One that leaves no room at all is the sampler's to refuse.
        by_room: dict[int, list[int]] = {}
        for index, prompt in enumerate(prompts):
            by_room.setdefault(max(1, min(room, self.positions - len(prompt))), []).append(index)
        found: list[Any] = [None] * len(prompts)
        for least, members in by_room.items():
            for places in neighbours([len(prompts[index]) + least for index in members], self.spec.batch):
                group = [members[place] for place in places]
                drawn = None if seeds is None else [seeds[index] for index in group]
                asking = [prompts[index] for index in group]
                made = sample(self.model, asking, max_new_tokens=least, stop=ends, seeds=drawn, batch_size=len(group), **how)
                for index, one in zip(group, made):
                    found[index] = one
                if bar is not None:
                    bar.advance(len(group), tokens=sum(len(one.tokens) for one in made))
        return found

    def texts(self, samples: Sequence[Sample]) -> list[str]:
        """What completions say, without their end marks."""
        spoken = [one.tokens[:-1] if one.finished else one.tokens for one in samples]
        return self.tokenizer.batch_decode(spoken, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _prompts(self) -> tuple[numpy.ndarray, list[Mapping[str, Any]], list[list[int]]]:
        """Of each question: its row's number, the row, its prompt's tokens."""
        numbers, asked = self.asked
        examples = encode(asked, self.tokenizer, max_length=None)
        prompts = [one.tokens[: int(one.supervised.argmax())].tolist() for one in examples]
        return numpy.array([numbers[one.source] for one in examples]), [asked.rows[one.source] for one in examples], prompts

    def _answer(self) -> Answers:
        number, rows, prompts = self._prompts()
        with self.context.track(len(prompts), f"{self.name}: answering", "question") as bar:
            if family_of(self.model) == "classifier":
                texts, logprob = self._labelled(prompts, bar)
                finished = numpy.ones(len(texts), bool)
            else:
                found = self.generated(prompts, self.spec.answer, bar, temperature=0)
                texts, logprob = self.texts(found), numpy.array([sum(one.logprobs) for one in found])
                finished = numpy.array([one.finished for one in found])
        if broken := int((~numpy.isfinite(logprob)).sum()):
            raise _broken(self.name, broken, len(logprob))
        return Answers(
            number,
            numpy.array(texts, numpy.str_),
            numpy.array([right(row, text) for row, text in zip(rows, texts)]),
            numpy.array([formed(row, text) for row, text in zip(rows, texts)]),
            logprob,
            finished,
        )

    def _labelled(self, prompts: Sequence[list[int]], bar: Track) -> tuple[list[str], numpy.ndarray]:
        """What a classifier answers, and the log-probability of each answer."""
        words, found, logprob = Words(self.tokenizer), [""] * len(prompts), numpy.zeros(len(prompts))
        if longest := max((len(one) for one in prompts if len(one) > self.positions), default=0):
            raise Problem(f"{self.name} has {self.positions} positions and a prompt {longest} tokens; give shorter prompts", ("data",))
        with torch.no_grad(), evaluating(self.model):
            for group in neighbours(list(map(len, prompts)), self.spec.batch):
                texts, logs = said(self.model, [prompts[index] for index in group], words)
                logprob[group] = logs.cpu().numpy()
                for index, text in zip(group, texts):
                    found[index] = text
                bar.advance(len(group), tokens=sum(len(prompts[index]) for index in group))
        return found, logprob

    def _attempt(self, successes: int, budget: int, temperature: float) -> Attempts:
        number, rows, prompts = self._prompts()
        stream = self.context.stream("metric")
        done, hits = [0] * len(rows), [0] * len(rows)
        waiting, at_once = list(range(len(rows))), successes
        with self.context.track(len(rows), f"{self.name}: attempting", "question") as bar:
            while waiting:
                tries = [(index, turn) for index in waiting for turn in range(done[index], min(done[index] + at_once, budget))]
                seeds = [stream.seed("attempt", int(number[index]), turn) for index, turn in tries]
                made = self.generated([prompts[index] for index, _ in tries], self.spec.answer, None, seeds, temperature=temperature)
                for (index, _), text in zip(tries, self.texts(made)):
                    if hits[index] < successes:  # those after the last one needed were made in vain
                        done[index] += 1
                        hits[index] += right(rows[index], text)
                still = [index for index in waiting if hits[index] < successes and done[index] < budget]
                bar.advance(len(waiting) - len(still), tokens=sum(len(one.tokens) for one in made))
                waiting, at_once = still, max(1, min(2 * at_once, _TRIES // max(1, len(still))))
        return Attempts(number, numpy.array(done), numpy.array(hits))

    def _kept(self, name: str, cls: type[T], make: Callable[[], T]) -> T:
        """A pass from an earlier, interrupted run where there is one."""
        file = self.context.work / f"{self._key}.{name}.npz"
        if file.exists():
            with numpy.load(file) as arrays:
                return cls(**arrays)
        made = make()
        held = io.BytesIO()
        numpy.savez(held, **vars(made))
        write(file, held.getvalue())
        return made


def _rows_of(examples: Sequence[Example]) -> numpy.ndarray:
    return numpy.repeat([one.source for one in examples], [one.targets for one in examples])


def _broken(name: str, broken: int, count: int) -> Problem:
    return Problem(f"{name} gives {broken} of {count} probabilities that are no numbers; see where its loss diverged")


def _said(completion: Any) -> str:
    return completion if isinstance(completion, str) else completion[0].get("content") or ""


def _as_turn(row: Mapping[str, Any], choice: str) -> Any:
    """A choice as the row's completion is written: a text, or an assistant's turn."""
    return choice if isinstance(row["prompt"], str) else [{"role": "assistant", "content": choice}]


def _check_choices(row: Mapping[str, Any], where: str) -> None:
    choices, answer = row["choices"], row.get("answer")
    if not isinstance(choices, (list, tuple)) or len(choices) < 2 or not all(isinstance(one, str) and one.strip() for one in choices):
        raise Problem(f"{where}, column `choices`: {shown(choices)}; a list of two texts or more is asked for, none of them empty")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise Problem(f"{where}, column `answer`: {shown(answer)}; the right choice's place is asked for, 0 to {len(choices) - 1}")


def token_statistics(logits: torch.Tensor, targets: torch.Tensor) -> tuple[numpy.ndarray, ...]:
    """Of logits [N, V] and targets int64 [N]: - log p(target), largest p, whether it is the target's, Brier score; float32 [N] each.

    Brier 1950: sum_v (p_v - [v = target])^2 = sum_v p_v^2 - 2 p_target + 1.
    """
    columns: list[tuple[Any, ...]] = []
    step = max(1, _CHUNK // logits.shape[-1])
    for some, wanted in zip(logits.split(step), targets.split(step)):
        some = some.float()
        own = some.gather(-1, wanted[:, None]).squeeze(-1)
        shares = some.softmax(-1)
        top, best = shares.max(-1)
        # log of the normaliser through the largest term: a target's own share may underflow
        normaliser = some.gather(-1, best[:, None]).squeeze(-1) - top.log()
        brier = shares.square().sum(-1) - 2 * (own - normaliser).exp() + 1
        columns.append((normaliser - own, top, best == wanted, brier))
    return tuple(torch.cat(column).float().cpu().numpy() for column in zip(*columns))


def divergence(reference: torch.Tensor, logits: torch.Tensor) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Of two models' logits [N, V]: whether the largest is the same one's, and KL(reference || other) in nats; float32 [N] each."""
    if reference.shape != logits.shape:
        raise Problem(
            f"vocabularies of {reference.shape[-1]} and {logits.shape[-1]} tokens cannot be compared; give models of one tokenizer",
            ("reference",),
        )
    columns: list[tuple[Any, ...]] = []
    step = max(1, _CHUNK // logits.shape[-1])
    for theirs, ours in zip(reference.split(step), logits.split(step)):
        q, p = theirs.float().log_softmax(-1), ours.float().log_softmax(-1)
        columns.append((q.argmax(-1) == p.argmax(-1), (q.exp() * (q - p)).sum(-1)))
    same, kl = (torch.cat(column).float().cpu().numpy() for column in zip(*columns))
    return same, kl


def neighbours(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices in groups of similar length, the longest first; rows x longest stays within `budget` in every group of several."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda one: (-lengths[one], one)):
        if not groups or lengths[groups[-1][0]] * (len(groups[-1]) + 1) > budget:
            groups.append([])
        groups[-1].append(index)
    return groups
