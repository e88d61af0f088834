"""Models whose every probability is known: a Llama whose next token depends on the last one alone, by a given table."""

from __future__ import annotations

import math
from pathlib import Path

import numpy
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from temper.passport import Artefact, Passport
from temper.tasks.rows import Rows

WORDS = ("<s>", "</s>", "<pad>", "a", "b", "c", "d", "?")
BEGIN, END = 0, 1


def tokenizer(opens: bool = True) -> PreTrainedTokenizerFast:
    """One token a word; opening with `<s>` or not."""
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    if opens:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BEGIN)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", clean_up_tokenization_spaces=False
    )


def bigram(table: numpy.ndarray, positions: int = 32) -> LlamaForCausalLM:
    """p(next = j | last = i) = table[i, j], rows summing to 1, exactly but for float32: the embedding is the identity, the layer adds
    nothing, and the output layer holds the logarithms."""
    size = len(table)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=size,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        head_dim=2,
        max_position_embeddings=positions,
        rms_norm_eps=1e-12,
        bos_token_id=BEGIN,
        eos_token_id=END,
        pad_token_id=2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.lm_head.weight.copy_(torch.tensor(numpy.log(table).T / math.sqrt(size)))
    return model


def drawn_table(seed: int = 0) -> numpy.ndarray:
    """A table of probabilities from a Dirichlet distribution."""
    return numpy.random.default_rng(seed).dirichlet(numpy.ones(len(WORDS)), len(WORDS))


def saved(folder: Path, model, words=None, name: str = "tune", template: str | None = None) -> Artefact:
    """The model as a step would leave it."""
    words = words or tokenizer()
    words.chat_template = template
    words.save_pretrained(folder / "model")
    model.save_pretrained(folder / "model")
    passport = Passport("model", tokenizer="t", template="h" if template else None, numbers="float32", architecture="LlamaForCausalLM")
    return Artefact(f"id-{name}", folder, passport, name=name)


class Given:
    """A data source that holds rows."""

    def __init__(self, shape: str, rows: list[dict]):
        self.rows = Rows(shape, rows, "given", "made by the test")

    def load(self, split: str) -> Rows:
        return self.rows

    def digest(self) -> str:
        return str(self.rows)


def texts(count: int, seed: int = 0, modules: int | None = None) -> list[dict]:
    """Rows of 1 to 12 words drawn at random."""
    rng = numpy.random.default_rng(seed)
    rows = [{"text": " ".join(rng.choice(WORDS[3:7], rng.integers(1, 13)))} for _ in range(count)]
    return [{**row, "module": f"m{index % modules}"} for index, row in enumerate(rows)] if modules else rows
