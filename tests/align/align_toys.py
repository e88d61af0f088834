"""A tiny Llama, its words, and data small enough to read."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from temper.models import folders
from temper.passport import Artefact
from temper.tasks.rows import Rows

WORDS = ["<s>", "</s>", "<u>", "<a>", *"abcdefgh", "ask", "say", "which", ":"]
CHAT = (
    "{% for m in messages %}{{ '<u> ' if m['role'] == 'user' else '<a> ' }}{{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


def tiny(**settings) -> LlamaForCausalLM:
    """Always the same weights."""
    config = {"vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        made = LlamaForCausalLM(LlamaConfig(**config, **ends, max_position_embeddings=64, initializer_range=0.1, **settings))
    return made.eval()


def artefact(path: Path, id_: str, base: Artefact | None = None) -> Artefact:
    """What stands under `path/model`, as the store would give it."""
    found = folders.passport(path / "model")
    if base is not None:
        found = dataclasses.replace(found, base=base.passport.base, numbers=base.passport.numbers, adapters=(*base.passport.adapters, id_))
    return Artefact(id_, path, found, base, name=id_)


class Data:
    """A source of rows: so many to train on, the rest held out."""

    def __init__(self, shape, rows, train):
        self.shape, self.rows, self.train = shape, rows, train

    def load(self, split):
        rows = self.rows[: self.train] if split == "train" else self.rows[self.train :]
        return Rows(self.shape, rows, "toy", "a test").validate()

    def digest(self):
        return "0"


def preferences(count: int = 24) -> list[dict]:
    """Letters in order are preferred to letters in reverse."""
    letters = "abcdefgh"
    rows = []
    for index in range(count):
        shift = letters[index % 8 :] + letters[: index % 8]
        good = sorted(shift[: 2 + index % 3])
        rows.append({"prompt": f"ask {' '.join(shift)} :", "chosen": " ".join(good), "rejected": " ".join(reversed(good))})
    return rows


def one_letter(count: int = 24) -> list[dict]:
    """Questions that one letter answers: an untrained model is right now and then."""
    return [
        {"prompt": f"which {' '.join('abcdefgh'[index % 8 :])} {'say ' * (index // 8)}:", "completion": "abcdefgh"[index % 8]}
        for index in range(count)
    ]
