"""Constraints hold in training, through LoRA, merging, copying and saving; and fold away exactly."""

from __future__ import annotations

import copy
import runpy
from pathlib import Path

import pytest
import torch
from peft import LoHaConfig, LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from temper.models.constraints import (
    SIDECAR,
    Constraint,
    Mask,
    OnGrid,
    Stack,
    load_constraints,
    magnitude_mask,
    pack_bits,
    part_of,
    save_constraints,
    unpack_bits,
)
from temper.models.grids import NF4, Grid, Integer, ranges
from temper.models.parametrizations import ConstrainedLora, attach, check_covered, constraints, cover_adapters, fold, folded
from temper.parts import Problem

NAMES = ("q_proj", "down_proj")
MASKED = "model.layers.0.self_attn.q_proj"


def llama(dtype: torch.dtype = torch.float32, tied: bool = False, **changes: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        **changes,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def tokens() -> torch.Tensor:
    return torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(1))


def on_grid(weight: torch.Tensor, grid: Grid) -> OnGrid:
    return OnGrid(grid, **grid.fit(*ranges(weight.detach().float(), grid.group), weight.dtype))


def stacked(weight: torch.Tensor) -> Stack:
    mask = magnitude_mask(weight, 0.5)
    return Stack(mask, on_grid(mask.fold(weight), Integer(group=8)))


MAKE = {
    "mask": lambda w: magnitude_mask(w, 0.4),
    "int4": lambda w: on_grid(w, Integer(group=8)),
    "int3-asym": lambda w: on_grid(w, Integer(bits=3, group=None, symmetric=False)),
    "nf4": lambda w: on_grid(w, NF4(group=16)),
    "mask+int4": stacked,
}


def parts_for(model: nn.Module, kind: str) -> dict[str, Constraint]:
    return {name: MAKE[kind](module.weight) for name, module in model.named_modules() if name.endswith(NAMES)}


def lora(model: nn.Module, dropout: float = 0.0, **changes: object):
    torch.manual_seed(1)
    wrapped = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, target_modules=list(NAMES), lora_dropout=dropout, **changes))
    torch.manual_seed(2)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    return wrapped.eval()


def obeys(model: nn.Module, parts: dict[str, Constraint]) -> bool:
    return all(torch.equal(part.fold(model.get_submodule(name).weight), model.get_submodule(name).weight) for name, part in parts.items())


@pytest.mark.parametrize("kind", MAKE)
def test_attach_and_fold_are_inverse(kind: str) -> None:
    model = llama()
    keys, classes = list(model.state_dict()), [type(m) for m in model.modules()]
    parts = parts_for(model, kind)
    attach(model, parts)
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in llama().named_parameters()]
    assert constraints(model) == parts
    with torch.no_grad():
        before = model(tokens()).logits
    exported = folded(model)
    assert fold(model) == parts
    assert [type(m) for m in model.modules()] == classes
    assert constraints(model) == {}
    assert obeys(model, parts)
    assert list(exported) == keys
    assert all(torch.equal(exported[key], value) for key, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, before)
        plain = llama()(tokens()).logits
    assert not torch.allclose(plain, before, atol=1e-4)  # the constraint did something
    attach(model, parts)
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, before)


@pytest.mark.parametrize("kind", MAKE)
def test_full_tuning_keeps_the_constraint(kind: str) -> None:
    """A few plain SGD steps: the loss falls, the folded model obeys on the same scales, and it is what was trained."""
    model = llama()
    parts = parts_for(model, kind)
    for name, part in parts.items():  # as loaded from a folder: weights obey already
        module = model.get_submodule(name)
        module.weight.data = part.fold(module.weight)
    before = {name: model.get_submodule(name).weight.clone() for name in parts}
    attach(model, parts).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.5)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    model.eval()
    with torch.no_grad():
        trained = model(tokens()).logits
    held = fold(model)
    assert obeys(model, held)
    assert any(not torch.equal(model.get_submodule(name).weight, before[name]) for name in parts)  # codes moved
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, trained)


def test_gradients() -> None:
    w = torch.tensor([[0.9, -0.3, 3.0, -4.0]], requires_grad=True)
    seed = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    (Mask(torch.tensor([[True, False, True, False]])).effective(w) * seed).sum().backward()
    assert w.grad is not None
    assert w.grad.tolist() == [[1, 0, 3, 0]]
    grid = OnGrid(Integer(bits=3, group=None), scale=torch.tensor([[0.5]]))
    w.grad = None
    (grid.effective(w) * seed).sum().backward()
    theirs = w.detach().clone().requires_grad_()
    (
        torch.fake_quantize_per_channel_affine(theirs, torch.tensor([0.5]), torch.tensor([0], dtype=torch.int32), 0, -4, 3) * seed
    ).sum().backward()
    assert torch.equal(w.grad, theirs.grad)  # type: ignore[arg-type]
    assert w.grad.tolist() == [[1, 2, 0, 0]]  # clipped weights get none
    assert torch.equal(
        grid.effective(w), torch.fake_quantize_per_channel_affine(w, torch.tensor([0.5]), torch.tensor([0], dtype=torch.int32), 0, -4, 3)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MAKE)
def test_lora_under_constraints_merges_to_the_same_model(kind: str, dtype: torch.dtype) -> None:
    model = llama(dtype)
    parts = parts_for(model, kind)
    wrapped = lora(attach(model, parts))
    with pytest.raises(Problem, match="would bypass its constraint"):
        check_covered(wrapped)
    with torch.no_grad():
        uncovered = wrapped(tokens()).logits
    cover_adapters(wrapped)
    check_covered(wrapped)
    assert constraints(wrapped) == parts
    with torch.no_grad():
        unmerged = wrapped(tokens()).logits
        assert not torch.allclose(unmerged, uncovered, atol=1e-4)
        with wrapped.disable_adapter():
            base = wrapped(tokens()).logits
        assert not torch.allclose(unmerged, base, atol=1e-4)  # the adapter lives
        wrapped.merge_adapter()
        assert torch.equal(wrapped(tokens()).logits, unmerged)
        wrapped.unmerge_adapter()
        assert torch.equal(wrapped(tokens()).logits, unmerged)
        merged = wrapped.merge_and_unload(safe_merge=True)
        assert torch.equal(merged(tokens()).logits, unmerged)
    assert fold(merged) == parts
    assert obeys(merged, parts)
    assert list(merged.state_dict()) == list(llama().state_dict())
    with torch.no_grad():
        assert torch.equal(merged(tokens()).logits, unmerged)


@pytest.mark.parametrize("kind", ["mask", "int4"])
def test_lora_trains_through_the_constraint(kind: str) -> None:
    model = llama()
    parts = parts_for(model, kind)
    for name, part in parts.items():
        model.get_submodule(name).weight.data = part.fold(model.get_submodule(name).weight)
    wrapped = cover_adapters(lora(attach(model, parts))).train()
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=0.02)
    first = None
    for _ in range(10):
        optimizer.zero_grad()
        loss = wrapped(tokens(), labels=tokens()).loss
        first = first or loss.item()
        loss.backward()
        optimizer.step()
    assert loss.item() < first - 0.05
    with torch.no_grad():
        tuned = wrapped.eval()(tokens()).logits
        merged = wrapped.merge_and_unload()
        assert torch.equal(merged(tokens()).logits, tuned)
    fold(merged)
    assert obeys(merged, parts)


def test_several_adapters_add_up() -> None:
    model = llama()
    parts = parts_for(model, "int4")
    wrapped = lora(attach(model, parts))
    wrapped.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    cover_adapters(wrapped)
    wrapped.base_model.set_adapter(["default", "second"])
    with torch.no_grad():
        both = wrapped(tokens()).logits
        wrapped.base_model.set_adapter(["default"])
        assert not torch.allclose(wrapped(tokens()).logits, both, atol=1e-4)
        wrapped.base_model.set_adapter(["default", "second"])
        wrapped.merge_adapter(["second"])
        wrapped.merge_adapter(["default"])  # one after the other: rounded once, from the start
        assert torch.equal(wrapped(tokens()).logits, both)
        wrapped.unmerge_adapter()
        merged = wrapped.merge_and_unload()
        assert torch.equal(merged(tokens()).logits, both)


def test_autocast_trains_what_merging_gives() -> None:
    model = llama()
    wrapped = cover_adapters(lora(attach(model, parts_for(model, "int4"))))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        tuned = wrapped(tokens()).logits
        assert torch.equal(wrapped.merge_and_unload()(tokens()).logits, tuned)


def test_dropout_over_a_mask_drops_the_adapter_alone() -> None:
    model = llama()
    wrapped = cover_adapters(lora(attach(model, parts_for(model, "mask")), dropout=0.5)).train()
    layer = wrapped.base_model.model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, ConstrainedLora)
    x = torch.randn(3, 32)
    base, delta = layer.base_layer, layer.get_delta_weight("default")
    torch.manual_seed(5)
    got = layer(x)
    torch.manual_seed(5)
    dropped = nn.functional.dropout(x, 0.5)
    expected = x @ base.constraint.fold(base.weight).T + dropped @ base.constraint.fold(delta).T
    assert torch.allclose(got, expected, atol=1e-6)
    assert not torch.allclose(wrapped.eval()(tokens()).logits, wrapped.train()(tokens()).logits)


def test_conv1d_and_embeddings() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_positions=16, n_embd=32, n_layer=1, n_head=2, tie_word_embeddings=False)).eval()
    attention = model.transformer.h[0].attn.c_attn  # Conv1D, weight [32, 96]
    parts = {
        "transformer.h.0.attn.c_attn": on_grid(attention.weight.T, Integer(group=8)),
        "transformer.wte": magnitude_mask(model.transformer.wte.weight, 0.5),
    }
    assert parts["transformer.h.0.attn.c_attn"].scale.shape == (96, 4)
    attach(model, parts)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)).eval()
    cover_adapters(wrapped)
    with torch.no_grad():
        out = wrapped(tokens()).logits
        merged = wrapped.merge_and_unload()
        assert torch.allclose(merged(tokens()).logits, out, atol=1e-5)
    fold(merged)
    weight = merged.transformer.h[0].attn.c_attn.weight
    assert torch.equal(parts["transformer.h.0.attn.c_attn"].fold(weight.T).T, weight)
    assert torch.equal(merged.transformer.wte.weight.ne(0), parts["transformer.wte"].keep)
    with torch.no_grad():
        assert torch.allclose(merged(tokens()).logits, out, atol=1e-5)


def test_deepcopy_and_dtype() -> None:
    model = llama()
    parts = parts_for(model, "mask+int4")
    attach(model, parts)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.get_submodule("model.layers.0.self_attn.q_proj").weight.zero_()
        assert not torch.equal(twin(tokens()).logits, model(tokens()).logits)
    assert all(one is not parts[name] for name, one in constraints(twin).items())
    scale = part_of(constraints(twin)["model.layers.0.self_attn.q_proj"], OnGrid).scale.clone()
    twin.to(torch.bfloat16)
    after = part_of(constraints(twin)["model.layers.0.self_attn.q_proj"], OnGrid)
    assert after.scale.dtype == torch.float32
    assert torch.equal(after.scale, scale)
    assert twin(tokens()).logits.dtype == torch.bfloat16


def test_state_dict_restores_the_latent_weights() -> None:
    """A checkpoint holds what the optimizer moves, not its projection."""
    model = llama()
    attach(model, parts_for(model, "int4"))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(state[name], llama().state_dict()[name])
    fresh = attach(llama(), parts_for(llama(), "int4"))
    fresh.get_submodule("model.layers.0.self_attn.q_proj").weight.data.zero_()
    fresh.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(fresh(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("kind", MAKE)
def test_sidecar(kind: str, tmp_path: Path) -> None:
    model = llama()
    parts = parts_for(model, kind)
    save_constraints(tmp_path, parts)
    back = load_constraints(tmp_path)
    assert list(back) == sorted(parts)
    for name, part in parts.items():
        weight = model.get_submodule(name).weight
        assert type(back[name]) is type(part)
        assert back[name].settings() == part.settings()
        assert torch.equal(back[name].fold(weight), part.fold(weight))
    if kind == "mask":
        masks = sum(part.keep.numel() / 8 for part in parts.values())
        header = int.from_bytes((tmp_path / SIDECAR).read_bytes()[:8], "little")
        assert (tmp_path / SIDECAR).stat().st_size == 8 + header + masks


def test_no_sidecar(tmp_path: Path) -> None:
    save_constraints(tmp_path, {})
    assert list(tmp_path.iterdir()) == []
    assert load_constraints(tmp_path) == {}


def test_magnitude_mask_and_bits() -> None:
    w = torch.tensor([[0.1, -3.0, 2.0], [2.0, -2.0, 0.0]])
    assert magnitude_mask(w, 0.5).keep.tolist() == [[False, True, True], [True, False, False]]  # of equals, the first
    assert (magnitude_mask(w, 0).density, magnitude_mask(w, 1).density) == (0, 1)
    bits = torch.rand(3, 7, generator=torch.Generator().manual_seed(0)) < 0.5
    assert pack_bits(bits).numel() == 3
    assert torch.equal(unpack_bits(pack_bits(bits), [3, 7]), bits)


def test_stack_keeps_zeros_and_order() -> None:
    w = llama().get_submodule("model.layers.0.self_attn.q_proj").weight
    for grid in (Integer(group=8), Integer(group=8, symmetric=False), NF4(group=8)):
        mask = magnitude_mask(w, 0.5)
        value = Stack(mask, on_grid(w, grid)).fold(w)
        assert value[~mask.keep].eq(0).all()
        assert torch.equal(value, on_grid(w, grid).fold(mask.fold(w)))

    class NoZero(Integer):
        """Half a step off."""

        def values(self, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None = None) -> torch.Tensor:
            return super().values(codes, scale, zero) + self._spread(scale, codes) / 2

    with pytest.raises(Problem, match="no exact 0"):
        Stack(magnitude_mask(w, 0.5), on_grid(w, NoZero(group=8)))
    with pytest.raises(Problem, match=r"OnGrid -> Mask.*put the mask before the grid"):
        Stack(on_grid(w, Integer(group=8)), magnitude_mask(w, 0.5))


def test_refusals() -> None:
    model = llama()
    name = "model.layers.0.self_attn.q_proj"
    weight = model.get_submodule(name).weight
    mask = magnitude_mask(weight, 0.5)
    with pytest.raises(Problem, match=r"no module `model.layers.0.self_attn.q_prj`; did you mean `model.layers.0.self_attn.q_proj`\?"):
        attach(model, {"model.layers.0.self_attn.q_prj": mask})
    with pytest.raises(Problem, match="LlamaRMSNorm; only Linear"):
        attach(model, {"model.norm": mask})
    with pytest.raises(Problem, match=r"shape \[32, 48\], for which"):
        attach(model, {"model.layers.0.mlp.down_proj": mask})
    with pytest.raises(Problem, match=r"shape \[48, 32\]"):  # as many columns, fewer rows: must not broadcast
        attach(model, {"model.layers.0.mlp.up_proj": on_grid(weight, Integer(group=8))})
    tied = llama(tied=True)
    with pytest.raises(Problem, match=r"shared by .*embed_tokens.*lm_head"):
        attach(tied, {"lm_head": magnitude_mask(tied.lm_head.weight, 0.5)})
    with pytest.raises(Problem, match=r"no module `model\.nothing`"):
        attach(model, {name: mask, "model.nothing": mask})
    assert constraints(model) == {}  # all or nothing
    attach(model, {name: mask})
    with pytest.raises(Problem, match="constrained already"):
        attach(model, {name: mask})
    with pytest.raises(Problem, match=r"density 1.5"):
        magnitude_mask(weight, 1.5)


def test_adapter_refusals() -> None:
    def constrained(kind: str = "mask") -> nn.Module:
        model = llama()
        return attach(model, parts_for(model, kind))

    wrapped = cover_adapters(lora(constrained()))
    with pytest.raises(Problem, match="merge it first"):
        fold(wrapped)
    with pytest.raises(Problem, match="rows alone"):
        wrapped(tokens(), adapter_names=["default", "__base__"])
    with pytest.raises(Problem, match="DoraLinearVariant"):
        cover_adapters(lora(constrained(), use_dora=True))
    with pytest.raises(Problem, match=r"loha\.Linear.*does not keep its constraint"):
        cover_adapters(get_peft_model(constrained(), LoHaConfig(r=2, target_modules=["q_proj"])))
    with pytest.raises(Problem, match=r"dropout 0\.1 on a quantised weight"):
        cover_adapters(lora(constrained("int4"), dropout=0.1))
    with pytest.raises(Problem, match="LoRA with a bias"):
        cover_adapters(
            lora(attach(llama(attention_bias=True), {MASKED: MAKE["mask"](llama().get_submodule(MASKED).weight)}), lora_bias=True)
        )
    merged = lora(constrained())
    merged.merge_adapter()
    with pytest.raises(Problem, match="is merged, past its constraint"):
        cover_adapters(merged)
    wrapped.add_adapter("later", LoraConfig(target_modules=["q_proj"], use_dora=True))
    for check in (cover_adapters, check_covered):
        with pytest.raises(Problem, match="DoraLinearVariant"):
            check(wrapped)
    untouched = lora(llama())
    assert not any(isinstance(module, ConstrainedLora) for module in cover_adapters(untouched).modules())


def test_the_demonstration_in_the_docs(capsys: pytest.CaptureFixture[str]) -> None:
    """`docs/examples/masked_lora.py` shows what its page says, and the page shows what it prints."""
    root = Path(__file__).parents[2] / "docs"
    found = runpy.run_path(str(root / "examples" / "masked_lora.py"))["main"]()
    zeroed, parametrized, pruned, ours = found.values()
    for row in found.values():
        assert row["tuned"] < 0.5 < 5 < row["loss before tuning"]
    assert zeroed["merged"] == pytest.approx(zeroed["tuned"], abs=1e-4)
    assert zeroed["density"] > 0.99  # the sparsity is gone
    for lost in (parametrized, pruned):
        assert lost["merged"] == pytest.approx(lost["loss before tuning"], abs=1e-4)  # the adapter is gone
        assert abs(lost["saved and loaded"] - lost["merged"]) > 0.1  # and then the weights
    assert ours["merged"] == ours["saved and loaded"] == ours["tuned"]
    assert ours["merged against tuned, largest change of an output"] == 0
    assert ours["density"] == 0.5
    page = (root / "guarantees" / "masked-lora.md").read_text(encoding="utf8")
    for line in capsys.readouterr().out.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        written = next(row for row in page.splitlines() if row.startswith(f"| {cells[0]} |") or row == line)
        assert written.rpartition("|")[0].rpartition("|")[2].strip() == cells[-1]  # losses may differ in the last digit between machines
