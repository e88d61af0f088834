"""What an epoch holds and in which order: the slot `Feed`.

A feed is a function of the epoch's number alone, so a resumed run needs no position. It orders what the batching puts together: single
examples, pairs of preferences, or packed rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Protocol

from pydantic import Field

from temper.lazy import torch
from temper.parts import part, slot

if TYPE_CHECKING:
    from temper.context import Stream


@slot(phased=False)
class Feed(Protocol):
    """Which examples does an epoch hold, and in which order? `(count, stream, epoch) -> indices below count`, of every epoch as many."""

    def __call__(self, count: int, stream: Stream, epoch: int) -> list[int]: ...


@part
class Shuffled:
    """All examples in a random order, another one every epoch."""

    def __call__(self, count: int, stream: Stream, epoch: int) -> list[int]:
        return _permutation(count, stream, epoch).tolist()


@part
class InOrder:
    """All examples as they stand in the data, every epoch."""

    def __call__(self, count: int, stream: Stream, epoch: int) -> list[int]:
        return list(range(count))


@part
class RandomSubset:
    """A random part of the examples, another one every epoch; the schedule runs over the fewer updates.  Okanovic et al. 2024, RS2.

    Without replacement an epoch is dealt from a shuffled deck of all examples, and when the deck runs out a new one is shuffled; in the
    epoch between, what the old deck gave comes later in the new one, so no epoch holds an example twice.
    Formula: an epoch holds fraction x examples; without replacement, every example once in every 1 / fraction epochs.
    """

    fraction: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Share of the examples in an epoch. 1, without replacement, is `shuffled`."""
    replacement: bool = False
    """Whether an epoch is drawn from all examples, whatever earlier epochs held."""

    def __call__(self, count: int, stream: Stream, epoch: int) -> list[int]:
        size = max(1, round(self.fraction * count))
        if self.replacement:
            return _permutation(count, stream, epoch)[:size].tolist()
        taken = rest = torch.empty(0, dtype=torch.int64)
        decks = 0
        for _ in range(epoch + 1):
            taken, rest = rest[:size], rest[size:]
            if len(taken) < size:
                deck, decks = _permutation(count, stream, decks), decks + 1
                first = deck[_outside(deck, taken)][: size - len(taken)]
                taken, rest = torch.cat([taken, first]), deck[_outside(deck, first)]
        return taken.tolist()


def _outside(indices: torch.Tensor, some: torch.Tensor) -> torch.Tensor:
    """Which of the `indices` 0 to N - 1, in any order, are none of `some`."""
    found = torch.ones(len(indices), dtype=torch.bool)
    found[some] = False
    return found[indices]


def _permutation(count: int, stream: Stream, number: int) -> torch.Tensor:
    return torch.randperm(count, generator=stream.generator(number))
