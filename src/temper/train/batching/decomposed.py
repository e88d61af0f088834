"""Batching by length: every document cut into powers of two, every update of one length."""

from __future__ import annotations

import bisect
import functools
import itertools
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from temper.context import Stream
from temper.lazy import numpy, torch
from temper.parts import Count, Problem, Rate, part
from temper.train.batching.batch import SHUFFLED, Batch, Plan, batch_of, check_some, check_unpaired, orders
from temper.train.batching.fitting import powers

if TYPE_CHECKING:
    from temper.train.examples import Example
    from temper.train.feed import Feed


@part
class Decomposed:
    """Documents cut into chunks of powers of two, every update of chunks of one length.  Pouransari et al. 2024, Dataset Decomposition.

    A chunk holds one document's tokens, nothing is padded, and every update has as many tokens. Lengths come in cycles: within one,
    short chunks are likelier at first, and used up sooner. An epoch holds of every length as many whole updates as its chunks fill;
    chunks left over differ from epoch to epoch. Formula: the next update's length is l with odds n_l growth^(log2(longest / l)) among
    lengths that the cycle still has, n_l the updates of length l in an epoch.
    """

    longest: Annotated[int, Field(ge=2)] = 512
    """Tokens in the longest chunks: a power of two. Longer documents give several."""
    shortest: Annotated[int, Field(ge=2)] = 16
    """Tokens in the shortest chunks that are trained on: a power of two. A document's last tokens, fewer than these, are left out."""
    tokens: Count = 4096
    """Tokens in a micro-batch: a multiple of `longest`."""
    accumulate: Count = 1
    """Micro-batches in an update, all of one length."""
    cycles: Count = 8
    """Cycles in an epoch."""
    growth: Rate = 2.0
    """How much the odds of a length exceed those of its double: 2 is Grow-P2, 1 prefers none, below 1 long ones come first."""

    def __post_init__(self) -> None:
        for name in ("longest", "shortest"):
            if (value := getattr(self, name)) & (value - 1):
                raise Problem(f"{name} {value}: chunks are powers of two; give {1 << value.bit_length() - 1} or {1 << value.bit_length()}")
        if self.shortest > self.longest:
            raise Problem(f"shortest {self.shortest} is above longest {self.longest}; give at most that")
        if self.tokens % self.longest:
            raise Problem(f"tokens {self.tokens}: a micro-batch holds whole chunks of every length; give a multiple of {self.longest}")

    def __call__(self, examples: Sequence[Example], stream: Stream, feed: Feed = SHUFFLED) -> Plan:
        return DecomposedPlan(examples, stream, feed, self)


class DecomposedPlan:
    """A plan in which every update draws its chunks from one bucket. buckets: length -> chunks. report: what an epoch holds of them."""

    def __init__(self, examples: Sequence[Example], stream: Stream, feed: Feed, settings: Decomposed):
        check_some(examples)
        check_unpaired(examples[:1], "decomposed")
        self.buckets = decompose(examples, settings.longest)
        self._settings, self._stream = settings, stream
        self._tokens = settings.tokens * settings.accumulate
        self._orders, self._counts = {}, {}
        for length in sorted(self.buckets):
            # each length has an order of its own
            order = orders(feed, len(self.buckets[length]), Stream(f"{stream.root}|{length}"))
            if length >= settings.shortest and (count := len(order(0)) * length // self._tokens):
                self._orders[length], self._counts[length] = order, count
        self.updates_per_epoch = sum(self._counts.values())
        self.tokens_per_update = float(self._tokens)
        held, count = self.updates_per_epoch * self._tokens, sum(map(len, examples))
        if not held:
            raise Problem(f"of {count:,} tokens no {self._tokens} are in chunks of one length; give smaller `tokens`, or more data")
        updates = ", ".join(f"{number:,} of length {length}" for length, number in self._counts.items())
        self.report = f"updates in an epoch: {updates}; {1 - held / count:.1%} of the tokens left out"
        self._epoch = functools.lru_cache(maxsize=1)(self._lengths)

    def update(self, i: int) -> list[Batch]:
        epoch, place = divmod(i, self.updates_per_epoch)
        length, number = self._epoch(epoch)[place]
        many, step = self._tokens // length, self._settings.tokens // length
        chosen = self._orders[length](epoch)[number * many : (number + 1) * many]
        return [self._batch(length, chosen[start : start + step], range(start, start + step), i) for start in range(0, many, step)]

    def _batch(self, length: int, chosen: list[int], keys: range, update: int) -> Batch:
        chunks = [self.buckets[length][index] for index in chosen]
        tokens = numpy.stack([chunk.tokens for chunk in chunks]).astype(numpy.int64)
        supervised = numpy.stack([chunk.supervised for chunk in chunks])
        supervised[:, 0] = False
        return batch_of(tokens, supervised, None, None, [chunk.source for chunk in chunks], tokens.size, update, keys)

    def _lengths(self, epoch: int) -> list[tuple[int, int]]:
        """Of every update of an epoch its length, and how many of that length come before it."""
        draws = iter(torch.rand(self.updates_per_epoch, generator=self._stream.generator(epoch, "length"), dtype=torch.float64).tolist())
        longest = max(self._counts).bit_length()
        odds = {length: count * self._settings.growth ** (longest - length.bit_length()) for length, count in self._counts.items()}
        cycles, found, used = self._settings.cycles, [], defaultdict(int)
        for cycle in range(cycles):
            left = {length: count * (cycle + 1) // cycles - count * cycle // cycles for length, count in self._counts.items()}
            while open_ := [length for length in left if left[length]]:
                sums = list(itertools.accumulate(odds[length] for length in open_))
                length = open_[min(bisect.bisect_right(sums, next(draws) * sums[-1]), len(open_) - 1)]
                found.append((length, used[length]))
                used[length] += 1
                left[length] -= 1
        return found


def decompose(examples: Sequence[Example], longest: int) -> dict[int, list[Example]]:
    """Length -> chunks of that length, powers of two up to `longest`, which together are the examples' tokens.

    From an example's beginning on, always the longest chunk that is left.
    """
    buckets: defaultdict[int, list[Example]] = defaultdict(list)
    for example in examples:
        begin = 0
        for length in powers(len(example), longest):
            buckets[length].append(example[begin : begin + length])
            begin += length
    return dict(buckets)
