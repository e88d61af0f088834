"""NF4 layers: nearest of 16 levels, magnitudes in 8 bits, products of floats that are made and thrown away, adapters on them."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, GPT2Config

from temper.models import io, nf4
from temper.models.deltas import attach, merge, prepare, trainable_parameters
from temper.models.deltas.base import NF4, Merged
from temper.models.deltas.delta import Lora
from temper.models.deltas.init import Default, Pissa
from temper.models.deltas.where import AllLinear
from temper.models.grids import NF4 as Grid
from temper.models.grids import nf4_levels, ranges
from temper.parts import Problem

# As Dettmers et al. print them (appendix E).
PRINTED = (
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495]
    + [0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941]
    + [0.7229568362236023, 1.0]
)


def drawn(*shape, seed=0, scale=0.1):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def slow(weight, block, double):
    """Number by number, in float64."""
    flat = weight.double().flatten().tolist()
    blocks = [flat[start : start + block] for start in range(0, len(flat), block)]
    scales = [max(abs(one) for one in some) for some in blocks]
    held = scales
    if double:
        mean = sum(scales) / len(scales)
        held = []
        for start in range(0, len(scales), 256):
            some = [one - mean for one in scales[start : start + 256]]
            step = max(abs(one) for one in some) / 128
            held += [min(127, round(one / step)) * step + mean for one in some]
    values = [
        min(PRINTED, key=lambda level, one=one, scale=scale: abs(one / scale - level)) * back
        for some, scale, back in zip(blocks, scales, held)
        for one in some
    ]
    return torch.tensor(values, dtype=torch.float64).view(weight.shape)


@pytest.mark.parametrize(
    ("shape", "block", "double"), [((40, 24), 64, False), ((40, 24), 16, True), ((3, 7), 4, True), ((130, 130), 64, True)]
)
def test_values_are_the_nearest_levels(shape, block, double):
    weight = drawn(*shape)
    torch.testing.assert_close(nf4.nearest(weight, block=block, double=double).double(), slow(weight, block, double), atol=2e-7, rtol=1e-5)


def test_the_levels_and_the_grid_of_the_same_name():
    torch.testing.assert_close(torch.tensor(nf4_levels()), torch.tensor(PRINTED), atol=3e-7, rtol=0)
    weight, grid = drawn(32, 128), Grid(group=64)
    fit = grid.fit(*ranges(weight, 64), torch.float32)
    assert torch.equal(nf4.nearest(weight, double=False), grid.values(grid.codes(weight, **fit), **fit))


def test_what_is_on_the_levels_stays_and_nothing_is_nothing():
    held = nf4.nearest(drawn(64, 64), double=False)
    assert torch.equal(nf4.nearest(held, double=False), held)
    some = drawn(64, 64)
    some[:20] = 0
    assert not nf4.nearest(some)[:20].any()  # whatever the mean of the magnitudes
    assert not nf4.nearest(torch.zeros(4, 4)).any()
    even = torch.full((4, 64), 0.25)
    assert torch.equal(nf4.nearest(even), even)  # no magnitude differs from their mean


def test_magnitudes_in_8_bits():
    scales = drawn(1000, seed=3).abs()
    codes, factors, mean = nf4.doubled(scales)
    assert (codes.dtype, len(codes), len(factors)) == (torch.int8, 1000, 4)
    back, steps = nf4.undoubled(codes, factors, mean), (1 / factors).repeat_interleave(256)[:1000]
    wrong = (back - scales).abs()
    clipped = codes == 127  # the code 128, were there one
    assert (wrong[~clipped] <= 0.501 * steps[~clipped]).all()
    assert (wrong[clipped] <= 1.001 * steps[clipped]).all()
    assert codes.abs().max() == 128 or codes.max() == 127


@pytest.mark.parametrize(("shape", "double"), [((192, 192), True), ((512, 192), True), ((192, 192), False), ((100, 90), True)])
def test_memory_is_within_a_twentieth_of_the_least(shape, double):
    held = nf4.Packed(drawn(*shape), double=double)
    bits = 8 * held.nbytes / (shape[0] * shape[1])
    least = 4 + (8 / 64 + 32 / (64 * 256) if double else 32 / 64)
    assert nf4.least_bits(64, double) == least
    assert least <= bits <= 1.05 * least


# ------------------------------------------------------------------------------------------------------------ layers


def layer(bias=True, **how):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        holder = nn.Sequential(nn.Linear(48, 40, bias=bias))
    plain = copy.deepcopy(holder[0])
    nf4.quantise(holder, modules=["0"], **how)
    plain.weight = nn.Parameter(nf4.nearest(plain.weight, **how), requires_grad=False)
    return holder[0], plain.requires_grad_(False)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_the_linear_layer_of_its_values(kind, bias):
    held, plain = layer(bias)
    held, plain = held.to(kind), plain.to(kind)
    one, two = (drawn(2, 5, 48, scale=1).to(kind).requires_grad_() for _ in range(2))
    near = {"atol": 2e-2, "rtol": 2e-2} if kind == torch.bfloat16 else {"atol": 1e-6, "rtol": 1e-5}
    torch.testing.assert_close(held(one), plain(two), **near)
    held(one).sin().sum().backward()
    plain(two).sin().sum().backward()
    torch.testing.assert_close(one.grad, two.grad, **near)
    assert isinstance(held, nn.Linear)
    assert held.packed.mean.dtype == held.packed.factors.dtype == torch.float32  # no factor was rounded
    assert not [name for name in held.state_dict() if name != "bias"]


def test_under_autocast_the_product_is_narrow():
    held, plain = layer()
    x = drawn(3, 48)
    with torch.autocast("cpu", torch.bfloat16):
        one, two = held(x), plain(x)
    assert one.dtype == torch.bfloat16
    torch.testing.assert_close(one, two, atol=2e-2, rtol=2e-2)


def test_no_matrix_of_floats_is_kept_for_the_backward_pass():
    held, _ = layer()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda tensor: tensor):
        made = held(drawn(5, 48).requires_grad_())
    assert (40, 48) not in kept
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape == (40, 48):
                seen.append(func)
            return out

    with Watch():
        made.sum().backward()
    assert seen  # it is made again


def test_a_weight_can_be_read_and_not_written():
    held, plain = layer()
    assert torch.equal(held.weight, plain.weight)
    assert type(held.weight * 1) is torch.Tensor
    with pytest.raises(Problem, match="a weight held in NF4 stands still: nothing can be merged into it"):
        held.weight.data = plain.weight
    with pytest.raises(Problem, match="stands still"):
        held.weight.data += 1
    with pytest.raises(Problem, match="an NF4 layer is made of a linear layer"):
        nf4.NF4Linear()


# ------------------------------------------------------------------------------------------------------------ models


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits[batch["attention_mask"].bool()]


def train(model, batch, steps=3):
    optimizer = torch.optim.SGD(trainable_parameters(model).values(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).loss.backward()
        optimizer.step()
    return model.eval()


def rounded(model):
    """The same model with weights that have the values of NF4, as floats."""
    for name in AllLinear()(model):
        module = model.get_submodule(name)
        module.weight.data = nf4.nearest(module.weight)
    return model


@pytest.mark.parametrize("delta", [Lora(rank=3), Lora(rank=3, dora=True), Lora(rank=3, rank_stabilized=True)])
def test_lora_on_it_is_lora_on_its_values(tiny, batch, delta):
    one = prepare(tiny(), None, delta, Default(), NF4(), seed=0)
    two = attach(rounded(tiny()), None, delta, Default(), seed=0)
    assert dict(nf4.layers(one)).keys() == set(AllLinear()(tiny()))
    torch.testing.assert_close(logits(one, batch), logits(two, batch), atol=2e-5, rtol=1e-4)
    train(one, batch)
    train(two, batch)
    assert (logits(one, batch) - logits(rounded(tiny()), batch)).abs().max() > 1e-2
    torch.testing.assert_close(logits(one, batch), logits(two, batch), atol=2e-5, rtol=1e-4)
    mine, theirs = trainable_parameters(one), trainable_parameters(two)
    assert mine.keys() == theirs.keys()
    assert all("lora_" in name for name in mine)
    assert not any(parameter.grad is not None for name, parameter in one.named_parameters() if "lora_" not in name)
    before = logits(one, batch)
    merged = merge(one)
    assert not list(nf4.layers(merged))
    assert {type(merged.get_submodule(name)) for name in AllLinear()(merged)} == {nn.Linear}
    torch.testing.assert_close(logits(merged, batch), before, atol=2e-5, rtol=1e-4)


def test_embeddings_norms_and_head_stay(tiny):
    model = NF4()(tiny())
    assert set(dict(model.named_parameters())) == {name for name, _ in tiny().named_parameters() if "proj" not in name}
    assert type(model.lm_head) is nn.Linear
    held, least = nf4.size(model)
    assert least <= held <= 1.1 * least  # of layers that are as small as these


def test_peft_alone_cannot_lose_an_adapter_in_it(tiny, batch):
    model = get_peft_model(NF4()(tiny()), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    before = logits(model.eval(), batch)
    with pytest.raises(Problem, match="stands still"):
        copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(logits(merge(model), batch), before, atol=2e-5, rtol=1e-4)


def test_an_adapter_in_a_folder_comes_back_to_the_same_bits(tiny, batch, tokenizer, tmp_path):
    io.save_model(tiny(), tokenizer, tmp_path / "base")
    model = train(prepare(io.load_model(tmp_path / "base"), None, Lora(rank=3), Default(), NF4(block=32), seed=0), batch)
    io.save_adapter(model, tokenizer, tmp_path / "adapter", "base")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace('"base"', f'"{tmp_path / "base"}"'))
    again = io.load_model(tmp_path / "adapter")
    assert {one.packed.block for _, one in nf4.layers(again)} == {32}
    assert torch.equal(logits(again, batch), logits(model, batch))
    narrow = io.load_model(tmp_path / "adapter", dtype="bfloat16")
    for (_, one), (_, two) in zip(nf4.layers(narrow), nf4.layers(model), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.packed.buffers(), two.packed.buffers(), strict=True))
    (tmp_path / "adapter" / nf4.SIDECAR).write_text('{"nf2": {}}')
    with pytest.raises(Problem, match=r"temper_base.json names a base \(nf2\) that this version does not know"):
        io.load_model(tmp_path / "adapter")


def test_an_adapter_that_comes_in_is_merged_first(tiny, batch):
    first = train(attach(tiny(), None, Lora(rank=2), Default(), seed=0), batch)
    whole = rounded(merge(copy.deepcopy(first)))
    second = prepare(first, None, Lora(rank=4), Default(), NF4(), seed=1)
    torch.testing.assert_close(logits(second, batch), logits(whole, batch), atol=2e-5, rtol=1e-4)
    third = prepare(second, None, Lora(rank=5), Default(), Merged(), seed=1)
    assert not list(nf4.layers(third))


def test_refusals(tiny):
    with pytest.raises(Problem, match=r"init `pissa` does not start an adapter on `model.layers.0.*NF4Linear"):
        prepare(tiny(), None, Lora(rank=2), Pissa(), NF4(), seed=0)
    gpt = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=32))
    with pytest.raises(Problem, match=r"NF4 holds Linear layers, and `transformer.h.0.attn.c_attn` is a Conv1D"):
        NF4()(gpt)
    with pytest.raises(Problem, match="has no linear layer besides its head that NF4 could hold"):
        NF4()(nn.Sequential(nn.LayerNorm(4)))
    model = NF4()(tiny())
    with pytest.raises(Problem, match="would be saved with weights that the architecture does not have, or without some"):
        io.save_model(model, None, None)
