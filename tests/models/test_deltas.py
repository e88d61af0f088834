"""Laws of deltas: a fresh one changes nothing, merged equals unmerged, an adapter on the untouched base equals the trained model."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, VeraConfig, get_peft_model, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, GPT2Config

from temper.context import Context
from temper.models.constraints import OnGrid, magnitude_mask
from temper.models.deltas import attach, continue_adapter, is_adapted, merge, prepare, to_plain_lora, trainable_parameters
from temper.models.deltas.base import AsLoaded, Base, Merged
from temper.models.deltas.delta import Delta, Full, Lora
from temper.models.deltas.init import Default, Gaussian, Init, Olora, Pissa, low_rank_layers
from temper.models.deltas.where import AllLinear, Attention, Everything, Mlp, Names, Where
from temper.models.grids import Integer, ranges
from temper.models.parametrizations import attach as constrain
from temper.models.parametrizations import constraints, fold
from temper.parts import Problem, describe, fill, spec
from temper.parts import Slot as SlotOf

LORAS = [
    Lora(rank=3),
    Lora(rank=3, rank_stabilized=True),
    Lora(rank=3, dora=True),
    Lora(rank=3, alpha=5.0, dora=True, rank_stabilized=True),
]
INITS = [Default(), Gaussian(), Pissa(), Olora()]


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits[batch["attention_mask"].bool()]


def train(model, batch, steps=3, rate=0.02):
    """A few steps that move every trained number."""
    optimizer = torch.optim.SGD(trainable_parameters(model).values(), lr=rate)
    for _ in range(steps):
        out = model(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    return model.eval()


def close(a, b, atol=2e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------------- where


def test_all_linear_leaves_the_head_and_tied_weights(tiny):
    names = AllLinear()(tiny())
    assert len(names) == 14
    assert "lm_head" not in names
    model = tiny(tie_word_embeddings=True)
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    assert set(AllLinear()(tiny())) - set(AllLinear()(model)) == {f"model.layers.{i}.mlp.up_proj" for i in (0, 1)}


def test_attention_and_mlp_part_the_linear_layers(tiny):
    model = tiny()
    attention, mlp = Attention()(model), Mlp()(model)
    assert attention == [name for name in AllLinear()(model) if ".self_attn." in name]
    assert mlp == [name for name in AllLinear()(model) if ".mlp." in name]
    gpt = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=32))
    assert Attention()(gpt) == ["transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_proj"]
    assert Mlp()(gpt) == ["transformer.h.0.mlp.c_fc", "transformer.h.0.mlp.c_proj"]


def test_names(tiny):
    model = tiny()
    assert Names(("q_proj",))(model) == ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    assert Names(("layers.1.mlp.*", "model.norm"))(model) == [
        *(f"model.layers.1.mlp.{one}_proj" for one in ("gate", "up", "down")),
        "model.norm",
    ]
    assert Names(("model.layers.?.self_attn.[qk]_proj",))(model) == [
        f"model.layers.{i}.self_attn.{one}_proj" for i in (0, 1) for one in "qk"
    ]


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        ("q_prj", "`patterns`: no module of LlamaForCausalLM matches `q_prj`; did you mean `q_proj`?"),
        (
            "model.layers.0.self_atn.q_proj",
            "`patterns`: no module of LlamaForCausalLM matches `model.layers.0.self_atn.q_proj`; "
            "did you mean `model.layers.0.self_attn.q_proj`?",
        ),
        (
            "zzz",
            "`patterns`: no module of LlamaForCausalLM matches `zzz`; there is `down_proj` · `embed_tokens` · `gate_proj` · "
            "`input_layernorm` · `k_proj` · `lm_head` · `norm` · `o_proj` · `post_attention_layernorm` · `q_proj` · `up_proj` · `v_proj`",
        ),
    ],
)
def test_a_name_that_matches_nothing(tiny, pattern, told):
    with pytest.raises(Problem) as caught:
        Names(("q_proj", pattern))(tiny())
    assert str(caught.value) == told


def test_places_that_are_not_there(tiny):
    bare = torch.nn.Module()
    bare.add_module("norm", torch.nn.LayerNorm(4))
    with pytest.raises(Problem, match="Module has no linear layer besides its head"):
        AllLinear()(bare)
    model = tiny()
    for layer in model.model.layers:
        layer.mixer = layer.self_attn
        del layer.self_attn
    with pytest.raises(
        Problem, match="no linear layer of LlamaForCausalLM is known as attention by its name; name the layers with `names`"
    ):
        Attention()(model)
    with pytest.raises(Problem, match="`names` has no patterns"):
        Names(())(model)


# ------------------------------------------------------------------------------------------------------------ attach


def test_what_is_trained(tiny):
    total = sum(one.numel() for one in tiny().parameters())
    full = attach(tiny(), None, Full(), Default(), seed=0)
    assert not is_adapted(full)
    assert sum(one.numel() for one in trainable_parameters(full).values()) == total
    some = attach(tiny(), Names(("norm", "v_proj")), Full(), Default(), seed=0)
    assert set(trainable_parameters(some)) == {"model.norm.weight", *(f"model.layers.{i}.self_attn.v_proj.weight" for i in (0, 1))}
    model = tiny()
    wanted = sum(3 * sum(model.get_submodule(name).weight.shape) for name in AllLinear()(model))  # rank (inputs + outputs)
    lora = attach(model, None, Lora(rank=3), Default(), seed=0)
    assert sum(one.numel() for one in trainable_parameters(lora).values()) == wanted
    outputs = sum(layer.out_features for _, layer in low_rank_layers(lora))
    dora = attach(tiny(), None, Lora(rank=3, dora=True), Default(), seed=0)
    assert sum(one.numel() for one in trainable_parameters(dora).values()) == wanted + outputs


@pytest.mark.parametrize("delta", LORAS)
@pytest.mark.parametrize("init", INITS)
def test_a_fresh_delta_changes_nothing(tiny, batch, delta, init):
    close(logits(attach(tiny(), None, delta, init, seed=0), batch), logits(tiny(), batch))


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("delta", LORAS)
def test_merged_equals_unmerged(tiny, batch, delta, init):
    model = train(attach(tiny(), None, delta, init, seed=0), batch)
    before = logits(model, batch)
    assert (before - logits(tiny(), batch)).abs().max() > 1e-2
    merged = merge(model)
    assert not is_adapted(merged)
    assert set(merged.state_dict()) == set(tiny().state_dict())
    assert all(one.requires_grad for one in merged.parameters())
    close(logits(merged, batch), before)
    assert merge(merged) is merged


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("delta", LORAS)
def test_plain_lora_sits_on_the_untouched_base(tiny, batch, delta, init):
    model = train(attach(tiny(), None, delta, init, seed=0), batch)
    before = logits(model, batch)
    config, tensors = to_plain_lora(model)
    assert config.r == (6 if isinstance(init, Pissa | Olora) else 3)
    fresh = get_peft_model(tiny(), config)
    assert not set_peft_model_state_dict(fresh, tensors).unexpected_keys
    close(logits(fresh.eval(), batch), before)
    close(logits(model, batch), before)  # the model itself was left as it is


def test_pissa_starts_from_the_principal_part(tiny):
    base = tiny()
    name = "model.layers.0.mlp.up_proj"
    weight = base.get_submodule(name).weight.detach().clone()
    model = attach(base, Names((name,)), Lora(rank=4, alpha=6.0), Pissa(), seed=0)
    ((_, layer),) = low_rank_layers(model)
    u, s, v = torch.linalg.svd(weight)
    close(layer.get_delta_weight("default"), (u[:, :4] * s[:4]) @ v[:4])
    close(layer.get_base_layer().weight + layer.get_delta_weight("default"), weight)
    quick = attach(tiny(), Names((name,)), Lora(rank=4, alpha=6.0), Pissa(iterations=30), seed=0)
    ((_, fast),) = low_rank_layers(quick)
    least = (weight - layer.get_delta_weight("default")).norm()
    assert least <= (weight - fast.get_delta_weight("default")).norm() <= 1.001 * least


def test_the_start_depends_on_the_seed_alone(tiny):
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    one = attach(tiny(), None, Lora(), Gaussian(), seed=3).state_dict()
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(8)
    two = attach(tiny(), None, Lora(), Gaussian(), seed=3).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    three = attach(tiny(), None, Lora(), Gaussian(), seed=4).state_dict()
    assert any(not torch.equal(one[name], three[name]) for name in one)
    assert not any("start_" in name for name in attach(tiny(), None, Lora(), Pissa(), seed=3).state_dict())


def test_lora_on_transposed_weights_and_embeddings(batch):
    def gpt():
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, initializer_range=0.2)
        return AutoModelForCausalLM.from_config(config).eval()

    for init in (Default(), Pissa()):
        model = train(attach(gpt(), None, Lora(rank=2), init, seed=0), batch)
        before = logits(model, batch)
        close(logits(merge(model), batch), before)
    with pytest.raises(
        Problem, match=r"init `olora` does not start an adapter on `transformer.h.0.attn.c_attn`, a Conv1D; use init `default`"
    ):
        attach(gpt(), None, Lora(rank=2), Olora(), seed=0)
    model = train(attach(gpt(), Names(("wpe",)), Lora(rank=2), Default(), seed=0), batch)
    before = logits(model, batch)
    close(logits(merge(model), batch), before)
    with pytest.raises(Problem, match=r"`transformer.wte` shares its weight with `lm_head`, so an adapter on one could not be merged"):
        attach(gpt(), Names(("wte",)), Lora(rank=2), Default(), seed=0)


@pytest.mark.parametrize(
    ("where", "delta", "init", "told"),
    [
        (
            Everything(),
            Lora(),
            Default(),
            "`lora` goes to linear layers and embeddings, and `model.layers.0.input_layernorm` is a LlamaRMSNorm",
        ),
        (None, Full(), Pissa(), "init `pissa` starts low-rank factors, and the delta has none; use delta `lora`, or init `default`"),
        (None, Full(), Gaussian(), "init `gaussian` starts low-rank factors"),
        (None, Lora(rank=33), Pissa(), r"init `pissa` finds 32 directions in `model.layers.0.mlp.down_proj` \[32, 48\]; rank 33 is more"),
        (Names(("embed_tokens",)), Lora(rank=2), Pissa(), "init `pissa` does not start an adapter on `model.embed_tokens`, a Embedding"),
    ],
)
def test_refusals(tiny, where, delta, init, told):
    with pytest.raises(Problem, match=told):
        attach(tiny(), where, delta, init, seed=0)


# ------------------------------------------------------------------------------------------------- base, constraints


def test_an_adapter_goes_on_or_is_merged(tiny, batch):
    first = train(attach(tiny(), Attention(), Lora(rank=2), Default(), seed=0), batch)
    before = logits(first, batch)
    for parameter in first.parameters():
        parameter.requires_grad_(False)
    on = prepare(copy.deepcopy(first), None, Lora(), Default(), AsLoaded(), seed=1)
    assert sum(one.numel() for one in trainable_parameters(on).values()) == 2 * 2 * (64 + 2 * 48 + 64)  # layers, rank; q, k, v, o
    assert all("lora_" in name for name in trainable_parameters(on))
    close(logits(on, batch), before)
    new = prepare(copy.deepcopy(first), Mlp(), Lora(rank=5), Gaussian(), Merged(), seed=1)
    close(logits(new.eval(), batch), before)
    assert {layer.r["default"] for _, layer in low_rank_layers(new)} == {5}
    close(logits(train(new, batch).unload(), batch), before)  # the first lies in the base
    full = prepare(copy.deepcopy(first), None, Full(), Default(), Merged(), seed=1)
    close(logits(full, batch), before)
    with pytest.raises(
        Problem, match="the model carries an adapter, which cannot go on under a delta that trains the weights; use base `merged`"
    ):
        prepare(first, None, Full(), Default(), AsLoaded(), seed=1)
    with pytest.raises(Problem, match="the model carries an adapter already"):
        attach(first, None, Lora(), Default(), seed=1)


def test_continuing_trains_the_adapter_and_nothing_else(tiny):
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM", inference_mode=True)
    model = get_peft_model(tiny(), config)
    assert not trainable_parameters(model)
    names = set(trainable_parameters(continue_adapter(model)))
    assert len(names) == 5
    assert "base_model.model.lm_head.modules_to_save.default.weight" in names
    assert not model.peft_config["default"].inference_mode


def constrained(model, kind):
    def of(weight):
        if kind == "mask":
            return magnitude_mask(weight, 0.5)
        grid = Integer(bits=4, group=16)
        return OnGrid(grid, **grid.fit(*ranges(weight.detach(), 16), torch.float32))

    parts = {name: of(model.get_submodule(name).weight) for name in Mlp()(model)}
    fold(constrain(model, parts))  # as in a folder: the weights obey already
    return constrain(model, parts)


@pytest.mark.parametrize(("kind", "init"), itertools.product(["mask", "grid"], INITS))
def test_a_constraint_holds_over_the_adapter_and_after_merging(tiny, batch, kind, init):
    base = logits(constrained(tiny(), kind), batch)
    model = attach(constrained(tiny(), kind), None, Lora(rank=3), init, seed=0)
    close(logits(model, batch), base)
    train(model, batch)
    before = logits(model, batch)
    assert (before - base).abs().max() > 1e-2
    merged = merge(model)
    close(logits(merged, batch), before)
    held = constraints(merged)
    assert set(held) == set(Mlp()(tiny()))
    for name, constraint in held.items():
        weight = merged.get_submodule(name).weight.detach()
        torch.testing.assert_close(constraint.fold(weight), weight, atol=0, rtol=0)  # what is merged obeys
        if kind == "mask":
            assert (weight == 0).float().mean() == 0.5


def test_what_cannot_hold_is_refused(tiny, batch):
    with pytest.raises(Problem, match="DoraLinearVariant on a constrained weight; use plain LoRA"):
        attach(constrained(tiny(), "mask"), None, Lora(dora=True), Default(), seed=0)
    bypassing = get_peft_model(constrained(tiny(), "mask"), LoraConfig(target_modules=["up_proj"]))
    with pytest.raises(Problem, match="would bypass its constraint"):
        merge(bypassing)
    model = attach(tiny(), None, Lora(), Default(), seed=0)
    low_rank_layers(model)[0][1].lora_A["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(Problem, match="the adapter cannot be merged: NaNs detected"):
        merge(model)


def test_soft_prompts_cannot_be_merged(tiny):
    model = get_peft_model(tiny(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(Problem, match="a PROMPT_TUNING adapter is no change of weights and cannot be merged; keep it as an adapter"):
        merge(model)


def test_other_peft_types_fit_the_protocol(tiny, batch):
    """A part of ten lines makes a peft type a delta: protocols stay as they are when more types come."""
    configs = [
        VeraConfig(task_type="CAUSAL_LM", r=4, target_modules=["down_proj"]),
        IA3Config(task_type="CAUSAL_LM", target_modules=["down_proj"], feedforward_modules=["down_proj"]),
    ]
    for config in configs:

        class Other:
            kind = "adapter"
            usual = Mlp()

            def __call__(self, model, modules, init, config=config):
                return init(model, config, get_peft_model)

        model = train(attach(tiny(), None, Other(), Default(), seed=0), batch, rate=0.5)
        assert isinstance(model, PeftModel)
        before = logits(model, batch)
        _, tensors = to_plain_lora(model)
        assert tensors
        close(logits(merge(model), batch), before)


# ------------------------------------------------------------------------------------------------------------- slots


@spec
class Learning:
    where: SlotOf[Where] | None = None
    delta: SlotOf[Delta] = Lora()
    init: SlotOf[Init] = Default()
    base: SlotOf[Base] = AsLoaded()


def test_the_slots_in_a_spec(tiny, batch, tmp_path):
    made = fill_spec({"where": {"names": {"patterns": ["q_proj"]}}, "delta": {"LoRA": {"rank": 2}}, "init": "PiSSA", "base": "merged"})
    live = Context.scratch(tmp_path).start(made)
    model = prepare(tiny(), live.where, live.delta, live.init, live.base, seed=1)
    assert len(low_rank_layers(model)) == 2
    close(logits(model, batch), logits(tiny(), batch))
    live = Context.scratch(tmp_path).start(Learning())
    assert live.delta.kind == "adapter"
    assert live.base.continues
    assert len(low_rank_layers(prepare(tiny(), live.where, live.delta, live.init, live.base, seed=1))) == 14
    assert [row.part for row in describe(made)] == ["names", "lora", "pissa", "merged"]


def fill_spec(raw):
    protocols = {"where": Where, "delta": Delta, "init": Init, "base": Base}
    return Learning(**{name: fill(protocols[name].__slot__, value) for name, value in raw.items()})  # pyright: ignore
