"""Rows -> token sequences that say which of their tokens are learnt.

The shapes and what they teach: text, every token; completion, the completion and its end; chat, the assistant's turns;
preference, the chosen and the rejected answer, two examples a row.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from temper.lazy import numpy, transformers
from temper.parts import Problem
from temper.tasks.rows import StreamedRows
from temper.train.recall import recall

if TYPE_CHECKING:
    from temper.context import Track
    from temper.tasks.rows import Rows

_AT_ONCE, _CHARACTERS = 1024, 2**23
"""Rows that go to the tokenizer in one call, so that it can use its threads, and their characters, so that long ones fit in memory."""


@dataclass(frozen=True, eq=False)
class Example:
    """One token sequence. tokens: int32 [T]. supervised: bool [T]; entry i says whether predicting token i is learnt.

    source: its row, counted from 0. side: which answer of a preference it is; a chosen one is followed by its rejected one.
    """

    tokens: numpy.ndarray
    supervised: numpy.ndarray
    source: int
    side: Literal["chosen", "rejected"] | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, part: slice) -> Example:
        """A part of it."""
        return Example(self.tokens[part], self.supervised[part], self.source, self.side)

    def pieces(self, length: int) -> list[Example]:
        """It as parts of `length` tokens, the last of what is left."""
        return [self[start : start + length] for start in range(0, len(self), length)]

    @property
    def targets(self) -> int:
        """How many predictions are learnt when the example stands alone: nothing predicts its first token."""
        return int(self.supervised[1:].sum())


class Encoded(list[Example]):
    """Examples, and what became of the rows on the way.

    rows: how many there were. cut: of these, how many were longer than `max_length` and lost their right end (text is cut into
    several examples and loses nothing). dropped: rows left out because nothing supervised was left of them. hindsight:
    assistant turns not learnt, because the chat template writes them otherwise once later turns follow.
    """

    def __init__(self, examples: Iterable[Example] = (), *, rows: int = 0, cut: int = 0, dropped: int = 0, hindsight: int = 0):
        super().__init__(examples)
        self.rows, self.cut, self.dropped, self.hindsight = rows, cut, dropped, hindsight

    @property
    def tokens(self) -> int:
        return sum(map(len, self))

    @property
    def supervised(self) -> int:
        return sum(example.targets for example in self)

    @property
    def report(self) -> str:
        """What a reader should know, in a line."""
        parts = [f"{self.rows:,} rows -> {len(self):,} examples of {self.tokens:,} tokens, {self.supervised:,} supervised"]
        parts += [f"{self.cut:,} rows cut on the right"] if self.cut else []
        parts += [f"{self.dropped:,} rows left out, nothing supervised in them"] if self.dropped else []
        parts += [f"{self.hindsight:,} assistant turns unsupervised, the template rewrites them later"] if self.hindsight else []
        return "; ".join(parts)


class Streamed(Encoded):
    """Examples that are made of a stream, a block of rows at a time. What it holds itself is the first block, to be looked at like any."""

    def __init__(self, rows: Rows, tokenizer: Any, max_length: int | None):
        assert isinstance(rows.rows, StreamedRows)
        self._rows, self._stream, self._max_length = rows, rows.rows, max_length
        self._words = _Words(copy.deepcopy(tokenizer))  # blocks are made in another thread, and the caller's is the caller's
        self._reading: tuple[Any, Any] = (None, None)
        first, self._after = self._made(None, 0)
        super().__init__(first, rows=first.rows, cut=first.cut, dropped=first.dropped, hindsight=first.hindsight)
        if not self:
            raise _nothing(self._rows, self, max_length)

    def block(self, state: Any, before: int) -> tuple[Encoded, Any]:
        """The examples of the next rows after a state (None: the first rows), before which `before` rows lie, and the state after them:
        JSON, or None at the end of the stream. There may be no examples."""
        return (self, self._after) if state is None else self._made(state, before)

    def _made(self, state: Any, before: int) -> tuple[Encoded, Any]:
        known, reading = self._reading
        if reading is None or known != state:
            reading = self._stream.read(state)
        taken = list(itertools.islice(reading, self._stream.buffer))
        after = taken[-1][1]() if len(taken) == self._stream.buffer else None  # a shorter block is the last
        self._reading = (after, reading) if after is not None else (None, None)
        rows = replace(self._rows, rows=[row for row, _ in taken])
        return _encoded(rows, self._words, self._max_length, before), after

    @property
    def report(self) -> str:
        return f"a stream, read {self._stream.buffer:,} rows at a time; of it the first {super().report}"


@dataclass(frozen=True)
class _Sequence:
    """Token ids before cutting; supervised from `spans`, half-open ranges of positions."""

    tokens: Sequence[int] | numpy.ndarray
    spans: list[tuple[int, int]]
    source: int
    side: Literal["chosen", "rejected"] | None = None
    hindsight: int = 0


def encode(rows: Rows, tokenizer: Any, *, max_length: int | None, track: Track | None = None) -> Encoded:
    """Tokenises rows of any shape; of streamed rows the first ones, and the rest as it is asked for (`Streamed`).

    tokenizer: a Hugging Face tokenizer. The end-of-sequence token is appended to text and completions where the tokenizer has
    one and has not put it there; a beginning-of-sequence token stands where the tokenizer puts it; in a chat the template
    decides on both. max_length: tokens; a longer text becomes consecutive examples that share one token at each joint, so that
    every token is predicted once; anything else loses its right end. None leaves every length (packing wants that for text).
    track: told of rows done. A fast tokenizer uses as many threads as `RAYON_NUM_THREADS` says, or there are cores, and one where
    `TOKENIZERS_PARALLELISM` is `false`.

    Raises `Problem` where the rows do not have their shape, a chat meets a tokenizer without template, or nothing at all is
    supervised.
    """
    if max_length is not None and max_length < 2:
        raise Problem(f"max_length {max_length}: a prediction needs a token before it; give at least 2")
    if isinstance(rows.rows, StreamedRows):
        return Streamed(rows, tokenizer, max_length)
    rows.validate()
    made = _encoded(rows, _Words(tokenizer), max_length, 0, track)
    if not made:
        raise _nothing(rows, made, max_length)
    return made


def _encoded(rows: Rows, words: _Words, max_length: int | None, before: int, track: Track | None = None) -> Encoded:
    """The examples of rows that are known to be whole, of which the first is the data's row `before`."""
    made = Encoded(rows=len(rows.rows))
    told = 0
    for number, sequences in enumerate(_by_row(_SHAPES[rows.shape](rows, words)), start=1):
        cut = max_length is not None and max(len(one.tokens) for one in sequences) > max_length
        if rows.shape == "text":
            kept = [window for one in sequences for window in _windows(one, max_length, before)]
        else:
            kept = [_example(one, max_length, before) for one in sequences]
            made.cut += cut
        made.hindsight += sum(one.hindsight for one in sequences)
        if kept and all(example.targets for example in kept):
            made.extend(kept)
        else:
            made.dropped += 1
        if track is not None and (number % _AT_ONCE == 0 or number == made.rows):
            track.advance(number - told)
            told = number
    return made


def _nothing(rows: Rows, made: Encoded, max_length: int | None) -> Problem:
    """What is wrong where no row gave an example."""
    why, remedy = "", _REMEDIES[rows.shape]
    if made.cut:
        why = f" ({made.cut:,} are longer than max_length {max_length} and lost their right end)"
    elif made.hindsight:
        why = " (the chat template writes their assistant turns otherwise once they are past)"
        remedy = "mark the assistant's words in the template with {% generation %}"
    return Problem(f"{rows.name}: none of its {made.rows:,} {rows.shape} rows holds a supervised token{why}; {remedy}")


_REMEDIES = {
    "text": "give rows with more than one token",
    "completion": "raise max_length, or give completions that are not empty",
    "chat": "raise max_length, or give conversations with assistant turns",
    "preference": "raise max_length, or give answers that are not empty",
}


def _by_row(sequences: Iterable[_Sequence]) -> Iterator[list[_Sequence]]:
    for _, group in itertools.groupby(sequences, key=lambda one: one.source):
        yield list(group)


def _example(one: _Sequence, length: int | None, before: int) -> Example:
    import numpy  # the lazy one takes longer to find a function than a short example takes in all

    tokens = numpy.array(one.tokens[:length], dtype=numpy.int32)
    supervised = numpy.zeros(len(tokens), dtype=bool)
    for start, end in one.spans:
        supervised[start:end] = True
    return Example(tokens, supervised, before + one.source, one.side)


def _windows(one: _Sequence, length: int | None, before: int) -> list[Example]:
    """Consecutive examples of at most `length` tokens; each begins with the last token of the one before, unsupervised."""
    whole = _example(one, None, before)
    if length is None or len(whole) <= length:
        return [whole] if whole.targets else []
    made = []
    for start in range(0, len(whole) - 1, length - 1):
        supervised = whole.supervised[start : start + length].copy()
        supervised[0] = supervised[0] and start == 0
        made.append(Example(whole.tokens[start : start + length], supervised, whole.source))
    return made


# ------------------------------------------------------------------------------------------------ text, completion


class _Words:
    """A tokenizer's plain side: ids without the end token, which we set ourselves."""

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.backend = tokenizer, None
        self.end = tokenizer.eos_token_id
        # This call also sets the tokenizer's Rust side to what such calls ask for: no padding, no truncation.
        framed, alone = (self._ids(["a"], special)[0] for special in (True, False))
        self._adds_end = framed[-1:] == [self.end]
        self.backend = _backend(tokenizer)
        begin = next((place for place in range(len(framed)) if alone and framed[place : place + len(alone)] == alone), None)
        self._recall = recall(self.backend) if self.backend is not None and begin is not None else None
        self._frame = framed[:begin], framed[(begin or 0) + len(alone) : len(framed) - self._adds_end]

    def _ids(self, texts: list[str], special: bool) -> list[list[int]]:
        if self.backend is not None:
            return [one.ids for one in self.backend.encode_batch_fast(texts, add_special_tokens=special)]
        return self.tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"] if texts else []

    def opening(self, texts: list[str]) -> list[list[int]]:
        """Ids of texts that begin a sequence."""
        found = self._ids(texts, True)
        return [ids[:-1] for ids in found] if self._adds_end else found

    def whole(self, texts: list[str]) -> list[numpy.ndarray]:
        """Ids of texts that are sequences by themselves, with their end."""
        if self._recall is None:
            return [numpy.array(self.closed(ids), numpy.int32) for ids in self.opening(texts)]
        before, after, end = (numpy.array(ids, numpy.int32).tobytes() for ids in (*self._frame, [] if self.end is None else [self.end]))
        joined = [before + ids + after for ids in self._recall(texts)]
        return [numpy.frombuffer(ids if ids.endswith(end) else ids + end, numpy.int32) for ids in joined]

    def inner(self, text: str) -> list[int]:
        """Ids of a text that stands inside a sequence."""
        return self._ids([text], False)[0]

    def closed(self, ids: list[int]) -> list[int]:
        return ids if self.end is None or ids[-1:] == [self.end] else [*ids, self.end]


def _backend(tokenizer: Any) -> Any:
    """The tokenizer's Rust side, where calling the tokenizer does nothing more than ask that."""
    base, kind = transformers.PreTrainedTokenizerFast, type(tokenizer)
    plain = tokenizer.is_fast and kind._encode_plus is base._encode_plus and kind.__call__ is base.__call__
    return tokenizer.backend_tokenizer if plain else None


def _text(rows: Rows, words: _Words) -> Iterator[_Sequence]:
    for batch in _batches(rows):
        for source, tokens in zip(batch, words.whole([rows.rows[source]["text"] for source in batch]), strict=True):
            yield _Sequence(tokens, [(0, len(tokens))], source)


def _completion(rows: Rows, words: _Words) -> Iterator[_Sequence]:
    yield from _answers(rows, words, (("completion", None),))


def _preference(rows: Rows, words: _Words) -> Iterator[_Sequence]:
    yield from _answers(rows, words, (("chosen", "chosen"), ("rejected", "rejected")))


def _answers(rows: Rows, words: _Words, columns: Sequence[tuple[str, Any]]) -> Iterator[_Sequence]:
    """A prompt and one answer or several, as strings or as messages."""
    for batch in _batches(rows):
        pairs = [(source, column, side) for source in batch for column, side in columns]
        texts = [(source, column) for source, column, _ in pairs if isinstance(rows.rows[source]["prompt"], str)]
        prompts = iter(words.opening([rows.rows[source]["prompt"] for source, _ in texts]))
        wholes = iter(words.opening([rows.rows[source]["prompt"] + rows.rows[source][column] for source, column in texts]))
        for source, column, side in pairs:
            row = rows.rows[source]
            if isinstance(row["prompt"], str):
                prompt, whole = next(prompts), next(wholes)
                # A tokenizer may join the prompt's end and the answer's start in one token. The model is later given the
                # prompt's own tokens, so then the two are tokenised apart.
                if whole[: len(prompt)] != prompt:
                    whole = prompt + words.inner(row[column])
                tokens = words.closed(whole)
                yield _Sequence(tokens, [(len(prompt), len(tokens))], source, side)
            else:
                messages = [*row["prompt"], *row[column]]
                where = f"{rows.name}, row {source + 1}"
                tokens, spans, lost = _conversation(words.tokenizer, messages, len(row["prompt"]), row.get("tools"), where)
                yield _Sequence(tokens, spans, source, side, lost)


def _batches(rows: Rows) -> Iterator[range]:
    """Numbers of rows that go to the tokenizer together."""
    begin = characters = 0
    for number, row in enumerate(rows.rows):
        size = sum(len(value) for value in row.values() if isinstance(value, str))
        if number - begin == _AT_ONCE or (number > begin and characters + size > _CHARACTERS):
            yield range(begin, number)
            begin, characters = number, 0
        characters += size
    yield range(begin, len(rows.rows))


# ----------------------------------------------------------------------------------------------------------- chat


def _chat(rows: Rows, words: _Words) -> Iterator[_Sequence]:
    for source, row in enumerate(rows.rows):
        tokens, spans, lost = _conversation(words.tokenizer, row["messages"], 0, row.get("tools"), f"{rows.name}, row {source + 1}")
        yield _Sequence(tokens, spans, source, hindsight=lost)


def _conversation(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], first: int, tools: Any, where: str
) -> tuple[list[int], list[tuple[int, int]], int]:
    """Ids of a conversation, the spans of its assistant turns from message `first` on, and how many such turns are not learnt.

    A template that marks the assistant's words with `{% generation %}` is believed. With any other, a turn is what the template adds
    to the conversation before it (with the generation prompt), when the conversation so far is a beginning of the whole: else
    the template writes the turn otherwise in hindsight (it drops the reasoning, say) than when it is generated, and the
    model would learn what it never sees.
    """
    template = tokenizer.chat_template
    if not template:
        raise Problem(
            f"{where}: messages need a chat template and the tokenizer has none; "
            "put a chat_template.jinja into the model's folder, or give rows with `prompt` and `completion` as texts"
        )
    if not tokenizer.is_fast:
        raise Problem(f"{where}: messages need a tokenizer that knows character positions; give the model's folder a tokenizer.json")

    def render(turns: Sequence[Mapping[str, Any]], opened: bool = False) -> str:
        try:
            return tokenizer.apply_chat_template(list(turns), tools=tools, tokenize=False, add_generation_prompt=opened)
        except Exception as error:  # a template raises what it likes
            raise Problem(f"{where}: the chat template refuses it: {error}") from error

    whole = render(messages)
    turns = [index for index, message in enumerate(messages) if index >= first and message["role"] == "assistant"]
    if first == 0 and isinstance(template, str) and re.search(r"\{%-?\s*generation\s*-?%\}", template):
        made = tokenizer.apply_chat_template(
            list(messages), tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return made["input_ids"], _runs(made["assistant_masks"]), 0
    characters = []
    for index in turns:
        before = render(messages[:index], opened=True) if index else ""
        after = render(messages[: index + 1])
        if after.startswith(before) and whole.startswith(after):
            characters.append((len(before), len(after)))
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False)
    # A token that begins in the prompt is the prompt's, even where it ends in the answer.
    inside = [any(start <= left < end and left < right for start, end in characters) for left, right in encoded["offset_mapping"]]
    return encoded["input_ids"], _runs(inside), len(turns) - len(characters)


def _runs(flags: Iterable[Any]) -> list[tuple[int, int]]:
    """Half-open ranges where `flags` is true."""
    edges, position = [], 0
    for value, group in itertools.groupby(flags, key=bool):
        length = sum(1 for _ in group)
        if value:
            edges.append((position, position + length))
        position += length
    return edges


_SHAPES = {"text": _text, "completion": _completion, "chat": _chat, "preference": _preference}


# -------------------------------------------------------------------------------------------------------- preview


def preview(examples: Sequence[Example], tokenizer: Any, n: int) -> list[list[tuple[str, bool]]]:
    """The first `n` examples as the model sees them: pieces of text, each with whether it is supervised.

    A piece is a token, or the few tokens that make up one character between them.
    """
    shown = []
    for example in examples[:n]:
        pieces: list[tuple[str, bool]] = []
        pending: list[int] = []
        ids, flags = example.tokens.tolist(), example.supervised.tolist()
        for place, (token, flag) in enumerate(zip(ids, flags, strict=True)):
            pending.append(token)
            text = tokenizer.decode(pending, clean_up_tokenization_spaces=False)
            last = place + 1 == len(ids) or flags[place + 1] != flag
            if last or not text.endswith("\ufffd"):
                pieces.append((text, flag))
                pending = []
        shown.append(pieces)
    return shown
