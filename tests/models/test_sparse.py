"""Adapters of single entries: which are chosen, what they compute and learn, what merging and saving leave; LoRA where they are dense."""

from __future__ import annotations

import copy
import subprocess
import sys

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config

from temper.context import Context
from temper.models import io
from temper.models.constraints import magnitude_mask
from temper.models.deltas import attach, continue_adapter, merge, trainable_parameters
from temper.models.deltas.budget import StructuredIfDense
from temper.models.deltas.delta import Entries, Lora
from temper.models.deltas.init import Default
from temper.models.deltas.ranking import Ranking, greatest
from temper.models.deltas.tuners import sparse
from temper.models.deltas.where import AllLinear, Attention, Mlp, Names, SensitiveWeights
from temper.models.parametrizations import attach as constrain
from temper.models.statistics import Statistics
from temper.parts import Problem
from temper.train.batching import collate
from temper.train.examples import Example
from temper.train.objectives import Causal

RANDOM = Entries(by="random", count=200)


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits[batch["attention_mask"].bool()]


def loss(model, batch):
    return model(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).loss


def train(model, batch, steps=3, rate=0.05):
    optimizer = torch.optim.SGD(trainable_parameters(model).values(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
    return model.eval()


def gpt():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, initializer_range=0.2)
    return AutoModelForCausalLM.from_config(config).eval()


def batches(size=3, count=7):
    rng = torch.Generator().manual_seed(1)
    made = []
    for source in range(count):
        tokens = torch.randint(3, 64, (4 + source,), generator=rng).int().numpy()
        made.append(Example(tokens, (torch.rand(len(tokens), generator=rng) < 0.7).numpy() | (tokens == tokens[-1]), source))
    return [collate(made[start : start + size], index) for index, start in enumerate(range(0, count, size))]


def started(tmp_path, model, *parts):
    """Parts as a run starts them, with statistics of `batches` over all linear layers."""
    context = Context.scratch(tmp_path)
    context.give("statistics", Statistics(model, lambda: AllLinear()(model), batches, Causal()))
    return [part.start(context) for part in parts]


def squares(model, names):
    """Sum over batches of the squared gradient of the batch's mean loss, by autograd in float64: [out, in]."""
    model = copy.deepcopy(model).double().requires_grad_()
    found = dict.fromkeys(names, 0.0)
    for batch in batches():
        model.zero_grad()
        Causal()(model, batch).mean.backward()
        for name in names:
            weight = model.get_submodule(name).weight
            gradient = weight.grad.T if type(model.get_submodule(name)).__name__ == "Conv1D" else weight.grad
            found[name] = found[name] + gradient**2
    return found


def chosen(model):
    return {name: layer.sparse_index["default"].long() for name, layer in sparse.layers(model) if "default" in layer.sparse_index}


# ------------------------------------------------------------------------------------------------- which are chosen


@pytest.mark.parametrize("architecture", ["llama", "gpt"])
def test_the_most_sensitive_entries_of_all_matrices_are_chosen(tiny, tmp_path, architecture):
    model = tiny() if architecture == "llama" else gpt()
    names = AllLinear()(model)
    exact = squares(model, names)
    (delta,) = started(tmp_path, model, Entries(count=150, samples=100))
    adapted = attach(model, None, delta, Default(), seed=0)
    flat = torch.cat([exact[name].flatten() for name in names])
    first = flat.argsort(descending=True)[:150].sort().values
    found = chosen(adapted)
    offset, whole = 0, []
    for name in names:
        whole.append(found.get(name, torch.tensor([], dtype=torch.long)) + offset)
        offset += exact[name].numel()
    assert torch.equal(torch.cat(whole), first)
    assert sum(one.numel() for one in trainable_parameters(adapted).values()) == 150


def test_of_equals_the_first(tmp_path):
    scores = torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0, 2.0, 0.0])
    assert greatest(scores, 1).tolist() == [1]
    assert greatest(scores, 4).tolist() == [1, 2, 3, 4]
    assert greatest(scores, 7).tolist() == list(range(7))
    held = {"a": torch.tensor([[1.0, 2.0]]), "b": torch.tensor([[2.0, 2.0], [1.0, -torch.inf]])}
    ranking = Ranking(lambda: held, lambda most: most - 3)
    assert ranking.most == 5
    assert ranking.asked == 2
    assert ranking.owners(5).tolist() == [0, 1, 1, 0, 1]
    assert ranking.counts(ranking.owners(2)) == {"a": 1, "b": 1}
    assert {name: one.tolist() for name, one in ranking.entries({"a": 1, "b": 1}).items()} == {"a": [1], "b": [0]}
    with pytest.raises(Problem, match="6 entries are asked for, and the modules have 5 to choose from"):
        _ = Ranking(lambda: held, lambda _: 6).asked


def test_modules_that_hold_a_sensitive_weight(tiny, tmp_path):
    model = tiny()
    names = Attention()(model)
    exact = squares(model, names)
    flat = torch.cat([exact[name].flatten() for name in names])
    for count in (2, 40):
        least = flat.sort(descending=True).values[count - 1]
        part = SensitiveWeights(share=count / len(flat), samples=100, of=Attention())
        assert part.candidates(model) == names
        (where,) = started(tmp_path, model, part)
        expected = [name for name in names if (exact[name] >= least).any()]
        assert where(model) == expected == where(model)
        assert len(expected) < len(names)


def test_by_magnitude_and_at_random(tiny):
    model = attach(tiny(), None, Entries(by="magnitude", share=0.01), Default(), seed=0)
    plain = tiny()
    flat = {name: plain.get_submodule(name).weight.abs().flatten() for name in AllLinear()(plain)}
    count = round(0.01 * sum(map(len, flat.values())))
    least = torch.cat(list(flat.values())).sort(descending=True).values[count - 1]
    assert {name: one.tolist() for name, one in chosen(model).items()} == {
        name: (one >= least).nonzero().flatten().tolist() for name, one in flat.items() if (one >= least).any()
    }
    one, two, other = (chosen(attach(tiny(), None, RANDOM, Default(), seed=seed)) for seed in (1, 1, 2))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(name not in other or not torch.equal(one[name], other[name]) for name in one)
    share = {name: len(one) / 200 for name, one in one.items()}
    assert share["model.layers.0.mlp.up_proj"] == pytest.approx(48 * 32 / sum(map(len, flat.values())), abs=0.06)


def test_pruned_entries_are_not_chosen(tiny):
    model = tiny()
    name = "model.layers.0.mlp.up_proj"
    mask = magnitude_mask(-model.get_submodule(name).weight.abs(), 0.25)  # the smallest stay
    constrain(model, {name: mask})
    found = chosen(attach(model, Names((name,)), Entries(by="random", share=1.0), Default(), seed=0))
    assert torch.equal(found[name], mask.keep.flatten().nonzero().flatten())


# ---------------------------------------------------------------------------------------------- LoRA where they are dense


@pytest.mark.parametrize(("asked", "rank", "ratio"), [(300, 1, 2.5), (900, 2, 8.0), (2000, 1, 5.0), (1200, 2, 1.0)])
def test_dense_matrices_get_lora_within_the_budget(tiny, tmp_path, asked, rank, ratio):
    """Against the rule tried at every tau: the greatest whose trained numbers are within the budget."""
    model = tiny()
    names = AllLinear()(model)
    exact = squares(model, names)
    sizes = [rank * sum(model.get_submodule(name).weight.shape) for name in names]
    owners = torch.cat([torch.full((exact[name].numel(),), index) for index, name in enumerate(names)])
    falling = owners[torch.cat([exact[name].flatten() for name in names]).argsort(descending=True, stable=True)].tolist()
    held, best, cost = [0] * len(names), (), 0
    for owner in falling:
        held[owner] += 1
        trained = sum(size if count >= size / ratio else count for size, count in zip(sizes, held))
        if trained <= asked:
            best, cost = tuple(held), trained
    dense = {name: rank for name, size, count in zip(names, sizes, best) if count >= size / ratio}
    (delta,) = started(tmp_path, model, Entries(count=asked, samples=100))
    adapted = attach(model, None, delta, Default(), seed=0, budget=StructuredIfDense(rank=rank, ratio=ratio))
    config = adapted.peft_config["default"]
    assert config.rank_pattern == dense
    assert config.counts == {name: count for name, count in zip(names, best) if count and name not in dense}
    assert sum(one.numel() for one in trainable_parameters(adapted).values()) == cost


def test_lora_takes_its_scale_and_refuses_other_deltas(tiny, batch):
    budget = StructuredIfDense(rank=2, ratio=1000.0, scale=3.0)
    model = attach(tiny(), Mlp(), Entries(by="random", count=2000), Default(), seed=0, budget=budget)
    (layer,) = {type(one) for _, one in sparse.layers(model)}
    assert layer is sparse.SparseLayer
    assert not chosen(model)
    first = sparse.layers(model)[0][1]
    torch.nn.init.normal_(first.sparse_B["default"])
    a, b, scale = first.low_rank("default")
    assert scale == 3.0
    torch.testing.assert_close(first.get_delta_weight("default"), 3.0 * b @ a)
    with pytest.raises(Problem, match="`structured-if-dense` counts entries, and a LORA adapter has none; use delta `entries`"):
        attach(tiny(), None, Lora(), Default(), seed=0, budget=budget)
    with pytest.raises(Problem, match="10 entries: the first matrix to get LoRA takes more than that"):
        attach(tiny(), None, Entries(by="random", count=10), Default(), seed=0, budget=budget)


# ------------------------------------------------------------------------------------------- what they compute and learn


@pytest.mark.parametrize("architecture", ["llama", "gpt"])
def test_gradients_are_those_of_the_dense_weight(tiny, batch, architecture):
    def fresh():
        return (tiny() if architecture == "llama" else gpt()).double()

    model = attach(fresh(), None, RANDOM, Default(), seed=0)
    dense = fresh()
    for name, layer in sparse.layers(model):
        values = layer.sparse_values["default"]
        values.data = 0.1 * torch.randn(values.shape, generator=torch.Generator().manual_seed(len(name)), dtype=torch.float64)
        weight = dense.get_submodule(name).weight
        weight.data += layer.get_delta_weight("default").detach()
    one, two = loss(model, batch), loss(dense.requires_grad_(), batch)
    torch.testing.assert_close(one, two, atol=1e-12, rtol=1e-12)
    one.backward()
    two.backward()
    for name, layer in sparse.layers(model):
        weight = dense.get_submodule(name).weight
        wanted = (weight.grad.T if layer.transposed else weight.grad).flatten()[layer.sparse_index["default"].long()]
        torch.testing.assert_close(layer.sparse_values["default"].grad, wanted, atol=1e-12, rtol=1e-9)


def test_everything_that_asks_for_a_gradient_gets_it():
    """Input, weight, bias and both adapters' entries, against autograd on the written-out product."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 6), (4,)))
    indices = [torch.tensor([0, 7, 8, 23]), torch.tensor([7, 11])]
    values = [torch.randn(len(one), dtype=torch.float64, requires_grad=True) for one in indices]
    before = weight.detach().clone()
    found = sparse._Product.apply(x, weight, bias, indices, *values)
    whole = weight + sum(torch.zeros(24, dtype=torch.float64).scatter(0, i, v).view(4, 6) for i, v in zip(indices, values))
    wanted = torch.nn.functional.linear(x, whole, bias)
    torch.testing.assert_close(found, wanted)
    above = torch.randn_like(wanted)
    inputs = [x, weight, bias, *values]
    for one, two in zip(torch.autograd.grad(found, inputs, above), torch.autograd.grad(wanted, inputs, above), strict=True):
        torch.testing.assert_close(one, two)
    assert torch.equal(weight, before)


def test_only_the_chosen_entries_ever_change(tiny, batch):
    plain = tiny()
    model = train(attach(tiny(), None, RANDOM, Default(), seed=0), batch)
    where = chosen(model)
    merged = merge(model)
    for name, before in plain.named_parameters():
        after = merged.get_parameter(name)
        same = torch.ones(before.numel(), dtype=torch.bool)
        same[where.get(name.removesuffix(".weight"), torch.tensor([], dtype=torch.long))] = False
        assert torch.equal(before.flatten()[same], after.flatten()[same])
        assert (before.flatten()[~same] != after.flatten()[~same]).all()


def test_nothing_of_the_weights_size_is_kept(tiny, batch):
    """Autograd saves the input and what the adapter is made of, and the weight itself: no second of its size."""
    model = attach(tiny(), Names(("layers.0.mlp.up_proj",)), RANDOM, Default(), seed=0)
    ((_, layer),) = sparse.layers(model)
    x = torch.randn(2, 5, 32, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        layer(x)
    weight = layer.get_base_layer().weight
    assert {one.data_ptr() for one in kept} == {one.data_ptr() for one in (x, weight, layer.sparse_values["default"])}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_is_exact_and_undone_to_the_last_bit(tiny, batch, dtype):
    model = attach(tiny().to(dtype), None, RANDOM, Default(), seed=0)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    assert all(one.dtype == torch.float32 for one in trainable_parameters(model).values())
    fresh = logits(model, batch)
    assert torch.equal(fresh, logits(tiny().to(dtype), batch))
    after = logits(train(model, batch, rate=5.0 if dtype is torch.bfloat16 else 0.05), batch)
    assert (after - fresh).abs().max() > 1e-2
    inner = model.base_model
    inner.merge_adapter(safe_merge=True)
    assert torch.equal(logits(model, batch), after)
    inner.unmerge_adapter()
    assert torch.equal(logits(model, batch), after)
    assert all(torch.equal(one, model.state_dict()[name]) for name, one in before.items() if "sparse_values" not in name)
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), fresh)
    assert torch.equal(logits(merge(model), batch), after)


def test_autocast_and_two_adapters(tiny, batch):
    model = attach(tiny(), Mlp(), RANDOM, Default(), seed=0)
    train(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        one = loss(model, batch)
    one.backward()
    exact = attach(tiny(), Mlp(), RANDOM, Default(), seed=0)
    train(exact, batch)
    loss(exact, batch).backward()
    for got, wanted in zip(trainable_parameters(model).values(), trainable_parameters(exact).values()):
        torch.testing.assert_close(got.grad, wanted.grad, atol=0.05 * float(wanted.grad.abs().max()), rtol=0.1)
    config = copy.deepcopy(model.peft_config["default"])
    model.add_adapter("other", config)
    for _, layer in sparse.layers(model):
        layer.sparse_values["other"].data.fill_(0.1)
    model.base_model.set_adapter(["default", "other"])
    both = logits(model, batch)
    model.base_model.merge_adapter()
    assert torch.equal(logits(model, batch), both)
    model.base_model.unmerge_adapter()
    assert torch.equal(logits(model, batch), both)
    model.base_model.set_adapter(["default"])
    assert not torch.equal(logits(model, batch), both)


# --------------------------------------------------------------------------------------------------- saved, gone on with


def adapted(tiny, batch):
    """Entries and LoRA in one adapter, trained."""
    budget = StructuredIfDense(rank=1, ratio=2.0)
    model = attach(tiny(), None, Entries(by="magnitude", count=500), Default(), seed=0, budget=budget)
    assert model.peft_config["default"].rank_pattern
    assert model.peft_config["default"].counts
    return train(model, batch)


def test_saved_equals_reloaded_by_peft_in_a_fresh_process(tiny, batch, tmp_path):
    model = adapted(tiny, batch)
    io.save_adapter(model, None, tmp_path / "adapter", "base")
    tiny().save_pretrained(tmp_path / "base")
    save_file(batch, tmp_path / "batch.safetensors")
    code = f"""
import torch, peft, temper.peft
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({str(tmp_path / "base")!r}), {str(tmp_path / "adapter")!r})
batch = load_file({str(tmp_path / "batch.safetensors")!r})
torch.set_num_threads(1)
with torch.no_grad():
    save_file({{"logits": model(**batch).logits[batch["attention_mask"].bool()]}}, {str(tmp_path / "logits.safetensors")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert torch.equal(load_file(tmp_path / "logits.safetensors")["logits"], logits(model, batch))


def test_a_loaded_adapter_goes_on(tiny, batch, tmp_path):
    model = adapted(tiny, batch)
    io.save_adapter(model, None, tmp_path, "base")
    loaded = continue_adapter(peft.PeftModel.from_pretrained(tiny(), tmp_path))
    assert {name: one.shape for name, one in trainable_parameters(loaded).items()} == {
        name: one.shape for name, one in trainable_parameters(model).items()
    }
    one, two = (logits(train(one, batch), batch) for one in (loaded, model))
    assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("where", "delta", "told"),
    [
        (Names(("embed_tokens",)), RANDOM, "`entries` goes to linear layers, and `model.embed_tokens` is a Embedding; leave it out"),
        (None, Entries(by="random", count=10**6), "1000000 entries are asked for, and the modules have 15360 to choose from"),
        (None, Entries(), "`entries` by sensitivity needs statistics"),
    ],
)
def test_refusals(tiny, where, delta, told):
    with pytest.raises(Problem, match=told):
        attach(tiny(), where, delta, Default(), seed=0)
