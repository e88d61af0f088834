"""Fill in the middle: a document's middle is moved to its end, so that a causal model learns to write between two texts."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from temper.lazy import torch
from temper.parts import Share, part
from temper.train import corrupt
from temper.train.objectives.base import Corrupting, Sum, next_token, rebuild

if TYPE_CHECKING:
    from temper.context import Context
    from temper.train.batching import Batch
    from temper.train.objectives.base import Piece

MARKS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
    ("[PREFIX]", "[SUFFIX]", "[MIDDLE]"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
)
"""What models call the tokens for prefix, suffix and middle: Qwen, CodeGemma and our own; StarCoder and Granite; SantaCoder; Code Llama;
Codestral; DeepSeek Coder, whose hole stands where the suffix begins."""


@part
class FillMiddle:
    """Next-token cross-entropy of documents some of which have their middle moved to their end, behind a mark.

    Bavarian et al. 2022, "Efficient Training of Language Models to Fill in the Middle", section 3: two cuts anywhere in a document make
    prefix, middle and suffix, and every token is learnt, marks too. Documents are told apart by their positions or their end tokens, and
    changed after packing (the paper's context level). One with an unsupervised prompt stays as it is. A document grows by its
    three marks; what it, or a row of joined ones, then has beyond the tokens that the model takes is cut off its end.
    Formula: - sum_t log p(y_t | y_<t), y the document as rearranged.
    """

    rate: Share = 0.5
    """Share of documents that are changed."""
    suffix_first: Share = 0.5
    """Share of these that have their suffix before their prefix (SPM); the others keep the order (PSM)."""
    split: Literal["characters", "tokens"] = "characters"
    """Where a document may be cut. A text that its pieces do not give back exactly, for its tokens begin or end within a character
    or the tokenizer adds to every piece, is cut between tokens anyway."""
    tokens: tuple[str, str, str] | None = None
    """The marks of prefix, suffix and middle; none: those that the tokenizer is found to have."""

    families: ClassVar = ("causal",)

    @property
    def reserves(self) -> tuple[str, ...]:
        """What a new tokenizer must reserve."""
        return () if self.tokens else ("middle",)

    def start(self, context: Context) -> Filling:
        return Filling(self, context)


class Filling(Corrupting):
    """`fill-middle` at work."""

    def __init__(self, part: FillMiddle, context: Context):
        super().__init__(part, context)
        names = part.tokens or next((some for some in MARKS if all(one in self.vocabulary for one in some)), MARKS[0])
        before, after, within = (self.token(one, "middle") for one in names)
        self.marks = before, after, within
        self.begin, self.end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id

    def __call__(self, model: Any, batch: Batch) -> Sum:
        return next_token(model, self.corrupt(batch))

    def corrupt(self, batch: Batch) -> Batch:
        """The batch with the middle of some of its documents moved; of separate ones, those without a target are left out."""
        tokens, supervised = batch.input_ids.tolist(), batch.supervised.tolist()
        rows: list[list[Piece]] = [[] for _ in tokens]
        for row, places, generator in self.documents(batch):
            if batch.position_ids is None or any(supervised[row][places]):
                made, learnt = self._document(tokens[row][places], supervised[row][places], generator)
                rows[row].append((made[: self.longest], learnt[: self.longest]))
        return rebuild(batch, rows)

    def _document(self, tokens: list[int], supervised: list[bool], generator: torch.Generator) -> Piece:
        """What positions set apart, which may be several documents one after another, each with an end token."""
        made: list[int] = []
        flags: list[bool] = []
        for start, end in _ended(tokens, self.end):
            some, learnt = tokens[start:end], supervised[start:end]
            if all(learnt[1:]):
                some = self._rearranged(some, generator)
                learnt = [learnt[0], *[True] * (len(some) - 1)]
            else:
                self.note("`fill-middle` leaves documents with an unsupervised prompt as they are")
            made += some
            flags += learnt
        if self.longest is not None and len(made) > self.longest:
            self.note(f"`fill-middle` cuts off the end of what its marks make longer than the {self.longest} tokens that the model takes")
        return made, flags

    def _rearranged(self, tokens: list[int], generator: torch.Generator) -> list[int]:
        """A document, perhaps with its middle at its end; its begin and end tokens stay where they are."""
        change, order = torch.rand(2, generator=generator).tolist()
        first = 1 if tokens[0] == self.begin else 0
        last = len(tokens) - (1 if tokens[-1] == self.end else 0)
        body = tokens[first:last]
        if change >= self.part.rate or not body:
            return tokens
        pieces = self._pieces(body, generator)
        return [*tokens[:first], *corrupt.rearrange(*pieces, self.marks, order < self.part.suffix_first), *tokens[last:]]

    def _pieces(self, body: list[int], generator: torch.Generator) -> tuple[list[int], list[int], list[int]]:
        """Prefix, middle and suffix."""
        if self.part.split == "characters":
            text = self._text(body)
            first, second = corrupt.cut(len(text), generator)
            some = [self._ids(one) for one in (text[:first], text[first:second], text[second:])]
            if "\ufffd" not in text and self._text([token for one in some for token in one]) == text:
                return some[0], some[1], some[2]
        first, second = corrupt.cut(len(body), generator)
        return body[:first], body[first:second], body[second:]

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []


def _ended(tokens: list[int], end: int | None) -> list[tuple[int, int]]:
    """Where documents that follow one another begin and end, each but perhaps the last with its end token."""
    edges = [0, *(place + 1 for place, token in enumerate(tokens[:-1]) if token == end), len(tokens)]
    return list(itertools.pairwise(edges))
