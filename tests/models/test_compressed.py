"""Quantised folders: what we write loads elsewhere with our numbers, what we read is what was written."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import unpack_from_int32
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig

from temper.models import compressed, io
from temper.models.constraints import OnGrid, Stack, magnitude_mask, save_constraints
from temper.models.grids import NF4, Grid, Integer, ranges
from temper.parts import Problem

GRIDS = [
    Integer(),
    Integer(bits=8, group=None),
    Integer(bits=4, group=16, symmetric=False),
    Integer(bits=3, group=8),
    Integer(bits=2, group=None, symmetric=False),
]


def llama(dtype: torch.dtype = torch.float32, tied: bool = False):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def tokens() -> torch.Tensor:
    return torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(1))


def on_grid(weight: torch.Tensor, grid: Grid) -> OnGrid:
    return OnGrid(grid, **grid.fit(*ranges(weight.detach().float(), grid.group), weight.dtype))


def settled(model: nn.Module, grid: Grid, skip: tuple[str, ...] = ("lm_head",)) -> dict[str, OnGrid]:
    """Every linear layer on its grid, in place."""
    grids = {n: on_grid(m.weight, grid) for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in skip}
    for name, one in grids.items():
        model.get_submodule(name).weight.data = one.fold(model.get_submodule(name).weight)
    return grids


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens()).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.label)
def test_written_loaded_and_read(grid: Integer, dtype: torch.dtype, tmp_path: Path) -> None:
    model = llama(dtype)
    grids = settled(model, grid)
    compressed.write(tmp_path, model, grids)
    assert compressed.is_compressed(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.dtype == dtype
    assert torch.equal(logits(theirs), logits(model))
    state, held = compressed.read(tmp_path)
    assert set(state) == set(model.state_dict())
    assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())
    assert set(held) == set(grids)
    for name, one in grids.items():
        assert held[name].settings() == one.settings()
        assert all(torch.equal(held[name].fitted[key], tensor) for key, tensor in one.fitted.items())
    assert torch.equal(logits(io.load_model(tmp_path, dtype="auto", constraints=False)), logits(model))


def test_read_in_another_dtype_is_what_transformers_computes(tmp_path: Path) -> None:
    model = llama(torch.bfloat16)
    compressed.write(tmp_path, model, settled(model, Integer(bits=8)))
    state, held = compressed.read(tmp_path, torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    logits(theirs)  # unpacked at the first call
    for name, one in held.items():
        weight = theirs.get_submodule(name).weight
        assert torch.equal(state[f"{name}.weight"], weight)
        assert torch.equal(one.fold(weight), weight)


def test_sizes_equal_the_arithmetic(tmp_path: Path) -> None:
    """Hand-counted for one layer; for a whole file: its header and its tensors, no byte more."""
    one = OnGrid(Integer(bits=4, group=16, symmetric=False), scale=torch.ones(64, 2), zero=torch.zeros(64, 2, dtype=torch.int8))
    assert compressed.packed_bytes(one, torch.Size((64, 32)), 2) == 64 * 4 * 4 + 64 * 2 * 2 + 8 * 4 * 2 + 16
    odd = OnGrid(Integer(bits=3, group=None), scale=torch.ones(5, 1))
    assert compressed.packed_bytes(odd, torch.Size((5, 33)), 4) == 5 * math.ceil(99 / 32) * 4 + 5 * 4 + 16
    for index, grid in enumerate(GRIDS):
        model = llama(tied=True)
        folder = tmp_path / str(index)
        grids = settled(model, grid)
        compressed.write(folder, model, grids)
        small = sum(compressed.packed_bytes(one, model.get_submodule(name).weight.shape, 4) for name, one in grids.items())
        rest = sum(parameter.numel() * 4 for name, parameter in model.named_parameters() if name.removesuffix(".weight") not in grids)
        file = folder / "model.safetensors"
        header = int.from_bytes(file.read_bytes()[:8], "little")
        assert file.stat().st_size == 8 + header + small + rest


def test_layers_on_different_grids(tmp_path: Path) -> None:
    model = llama()
    grids = settled(model, Integer(bits=4, group=8), skip=("lm_head", "model.layers.1.mlp.down_proj"))
    last = {"model.layers.1.mlp.down_proj": on_grid(model.model.layers[1].mlp.down_proj.weight, Integer(bits=8, group=None))}
    model.model.layers[1].mlp.down_proj.weight.data = last["model.layers.1.mlp.down_proj"].fold(model.model.layers[1].mlp.down_proj.weight)
    compressed.write(tmp_path, model, grids | last)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))
    _, held = compressed.read(tmp_path)
    assert {one.grid.label for one in held.values()} == {"int4-g8-sym", "int8-channel-sym"}
    assert held["model.layers.1.mlp.down_proj"].grid.bits == 8


def test_a_mask_beside_the_codes(tmp_path: Path) -> None:
    model = llama()
    name = "model.layers.0.mlp.up_proj"
    mask = magnitude_mask(model.get_submodule(name).weight, 0.5)
    model.get_submodule(name).weight.data = mask.fold(model.get_submodule(name).weight)
    grids = settled(model, Integer(group=8))
    compressed.write(tmp_path, model, grids)
    save_constraints(tmp_path, {name: mask})
    state, held = compressed.read(tmp_path)
    assert isinstance(held[name], Stack)
    assert torch.equal(held[name].fold(state[f"{name}.weight"]), state[f"{name}.weight"])
    assert state[f"{name}.weight"][~mask.keep].eq(0).all()


@pytest.mark.parametrize("grid", [Integer(bits=3, group=8), Integer(group=8, symmetric=False), NF4(group=8)], ids=lambda grid: grid.label)
def test_packed_codes_unpack(grid: Grid, tmp_path: Path) -> None:
    """The sidecar's codes give the weights back: unpack, count from the grid's lowest code, take the values."""
    weight = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    one = on_grid(weight, grid)
    save_constraints(tmp_path, {"layer": one}, {"layer": compressed.packed(one, weight)})
    with safe_open(tmp_path / "temper_constraints.safetensors", framework="pt") as opened:
        packed = opened.get_tensor("layer:codes")
        fit = {key.removeprefix("layer:"): opened.get_tensor(key) for key in opened.keys() if not key.endswith("codes")}  # noqa: SIM118
    assert packed.shape == (6, math.ceil(20 * grid.bits / 32))
    codes = unpack_from_int32(packed, grid.bits, torch.Size((6, 20)))
    codes = codes + (0 if isinstance(grid, Integer) else 8)
    assert torch.equal(grid.values(codes, **fit), one.fold(weight))


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(Problem, match=r"holds integer grids, not nf4-g64; write `store: dequantised`"):
        compressed.check("q", nn.Linear(64, 4), NF4())
    with pytest.raises(Problem, match=r"`q` has 48 columns, which groups of 32 do not divide.*take group 24, group none"):
        compressed.check("q", nn.Linear(48, 4), Integer())
    with pytest.raises(Problem, match=r"`q` has 47 columns.*take group none"):
        compressed.check("q", nn.Linear(47, 4), Integer())
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=8, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(Problem, match=r"holds Linear layers; `c_attn` is a Conv1D"):
        compressed.check("c_attn", gpt.transformer.h[0].attn.c_attn, Integer())
    model = llama()
    mixed = settled(model, Integer(group=8), skip=("lm_head", "model.layers.0.mlp.up_proj"))
    mixed["model.layers.0.mlp.up_proj"] = on_grid(model.get_submodule("model.layers.0.mlp.up_proj").weight, Integer(symmetric=False))
    with pytest.raises(Problem, match="several schemes with zero points"):
        compressed.write(tmp_path / "mixed", model, mixed)
    assert not (tmp_path / "mixed").exists()

    compressed.write(tmp_path, model, settled(llama(), Integer()))
    config = json.loads((tmp_path / "config.json").read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]
    group["targets"] = ["re:.*q_proj"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(Problem, match="no group of the folder's quantization_config targets it"):
        compressed.read(tmp_path)
    group["input_activations"] = {"num_bits": 8, "dynamic": True, "strategy": "token", "type": "int"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(Problem, match="with quantised activations"):
        compressed.read(tmp_path)
    group.update(format="int-quantized", input_activations=None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(Problem, match="quantised as int-quantized; only pack-quantized"):
        compressed.read(tmp_path)


def test_a_plain_folder_is_not_compressed(tmp_path: Path) -> None:
    assert not compressed.is_compressed(tmp_path)
    llama().save_pretrained(tmp_path)
    assert not compressed.is_compressed(tmp_path)
