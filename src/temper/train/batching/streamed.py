"""Batching of a stream: a block of examples at a time, each batched as if it were all the data."""

from __future__ import annotations

import bisect
import concurrent.futures
import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from temper.context import Stream
from temper.parts import Problem
from temper.train.batching.batch import SHUFFLED, Batch, Plan
from temper.train.examples import Encoded, Streamed
from temper.train.threads import beside

if TYPE_CHECKING:
    from temper.train.batching import Batching
    from temper.train.examples import Example
    from temper.train.feed import Feed


def planned(batching: Batching, examples: Sequence[Example], stream: Stream, feed: Feed = SHUFFLED) -> Plan:
    """The plan that a batching makes of examples, of a stream or in memory."""
    if isinstance(examples, Streamed):
        return StreamedPlan(batching, examples, stream, feed)
    return batching(examples, stream, feed)


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a block begins. update: its first one. block: how many come before, those of earlier passes over the stream included. row: how
    many of this pass's rows come before. state: of the stream; None at its start."""

    update: int = 0
    block: int = 0
    row: int = 0
    state: Any = None


class StreamedPlan:
    """A plan over a stream: each block in turn is batched as an epoch of its own, in an order drawn by the block's number; at its end the
    stream begins again.

    A block is read while the one before is trained on. Updates are asked for in turn, or again from where a known block begins.
    `state_dict(i)` says in JSON what is needed to give update i next; after `load_state_dict` nothing is read of what lies before that
    update's block. layouts: as the batching's own.
    """

    updates_per_epoch = None

    def __init__(self, batching: Batching, examples: Streamed, stream: Stream, feed: Feed):
        self._batching, self._examples, self._stream, self._feed = batching, examples, stream, feed
        self._layout = ""
        self._places = [_Place()]  # of the blocks given so far, and of the next one
        self._pool = beside("stream")
        self._blocks: dict[int, concurrent.futures.Future[tuple[Any, _Place]]] = {}
        first = self._batched(examples, _Place())
        self.tokens_per_update: float = first.tokens_per_update
        self._names = tuple(getattr(first, "layouts", ()))

    def update(self, i: int) -> list[Batch]:
        place = self._place(i)
        plan, after = self._block(place)
        while i >= after.update:
            place = after
            plan, after = self._block(place)
        plan = plan.chosen(self._layout) if self._layout else plan
        return [dataclasses.replace(batch, update=i) for batch in plan.update(i - place.update)]

    def state_dict(self, i: int) -> dict[str, Any]:
        return dataclasses.asdict(self._place(i))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._places[:] = [_Place(**state)]
        self._blocks.clear()

    @property
    def layouts(self) -> dict[str, Plan]:
        """Layout -> the plan that has it. All of them read one stream: one is to be kept."""
        return {name: self.chosen(name) for name in self._names}

    def chosen(self, layout: str) -> Plan:
        """The same plan with one layout."""
        made = copy.copy(self)
        made._layout = layout
        return made

    def _place(self, i: int) -> _Place:
        """The last known beginning of a block at or before update `i`."""
        found = bisect.bisect_right([one.update for one in self._places], i)
        if not found:
            raise Problem(f"update {i} of a stream that was taken up at update {self._places[0].update}; what lies before is not read")
        return self._places[found - 1]

    def _block(self, place: _Place) -> tuple[Any, _Place]:
        """The plan of the block that begins at a place, and the next block's place; of that block reading begins."""
        if place.block not in self._blocks:
            self._blocks.clear()
            self._blocks[place.block] = self._pool.submit(self._load, place)
        plan, after = self._blocks[place.block].result()
        if after.update > self._places[-1].update:
            self._places.append(after)
        if after.block not in self._blocks:
            for old in self._blocks.keys() - {place.block}:
                del self._blocks[old]
            self._blocks[after.block] = self._pool.submit(self._load, after)
        return plan, after

    def _load(self, place: _Place) -> tuple[Any, _Place]:
        begin, examples, after = place, Encoded(), place.state
        while not examples:  # rows without anything to learn give none; of the stream's first block there are some
            examples, after = self._examples.block(begin.state, begin.row)
            row = begin.row + examples.rows if after is not None else 0
            begin = dataclasses.replace(begin, block=begin.block + 1, row=row, state=after)
        plan = self._batched(examples, place)
        return plan, dataclasses.replace(begin, update=place.update + plan.updates_per_epoch)

    def _batched(self, examples: Encoded, place: _Place) -> Any:
        return self._batching(examples, Stream(f"{self._stream.root}|{place.block}"), self._feed)
