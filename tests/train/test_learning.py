"""A run as an engine asks for it: choices that are recorded with their reasons, and advice where memory runs out."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from temper.context import Context
from temper.parts import Slot, spec
from temper.train import learning
from temper.train.averages import Average
from temper.train.batching import Batching, Bucketed
from temper.train.examples import Encoded
from temper.train.feed import Feed, Shuffled
from temper.train.learning import Learning, learn
from temper.train.objectives import Causal
from temper.train.optimizers import SGD, Optimizer
from temper.train.schedules import Constant, Schedule


@spec
class Plain(Learning):
    """An engine that only learns."""

    batching: Slot[Batching] = Bucketed(size=4, tokens=64)
    feed: Slot[Feed] = Shuffled()
    optimizer: Slot[Optimizer] = SGD(lr=0.1)
    schedule: Slot[Schedule] = Constant()
    average: Slot[Average] | None = None


@pytest.fixture
def go(tmp_path, examples):
    """Runs a spec on a tiny GPT-2, whose layers no fused node computes; gives the context."""

    def run(loss=None, **settings):
        asked = Plain(**{"updates": 3, "precision": "float32", "evaluate_every": None, **settings})
        context = Context.scratch(tmp_path)
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            shape = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
            model = GPT2LMHeadModel(GPT2Config(vocab_size=128, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, **shape))
        live = context.start(asked)
        learn(model, Encoded(examples()), loss or Causal(), spec=asked, live=live, context=context, save=lambda folder: None)
        return context

    return run


def test_a_short_run_takes_the_plain_choices_and_says_why(go):
    made = go().decisions()
    assert made["layout"] == {"value": "rows", "reason": "3 updates are too few to pay for measuring"}
    assert made["compile"] == {"value": False, "reason": "3 updates are too few to pay for compiling"}


def test_a_longer_run_measures_its_layouts_and_a_resumed_one_keeps_to_the_choice(go, monkeypatch):
    monkeypatch.setattr(learning, "_WORTH_MEASURING", 3)
    times = iter([0.3, 0.1, 0.2])
    monkeypatch.setattr(learning, "seconds", lambda *_: next(times))
    first = go()
    assert first.decisions()["layout"]["value"] == "packed"
    assert first.decisions()["layout"]["reason"] == "an update's passes take: rows 300 ms, packed 100 ms, flat 200 ms"
    assert go().decisions()["layout"]["value"] == "packed"  # `seconds` has nothing left to give


def test_out_of_memory_names_the_settings_to_change(go):
    def loss(model, batch):
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    with pytest.raises(MemoryError) as caught:
        go(loss)
    assert str(caught.value) == (
        "out of memory; give a smaller micro-batch (`batching` has tokens 64 and size 4), or a smaller max_length (now 1024), or "
        "`recompute: true`, or `precision: bf16`. The run goes on from its last checkpoint (tried to allocate 2 GiB)"
    )


def test_other_errors_are_left_as_they_are(go):
    def loss(model, batch):
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match=r"^shapes do not fit$"):
        go(loss)


def test_recomputing_is_refused_where_a_model_cannot(tmp_path):
    with pytest.raises(ValueError, match="Linear cannot compute its activations again; use `recompute: false`"):
        with learning.recomputing(torch.nn.Linear(2, 2)):
            pass
