"""What a model sees at once, what says which of it an update holds, and how examples become it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from temper.lazy import numpy, torch
from temper.parts import Problem
from temper.train.feed import Shuffled

if TYPE_CHECKING:
    from temper.context import Stream
    from temper.train.examples import Example
    from temper.train.feed import Feed

SHUFFLED = Shuffled()
"""The feed where none is given."""


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """What a model sees at once. Padding stands on the right.

    input_ids: int64 [B, T]. supervised: bool [B, T]; token t is a target, predicted from the tokens before it, so column 0 is
    False. attention_mask: int64 [B, T], 0 on padding, or None where no token needs hiding. position_ids: int64 [B, T], or None for
    0, 1, 2, ...; where they start anew, attention starts anew. rows: the data's rows, counted from 0, in the order of the
    batch's rows (of a packed batch: those within). targets, tokens: how many tokens are targets, are not padding.
    update: which update it belongs to. keys: B numbers that tell the rows of one update apart, however it is cut into
    micro-batches: with `update` the key for whatever is drawn per sample. A row that holds several examples has one for each.

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
    keys: Sequence[int | tuple[int, ...]] = ()

    def to(self, device: Any) -> Batch:
        """The same batch on a device."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return dataclasses.replace(self, **{name: value.to(device, non_blocking=True) for name, value in tensors.items()})

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """What a model's forward takes."""
        given = {"input_ids": self.input_ids, "attention_mask": self.attention_mask, "position_ids": self.position_ids}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def positions(self) -> int:
        """How many positions a model must know: the length of the longest document within."""
        return self.input_ids.shape[1] if self.position_ids is None else int(self.position_ids.max()) + 1


class Plan(Protocol):
    """Which micro-batches an update holds, for any update from 0 on; epochs follow one another.

    tokens_per_update: how many tokens an update has on the average, padding not counted. Where an update may be cut in several ways,
    `layouts` gives a plan for each, and `chosen(name)` one. Where there is something to tell of the data, `report` tells it. A plan over
    a stream has no `updates_per_epoch`, and a `state_dict` (`StreamedPlan`).
    """

    @property
    def updates_per_epoch(self) -> int | None: ...

    @property
    def tokens_per_update(self) -> float: ...

    def update(self, i: int) -> list[Batch]:
        """The micro-batches of update `i`, on the CPU."""
        ...


def collate(examples: Sequence[Example], update: int = 0, keys: Sequence[int] | None = None) -> Batch:
    """One batch of examples, padded on the right to the longest. Padding is token 0, hidden and never a target."""
    keys = range(len(examples)) if keys is None else keys
    shape = len(examples), max(map(len, examples))
    tokens, supervised, mask = numpy.zeros(shape, numpy.int64), numpy.zeros(shape, bool), numpy.zeros(shape, numpy.int64)
    for row, example in enumerate(examples):
        tokens[row, : len(example)] = example.tokens
        supervised[row, 1 : len(example)] = example.supervised[1:]
        mask[row, : len(example)] = 1
    return batch_of(tokens, supervised, mask, None, [example.source for example in examples], int(mask.sum()), update, keys)


def collate_packed(
    rows: Sequence[Sequence[Example]], update: int = 0, keys: Sequence[int | tuple[int, ...]] | None = None, length: int = 0
) -> Batch:
    """One batch of rows that hold several examples each, side by side.

    Every example is as it would be alone: positions start anew with it, and nothing predicts its first token. Padding, token 0, is a
    document of its own at the end of a row. length: tokens of a row at least.
    """
    keys = range(len(rows)) if keys is None else keys
    shape = len(rows), max(length, max(sum(map(len, row)) for row in rows))
    tokens, supervised, positions = numpy.zeros(shape, numpy.int64), numpy.zeros(shape, bool), numpy.empty(shape, numpy.int64)
    along, count = numpy.arange(shape[1]), 0
    for row, examples in enumerate(rows):
        end = 0
        for example in examples:
            begin, end = end, end + len(example)
            tokens[row, begin:end] = example.tokens
            supervised[row, begin + 1 : end] = example.supervised[1:]
            positions[row, begin:end] = along[: end - begin]
        positions[row, end:] = along[: shape[1] - end]
        count += end
    sources = list(dict.fromkeys(example.source for examples in rows for example in examples))
    return batch_of(tokens, supervised, None, positions, sources, count, update, keys)


def batch_of(
    tokens: Any,
    supervised: Any,
    mask: Any,
    positions: Any,
    rows: list[int],
    count: int,
    update: int,
    keys: Sequence[int | tuple[int, ...]],
) -> Batch:
    """A batch of numpy arrays."""
    tensors = [None if one is None else torch.from_numpy(one) for one in (tokens, supervised, mask, positions)]
    return Batch(*tensors, rows=rows, targets=int(supervised.sum()), tokens=count, update=update, keys=keys)  # type: ignore[arg-type]


def orders(feed: Feed, count: int, stream: Stream) -> Callable[[int], list[int]]:
    """Epoch -> what the feed says of `count` things, the newest epoch remembered. Raises `Problem` where epochs differ in size."""

    @functools.lru_cache(maxsize=1)
    def order(epoch: int) -> list[int]:
        found = feed(count, stream, epoch)
        if len(found) != size:
            raise Problem(f"the feed gives {len(found)} examples in epoch {epoch} and {size} in epoch 0; give as many in every epoch")
        return found

    size = len(feed(count, stream, 0))
    if not size:
        raise Problem(f"the feed gives none of {count} examples; give at least one in every epoch")
    return order


def check_some(examples: Sequence[Example]) -> None:
    """Raises `Problem` where there are none."""
    if not examples:
        raise Problem("no examples to batch; at least one is needed")


def check_unpaired(examples: Iterable[Example], part: str) -> None:
    """Raises `Problem` where the examples are preferences, which stay in pairs."""
    if any(example.side for example in examples):
        raise Problem(f"`{part}` joins examples and cannot keep a chosen and a rejected answer apart; use `padded` or `bucketed`")
