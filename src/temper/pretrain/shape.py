"""Slot `shape`: what a new model looks like, and its first weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from temper.lazy import torch, transformers
from temper.parts import Count, Problem, Rate, part, slot

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
        with torch.random.fork_rng(devices=[]):  # transformers draws from the global generator
            torch.manual_seed(seed)
            return transformers.LlamaForCausalLM(config)
