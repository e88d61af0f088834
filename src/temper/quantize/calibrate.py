"""Slot `calibrate`: the inputs on which a layer's error is measured."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Protocol

from temper.lazy import numpy, torch
from temper.parts import Count, Problem, part, slot
from temper.train.examples import encode

if TYPE_CHECKING:
    from torch import Tensor

    from temper.context import Context, Stream
    from temper.tasks.rows import Rows


@slot(phased=False)
class Calibrate(Protocol):
    """On which inputs is a layer's error measured?

    Live: `(rows, tokenizer, longest) -> batches`, each with `input_ids` [B, T] and, where some are padding, `attention_mask`
    [B, T]; T is at most `longest`, the model's context.
    """

    def start(self, context: Context) -> Any: ...


@part(gives=("inputs",), cost=("batch",))
class Samples:
    """Windows of equal length out of the data: rows in random order under the model's template, one after the other, cut."""

    count: Count = 128
    """Windows."""
    length: Count = 512
    """Tokens in a window."""
    batch: Count = 8
    """Windows that run through a block at once."""

    def start(self, context: Context) -> Sampler:
        return Sampler(self, context)


@dataclasses.dataclass
class Sampler:
    """Draws the windows of `Samples` from the slot's stream."""

    settings: Samples
    context: Context

    def __call__(self, rows: Rows, tokenizer: Any, longest: int) -> list[dict[str, Tensor]]:
        settings = self.settings
        windows = cut(rows, tokenizer, settings.count, min(settings.length, longest), self.context.stream())
        if windows.shape != (settings.count, settings.length):
            held, length = windows.shape
            why = f"the model's context is {longest} tokens" if length == longest else "the data held no more"
            asked = f"{settings.count} of {settings.length} were asked for"
            self.context.note(f"calibrated on {held} windows of {length} tokens; {asked}, {why}")
        return [{"input_ids": windows[start : start + settings.batch]} for start in range(0, len(windows), settings.batch)]


def cut(rows: Rows, tokenizer: Any, count: int, length: int, stream: Stream) -> Tensor:
    """At most `count` windows [N, length] of token ids. Fewer tokens than one window make one shorter window."""
    examples = encode(rows, tokenizer, max_length=None)
    taken, total = [], 0
    for index in torch.randperm(len(examples), generator=stream.generator("rows")).tolist():
        taken.append(examples[index].tokens)
        total += len(taken[-1])
        if total >= count * length:
            break
    tokens = torch.from_numpy(numpy.concatenate(taken).astype("int64"))
    if not len(tokens):
        raise Problem(f"{rows.name}: no tokens to calibrate on; give rows that are not empty", ("data",))
    length = min(length, len(tokens))
    windows = tokens[: len(tokens) // length * length].view(-1, length)
    return windows[:count]
