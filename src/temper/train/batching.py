"""How examples become batches: the slot `Batching`.

A plan is asked for the micro-batches of update i and keeps no position, so a resumed run needs the update's number alone, and what
an update holds depends neither on the past nor on how many processes share it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from pydantic import Field

from temper.lazy import numpy, torch
from temper.parts import Count, Problem, part, slot

if TYPE_CHECKING:
    from temper.context import Stream
    from temper.train.examples import Example


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """What a model sees at once. Padding stands on the right.

    input_ids: int64 [B, T]. supervised: bool [B, T]; token t is a target, predicted from the tokens before it, so column 0 is
    False. attention_mask: int64 [B, T], 0 on padding, or None where no token needs hiding. position_ids: int64 [B, T], or None for
    0, 1, 2, ...; where they start anew, attention starts anew. rows: the data's rows, counted from 0, in the order of the
    batch's rows (of a packed batch: those within). targets, tokens: how many tokens are targets, are not padding.
    update: which update it belongs to. keys: B numbers that tell the rows of one update apart, however it is cut into
    micro-batches: with `update` the key for whatever is drawn per sample.

    Of preferences row 2i is a chosen answer and row 2i + 1 the rejected one of the same prompt.
    """

    input_ids: torch.Tensor
    supervised: torch.Tensor
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor | None
    rows: list[int]
    targets: int
    tokens: int
    update: int = 0
    keys: Sequence[int] = ()

    def to(self, device: Any) -> Batch:
        """The same batch on a device."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return dataclasses.replace(self, **{name: value.to(device, non_blocking=True) for name, value in tensors.items()})

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """What a model's forward takes."""
        given = {"input_ids": self.input_ids, "attention_mask": self.attention_mask, "position_ids": self.position_ids}
        return {name: value for name, value in given.items() if value is not None}


class Plan(Protocol):
    """Which micro-batches an update holds, for any update from 0 on; epochs follow one another."""

    updates_per_epoch: int

    def update(self, i: int) -> list[Batch]:
        """The micro-batches of update `i`, on the CPU."""
        ...


@slot(phased=False)
class Batching(Protocol):
    """How do examples become batches? `(examples, stream) -> Plan`, whose `update(i)` gives update i's micro-batches `[B, T]`."""

    def __call__(self, examples: Sequence[Example], stream: Stream) -> Plan: ...


def collate(examples: Sequence[Example], update: int = 0, keys: Sequence[int] | None = None) -> Batch:
    """One batch of examples, padded on the right to the longest. Padding is token 0, hidden and never a target."""
    keys = range(len(examples)) if keys is None else keys
    shape = len(examples), max(map(len, examples))
    tokens, supervised, mask = numpy.zeros(shape, numpy.int64), numpy.zeros(shape, bool), numpy.zeros(shape, numpy.int64)
    for row, example in enumerate(examples):
        tokens[row, : len(example)] = example.tokens
        supervised[row, 1 : len(example)] = example.supervised[1:]
        mask[row, : len(example)] = 1
    return _batch(tokens, supervised, mask, None, [example.source for example in examples], int(mask.sum()), update, keys)


def _batch(
    tokens: Any, supervised: Any, mask: Any, positions: Any, rows: list[int], count: int, update: int, keys: Sequence[int]
) -> Batch:
    tensors = [None if one is None else torch.from_numpy(one) for one in (tokens, supervised, mask, positions)]
    return Batch(*tensors, rows=rows, targets=int(supervised.sum()), tokens=count, update=update, keys=keys)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------- padded, bucketed

Unit = tuple[tuple[int, "Example"], ...]
"""What stays together: one example, or the two of a preference; each with its place in the update."""


class DrawnPlan:
    """A plan in which an update is so many units of an epoch's random order, cut into micro-batches by `split`.

    Every epoch holds every example once; its last update holds what is left.
    """

    def __init__(self, examples: Sequence[Example], stream: Stream, size: int, split: Callable[[list[Unit]], list[list[Unit]]]):
        _some(examples)
        pair = 2 if examples[0].side else 1
        self._units = [examples[start : start + pair] for start in range(0, len(examples), pair)]
        self._size, self._split = size, split
        self._order = functools.lru_cache(maxsize=1)(lambda epoch: _shuffled(len(self._units), stream, epoch))
        self.updates_per_epoch = math.ceil(len(self._units) / size)

    def update(self, i: int) -> list[Batch]:
        epoch, place = divmod(i, self.updates_per_epoch)
        chosen = self._order(epoch)[place * self._size : (place + 1) * self._size]
        placed = enumerate(example for index in chosen for example in self._units[index])
        units = [tuple(itertools.islice(placed, len(self._units[index]))) for index in chosen]
        return [_gathered([one for unit in group for one in unit], i) for group in self._split(units)]


def _gathered(placed: Sequence[tuple[int, Example]], update: int) -> Batch:
    return collate([example for _, example in placed], update, [place for place, _ in placed])


@part
class Padded:
    """So many examples at a time in random order, padded to the longest.  Formula: update = accumulate micro-batches of size rows."""

    size: Count = 8
    """Examples in a micro-batch; preferences count as one."""
    accumulate: Count = 1
    """Micro-batches in an update."""

    def __call__(self, examples: Sequence[Example], stream: Stream) -> Plan:
        def split(units: list[Unit]) -> list[list[Unit]]:
            return [units[start : start + self.size] for start in range(0, len(units), self.size)]

        return DrawnPlan(examples, stream, self.size * self.accumulate, split)


@part(cost=("tokens",))
class Bucketed:
    """An update's examples sorted by length and cut into micro-batches of similar lengths, so that little is padding.

    The examples of an update are drawn as `padded` draws them, and an update's gradient does not depend on how it is cut, so this
    trains as `padded` does with the same examples an update. Formula: rows x longest <= tokens in every micro-batch of several.
    """

    size: Count = 32
    """Examples in an update; preferences count as one."""
    tokens: Count = 4096
    """Tokens of a micro-batch at most, padding counted. How many micro-batches an update has follows from it."""

    def __call__(self, examples: Sequence[Example], stream: Stream) -> Plan:
        def split(units: list[Unit]) -> list[list[Unit]]:
            groups: list[list[Unit]] = []
            longest = 0
            for unit in sorted(units, key=_longest, reverse=True):
                if not groups or longest * len(unit) * (len(groups[-1]) + 1) > self.tokens:
                    groups.append([])
                    longest = _longest(unit)
                groups[-1].append(unit)
            return groups

        return DrawnPlan(examples, stream, self.size, split)


def _longest(unit: Unit) -> int:
    return max(len(example) for _, example in unit)


def _shuffled(count: int, stream: Stream, epoch: int) -> list[int]:
    return torch.randperm(count, generator=stream.generator(epoch)).tolist()


def _some(examples: Sequence[Example]) -> None:
    if not examples:
        raise Problem("no examples to batch; at least one is needed")


# ------------------------------------------------------------------------------------------------------- packed


@part
class Packed:
    """Documents in random order, one after the other, cut into rows of one length: no padding but in an epoch's last row.

    Neighbouring rows share one token, so every token is predicted exactly once an epoch. Made for text; whatever is supervised
    stays so. Formula: row r holds tokens r (length - 1) to r (length - 1) + length of the epoch's stream.
    """

    length: Annotated[int, Field(ge=2)] = 512
    """Tokens in a row."""
    size: Count = 8
    """Rows in a micro-batch."""
    accumulate: Count = 1
    """Micro-batches in an update."""
    documents: Literal["joined", "separate"] = "joined"
    """joined: attention crosses documents, which their end tokens mark, and a document's first token is predicted from the one
    before. separate: positions start anew with each document and attention stays within it, for attention models of `transformers`."""

    def __call__(self, examples: Sequence[Example], stream: Stream) -> Plan:
        return PackedPlan(examples, stream, self)


class PackedPlan:
    """A plan over rows of one length, cut from an epoch's stream of tokens."""

    def __init__(self, examples: Sequence[Example], stream: Stream, settings: Packed):
        _some(examples)
        if examples[0].side:
            raise Problem("`packed` joins examples and cannot keep a chosen and a rejected answer apart; use `padded` or `bucketed`")
        self._settings = settings
        self._count = sum(map(len, examples))
        self._rows = max(1, math.ceil((self._count - 1) / (settings.length - 1)))
        self._per_update = settings.size * settings.accumulate
        self._epoch = functools.lru_cache(maxsize=1)(lambda epoch: _joined(examples, _shuffled(len(examples), stream, epoch)))
        self.updates_per_epoch = math.ceil(self._rows / self._per_update)

    def update(self, i: int) -> list[Batch]:
        epoch, place = divmod(i, self.updates_per_epoch)
        last = min((place + 1) * self._per_update, self._rows)
        starts = range(place * self._per_update, last, self._settings.size)
        return [self._cut(epoch, start, min(start + self._settings.size, last), i) for start in starts]

    def _cut(self, epoch: int, first: int, last: int, update: int) -> Batch:
        """Rows `first` to `last` (not included) of an epoch."""
        tokens, supervised, starts, sources = self._epoch(epoch)
        length, separate = self._settings.length, self._settings.documents == "separate"
        places = numpy.arange(first, last)[:, None] * (length - 1) + numpy.arange(length)[None, :]  # of each row's tokens in the stream
        real = places < self._count
        places = numpy.minimum(places, self._count - 1)
        document = numpy.searchsorted(starts, places, side="right") - 1
        inputs = numpy.where(real, tokens[places], 0).astype(numpy.int64)
        targets = supervised[places] & real
        targets[:, 0] = False
        mask, positions = real.astype(numpy.int64), None
        if separate:
            # A row may begin within a document: positions count from the later of the two beginnings. Padding is a document of its own.
            begin = numpy.maximum(starts[document], places[:, :1])
            positions = numpy.where(real, places - begin, numpy.arange(length) - real.sum(1, keepdims=True))
            targets &= positions > 0
            mask = None
        within = list(dict.fromkeys(sources[document[real]].tolist()))
        keys = range(first % self._per_update, first % self._per_update + last - first)
        return _batch(inputs, targets, mask, positions, within, int(real.sum()), update, keys)


def _joined(examples: Sequence[Example], order: list[int]) -> tuple[Any, Any, Any, Any]:
    """The stream of an epoch: its tokens, which are supervised, where each document begins, and its row in the data."""
    chosen = [examples[index] for index in order]
    lengths = numpy.array([len(example) for example in chosen])
    tokens = numpy.concatenate([example.tokens for example in chosen])
    supervised = numpy.concatenate([example.supervised for example in chosen])
    return tokens, supervised, numpy.cumsum(lengths) - lengths, numpy.array([example.source for example in chosen])
