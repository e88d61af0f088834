"""Slot `source`: where pairs of responses come from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol

from pydantic import Field

from temper.align.figures import mean, share
from temper.context import write
from temper.lazy import numpy
from temper.models.sample import own_stops, sample
from temper.parts import Count, Problem, Rate, part, shown, slot
from temper.tasks.questions import questions
from temper.train.examples import Encoded, Example, encode

if TYPE_CHECKING:
    from temper.context import Context
    from temper.passport import Figure
    from temper.tasks.rows import Rows

Score = Callable[[Mapping[str, Any], Sequence[str]], list[float]]
"""What slot `reward` answers: `(row, responses) -> [float]`."""

_CHUNK = 64
"""Prompts between two writings of what was sampled."""


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Pairs as token sequences, a chosen one followed by its rejected one; what a reader should know, in a line; figures."""

    examples: Encoded
    report: str
    figures: Mapping[str, Figure] = dataclasses.field(default_factory=dict)


@slot(phased=False)
class Source(Protocol):
    """Which responses are compared? `(rows, split, reward, max_length) -> Pairs`, for each split of the data.

    rows: of a shape in `shapes`. split: `train` or `test`. reward: what stands in slot `reward`. max_length: tokens of prompt and
    response together. No pairs are an answer too: the skeleton refuses to train on none.
    """

    shapes: ClassVar[tuple[str, ...]]
    """Shapes of data that it takes."""
    asks_reward: ClassVar[bool]
    """Whether it asks what stands in slot `reward`."""

    def __call__(self, rows: Rows, split: str, reward: Score, max_length: int) -> Pairs: ...


# ------------------------------------------------------------------------------------------------- pure functions


def best_against_worst(rewards: Sequence[float], texts: Sequence[str], limit: int) -> list[tuple[int, int]]:
    """Up to `limit` pairs (chosen, rejected) of one prompt's responses: the best with the worst, the next best with the next worst.

    Equal texts count once, and no response is in two pairs. A chosen one always has the greater reward; of equal rewards the
    earlier response ranks higher.
    """
    first = {text: index for index, text in reversed(list(enumerate(texts)))}
    ranked = sorted(first.values(), key=lambda index: (-rewards[index], index))
    pairs = zip(ranked[: min(limit, len(ranked) // 2)], reversed(ranked))
    return [(chosen, rejected) for chosen, rejected in pairs if rewards[chosen] > rewards[rejected]]


# ---------------------------------------------------------------------------------------------------------- parts


@part(needs=("tokenizer",))
class Given:
    """The data's own pairs: rows with `prompt`, `chosen` and `rejected`. Rewards are not asked."""

    shapes: ClassVar[tuple[str, ...]] = ("preference",)
    asks_reward: ClassVar[bool] = False

    def start(self, context: Context) -> Callable[..., Pairs]:
        def pairs(rows: Rows, split: str, reward: Score, max_length: int) -> Pairs:
            made = encode(rows, context.want("tokenizer"), max_length=max_length)
            return Pairs(made, made.report)

        return pairs


@part(needs=("model", "tokenizer"), cost=("batch_size",))
class Attempts:
    """Pairs of the incoming policy's own attempts: it answers each prompt several times, and what scores high stands against
    what scores low. With reward `verifier` that is a response checked to be right against one checked to be wrong.

    Pang et al. 2024, "Iterative Reasoning Preference Optimization", section 2. Attempts and their rewards are kept on disk, so a resumed
    run has the same pairs. They do not depend on the batch size, and those of one prompt not on the others.
    """

    shapes: ClassVar[tuple[str, ...]] = ("completion", "chat")
    asks_reward: ClassVar[bool] = True

    count: Count = 8
    """Attempts a prompt."""
    temperature: Rate = 1.0
    """Divides the logits; 1 samples from the policy itself."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Samples from the most probable tokens that hold this share of the probability."""
    max_new_tokens: Count = 64
    """Tokens of an attempt, at most."""
    pairs_per_prompt: Count = 1
    """Pairs from one prompt, at most."""
    prompts: Count | None = None
    """Prompts to train on, at most: the first of the data. None: all."""
    gold: bool = False
    """Whether the row's own completion stands in as the chosen response where every attempt scores below it."""
    batch_size: Count = 64
    """Attempts computed together."""

    def __post_init__(self) -> None:
        if self.count < 2 and not self.gold:
            raise Problem("one attempt cannot be compared; give a count of at least 2, or `gold: true`")

    def start(self, context: Context) -> Sampled:
        return Sampled(self, context)


@dataclasses.dataclass(frozen=True)
class Response:
    """An answer to a prompt: its tokens, its text without special tokens, its reward."""

    tokens: list[int]
    text: str
    reward: float


@dataclasses.dataclass(frozen=True)
class Question:
    """A row that asks something, the tokens of its prompt, and those of its own answer."""

    row: Mapping[str, Any]
    number: int
    prompt: list[int]
    answer: list[int]


class Sampled:
    """`Attempts` at work."""

    def __init__(self, settings: Attempts, context: Context):
        self._settings, self._context, self._stream = settings, context, context.stream()
        self._model, self._tokenizer = context.want("model"), context.want("tokenizer")

    def __call__(self, rows: Rows, split: str, reward: Score, max_length: int) -> Pairs:
        settings = self._settings
        asked = self._questions(rows, split, max_length)
        examples = Encoded(rows=len(rows))
        means: list[float] = []
        paired = 0
        for one, responses in zip(asked, self._responses(asked, split, reward), strict=True):
            attempts = responses[: settings.count]
            means.append(sum(attempt.reward for attempt in attempts) / len(attempts))
            found = best_against_worst([one.reward for one in responses], [one.text for one in responses], settings.pairs_per_prompt)
            paired += bool(found)
            for pair in found:
                number = len(examples) // 2
                examples.append(_example(one.prompt, responses[pair[0]].tokens, number, "chosen"))
                examples.append(_example(one.prompt, responses[pair[1]].tokens, number, "rejected"))
        report = (
            f"{len(asked):,} prompts, {settings.count} attempts each, mean reward {sum(means) / len(means):.3g}: "
            f"{len(examples) // 2:,} pairs from {paired:,} prompts"
        )
        if not examples:
            report += "; each prompt's attempts scored alike, so raise `count` or `temperature`, set `gold: true`, or ask what is "
            report += "harder" if settings.gold else "neither always right nor always wrong"
        return Pairs(examples, report, {"reward_before": mean(means, "reward", "higher"), "prompts_paired": share(paired, len(asked))})

    def _questions(self, rows: Rows, split: str, max_length: int) -> list[Question]:
        """Rows whose prompt leaves room for an attempt."""
        _, asked = questions(rows)
        if split == "train":
            asked = dataclasses.replace(asked, rows=asked.rows[: self._settings.prompts])
        room = max_length - self._settings.max_new_tokens
        found = []
        encoded = encode(asked, self._tokenizer, max_length=None)
        for one in encoded:
            tokens, begin = one.tokens.tolist(), int(one.supervised.argmax())
            if begin <= room:
                found.append(Question(asked.rows[one.source], one.source, tokens[:begin], tokens[begin:max_length]))
        if not found:
            raise Problem(
                f"{rows.name}: no prompt leaves room for {self._settings.max_new_tokens} new tokens within {max_length}; "
                "lower the source's max_new_tokens, or raise max_length as far as the model's positions go"
            )
        if left_out := len(encoded) - len(found):
            self._context.note(f"{split}: {left_out:,} prompts left out, longer than {room} tokens")
        return found

    def _responses(self, asked: Sequence[Question], split: str, reward: Score) -> Iterator[list[Response]]:
        """Of each question the attempts in order, and its own answer where that stands in for a right one."""
        with self._context.track(len(asked), f"attempts ({split})", "prompt") as bar:
            for first in range(0, len(asked), _CHUNK):
                some = asked[first : first + _CHUNK]
                file = self._context.work / "attempts" / f"{split}-{first:07d}-{self._digest(some)}.json"
                if not file.exists():
                    made = [[dataclasses.asdict(one) for one in responses] for responses in self._answer(some, split, reward)]
                    write(file, json.dumps(made))
                for responses in json.loads(file.read_text(encoding="utf8")):
                    yield [Response(**one) for one in responses]
                bar.advance(len(some))

    def _digest(self, asked: Sequence[Question]) -> str:
        """Of what was asked and how, so that other questions' attempts are never taken for these."""
        how = {**dataclasses.asdict(self._settings), "batch_size": None}
        return hashlib.sha256(json.dumps([how, [[one.number, one.prompt, one.answer] for one in asked]]).encode()).hexdigest()[:12]

    def _answer(self, asked: Sequence[Question], split: str, reward: Score) -> Iterator[list[Response]]:
        settings = self._settings
        drawn = sample(
            self._model,
            [one.prompt for one in asked for _ in range(settings.count)],
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            stop=sorted({*own_stops(self._model), self._tokenizer.eos_token_id} - {None}),
            seeds=[self._stream.seed(split, one.number, attempt) for one in asked for attempt in range(settings.count)],
            batch_size=settings.batch_size,
        )
        for index, one in enumerate(asked):
            attempts = drawn[index * settings.count : (index + 1) * settings.count]
            texts = [self._text(attempt.tokens[: -1 if attempt.finished else None]) for attempt in attempts]
            rewards = _scored(reward, one.row, texts)
            responses = [Response(list(a.tokens), text, value) for a, text, value in zip(attempts, texts, rewards, strict=True)]
            if settings.gold:
                text = self._text(one.answer)
                own = Response(one.answer, text, *_scored(reward, one.row, [text]))
                responses += [own] if own.reward > max(rewards) else []
            yield responses

    def _text(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _scored(reward: Score, row: Mapping[str, Any], texts: list[str]) -> list[float]:
    """What the reward says, checked: a user's function may be in this slot."""
    values = [float(value) for value in reward(row, texts)]
    if len(values) != len(texts) or not all(map(math.isfinite, values)):
        raise Problem(f"the reward gave {shown(values)} for {len(texts)} responses; one finite number for each is asked for", ("reward",))
    return values


def _example(prompt: list[int], response: list[int], number: int, side: Literal["chosen", "rejected"]) -> Example:
    tokens = numpy.array(prompt + response, dtype=numpy.int32)
    return Example(tokens, numpy.arange(len(tokens)) >= len(prompt), number, side)
