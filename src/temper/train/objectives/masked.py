"""Masked language modelling: hidden tokens are told from both sides."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from temper.lazy import torch
from temper.parts import Problem, Share, part
from temper.train import corrupt
from temper.train.objectives.attention import check_mask, full_mask
from temper.train.objectives.base import Corrupting, Sum, in_place, segments

if TYPE_CHECKING:
    from temper.context import Context
    from temper.train.batching import Batch


@part
class Masked:
    """Cross-entropy of some tokens that are hidden from the model, each told from both sides and at its own place.

    Devlin et al. 2019, "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", section 3.1. Of each document's
    supervised tokens so many are drawn, special tokens never. A causal decoder is trained with attention to both sides, as diffusion
    language models are; its plain folder then computes otherwise. Formula: - sum_i log p(x_i | x with the drawn tokens hidden).
    """

    rate: Annotated[float, Field(gt=0, le=1)] = 0.15
    """Share of a document's supervised tokens that are predicted; at least one is."""
    masked: Share = 0.8
    """Share of these that the mask token stands for."""
    swapped: Share = 0.1
    """Share of these that a random token of the vocabulary stands for; the rest stay as they are."""
    token: str | None = None
    """The mask token; none: the tokenizer's own."""

    families: ClassVar = ("masked", "causal")

    def __post_init__(self) -> None:
        if self.masked + self.swapped > 1:
            raise Problem(f"masked {self.masked:g} and swapped {self.swapped:g} are more than all; make them at most 1 together")

    @property
    def reserves(self) -> tuple[str, ...]:
        """What a new tokenizer must reserve."""
        return () if self.token else ("mask",)

    def start(self, context: Context) -> Masking:
        return Masking(self, context)


class Masking(Corrupting):
    """`masked` at work."""

    def __init__(self, part: Masked, context: Context):
        super().__init__(part, context)
        self.mask = self.token(part.token or self.tokenizer.mask_token or "<|mask|>", "mask")
        self.kept = torch.tensor(self.tokenizer.all_special_ids)
        if self.family == "causal":
            check_mask(self.model, self.name)
            self.note(
                f"`masked` trains {type(self.model).__name__} with attention to both sides; loaded from its folder it attends to the left "
                "alone, unless it is called with an attention_mask [B, 1, T, T] that lets every token see all others"
            )

    def __call__(self, model: Any, batch: Batch) -> Sum:
        tokens, picked = self.corrupt(batch)
        inputs = {**batch.inputs, "input_ids": tokens}
        if self.family == "causal" or batch.position_ids is not None:
            number = segments(batch)
            inputs["attention_mask"] = full_mask(model, number[:, :, None] == number[:, None, :])
        return in_place(model, inputs, picked, batch.input_ids[picked])

    def corrupt(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch's tokens with some hidden, and which are predicted: int64 and bool [B, T]."""
        tokens, device = batch.input_ids.cpu().clone(), batch.input_ids.device
        able = batch.supervised.cpu() & ~torch.isin(tokens, self.kept)
        picked = torch.zeros_like(able)
        for row, places, generator in self.documents(batch):
            some = picked[row, places] = corrupt.pick(able[row, places], self.part.rate, generator)
            shares = self.part.masked, self.part.swapped
            tokens[row, places] = corrupt.mask(tokens[row, places], some, self.mask, len(self.tokenizer), *shares, generator)
        return tokens.to(device), picked.to(device)
