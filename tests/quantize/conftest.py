"""A tiny Llama in a folder with its tokenizer, and data."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from temper.models import folders
from temper.passport import Artefact
from temper.tasks.rows import Rows


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{index}" for index in range(60))]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    made = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    made.chat_template = "{% for m in messages %}{{ m['role'][0] }} {{ m['content'] }} {% endfor %}"
    return made


def _llama(**changes: Any) -> LlamaForCausalLM:
    settings = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()


@pytest.fixture
def llama() -> Callable[..., LlamaForCausalLM]:
    """`llama(**config)`: hidden width 32, 2 layers, the same weights every time."""
    return _llama


@pytest.fixture
def artefact(tmp_path: Path, tokenizer: Any) -> Callable[..., Artefact]:
    """`artefact(model, base=None)`: a model or an adapter written to a folder, as an artefact with its passport."""

    def make(model: Any = None, base: Artefact | None = None, name: str = "start") -> Artefact:
        from temper.models import io

        folder = tmp_path / name / "model"
        io.save(model if model is not None else _llama(), tokenizer, folder, base_name="start" if base else "")
        identity = hashlib.sha256(name.encode()).hexdigest()
        return Artefact(identity, folder.parent, folders.passport(folder, name), base, {}, identity, name)

    return make


class Data:
    """Rows in memory where an engine expects a data source."""

    def __init__(self, rows: list[dict[str, Any]], shape: Any = "text"):
        self.rows, self.shape = rows, shape

    def load(self, split: str) -> Rows:
        return Rows(self.shape, self.rows, "rows", "memory")


@pytest.fixture
def texts() -> Data:
    """60 texts of 12 to 31 words with some order in them."""
    draw = torch.Generator().manual_seed(3)
    rows = []
    for index in range(60):
        first, step = torch.randint(0, 60, (2,), generator=draw).tolist()
        rows.append({"text": " ".join(f"w{(first + place * step) % 60}" for place in range(12 + index % 20))})
    return Data(rows)
