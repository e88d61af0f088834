"""Laws that every adapter type of peft keeps as a part of slot `delta`; where a type does not keep one, it stands below with the reason."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path

import peft
import pytest
import torch

from temper.models import io
from temper.models.deltas import attach, continue_adapter, is_adapted, merge, peft_types, trainable_parameters
from temper.models.deltas.delta import Delta
from temper.models.deltas.init import Default
from temper.models.deltas.where import Names
from temper.models.sample import sample
from temper.parts import Problem, build, documented, fill, settings
from temper.passport import Passport
from temper.tune.engine import Tune

QUESTION = Delta.__slot__
SMALL = {
    "adamss": {"r": 8, "num_subspaces": 2},
    "adaption-prompt": {"adapter_len": 3},
    "c3a": {"block_size": 16},
    "cartridge": {"num_virtual_tokens": 3},
    "fourierft": {"n_frequency": 40},
    "miss": {"r": 8},
    "p-tuning": {"num_virtual_tokens": 3, "encoder_hidden_size": 16},
    "prefix-tuning": {"num_virtual_tokens": 3},
    "prompt-tuning": {"num_virtual_tokens": 3},
    "psoft": {"r": 4},
    "road": {"group_size": 16},
    "shira": {"r": 2},
    "trainable-tokens": {"token_indices": [5, 7, 9, 22]},
    "vblora": {"vector_length": 16, "num_vectors": 8},
    "waveft": {"n_frequency": 40},
}
"""Settings that suit a model of width 32."""

NOT_IDENTITY = {
    "c3a": "its blocks are drawn (`init_weights: true` starts them at 0)",
    "cartridge": "the keys and values are drawn",
    "fourierft": "the coefficients are drawn (`init_weights: true` starts them at 0)",
    "p-tuning": "the embeddings are drawn",
    "prefix-tuning": "the keys and values are drawn (`init_weights: zero` starts them at 0, where they still draw attention)",
    "prompt-tuning": "the embeddings are drawn (init `vocabulary` takes those of words)",
    "unilora": "the vector is drawn",
    "vblora": "the bank is drawn",
}
NOT_MERGED = {
    "adaption-prompt": "no way to merge",
    "beft": "Base layer has no bias",
    "cartridge": "is no change of weights",
    "p-tuning": "is no change of weights",
    "prefix-tuning": "is no change of weights",
    "prompt-tuning": "is no change of weights",
}
REFUSED = {
    "adalora": "use delta `svd-triplet` with budget",
    "cpt": "its own loss",
    "lily": "an average over the whole batch",
    "multitask-prompt-tuning": "every row's task",
    "poly": "every row's task",
    "shadow": "a second loss",
    "xlora": "adapters that are trained already",
}
TYPES = sorted(name for name in peft_types.TABLE["types"] if name not in REFUSED)
EVERY = pytest.mark.parametrize("name", TYPES)


def made(name, **changes):
    return fill(QUESTION, {name: {**SMALL.get(name, {}), **changes}})


def put_on(model, name, **changes):
    return attach(model, None, made(name, **changes), Default(), seed=1).eval()


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits[:, -12:][batch["attention_mask"].bool()]


def train(model, batch, steps=2):
    """Updates of what is trained; the names of what got no gradient."""
    held = trainable_parameters(model)
    optimizer = torch.optim.Adam(held.values(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).loss.backward()
        optimizer.step()
    return [name for name, one in held.items() if one.grad is None]


def tool():
    file = Path(__file__).parents[2] / "tools" / "peft_types.py"
    spec = importlib.util.spec_from_file_location("peft_types_tool", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_what_the_installed_peft_says():
    assert json.loads(json.dumps(tool().made())) == peft_types.TABLE, "run `python tools/peft_types.py`"
    own = {kind for kind, config in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items() if config.__module__.startswith("peft.")}
    assert {row["type"] for row in peft_types.TABLE["types"].values()} == {kind.value for kind in own}


@EVERY
def test_what_a_setting_leaves_unsaid_is_as_in_peft(name):
    kind = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft_types.TABLE["types"][name]["type"]]
    fields = {field.name: field for field in dataclasses.fields(kind)}
    part = QUESTION.parts()[name]
    for setting, told in settings(part).items():
        default = fields[setting].default
        if default is not dataclasses.MISSING and default is not None:
            assert told.default == getattr(default, "value", default)
    assert set(documented(part)) == set(settings(part))


@EVERY
def test_laws(name, tiny, batch, tmp_path):
    before = logits(tiny(), batch)
    model = put_on(tiny(), name)
    assert is_adapted(model)
    held = set(trainable_parameters(model))
    assert held
    frozen = {key: one.detach().clone() for key, one in model.named_parameters() if key not in held}
    difference = (logits(model, batch) - before).abs().max()
    assert (difference > 1e-4) == (name in NOT_IDENTITY)
    # exactly the adapter's own parameters train
    fresh = logits(model, batch)
    assert not train(model, batch)
    after = logits(model, batch)
    assert (after - fresh).abs().max() > 1e-6
    assert all(torch.equal(one, frozen[key]) for key, one in model.named_parameters() if key not in held)
    assert set(trainable_parameters(model)) == held
    # the folder holds it
    tiny().save_pretrained(tmp_path / "base")
    io.save_adapter(model, None, tmp_path / "adapter", "base")
    loaded = io._load_adapter(tiny(), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(loaded, batch), after, atol=1e-6, rtol=0)
    # and goes on from it
    if name == "p-tuning":
        with pytest.raises(Problem, match="cannot go on training"):
            continue_adapter(loaded)
    else:
        assert set(trainable_parameters(continue_adapter(loaded))) == held
        torch.testing.assert_close(logits(loaded.eval(), batch), after, atol=1e-6, rtol=0)
    # a text does not depend on the others in its batch, and the sampler computes what a full pass does
    with torch.no_grad():
        alone = model(input_ids=batch["input_ids"][1:2, :8], attention_mask=torch.ones(1, 8)).logits[0, -8:]
    torch.testing.assert_close(after[12:20], alone, atol=1e-5, rtol=1e-4)
    (made,) = sample(model, [[4, 9, 21]], max_new_tokens=4, temperature=0, stop=())
    with torch.no_grad():
        full = model(input_ids=torch.tensor([[4, 9, 21, *made.tokens]]), use_cache=False).logits[0, -7:].log_softmax(-1)
    wanted = full[2:6].gather(-1, torch.tensor(made.tokens)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(made.logprobs), wanted, atol=1e-5, rtol=0)
    # merged is unmerged, or it is refused
    if name in NOT_MERGED:
        with pytest.raises(Problem, match=NOT_MERGED[name]):
            merge(model)
        return
    merged = merge(model)
    assert not is_adapted(merged)
    assert set(merged.state_dict()) == set(tiny().state_dict())
    torch.testing.assert_close(logits(merged, batch), after, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_cannot_be_trained_here_says_why(name):
    with pytest.raises(Problem, match=f"`{name}` .*{REFUSED[name]}"):
        build(Tune, {"delta": name})
    assert name not in QUESTION.parts()
    assert set(peft_types.refused()) == set(REFUSED)


def test_an_older_peft_is_told_apart(tiny, monkeypatch):
    mapping = dict(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING)
    del mapping[peft.PeftType.VERA]
    older = dataclasses.make_dataclass("OFTConfig", [("oft_block_size", int, 32)], bases=(peft.PeftConfig,))
    mapping[peft.PeftType.OFT] = older
    monkeypatch.setattr(peft.mapping, "PEFT_TYPE_TO_CONFIG_MAPPING", mapping)
    with pytest.raises(Problem, match=r"peft [\d.]+ has no adapter type VERA, and peft [\d.]+ has; upgrade peft"):
        put_on(tiny(), "vera")
    with pytest.raises(Problem, match=r"OFT of peft [\d.]+ has no setting `coft`, and that of peft [\d.]+ has; upgrade peft"):
        put_on(tiny(), "oft", coft=True)


def test_what_does_not_fit_is_refused(tiny):
    with pytest.raises(Problem, match=r"`c3a` does not go onto LlamaForCausalLM: .*block size should be a factor"):
        put_on(tiny(), "c3a", block_size=17)
    with pytest.raises(Problem, match=r"`vera` goes to linear layers and embeddings, and `model.norm` is a LlamaRMSNorm"):
        attach(tiny(), Names(("model.norm",)), made("vera"), Default(), seed=0)
    with pytest.raises(Problem, match="`prompt-tuning` brings its own places; leave `where` out"):
        attach(tiny(), Names(("q_proj",)), made("prompt-tuning"), Default(), seed=0)
    with pytest.raises(Problem, match="the model is pruned"):
        made("oft").fits(Passport("model", mask=0.5))
    with pytest.raises(Problem, match="`prefix-tuning` stands before the tokens of a causal language model, and this is BertForMaskedLM"):
        made("prefix-tuning").fits(Passport("model", architecture="BertForMaskedLM"))
