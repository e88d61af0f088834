"""A tiny Llama, a tiny tokenizer and small examples, made in memory."""

from __future__ import annotations

import numpy
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from temper.context import Stream
from temper.train.examples import Example

CHAT = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def llama():
    """Makes a Llama of 2 layers, the same one every time; settings go to its configuration."""

    def make(**settings) -> LlamaForCausalLM:
        config = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            return LlamaForCausalLM(LlamaConfig(**{**config, "max_position_embeddings": 64, "initializer_range": 0.2, **settings}))

    return make


@pytest.fixture
def examples():
    """Makes examples of random tokens and random lengths; completions have an unsupervised half."""

    def make(count: int = 14, longest: int = 20, completion: bool = False, side: bool = False) -> list[Example]:
        draw = numpy.random.default_rng(5)
        made = []
        for index in range(count):
            length = int(draw.integers(3, longest + 1))
            supervised = numpy.ones(length, dtype=bool)
            if completion:
                supervised[: length // 2] = False
            tokens = draw.integers(1, 128, length).astype(numpy.int32)
            made.append(Example(tokens, supervised, index // 2 if side else index, ("chosen", "rejected")[index % 2] if side else None))
        return made

    return make


@pytest.fixture
def stream():
    return Stream("0|test|batching")


@pytest.fixture(scope="session")
def _words():
    """A byte-level BPE with merges that cross the seam of `fore` and `cast`."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(["the forecast of a forecast is the forecast"] * 20, trainer)
    return tokenizer


@pytest.fixture
def tokenizer(_words):
    """Makes a tokenizer with a chat template and an end token; `opening` sets the beginning token before every text."""

    def make(*, opening: bool = False, template: str | None = CHAT, end: str | None = "</s>") -> PreTrainedTokenizerFast:
        from tokenizers.processors import TemplateProcessing

        words = Tokenizer.from_str(_words.to_str())
        if opening:
            words.post_processor = TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", words.token_to_id("<s>"))])
        made = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token=end)
        made.chat_template = template
        return made

    return make
