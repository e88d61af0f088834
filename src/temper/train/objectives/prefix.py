"""Prefix language modelling: a prefix is read from both sides, what follows is told token by token."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

from temper.lazy import torch
from temper.parts import part
from temper.train import corrupt
from temper.train.objectives.attention import check_mask, full_mask
from temper.train.objectives.base import Corrupting, Sum, next_token, segments, translate

if TYPE_CHECKING:
    from temper.context import Context
    from temper.train.batching import Batch
    from temper.train.objectives.base import Piece


@part
class Prefix:
    """Next-token cross-entropy of what follows a prefix, whose tokens all see one another.

    Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", sections 3.2.1 and 3.3.1. The
    prefix of a document is its unsupervised beginning; where that is a first token alone, a part of the document from that token to all
    but one, each as likely, drawn anew every time. An encoder-decoder reads the prefix and writes the rest. A causal decoder's
    plain folder reads prompts from left to right. Formula: - sum_{t >= p} log p(x_t | x_<t), with attention to x_<p from all of x_<p.
    """

    families: ClassVar = ("causal", "encoder-decoder")

    def start(self, context: Context) -> Prefixing:
        return Prefixing(self, context)


class Prefixing(Corrupting):
    """`prefix` at work."""

    def __init__(self, part: Prefix, context: Context):
        super().__init__(part, context)
        if self.family == "causal":
            check_mask(self.model, self.name)
            self.note(
                f"`prefix` trains {type(self.model).__name__} to see all of its prompt from each token of it; loaded from its folder it "
                "reads a prompt from left to right, unless it is called with an attention_mask [B, 1, T, T] that says otherwise"
            )

    def __call__(self, model: Any, batch: Batch) -> Sum:
        drawn = self.draw(batch)
        if self.family == "encoder-decoder":
            return translate(model, self.split(batch, drawn), batch.input_ids.device)
        inside = torch.zeros(batch.input_ids.shape, dtype=torch.bool)
        for row, places, length in drawn:
            inside[row, places.start : places.start + length] = True
        supervised, device = batch.supervised.cpu() & ~inside, batch.input_ids.device
        number, width = segments(batch), inside.shape[1]
        before = torch.ones(width, width, dtype=torch.bool, device=device).tril()
        seen = (number[:, :, None] == number[:, None, :]) & (before | inside.to(device)[:, None, :])
        changed = {"supervised": supervised.to(device), "attention_mask": full_mask(model, seen), "targets": int(supervised.sum())}
        return next_token(model, dataclasses.replace(batch, **changed))

    def draw(self, batch: Batch) -> list[tuple[int, slice, int]]:
        """Row, places and length of the prefix of every document that has a target."""
        supervised, found = batch.supervised.cpu(), []
        for row, places, generator in self.documents(batch):
            if targets := supervised[row, places].nonzero().flatten().tolist():
                length = places.stop - places.start
                found.append((row, places, targets[0] if targets[0] > 1 else length - corrupt.tail(length, 0.5, generator)))
        return found

    def split(self, batch: Batch, drawn: list[tuple[int, slice, int]]) -> list[tuple[list[int], Piece]]:
        """Each document's prefix with an end token, and what follows it."""
        close = [self.tokenizer.eos_token_id] if self.tokenizer.eos_token_id is not None else []
        tokens, supervised = batch.input_ids.tolist(), batch.supervised.tolist()
        found = []
        for row, places, length in drawn:
            first, rest = slice(places.start, places.start + length), slice(places.start + length, places.stop)
            found.append(([*tokens[row][first], *close], (tokens[row][rest], supervised[row][rest])))
        return found
