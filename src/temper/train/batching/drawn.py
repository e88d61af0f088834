"""Batching by examples: an update is so many of them, however it is cut into micro-batches."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from temper.parts import Count, Problem, part
from temper.train.batching.batch import SHUFFLED, Batch, Plan, check_some, collate, collate_packed, orders
from temper.train.batching.fitting import best_fit

if TYPE_CHECKING:
    from temper.context import Stream
    from temper.train.examples import Example
    from temper.train.feed import Feed

Unit = tuple[tuple[int, "Example"], ...]
"""What stays together: one example, or the two of a preference; each with its place in the update."""

Cut = Callable[[list[Unit], int], list[Batch]]
"""(an update's units, its number) -> its micro-batches."""


class DrawnPlan:
    """A plan in which an update is so many units of an epoch's order, cut into micro-batches.

    The last update of an epoch holds what is left. layouts: ways to cut, which change nothing but time and memory; the first is in use.
    """

    def __init__(self, examples: Sequence[Example], stream: Stream, feed: Feed, size: int, cuts: Mapping[str, Cut]):
        check_some(examples)
        pair = 2 if examples[0].side else 1
        self._units = [examples[start : start + pair] for start in range(0, len(examples), pair)]
        self._order = orders(feed, len(self._units), stream)
        self._size, self._cuts = size, cuts
        held = len(self._order(0))
        self.updates_per_epoch = math.ceil(held / size)
        self.tokens_per_update = sum(map(len, examples)) * held / len(self._units) / self.updates_per_epoch

    def update(self, i: int) -> list[Batch]:
        epoch, place = divmod(i, self.updates_per_epoch)
        chosen = self._order(epoch)[place * self._size : (place + 1) * self._size]
        placed = enumerate(example for index in chosen for example in self._units[index])
        units = [tuple(itertools.islice(placed, len(self._units[index]))) for index in chosen]
        return next(iter(self._cuts.values()))(units, i)

    @property
    def layouts(self) -> dict[str, Plan]:
        """Layout -> the plan that has it."""
        return {name: self.chosen(name) for name in self._cuts}

    def chosen(self, layout: str) -> Plan:
        """The same plan with one layout."""
        made = copy.copy(self)
        made._cuts = {layout: self._cuts[layout]}
        return made


def _gathered(units: Sequence[Unit], update: int) -> Batch:
    placed = [one for unit in units for one in unit]
    return collate([example for _, example in placed], update, [place for place, _ in placed])


@part
class Padded:
    """So many examples at a time in the feed's order, padded to the longest.  Formula: update = accumulate micro-batches of size rows."""

    size: Count = 8
    """Examples in a micro-batch; preferences count as one."""
    accumulate: Count = 1
    """Micro-batches in an update."""

    def __call__(self, examples: Sequence[Example], stream: Stream, feed: Feed = SHUFFLED) -> Plan:
        def cut(units: list[Unit], update: int) -> list[Batch]:
            return [_gathered(units[start : start + self.size], update) for start in range(0, len(units), self.size)]

        return DrawnPlan(examples, stream, feed, self.size * self.accumulate, {"rows": cut})


@part(cost=("tokens", "layout"))
class Bucketed:
    """An update's examples sorted by length and cut into micro-batches of similar lengths, so that little is padding.

    The examples of an update are drawn as `padded` draws them, and an update's gradient does not depend on how it is cut, so this
    trains as `padded` does with the same examples an update. Formula: rows x longest <= tokens in every micro-batch of several.
    """

    size: Count = 32
    """Examples in an update; preferences count as one."""
    tokens: Count = 4096
    """Tokens of a micro-batch at most, padding counted. How many micro-batches an update has follows from it."""
    layout: Literal["auto", "rows", "packed", "flat"] = "auto"
    """How a micro-batch holds its examples. rows: one a row. packed: several side by side in rows of the longest one's length. flat: all in
    one row. Side by side, positions start anew with each and attention stays within it. auto: what this machine measures to be fastest."""

    def __call__(self, examples: Sequence[Example], stream: Stream, feed: Feed = SHUFFLED) -> Plan:
        cuts: dict[str, Cut] = {"rows": self._rows, "packed": self._packed, "flat": self._flat}
        if self.layout != "auto":
            cuts = {self.layout: cuts[self.layout]}
        if examples and examples[0].side:
            cuts = {"rows": self._rows}
            if self.layout not in ("auto", "rows"):
                raise Problem(f"layout `{self.layout}` joins examples, and preferences stay in rows of their own; use `layout: rows`")
        return DrawnPlan(examples, stream, feed, self.size, cuts)

    def _rows(self, units: list[Unit], update: int) -> list[Batch]:
        groups: list[list[Unit]] = []
        longest = 0
        for unit in sorted(units, key=_longest, reverse=True):
            if not groups or longest * len(unit) * (len(groups[-1]) + 1) > self.tokens:
                groups.append([])
                longest = _longest(unit)
            groups[-1].append(unit)
        return [_gathered(group, update) for group in groups]

    def _packed(self, units: list[Unit], update: int) -> list[Batch]:
        longest = max(map(_longest, units))
        rows = _fitted(units, longest)
        several = max(1, self.tokens // longest)
        return [_side_by_side(rows[start : start + several], update) for start in range(0, len(rows), several)]

    def _flat(self, units: list[Unit], update: int) -> list[Batch]:
        rows = _fitted(units, max(self.tokens, max(map(_longest, units))))
        return [_side_by_side([row], update) for row in rows]


def _longest(unit: Unit) -> int:
    return max(len(example) for _, example in unit)


def _fitted(units: list[Unit], room: int) -> list[list[tuple[int, Example]]]:
    """Rows of at most `room` tokens."""
    placed = [one for unit in units for one in unit]
    return [[placed[index] for index in row] for row in best_fit([len(example) for _, example in placed], room)]


def _side_by_side(rows: list[list[tuple[int, Example]]], update: int) -> Batch:
    """A batch of packed rows; each example's place is its key."""
    return collate_packed([[example for _, example in row] for row in rows], update, [tuple(place for place, _ in row) for row in rows])
