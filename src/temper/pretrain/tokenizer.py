"""Slot `tokenizer`: how a new model's text becomes ids."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Literal, Protocol

from pydantic import Field

from temper.lazy import tokenizers, transformers
from temper.parts import Count, Problem, part, slot
from temper.tasks.rows import ROLES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
_SPECIAL = (BEGIN, END, PAD, *(f"<|{role}|>" for role in ROLES))
MASK = "<|mask|>"
_MIDDLE = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
_MODES = ("[R]", "[S]", "[X]")

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
    """Tokens, at most: 256 bytes, 8 special tokens (begin, end, pad, five roles of a chat), those reserved, and merges."""
    frequency: Count = 2
    """Times that a pair must occur to be merged."""
    digits: bool = True
    """Whether every digit is a token of its own."""
    reserve: tuple[Literal["mask", "spans", "middle"], ...] = ()
    """Further special tokens, for objectives. mask: one that hides others, for `masked`. spans: sentinels `<extra_id_0>` and on, and the
    modes `[R]`, `[S]`, `[X]`, for `span-mixture`. middle: three marks, for `fill-middle`."""
    sentinels: Count = 100
    """Sentinels that `spans` reserves."""

    def __post_init__(self) -> None:
        if self.vocabulary < (least := 256 + len(self._special)):
            raise Problem(f"vocabulary {self.vocabulary}: bytes and special tokens are {least}; give at least as many, or reserve fewer")

    @property
    def _special(self) -> list[str]:
        """Special tokens in the order of their ids."""
        spans = [*(f"<extra_id_{number}>" for number in range(self.sentinels)), *_MODES]
        kinds = {"mask": (MASK,), "spans": spans, "middle": _MIDDLE}
        return [*_SPECIAL, *(token for kind, some in kinds.items() if kind in self.reserve for token in some)]

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
            special_tokens=self._special,
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
        if "mask" in self.reserve:
            wrapped.mask_token = MASK
        return wrapped
