from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import peft
import pytest
import torch
from align_toys import artefact, tiny
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from temper import parts
from temper.align import engine, layout, methods
from temper.align.engine import Align
from temper.align.likelihood import PerToken
from temper.align.loss import DPO, SFT
from temper.align.reward import Reward
from temper.align.source import Attempts
from temper.context import Context
from temper.models import io
from temper.models.constraints import magnitude_mask
from temper.models.deltas import attach, merge
from temper.models.deltas.base import Merged
from temper.models.deltas.delta import Full, Lora
from temper.models.deltas.init import Default, Pissa
from temper.models.deltas.where import free_linears
from temper.models.parametrizations import attach as constrain
from temper.parts import Function, Problem
from temper.passport import Artefact, Inputs, Passport
from temper.train.batching import Bucketed
from temper.train.examples import encode
from temper.train.optimizers import AdamW

SHORT: dict[str, Any] = {"batching": Bucketed(size=8), "optimizer": AdamW(lr=1e-2, weight_decay=0.0), "updates": 12, "precision": "float32"}


def aligned(folder, spec, model, data, **context):
    made = Context.scratch(folder)
    made = dataclasses.replace(made, **context)
    output = engine.run(spec, Inputs(model=model, data=data), made)
    return output, made


def left(output, context, id_="aligned-id") -> Artefact:
    """What the run left, with its base as the store would find it."""
    assert (output.base is not None) == (output.passport.kind == "adapter")
    return artefact(context.out, id_, output.base)


@pytest.fixture(scope="session")
def tuned(tmp_path_factory, policy, tokenizer) -> Artefact:
    """An adapter on the policy that computes something of its own."""
    model = attach(tiny(), None, Lora(rank=4), Default(), seed=1)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, one in model.named_parameters():
            if "lora_B" in name:
                one.copy_(0.1 * torch.randn(one.shape, generator=draw))
    path = tmp_path_factory.mktemp("tuned")
    io.save_adapter(model, tokenizer, path / "model", "policy")
    return artefact(path, "tuned-id", policy)


IDS = torch.tensor([[12, 4, 5, 6, 15, 4, 5]])


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


# ----------------------------------------------------------------------------------------------------------- the run


def test_dpo_raises_the_margin_of_held_out_pairs(tmp_path, policy, pairs_data):
    output, context = aligned(tmp_path, Align(**SHORT, evaluate_every=6), policy, pairs_data)
    figures = output.figures
    assert figures["heldout_margin"].low > 1
    assert figures["heldout_reward_accuracy"].value == 1
    assert figures["heldout_preference_accuracy"].value > figures["heldout_preference_accuracy_before"].value
    assert 0 < figures["heldout_kl"].value < 10
    assert figures["heldout_kl"].n == figures["heldout_margin"].n == 8
    assert figures["pairs"].value == 16
    curve = [row for row in context.curve() if "heldout_margin" in row]
    assert [row["step"] for row in curve] == [6, 12]
    assert 0 < curve[0]["heldout_margin"] < curve[1]["heldout_margin"]
    assert curve[1]["heldout_margin"] == pytest.approx(figures["heldout_margin"].value, rel=1e-5)
    first = context.curve()[0]
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5)  # log 2: the policy is its reference
    assert first["margin"] == pytest.approx(0, abs=1e-5)
    assert first["kl"] == pytest.approx(0, abs=1e-10)
    assert not any(note.startswith("layers compute as they are") for note in context.notes)  # of the reference neither


def test_either_layout_of_the_pairs_trains_the_same_policy(tmp_path, policy, pairs_data, monkeypatch):
    found, chosen = {}, layout.choose
    for way in ("one row", "two rows"):
        monkeypatch.setattr(layout, "choose", chosen if way == "one row" else lambda *_: ("two rows", "a test"))
        output, context = aligned(tmp_path / way, Align(**SHORT, evaluate_every=6), policy, pairs_data)
        assert context.decisions()["pairs"]["value"] == way
        found[way] = (
            {name: figure.value for name, figure in output.figures.items() if figure.unit not in ("s", "FLOP", "bytes")},
            [row["loss"] for row in context.curve() if "loss" in row],
        )
    (one, losses), (two, others) = found.values()
    assert one == pytest.approx(two, rel=1e-3)
    assert losses == pytest.approx(others, rel=1e-3)


def test_what_is_left_is_an_adapter_that_peft_reads_alone(tmp_path, policy, pairs_data):
    output, context = aligned(tmp_path, Align(**SHORT), policy, pairs_data)
    passport = output.passport
    assert (passport.kind, passport.reference, passport.numbers) == ("adapter", "policy-id", "float32")
    assert output.base is policy
    base = AutoModelForCausalLM.from_pretrained(policy.model)
    plain = logits(base)
    alone = peft.PeftModel.from_pretrained(base, context.out / "model")
    ours = io.load_model(left(output, context))
    assert torch.equal(logits(alone), logits(ours))
    assert not torch.allclose(logits(ours), plain, atol=0.1)
    assert (context.out / "model" / "tokenizer.json").is_file()


def test_full_leaves_a_model_and_keeps_what_is_asked(tmp_path, policy, pairs_data):
    spec = Align(**SHORT | {"optimizer": AdamW(lr=1e-3)}, delta=Full(), keep=(4,))
    output, context = aligned(tmp_path, spec, policy, pairs_data)
    assert output.passport.kind == "model"
    kept, end = (io.load_model(context.out / name / "model") for name in ("checkpoints/4", ""))
    assert not torch.equal(logits(kept), logits(end))
    assert output.figures["heldout_margin"].low > 0


def test_checked_attempts(tmp_path, policy, questions_data):
    source = Attempts(count=32, max_new_tokens=2, pairs_per_prompt=2, gold=True)
    output, context = aligned(tmp_path, Align(**SHORT, source=source, loss=(DPO(), SFT(weight=0.1))), policy, questions_data)
    figures = output.figures
    assert figures["heldout_margin"].value > 0
    assert figures["reward_before"].n == 16
    assert figures["heldout_reward_before"].n == 8
    assert figures["pairs"].value >= 16  # gold stands in
    assert any("16 prompts, 32 attempts each" in note for note in context.notes)


def test_no_pair_is_an_error_with_the_remedy(tmp_path, policy, questions_data):
    (tmp_path / "mine.py").write_text("def nothing(row, responses):\n    return [0.0] * len(responses)\n")
    reward = parts.fill(Reward.__slot__, "mine.py:nothing", scope=parts.Scope(tmp_path))
    spec = Align(**SHORT, source=Attempts(count=2, max_new_tokens=1), reward=reward)
    with pytest.raises(Problem, match=r"no pair to learn from: 16 prompts, 2 attempts each, mean reward 0: 0 pairs.*raise `count`"):
        aligned(tmp_path, spec, policy, questions_data)


def test_data_without_held_out_rows(tmp_path, policy, pairs_data):
    def refused(split, load=pairs_data.load):
        if split == "test":
            raise Problem("no rows are held out")
        return load(split)

    pairs_data.load = refused
    output, context = aligned(tmp_path, Align(**SHORT | {"updates": 1}), policy, pairs_data)
    assert "no held-out pairs: no rows are held out" in context.notes
    assert not [name for name in output.figures if name.startswith("heldout")]


# -------------------------------------------------------------------------------------------------------- resuming


class Stop(Exception):
    pass


@pytest.mark.parametrize("source", ["given", "attempts"])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path, policy, pairs_data, questions_data, source, monkeypatch):
    spec, data = Align(**SHORT, checkpoint_every=4), pairs_data
    if source == "attempts":
        spec = dataclasses.replace(spec, source=Attempts(count=32, max_new_tokens=2))
        data = questions_data
    aligned(tmp_path / "whole", spec, policy, data)

    def stop(track):
        if track.unit == "update" and track.done == 7:
            raise Stop

    with pytest.raises(Stop):
        aligned(tmp_path / "torn", spec, policy, data, show=stop)
    made = {file: file.stat().st_mtime_ns for file in (tmp_path / "torn" / "work").rglob("*") if file.suffix in (".json", ".safetensors")}
    monkeypatch.setattr("temper.align.reference.response_logprobs", None)  # would fail if it were asked again
    monkeypatch.setattr("temper.align.source.sample", None)
    _, context = aligned(tmp_path / "torn", spec, policy, data)
    kept = [file for file in made if file.name == "reference.safetensors" or file.parent.name == "attempts"]
    assert len(kept) == (1 if source == "given" else 3)
    assert all(file.stat().st_mtime_ns == made[file] for file in kept)
    one, two = (load_file(tmp_path / name / "out" / "model" / "adapter_model.safetensors") for name in ("whole", "torn"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert [row["step"] for row in context.curve() if "loss" in row] == list(range(1, 13))


# ---------------------------------------------------------------------------------------------------------- chains


def test_an_adapter_that_comes_in_goes_on(tmp_path, policy, tuned, pairs_data):
    before = logits(io.load_model(tuned))
    output, context = aligned(tmp_path, Align(**SHORT), tuned, pairs_data)
    assert output.passport.kind == "adapter"
    assert output.passport.reference == "tuned-id"
    assert output.base is policy
    assert context.curve()[0]["loss"] == pytest.approx(0.693147, abs=1e-5)  # the reference is the adapted policy, not its base
    made = left(output, context)
    assert peft.PeftConfig.from_pretrained(made.model).r == 4  # its own rank, not that of a new one
    assert not torch.allclose(logits(io.load_model(made)), before, atol=0.1)
    assert output.figures["heldout_margin"].low > 1


def test_an_adapter_that_comes_in_is_merged_where_asked(tmp_path, policy, tuned, pairs_data):
    output, context = aligned(tmp_path / "lora", Align(**SHORT, base=Merged()), tuned, pairs_data)
    assert output.passport.kind == "adapter"
    assert output.base is tuned  # the new adapter sits on what the incoming one computes
    made = left(output, context)
    assert peft.PeftConfig.from_pretrained(made.model).r == 8
    margin = output.figures["heldout_margin"].value
    assert margin > 1
    assert _margin(made, tuned, pairs_data) == pytest.approx(margin, rel=1e-4)

    output, context = aligned(
        tmp_path / "full", Align(**SHORT | {"optimizer": AdamW(lr=1e-3)}, base=Merged(), delta=Full()), tuned, pairs_data
    )
    assert (output.passport.kind, output.base) == ("model", None)
    assert _margin(left(output, context), tuned, pairs_data) == pytest.approx(output.figures["heldout_margin"].value, rel=1e-4)


def _margin(made, reference, data) -> float:
    """The mean margin of held-out pairs, from both models as they are read from disk."""
    from temper.align.layout import response_logprobs
    from temper.align.likelihood import Whole
    from temper.align.scores import compare
    from temper.train.batching import collate

    batch = collate(encode(data.load("test"), io.load_tokenizer(made), max_length=64))
    with torch.no_grad():
        one, two = (response_logprobs(merge(io.load_model(each)), batch) for each in (made, reference))
    return compare(one, two, batch.supervised, Whole()).margin.mean().item()


def test_a_policy_that_moved_before_step_0_is_refused(tmp_path, policy, pairs_data, monkeypatch):
    def moved(model, *_):
        with torch.no_grad():
            model.lm_head.weight.mul_(1.05)
        return model.requires_grad_(True), None

    monkeypatch.setattr(engine, "put_on", moved)
    with pytest.raises(
        Problem, match=r"before the first update the policy is 0\.\d+ nats per token from its reference.*use `init: default`"
    ):
        aligned(tmp_path, Align(**SHORT), policy, pairs_data)


def test_an_init_that_splits_the_base_starts_at_the_reference(tmp_path, policy, pairs_data):
    output, context = aligned(tmp_path, Align(**SHORT, init=Pissa()), policy, pairs_data)
    assert context.curve()[0]["kl"] < 1e-5
    assert _margin(left(output, context), policy, pairs_data) == pytest.approx(output.figures["heldout_margin"].value, rel=1e-3)


def test_bf16_starts_within_its_rounding(tmp_path, policy, pairs_data):
    output, context = aligned(tmp_path, Align(**SHORT | {"precision": "bf16"}), policy, pairs_data)
    assert context.curve()[0]["kl"] < 1e-2
    assert output.figures["heldout_margin"].low > 1


@pytest.mark.parametrize("delta", [Full(), Lora()], ids=["full", "lora"])
def test_a_mask_holds(tmp_path, policy, pairs_data, tokenizer, delta):
    model, masks = tiny(), {}
    for name in free_linears(model):
        masks[name] = magnitude_mask(model.get_submodule(name).weight.detach(), 0.5)
    io.save_model(constrain(model, masks), tokenizer, tmp_path / "pruned" / "model")
    pruned = artefact(tmp_path / "pruned", "pruned-id")
    output, context = aligned(tmp_path, Align(**SHORT, delta=delta), pruned, pairs_data)
    assert (output.passport.kind, output.passport.reference) == ("model", "pruned-id")
    assert output.figures["heldout_margin"].low > 0.5
    made = left(output, context)
    assert made.passport.mask == pruned.passport.mask == pytest.approx(0.5, abs=0.01)
    before, after = (io.load_model(one, constraints=False).state_dict() for one in (pruned, made))
    for name in masks:
        one, two = before[f"{name}.weight"], after[f"{name}.weight"]
        assert torch.equal(one == 0, two == 0)
        assert not torch.equal(one, two)


# ------------------------------------------------------------------------------------------- what is known beforehand

MODEL = Passport("model", base="b", tokenizer="t", template="c", numbers="float32", architecture="LlamaForCausalLM", parameters=10)
PAIRS, QUESTIONS, CHATS = (Passport(kind, origin="rows.jsonl") for kind in ("preference", "completion", "chat"))


def test_passport():
    made = engine.passport(Align(), {"model": MODEL, "data": PAIRS})
    assert (made.kind, made.reference, made.base, made.tokenizer) == ("adapter", "?", "b", "t")
    assert engine.passport(Align(delta=Full()), {"model": MODEL, "data": PAIRS}).kind == "model"
    quantised = dataclasses.replace(MODEL, numbers="int4-g32-sym")
    assert engine.passport(Align(), {"model": quantised, "data": PAIRS}).kind == "adapter"


@pytest.mark.parametrize(
    ("settings", "parents", "text"),
    [
        (
            {},
            {"data": QUESTIONS},
            "`source`: takes preference rows; rows.jsonl holds completion rows: give such rows, or write `source: attempts`",
        ),
        (
            {"source": Attempts()},
            {"data": PAIRS},
            "`source`: takes completion or chat rows; rows.jsonl holds preference rows: give such rows, or write `source: given`",
        ),
        (
            {"reward": Function("mine.py:f", "0")},
            {},
            "`reward`: the pairs that the data give are not rewarded; leave `reward` out, or write `source: attempts`",
        ),
        (
            {"source": Attempts()},
            {"data": CHATS, "model": dataclasses.replace(MODEL, template=None)},
            "`data`: chats need a chat template and the model's tokenizer has none; put a chat_template.jinja into the model's folder, "
            "or give rows with `prompt` and `completion`",
        ),
        (
            {},
            {"model": dataclasses.replace(MODEL, tokenizer=None)},
            "`model`: the model has no tokenizer, which training needs; put `tokenizer.json` into its folder",
        ),
        (
            {"delta": Full()},
            {"model": dataclasses.replace(MODEL, kind="adapter")},
            "`base`: an adapter comes in, and delta `full` trains the weights under it; write `base: merged`",
        ),
    ],
)
def test_refused_before_any_compute(settings, parents, text):
    with pytest.raises(Problem) as caught:
        engine.passport(Align(**settings), {"model": MODEL, "data": PAIRS, **parents})
    assert str(caught.value) == text


def test_a_spec_from_what_a_user_writes():
    made = parts.build(Align, {"source": {"attempts": {"gold": True}}, "loss": ["dpo", {"sft": {"weight": 0.1}}], "likelihood": "mean"})
    assert made.loss == (DPO(), SFT(weight=0.1))
    assert (made.likelihood, made.source) == (PerToken(), Attempts(gold=True))
    with pytest.raises(Problem, match="`source`: slot `source` takes one part, not a list"):
        parts.build(Align, {"source": ["given", "attempts"]})
    with pytest.raises(Problem, match="`reference`: slot `reference` cannot be empty"):
        parts.build(Align, {"reference": "none"})


def test_methods():
    found = parts.methods("align")
    assert set(found) == {"dpo", "length-normalized-dpo", "checked-dpo"}
    assert parts.method("align", "DPO") is methods.DPO
    slots = [row.slot for row in parts.describe(found["checked-dpo"], engine.PROVIDES)]
    assert slots.index("reference") < slots.index("loss")


def test_nothing_heavy_is_imported():
    heavy = ("torch", "numpy", "transformers", "peft")
    code = f"import sys, temper.align.engine, temper.align.methods; print([one for one in {heavy} if one in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
