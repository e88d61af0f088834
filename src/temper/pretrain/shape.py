"""Slot `shape`: what a new model looks like, and its first weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol

from pydantic import Field

from temper.lazy import torch, transformers
from temper.parts import Count, Problem, Rate, Share, part, slot

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@slot(phased=False)
class Shape(Protocol):
    """What does a new model look like? `(tokenizer, seed) -> model`: a Hugging Face model for the tokenizer's ids in float32,
    its weights drawn from `seed` alone. A part also says, before anything is built, the model's class (`architecture`) and
    its number of parameters: `count(vocabulary) -> int`."""

    architecture: ClassVar[str]

    def __call__(self, tokenizer: Any, seed: int) -> PreTrainedModel: ...

    def count(self, vocabulary: int) -> int: ...


@part
class Llama:
    """A decoder of Llama's shape: RMS norms before each part, rotary positions, grouped-query attention, a gated MLP
    (Touvron et al. 2023, "LLaMA: Open and Efficient Foundation Language Models")."""

    hidden: Count = 256
    """Width of the residual stream."""
    layers: Count = 4
    """Decoder blocks."""
    heads: Count = 4
    """Query heads; their width is hidden / heads."""
    kv_heads: Count | None = None
    """Key and value heads; none: as many as query heads."""
    feed_forward: Count | None = None
    """Width of the MLP; none: 8/3 of hidden, rounded up to a multiple of 32 (gated, that costs what 4 hidden does ungated)."""
    tie: bool = True
    """Whether the output layer shares the embedding's weights."""
    positions: Count = 2048
    """Tokens that the model is said to take."""
    theta: Rate = 10_000.0
    """Base of the rotary angles."""
    deviation: Rate | None = None
    """Standard deviation of the first weights; none: 1 / sqrt(hidden), the usual 0.02 at a hidden of 2500. Narrow models learn much
    faster from it than from 0.02."""

    architecture: ClassVar[str] = "LlamaForCausalLM"

    def __post_init__(self) -> None:
        if self.hidden % (2 * self.heads):
            raise Problem(f"hidden {self.hidden} over {self.heads} heads: rotary positions need an even whole width; change one of them")
        if self.heads % self._kv_heads:
            raise Problem(f"{self.heads} heads do not share {self._kv_heads} key-value heads evenly; give a divisor of {self.heads}")

    @property
    def _kv_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def _feed_forward(self) -> int:
        return self.feed_forward or -(-8 * self.hidden // 3 // 32) * 32

    def count(self, vocabulary: int) -> int:
        h, kv = self.hidden, self.hidden // self.heads * self._kv_heads
        block = 2 * h * h + 2 * h * kv + 3 * h * self._feed_forward + 2 * h
        return vocabulary * h * (1 if self.tie else 2) + self.layers * block + h

    def __call__(self, tokenizer: Any, seed: int) -> PreTrainedModel:
        config = transformers.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self._kv_heads,
            intermediate_size=self._feed_forward,
            tie_word_embeddings=self.tie,
            max_position_embeddings=self.positions,
            rope_parameters={"rope_type": "default", "rope_theta": self.theta},
            initializer_range=self.deviation or self.hidden**-0.5,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            dtype="float32",
        )
        return _drawn(transformers.LlamaForCausalLM, config, seed)


@part
class Bert:
    """An encoder of BERT's shape, which sees both sides and is trained with `objective: masked`: learned positions, norms after each
    part (Devlin et al. 2019, "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding")."""

    hidden: Count = 256
    """Width of the residual stream."""
    layers: Count = 4
    """Encoder blocks."""
    heads: Count = 4
    """Attention heads; their width is hidden / heads."""
    feed_forward: Count | None = None
    """Width of the MLP; none: 4 hidden."""
    positions: Count = 512
    """Tokens that the model takes."""
    dropout: Share = 0.1
    """Share of activations and of attention that is dropped in training."""
    deviation: Rate | None = None
    """Standard deviation of the first weights; none: 1 / sqrt(hidden)."""

    architecture: ClassVar[str] = "BertForMaskedLM"

    def __post_init__(self) -> None:
        _divides(self.hidden, self.heads)

    def count(self, vocabulary: int) -> int:
        h, f = self.hidden, self.feed_forward or 4 * self.hidden
        block = 4 * (h * h + h) + 2 * h * f + f + h + 4 * h
        ends = (self.positions + 2) * h + 2 * h + h * h + 3 * h  # positions, two kinds of segment and their norm; the head's own layer
        return vocabulary * (h + 1) + ends + self.layers * block

    def __call__(self, tokenizer: Any, seed: int) -> PreTrainedModel:
        config = transformers.BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=self.feed_forward or 4 * self.hidden,
            max_position_embeddings=self.positions,
            hidden_dropout_prob=self.dropout,
            attention_probs_dropout_prob=self.dropout,
            initializer_range=self.deviation or self.hidden**-0.5,
            pad_token_id=tokenizer.pad_token_id,
            dtype="float32",
        )
        return _drawn(transformers.BertForMaskedLM, config, seed)


@part(name="t5")
class T5:
    """An encoder and a decoder of T5's shape, trained with `objective: span-mixture` or `prefix`: RMS norms before each part, relative
    positions, a gated MLP (Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer";
    the gate: Shazeer 2020, "GLU Variants Improve Transformer")."""

    hidden: Count = 256
    """Width of the residual streams."""
    layers: Count = 4
    """Blocks of the encoder, and as many of the decoder."""
    heads: Count = 4
    """Attention heads; their width is hidden / heads."""
    feed_forward: Count | None = None
    """Width of the MLP; none: 8/3 of hidden, rounded up to a multiple of 32."""
    dropout: Share = 0.0
    """Share of activations and of attention that is dropped in training."""
    distance: Annotated[int, Field(gt=16)] = 128
    """Tokens apart from which on relative positions are no longer told apart; nearer than 16 each is told."""

    architecture: ClassVar[str] = "T5ForConditionalGeneration"

    def __post_init__(self) -> None:
        _divides(self.hidden, self.heads)

    @property
    def _feed_forward(self) -> int:
        return self.feed_forward or -(-8 * self.hidden // 3 // 32) * 32

    def count(self, vocabulary: int) -> int:
        h, mlp = self.hidden, 3 * self.hidden * self._feed_forward
        encoder, decoder = 4 * h * h + mlp + 2 * h, 8 * h * h + mlp + 3 * h
        return vocabulary * h + self.layers * (encoder + decoder) + 2 * h + 2 * _BUCKETS * self.heads

    def __call__(self, tokenizer: Any, seed: int) -> PreTrainedModel:
        config = transformers.T5Config(
            vocab_size=len(tokenizer),
            d_model=self.hidden,
            d_kv=self.hidden // self.heads,
            d_ff=self._feed_forward,
            num_layers=self.layers,
            num_heads=self.heads,
            relative_attention_num_buckets=_BUCKETS,
            relative_attention_max_distance=self.distance,
            dropout_rate=self.dropout,
            feed_forward_proj="gated-gelu",
            scale_decoder_outputs=True,  # pyright: ignore[reportCallIssue]
            decoder_start_token_id=tokenizer.pad_token_id,  # pyright: ignore[reportCallIssue]
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            dtype="float32",
        )
        return _drawn(transformers.T5ForConditionalGeneration, config, seed)


_BUCKETS = 32  # relative positions that T5 tells apart


def _divides(hidden: int, heads: int) -> None:
    if hidden % heads:
        raise Problem(f"hidden {hidden} over {heads} heads is no whole width; change one of them")


def _drawn(cls: Any, config: Any, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):  # transformers draws from the global generator
        torch.manual_seed(seed)
        return cls(config)
