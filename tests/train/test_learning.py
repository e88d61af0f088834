"""A run as an engine asks for it: choices that are recorded with their reasons, and advice where memory runs out."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
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
from temper.train.optimizers import SAM, SGD, MeZO, Optimizer
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


# ------------------------------------------------------------------------------------------------------------ lengths


@pytest.fixture
def figured(tmp_path, examples, llama):
    """Runs a spec on a tiny Llama; gives the figures and the context."""

    def run(model=None, folder="one", loss=None, **settings):
        asked = Plain(**{"precision": "float32", "evaluate_every": None, **settings})
        context = Context.scratch(tmp_path / folder)
        live = context.start(asked)
        model, data = llama() if model is None else model, Encoded(examples())
        figures = learn(model, data, loss or Causal(), spec=asked, live=live, context=context, save=lambda _: None)
        return {name: one.value for name, one in figures.items()}, context

    return run


def test_a_length_in_operations_is_made_into_updates(figured, llama):
    made, context = figured(flops=3e7)
    (each, kept), updates = (context.decisions()[name]["value"] for name in ("per_token", "updates"))
    assert made["kept_per_token"] == kept
    assert made["trained_parameters"] == sum(one.numel() for one in llama().parameters())
    a_token = 3 * 2 * (2 * (4 * 32**2 + 3 * 32 * 64) + 32 * 128)  # of the matrices alone; attention, and what predicts nothing, aside
    assert each == pytest.approx(a_token, rel=0.1)
    assert made["updates"] == updates
    assert made["flops"] == each * made["tokens"] == pytest.approx(3e7, rel=0.2)
    assert context.decisions()["updates"]["reason"].startswith("3e+07 operations at ")


def test_of_equal_operations_adapters_make_more_updates(figured, llama):
    frozen = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    one, two = figured(flops=3e7)[0], figured(frozen, "two", flops=3e7)[0]
    assert two["updates"] > 1.2 * one["updates"]
    assert one["flops"] == pytest.approx(two["flops"], rel=0.2)


@pytest.mark.parametrize(("optimizer", "times"), [(SAM(), 2), (MeZO(), 2 / 3), (MeZO(estimator="conservative"), 5 / 3)])
def test_every_pass_of_an_update_counts(figured, optimizer, times):
    one, two = figured(updates=2)[0], figured(folder="two", updates=2, optimizer=optimizer)[0]
    assert two["flops"] == pytest.approx(times * one["flops"])


def test_what_was_counted_stays_on_resume(figured, monkeypatch):
    first, _ = figured(flops=3e7)
    monkeypatch.setattr(learning, "operations", None)
    assert figured(flops=3e7)[0]["flops"] == first["flops"]


def test_operations_that_cannot_be_counted(figured, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(learning, "operations", refuse)
    made, context = figured(updates=2)
    assert "flops" not in made
    assert "floating-point operations are not counted: RuntimeError: no such kernel" in context.notes
    with pytest.raises(ValueError, match=r"cannot be counted \(RuntimeError: no such kernel\); give the length in updates or tokens"):
        figured(folder="two", flops=1e9)


def test_a_run_of_given_time(figured):
    made, context = figured(seconds=0.3, batching=Bucketed(size=4, tokens=64), compile="auto")
    assert made["updates"] >= 1
    assert 0.3 <= made["training_seconds"] < 10
    assert "updates" not in context.decisions(), "fused layers leave nothing to choose"


def test_a_run_of_given_time_is_measured_for_its_choices(tmp_path, go):
    made = go(updates=None, seconds=0.2).decisions()
    assert made["updates"]["reason"].startswith("about: an update's passes take ")
    assert made["layout"]["value"] in ("rows", "packed", "flat")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seconds": 5.0, "flops": 1e9}, "flops 1e+09 and seconds 5: a run's length is given once; leave one out"),
        ({"seconds": 5.0, "keep": (3,)}, "keep 3: a run of 5 s may end before; leave `keep` out, or give the length in updates"),
        ({"seconds": 0.0}, "seconds"),
    ],
)
def test_lengths_that_are_refused(settings, message):
    with pytest.raises(ValueError) as caught:
        Plain(**settings)
    assert message in str(caught.value)
