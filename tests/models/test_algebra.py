"""Laws of adapters as changes of weights, over every delta that there is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from test_peft_types import SMALL
from transformers import GPT2Config, GPT2LMHeadModel

from temper.models.deltas import attach, is_adapted, merge
from temper.models.deltas.algebra import Change, Factors, factors, put, save
from temper.models.deltas.delta import Delta, Lora
from temper.models.deltas.init import Default, Olora, Pissa
from temper.models.deltas.where import AllLinear, Names
from temper.parts import Problem, fill


def moved(model: Any, seed: int = 0, size: float = 0.05) -> Any:
    """The model with everything that it trains moved at random."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for one in model.parameters():
            if one.requires_grad:
                one += size * torch.randn(one.shape, generator=draw)
    return model.eval()


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits[:, -batch["input_ids"].shape[1] :][batch["attention_mask"].bool()]  # virtual tokens left out


def close(a, b, atol=3e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-4)


LORAS = [
    pytest.param(Lora(rank=3), Default(), id="lora"),
    pytest.param(Lora(rank=3, alpha=5.0, rank_stabilized=True), Default(), id="rank-stabilized"),
    pytest.param(Lora(rank=3), Pissa(), id="pissa"),
    pytest.param(Lora(rank=3), Olora(), id="olora"),
    pytest.param(Lora(rank=3, dora=True), Default(), id="dora"),
    pytest.param(Lora(rank=3, alpha=7.0, dora=True, rank_stabilized=True), Default(), id="dora, rank-stabilized"),
]


@pytest.mark.parametrize(("delta", "init"), LORAS)
def test_a_change_at_weight_one_is_the_adapter(tiny, batch, delta, init):
    model = moved(attach(tiny(), AllLinear(), delta, init, seed=0))
    change = factors(model)
    wanted = logits(model, batch)
    close(logits(put(tiny(), 1.0 * change), batch), wanted)
    assert not change.errors
    full = 32 if delta.dora else 6 if init != Default() else 3
    assert max(one.rank for one in change.modules.values()) == full
    close(logits(model, batch), wanted)  # and the model is as it was


QUESTION = Delta.__slot__
OURS = {
    "entries": {"by": "random", "share": 0.05},
    "lora": {"rank": 3},
    "side-ladder": {"shrink": 4},
    "svd-triplet": {"rank": 3},
    "tri-factor": {"rank": 4},
}
RANKS = {"lora": 3, "svd-triplet": 3, "tri-factor": 4, "delora": 8, "peft-lora": 8, "trainable-tokens": 4, "tinylora": 3}
"""Ranks that a type's own settings say; the embeddings of four tokens are four directions."""
NO_CHANGE = {
    "adaption-prompt": "is no change of weights",
    "beft": "Base layer has no bias",
    "cartridge": "is no change of weights",
    "ln-tuning": "a LlamaRMSNorm, changes no matrix",
    "low-rank-experts": "change each token in a way of its own",
    "p-tuning": "is no change of weights",
    "prefix-tuning": "is no change of weights",
    "prompt-tuning": "is no change of weights",
    "side-ladder": "a Ladder, changes no matrix",
}
"""Deltas that no factors say, and why."""
NOT_UNMERGED = {"osf": "do not support unmerging"}
EVERY = sorted(name for name, part in QUESTION.parts().items() if part.kind == "adapter")


@pytest.mark.parametrize("name", EVERY)
def test_every_adapter_is_a_change_or_says_why_not(name, tiny, batch):
    """At weight one the change computes what the adapter does, whatever its type; merged and unmerged again the adapter is as it was."""
    before = logits(tiny(), batch)
    model = moved(attach(tiny(), None, fill(QUESTION, {name: {**SMALL, **OURS}.get(name, {})}), Default(), seed=1))
    wanted = logits(model, batch)
    assert (wanted - before).abs().max() > 0.02
    if name in NO_CHANGE:
        with pytest.raises(Problem, match=NO_CHANGE[name]):
            factors(model)
    else:
        change = factors(model)
        assert not change.errors
        assert RANKS.get(name) in (None, max(one.rank for one in change.modules.values()))
        close(logits(put(tiny(), 1.0 * change), batch), wanted, atol=5e-5)
        close(logits(put(tiny(), change - 1.0 * change), batch), before, atol=5e-5)
    assert torch.equal(logits(model, batch), wanted)  # asked or refused, the model is as it was
    if name in NO_CHANGE and name != "ln-tuning":
        with pytest.raises(Problem):
            merge(model)
        return
    inner: Any = model
    inner.merge_adapter()
    close(logits(model, batch), wanted, atol=5e-5)
    if name in NOT_UNMERGED:
        with pytest.raises(NotImplementedError, match=NOT_UNMERGED[name]):
            inner.unmerge_adapter()
        return
    inner.unmerge_adapter()
    close(logits(model, batch), wanted, atol=5e-5)
    with inner.disable_adapter():
        close(logits(model, batch), before, atol=5e-5)
    merged = merge(model)
    assert not is_adapted(merged)
    close(logits(merged, batch), wanted, atol=5e-5)


def test_changes_add_up_and_cancel(tiny, batch):
    one, two = (moved(attach(tiny(), AllLinear(), Lora(rank=rank), Default(), seed=rank), seed=rank) for rank in (2, 3))
    a, b = factors(one), factors(two)
    both = a + b
    for name, made in both.modules.items():
        assert made.rank == 5
        close(made.dense(), a.modules[name].dense() + b.modules[name].dense())
    merged = merge(copy.deepcopy(one))
    close(logits(put(tiny(), both), batch), logits(put(merged, b), batch))  # one after the other is both at once
    close(logits(put(tiny(), both - b), batch), logits(one, batch))
    close(logits(put(tiny(), a - a), batch), logits(tiny(), batch))
    close(logits(put(tiny(), -0.5 * a + 1.5 * a), batch), logits(one, batch))


def test_a_neighbour_on_the_same_base_is_unharmed(tiny, batch):
    """A PiSSA adapter changes its base in memory; as a change it sits on the base as it was, beside any other."""
    plain = moved(attach(tiny(), AllLinear(), Lora(rank=3), Default(), seed=1), seed=1)
    principal = moved(attach(tiny(), AllLinear(), Lora(rank=4), Pissa(), seed=2), seed=2)
    a, b = factors(plain), factors(principal)
    beside: Any = put(tiny(), a)
    close(logits(beside, batch), logits(plain, batch))
    weights = merge(copy.deepcopy(plain)).state_dict(), merge(copy.deepcopy(principal)).state_dict(), tiny().state_dict()
    together = merge(put(tiny(), a + b)).state_dict()
    for name, one in together.items():
        close(one, weights[0][name] + weights[1][name] - weights[2][name])


def test_cutting_gives_the_best_of_a_rank_and_says_what_it_loses(tiny):
    model = moved(attach(tiny(), AllLinear(), Lora(rank=6), Default(), seed=0), size=0.2)
    change = factors(model)
    cut = change.cut(2)
    for name, one in cut.modules.items():
        dense = change.modules[name].dense().double()
        s = torch.linalg.svdvals(dense)
        lost = torch.linalg.matrix_norm(one.dense().double() - dense)
        torch.testing.assert_close(lost, s[2:].square().sum().sqrt(), rtol=1e-4, atol=1e-6)  # Eckart and Young
        assert cut.errors[name] == pytest.approx(float(s[2:].square().sum().sqrt() / s.square().sum().sqrt()), rel=1e-4)
    assert cut.parameters == change.parameters / 3
    assert change.cut(6) == change
    assert not (0.0 * change).cut(1).errors
    dora = factors(moved(attach(tiny(), AllLinear(), Lora(rank=3, dora=True), Default(), seed=0)), rank=5)
    assert {one.rank for one in dora.modules.values()} == {5}
    assert all(0 < error < 1 for error in dora.errors.values())


def test_what_is_saved_loads_with_peft_alone(tiny, batch, tmp_path):
    first = moved(attach(tiny(), Names(("q_proj", "up_proj")), Lora(rank=3), Default(), seed=0))
    second = moved(attach(tiny(), Names(("layers.0.*.q_proj", "embed_tokens")), Lora(rank=2), Default(), seed=1), seed=1)
    change = factors(first) + factors(second)
    save(change, tiny(), tmp_path, "base")
    close(logits(PeftModel.from_pretrained(tiny(), tmp_path), batch), logits(put(tiny(), change), batch))
    weights = merge(copy.deepcopy(first)).state_dict(), merge(copy.deepcopy(second)).state_dict(), tiny().state_dict()
    for name, one in merge(put(tiny(), change)).state_dict().items():
        close(one, weights[0][name] + weights[1][name] - weights[2][name])


def test_transposed_weights(batch):
    base = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=4)).eval()
    config = LoraConfig(r=3, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, use_dora=True)
    model = moved(get_peft_model(copy.deepcopy(base), config))
    close(logits(put(copy.deepcopy(base), factors(model)), batch), logits(model, batch))


def test_refusals(tiny, tmp_path):
    def head(size: int) -> Change:
        return Change({"lm_head": Factors(torch.ones(1, 3), torch.ones(size, 1))})

    with pytest.raises(Problem, match="carries no adapter"):
        factors(tiny())
    model = attach(tiny(), AllLinear(), Lora(rank=2), Default(), seed=0)
    with pytest.raises(Problem, match="no adapter `other`; it has default"):
        factors(model, "other")
    with pytest.raises(Problem, match="PROMPT_TUNING adapter is no change of weights"):
        factors(get_peft_model(tiny(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)))
    with pytest.raises(Problem, match=r"holds more than changes of weights: `lm_head\.weight`"):
        factors(get_peft_model(tiny(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])))
    with pytest.raises(Problem, match="`lm_head` is 2 x 3 in one change and 4 x 3 in the other"):
        head(2) + head(4)
    with pytest.raises(Problem, match="no module `nowhere`"):
        save(Change({"nowhere": head(2).modules["lm_head"]}), tiny(), tmp_path, "base")
    with pytest.raises(Problem, match="the change is empty"):
        put(tiny(), Change({}))
