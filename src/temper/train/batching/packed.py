"""Batching by rows of one length that hold several documents."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from temper.lazy import numpy
from temper.parts import Count, part
from temper.train.batching.batch import SHUFFLED, Batch, Plan, batch_of, check_some, check_unpaired, collate_packed, orders
from temper.train.batching.fitting import best_fit

if TYPE_CHECKING:
    from temper.context import Stream
    from temper.train.examples import Example
    from temper.train.feed import Feed

Length = Annotated[int, Field(ge=2)]
"""Tokens in a row: a prediction needs a token before it."""


@part
class Packed:
    """Documents in the feed's order, one after the other, cut into rows of one length: no padding but in an epoch's last row.

    Neighbouring rows share one token, so every token is predicted exactly once an epoch. Made for text; whatever is supervised
    stays so. Formula: row r holds tokens r (length - 1) to r (length - 1) + length of the epoch's stream.
    """

    length: Length = 512
    """Tokens in a row."""
    size: Count = 8
    """Rows in a micro-batch."""
    accumulate: Count = 1
    """Micro-batches in an update."""
    documents: Literal["joined", "separate"] = "joined"
    """joined: attention crosses documents, which their end tokens mark, and a document's first token is predicted from the one
    before. separate: positions start anew with each document and attention stays within it, for attention models of `transformers`."""

    def __call__(self, examples: Sequence[Example], stream: Stream, feed: Feed = SHUFFLED) -> Plan:
        return PackedPlan(examples, stream, feed, self)


class PackedPlan:
    """A plan over rows of one length, cut from an epoch's stream of tokens.

    Epochs are of one size: where a feed leaves out documents, whose lengths differ, the stream ends with, or begins again for, the share
    of all tokens that the feed's share of the documents comes to.
    """

    def __init__(self, examples: Sequence[Example], stream: Stream, feed: Feed, settings: Packed):
        check_some(examples)
        check_unpaired(examples[:1], "packed")
        order = orders(feed, len(examples), stream)
        self._settings = settings
        self._count = round(sum(map(len, examples)) * len(order(0)) / len(examples))
        self._rows = max(1, math.ceil((self._count - 1) / (settings.length - 1)))
        self._per_update = settings.size * settings.accumulate
        self._epoch = functools.lru_cache(maxsize=1)(lambda epoch: _joined(examples, order(epoch), self._count))
        self.updates_per_epoch = math.ceil(self._rows / self._per_update)
        self.tokens_per_update = self._count / self.updates_per_epoch

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
        return batch_of(inputs, targets, mask, positions, within, int(real.sum()), update, keys)


def _joined(examples: Sequence[Example], order: list[int], count: int) -> tuple[Any, Any, Any, Any]:
    """An epoch's stream of at least `count` tokens: the tokens, which are supervised, where each document begins, its row in the data."""
    chosen, length = [], 0
    for index in itertools.cycle(order):
        if length >= count:
            break
        chosen.append(examples[index])
        length += len(examples[index])
    lengths = numpy.array([len(example) for example in chosen])
    tokens = numpy.concatenate([example.tokens for example in chosen])
    supervised = numpy.concatenate([example.supervised for example in chosen])
    return tokens, supervised, numpy.cumsum(lengths) - lengths, numpy.array([example.source for example in chosen])


@part
class BestFit:
    """Whole documents side by side in rows of one length: only those longer than a row are cut.  Ding et al. 2024, Fewer Truncations.

    Documents are put together once, the same in every epoch; the feed orders the rows. Positions start anew with each document and
    attention stays within it, for attention models of `transformers`. A document longer than a row goes on in another one, whose first
    token is predicted from nothing. Formula: pieces of at most `length` tokens, the longest first, each into the row with the least
    sufficient room.
    """

    length: Length = 512
    """Tokens in a row."""
    size: Count = 8
    """Rows in a micro-batch."""
    accumulate: Count = 1
    """Micro-batches in an update."""

    def __call__(self, examples: Sequence[Example], stream: Stream, feed: Feed = SHUFFLED) -> Plan:
        return BestFitPlan(examples, stream, feed, self)


class BestFitPlan:
    """A plan over rows that were fitted once. rows: what each holds. report: how many rows, documents cut and padding there are."""

    def __init__(self, examples: Sequence[Example], stream: Stream, feed: Feed, settings: BestFit):
        check_some(examples)
        check_unpaired(examples[:1], "best-fit")
        pieces = [piece for example in examples for piece in example.pieces(settings.length)]
        self.rows = [[pieces[index] for index in row] for row in best_fit([len(piece) for piece in pieces], settings.length)]
        self._order = orders(feed, len(self.rows), stream)
        self._settings = settings
        self._per_update = settings.size * settings.accumulate
        held, count = len(self._order(0)), sum(map(len, examples))
        self.updates_per_epoch = math.ceil(held / self._per_update)
        self.tokens_per_update = count * held / len(self.rows) / self.updates_per_epoch
        padding = 1 - count / (len(self.rows) * settings.length)
        cut = sum(len(example) > settings.length for example in examples)
        self.report = f"{len(self.rows):,} packed rows, {padding:.2%} of them padding; {cut:,} of {len(examples):,} documents cut"

    def update(self, i: int) -> list[Batch]:
        epoch, place = divmod(i, self.updates_per_epoch)
        chosen = self._order(epoch)[place * self._per_update : (place + 1) * self._per_update]
        made, size = [], self._settings.size
        for start in range(0, len(chosen), size):
            rows = [self.rows[index] for index in chosen[start : start + size]]
            made.append(collate_packed(rows, i, range(start, start + len(rows)), self._settings.length))
        return made
