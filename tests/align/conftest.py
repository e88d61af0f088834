"""A tiny policy on disk, its tokenizer of whole words, and data."""

from __future__ import annotations

import pytest
import torch
from align_toys import CHAT, WORDS, Data, artefact, one_letter, preferences, tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from temper.models import io
from temper.passport import Artefact


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<u>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")
    made.chat_template = CHAT
    return made


@pytest.fixture
def llama() -> LlamaForCausalLM:
    return tiny()


@pytest.fixture(scope="session")
def policy(tmp_path_factory, tokenizer) -> Artefact:
    path = tmp_path_factory.mktemp("policy")
    io.save_model(tiny(), tokenizer, path / "model")
    return artefact(path, "policy-id")


@pytest.fixture
def pairs_data() -> Data:
    return Data("preference", preferences(), 16)


@pytest.fixture
def questions_data() -> Data:
    return Data("completion", one_letter(), 16)
