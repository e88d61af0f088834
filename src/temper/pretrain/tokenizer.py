"""Slot `tokenizer`: how a new model's text becomes ids."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Protocol

from pydantic import Field

from temper.lazy import tokenizers, transformers
from temper.parts import Count, part, slot
from temper.tasks.rows import ROLES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
_SPECIAL = (BEGIN, END, PAD, *(f"<|{role}|>" for role in ROLES))

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""The chat template of a new tokenizer: `<|begin|>`, then for each message its role as one token and its words. The
assistant's words end with `<|end|>`, so that a chat and a plain text stop alike; both are marked `generation`."""


@slot(phased=False)
class Tokenizer(Protocol):
    """How does text become ids? `(texts) -> tokenizer`: learns from an iterable of texts and gives a Hugging Face fast
    tokenizer with tokens for beginning, end and padding, and a chat template. A part also says how many ids there will
    be: `most() -> int`."""

    def __call__(self, texts: Iterable[str]) -> PreTrainedTokenizerFast: ...

    def most(self) -> int: ...


@part(name="byte-bpe")
class ByteBPE:
    """Byte-pair encoding over bytes: the most frequent pair of neighbours becomes a new token, until the vocabulary is full
    (Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units"; over bytes, Radford et al. 2019).

    Nothing is unknown to it, and decoding gives the very text back. Merges stay inside words, numbers, and runs of white
    space, as GPT-2 splits them. Ties are broken by order, so the same texts give the same tokenizer.
    """

    vocabulary: Annotated[int, Field(ge=256 + len(_SPECIAL))] = 2048
    """Tokens, at most: 256 bytes, 8 special tokens (begin, end, pad, five roles of a chat), and merges."""
    frequency: Count = 2
    """Times that a pair must occur to be merged."""
    digits: bool = True
    """Whether every digit is a token of its own."""

    def most(self) -> int:
        return self.vocabulary

    def __call__(self, texts: Iterable[str]) -> PreTrainedTokenizerFast:
        before = tokenizers.pre_tokenizers
        splits = [before.Digits(individual_digits=True)] if self.digits else []
        made = tokenizers.Tokenizer(tokenizers.models.BPE())
        made.pre_tokenizer = before.Sequence([*splits, before.ByteLevel(add_prefix_space=False)])
        made.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=self.vocabulary,
            min_frequency=self.frequency,
            special_tokens=list(_SPECIAL),
            initial_alphabet=sorted(before.ByteLevel.alphabet()),
            show_progress=False,
        )
        made.train_from_iterator(texts, trainer)
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, _SPECIAL.index(BEGIN))]
        )
        wrapped = transformers.PreTrainedTokenizerFast(
            tokenizer_object=made, bos_token=BEGIN, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False
        )
        wrapped.chat_template = TEMPLATE
        return wrapped
