"""Tiny models and a tokenizer, made in milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def tiny() -> Callable[..., Any]:
    """`tiny(seed=0, **config)`: a Llama of hidden width 32 with 2 layers and 64 tokens, with weights large enough to matter."""

    def make(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
        settings = {
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "initializer_range": 0.2,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()

    return make


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """3 rows of 12 tokens; the second and third are shorter and padded on the right."""
    tokens = torch.randint(3, 64, (3, 12), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(tokens)
    mask[1, 8:] = mask[2, 3:] = 0
    return {"input_ids": tokens * mask, "attention_mask": mask}


@pytest.fixture
def tokenizer() -> Any:
    """A word-level tokenizer with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{index}" for index in range(60))]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    made = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    made.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return made
