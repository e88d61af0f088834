"""The walk against hooks on the whole model: the same inputs, those of changed blocks, none of the padding."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config

from temper.models.deltas import attach
from temper.models.deltas.delta import Lora
from temper.models.deltas.init import Olora
from temper.models.deltas.where import AllLinear, Attention, Names
from temper.models.walk import blocks, capture_inputs, linears, walk
from temper.parts import Problem

LAYERS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")


def recorded(model, batches, names):
    """Inputs of layers in plain forward passes of the model, padding removed, batches laid end to end."""
    found = {name: [] for name in names}
    masks = [batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool() for batch in batches]
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: found[name].append(args[0]))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    return {name: torch.cat([x[mask] for x, mask in zip(inputs, masks)]) for name, inputs in found.items()}


def several(batch):
    return [batch, {"input_ids": batch["input_ids"][:2, :5]}, {name: one.flip(1) for name, one in batch.items()}]  # the last: padded left


def collect(into):
    return {name: inputs.append for name, inputs in into.items()}


def test_blocks(tiny):
    assert [name for name, _ in blocks(tiny())] == ["model.layers.0", "model.layers.1"]
    gpt = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32))
    assert [name for name, _ in blocks(gpt)] == ["transformer.h.0", "transformer.h.1"]
    model = tiny()
    model.config.num_hidden_layers = 3
    with pytest.raises(Problem, match="LlamaForCausalLM has no list of 3 blocks"):
        blocks(model)


def test_linears(tiny):
    model = tiny()
    assert list(linears(model, Attention())) == [f"model.layers.{i}.self_attn.{one}_proj" for i in (0, 1) for one in "qkvo"]
    assert len(linears(model, AllLinear())) == 14
    assert list(linears(model, Names(("norm", "lm_head")))) == ["lm_head"]


def test_an_untouched_walk_gives_the_models_own_inputs(tiny, batch):
    model, batches = tiny(), several(batch)
    names = [f"model.layers.{index}.{name}" for index in (0, 1) for name in LAYERS]
    wanted = recorded(tiny(), batches, names)
    seen = 0
    for index, block in enumerate(walk(model.train(), batches)):
        assert block.name == f"model.layers.{index}"
        found = {name: [] for name in LAYERS}
        block.feed(collect(found))
        for name, inputs in found.items():
            torch.testing.assert_close(torch.cat(inputs), wanted[f"{block.name}.{name}"], atol=1e-6, rtol=1e-5)
            seen += 1
    assert seen == 8
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_is_done_to_a_block_shows_after_it(tiny, batch):
    model, batches = tiny(), several(batch)
    wanted = tiny()
    with torch.no_grad():
        for module in wanted.model.layers[0].modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_((module.weight * 8).round() / 8)
    after = recorded(wanted, batches, ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"])
    for block in walk(model, batches):
        with torch.no_grad():
            for name, module in block.module.named_modules():
                if isinstance(module, nn.Linear) and block.name.endswith("0"):
                    before: list[torch.Tensor] = []
                    block.feed({name: before.append})  # layer by layer within the block: its inputs by now
                    module.weight.copy_((module.weight * 8).round() / 8)
                    if name == "mlp.down_proj":
                        torch.testing.assert_close(torch.cat(before), after["model.layers.0.mlp.down_proj"], atol=1e-6, rtol=1e-5)
        if block.name.endswith("1"):
            found: list[torch.Tensor] = []
            block.feed({"self_attn.q_proj": found.append})
            torch.testing.assert_close(torch.cat(found), after["model.layers.1.self_attn.q_proj"], atol=1e-6, rtol=1e-5)


def test_a_model_whose_layers_have_masks_and_angles_of_their_own(batch):
    config = Gemma3TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        sliding_window=3, layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    names = [f"model.layers.{index}.self_attn.o_proj" for index in range(3)]
    wanted = recorded(model, [batch], names)
    for block in walk(model, [batch]):
        found: list[torch.Tensor] = []
        block.feed({"self_attn.o_proj": found.append})
        torch.testing.assert_close(torch.cat(found), wanted[f"{block.name}.self_attn.o_proj"], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("more", [[], ["lm_head"]])
def test_capture_inputs(tiny, batch, more):
    batches = several(batch)
    names = ["model.layers.1.mlp.up_proj", "model.layers.0.self_attn.v_proj", *more]
    wanted = recorded(tiny(), batches, names)
    found = {name: [] for name in names}
    capture_inputs(tiny(), batches, collect(found))
    for name in names:
        torch.testing.assert_close(torch.cat(found[name]), wanted[name], atol=1e-6, rtol=1e-5)
        assert len(torch.cat(found[name])) == 12 + 8 + 3 + 10 + 12 + 8 + 3


def test_the_walk_goes_through_adapters(tiny, batch):
    wanted = recorded(tiny(), [batch], ["model.layers.1.mlp.down_proj"])
    model = attach(tiny(), None, Lora(rank=2), Olora(), seed=0)
    *_, last = walk(model, [batch])
    assert last.name == "base_model.model.model.layers.1"
    found: list[torch.Tensor] = []
    for block in walk(model, [batch]):
        if block.name == last.name:
            block.feed({"mlp.down_proj.base_layer": found.append})
    torch.testing.assert_close(torch.cat(found), wanted["model.layers.1.mlp.down_proj"], atol=1e-4, rtol=1e-4)
