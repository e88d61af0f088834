"""A model looked at through data: the passes that metrics share, each made once and kept through a crash."""

from __future__ import annotations

import dataclasses
import functools
import io
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from temper.context import write
from temper.lazy import numpy, torch
from temper.models.sample import evaluating, own_stops, sample
from temper.parts import Problem
from temper.tasks.questions import questions, right
from temper.tasks.rows import Rows
from temper.train.batching import collate
from temper.train.examples import Encoded, encode
from temper.train.logprobs import supervised_logits

if TYPE_CHECKING:
    from temper.context import Context
    from temper.evaluate.engine import Evaluate

T = TypeVar("T")

_LOGITS = 2**26
"""Logits held at once, at most (where a single row stays below): 256 MiB in float32."""
_CHUNK = 2**21
"""Logits turned to probabilities at once: what caches hold."""


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

    row: int64. correct: bool, by the row's own checker, else equal to its answer. logprob: float64, that of the whole greedy
    answer, end mark included. finished: bool, whether it ended of itself.
    """

    row: numpy.ndarray
    correct: numpy.ndarray
    logprob: numpy.ndarray
    finished: numpy.ndarray


class Subject:
    """One model, its tokenizer and the data's rows. Metrics ask it for `predictions`, `answers` and `bytes`."""

    def __init__(self, name: str, model: Any, tokenizer: Any, rows: Rows, spec: Evaluate, context: Context, key: str):
        self.name, self.model, self.tokenizer, self.rows = name, model, tokenizer, rows
        self._spec, self._context, self._key = spec, context, key
        self._positions: int = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize

    @functools.cached_property
    def encoded(self) -> Encoded:
        """The rows as token sequences; what was lost is noted for the report."""
        made = encode(self.rows, self.tokenizer, max_length=min(self._spec.length, self._positions))
        if made.cut or made.dropped:
            self._context.note(f"{self.name}: {made.report}")
        return made

    @functools.cached_property
    def predictions(self) -> Predictions:
        """What the model predicts for every supervised token, in one pass without gradient."""
        made = self._kept("predictions", Predictions, functools.partial(self._predict, self.encoded))
        self._finite(made.nll)
        return made

    @functools.cached_property
    def answers(self) -> Answers:
        """The model's greedy answers. Needs rows that ask something: completion or chat."""
        made = self._kept("answers", Answers, self._answer)
        self._finite(made.logprob)
        if unasked := len(self.rows) - len(made.row):
            self._context.note(f"{self.name}: {unasked} of {len(self.rows)} rows not asked, they hold no answer to compare with")
        if unfinished := int((~made.finished).sum()):
            self._context.note(f"{self.name}: {unfinished} of {len(made.row)} answers cut off before their end")
        return made

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

    def _kept(self, name: str, cls: type[T], make: Callable[[], T]) -> T:
        """A pass from an earlier, interrupted run where there is one."""
        file = self._context.work / f"{self._key}.{name}.npz"
        if file.exists():
            with numpy.load(file) as arrays:
                return cls(**arrays)
        made = make()
        held = io.BytesIO()
        numpy.savez(held, **vars(made))
        write(file, held.getvalue())
        return made

    def _finite(self, logprobs: numpy.ndarray) -> None:
        if not numpy.isfinite(logprobs).all():
            broken = int((~numpy.isfinite(logprobs)).sum())
            raise Problem(f"{self.name} gives {broken} of {len(logprobs)} probabilities that are no numbers; see where its loss diverged")

    def _predict(self, examples: Encoded) -> Predictions:
        vocabulary = self.model.config.get_text_config().vocab_size
        groups = neighbours([len(one) for one in examples], min(self._spec.batch, _LOGITS // vocabulary))
        found: list[Any] = [None] * len(examples)
        with (
            torch.no_grad(),
            evaluating(self.model),
            self._context.track(len(examples), f"{self.name}: predicting", "sequence") as bar,
        ):
            for group in groups:
                batch = collate([examples[index] for index in group]).to(self._context.device)
                scored = numpy.stack(token_statistics(*supervised_logits(self.model, batch)))  # [4, targets]
                ends = numpy.cumsum([examples[index].targets for index in group])
                for index, piece in zip(group, numpy.split(scored, ends[:-1], axis=1)):
                    found[index] = piece
                bar.advance(len(group), tokens=batch.tokens)
        row = numpy.repeat([one.source for one in examples], [one.targets for one in examples])
        nll, confidence, hit, brier = numpy.concatenate(found, axis=1)
        return Predictions(row, nll, confidence, hit.astype(bool), brier)

    def _answer(self) -> Answers:
        numbers, asked = questions(self.rows)
        examples = encode(asked, self.tokenizer, max_length=None)
        prompts = [one.tokens[: int(one.supervised.argmax())].tolist() for one in examples]
        ends = sorted({*own_stops(self.model), self.tokenizer.eos_token_id} - {None})
        # Prompts near the end of the model's positions leave less room than `answer`; they are sampled apart, so that they take none
        # from the others. One that leaves no room at all is the sampler's to refuse.
        by_room: dict[int, list[int]] = {}
        for index, prompt in enumerate(prompts):
            by_room.setdefault(max(1, min(self._spec.answer, self._positions - len(prompt))), []).append(index)
        found: list[Any] = [None] * len(prompts)
        with self._context.track(len(prompts), f"{self.name}: answering", "question") as bar:
            for room, members in by_room.items():
                for places in neighbours([len(prompts[index]) + room for index in members], self._spec.batch):
                    group = [members[place] for place in places]
                    asking = [prompts[index] for index in group]
                    made = sample(self.model, asking, max_new_tokens=room, temperature=0, stop=ends, batch_size=len(group))
                    for index, one in zip(group, made):
                        found[index] = one
                    bar.advance(len(group), tokens=sum(len(one.tokens) for one in made))
        spoken = [one.tokens[:-1] if one.finished else one.tokens for one in found]
        texts = self.tokenizer.batch_decode(spoken, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Answers(
            numpy.array([numbers[one.source] for one in examples]),
            numpy.array([right(asked.rows[one.source], text) for one, text in zip(examples, texts)]),
            numpy.array([sum(one.logprobs) for one in found]),
            numpy.array([one.finished for one in found]),
        )


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


def neighbours(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices in groups of similar length, the longest first; rows x longest stays within `budget` in every group of several."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda one: (-lengths[one], one)):
        if not groups or lengths[groups[-1][0]] * (len(groups[-1]) + 1) > budget:
            groups.append([])
        groups[-1].append(index)
    return groups
