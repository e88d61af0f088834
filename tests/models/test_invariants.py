"""Tuning a pruned or quantised model keeps its mask and its grid, or is refused before anything is trained: for every delta there is."""

from __future__ import annotations

import pytest
import torch

from temper.models import io
from temper.models.constraints import Mask, OnGrid, magnitude_mask
from temper.models.deltas import attach, is_adapted, merge, trainable_parameters
from temper.models.deltas.base import AsLoaded
from temper.models.deltas.budget import StructuredIfDense
from temper.models.deltas.delta import Delta, Entries, Full, Lora, SvdTriplet, TriFactor
from temper.models.deltas.init import Default
from temper.models.deltas.lineage import adapted
from temper.models.deltas.tuners import sparse
from temper.models.deltas.where import AllLinear
from temper.models.grids import Integer, ranges
from temper.models.parametrizations import ConstrainedAdapter, constraints, fold
from temper.models.parametrizations import attach as constrain
from temper.parts import Problem
from temper.passport import Passport

DELTAS = Delta.__slot__.parts()  # pyright: ignore[reportAttributeAccessIssue]
SMALL = {
    "c3a": {"block_size": 8},
    "cartridge": {"num_virtual_tokens": 4},
    "entries": {"by": "random", "share": 0.1},
    "fourierft": {"n_frequency": 10},
    "miss": {"r": 4},
    "psoft": {"r": 4},
    "road": {"group_size": 8},
    "shira": {"r": 2},
    "side-ladder": {"shrink": 2},
    "trainable-tokens": {"token_indices": (3, 4)},
    "tri-factor": {"rank": 4},
    "vblora": {"vector_length": 8, "num_vectors": 16},
    "waveft": {"n_frequency": 10},
}
"""Settings with which a delta goes onto a model this small."""
PRUNED = Passport("model", tokenizer="t", numbers="float32", mask=0.5, architecture="LlamaForCausalLM")
QUANTISED = Passport("model", tokenizer="t", numbers="int4-g16-sym", architecture="LlamaForCausalLM")


def small(name):
    return DELTAS[name](**SMALL.get(name, {}))


def model(tiny, kind=None):
    """A Llama of one block whose linear layers are pruned (`mask`) or on a grid (`grid`), as a folder has it."""
    made = tiny(num_hidden_layers=1, num_key_value_heads=4)

    def of(weight):
        if kind == "mask":
            return magnitude_mask(weight, 0.5)
        grid = Integer(bits=4, group=16)
        return OnGrid(grid, **grid.fit(*ranges(weight.detach(), 16), torch.float32))

    if kind is not None:
        parts = {name: of(made.get_submodule(name).weight) for name in AllLinear()(made)}
        fold(constrain(made, parts))
        constrain(made, parts)
    return made


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits[batch["attention_mask"].bool()]


def train(model, batch, steps=2):
    optimizer = torch.optim.Adam(trainable_parameters(model).values(), lr=0.03)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).loss.backward()
        optimizer.step()
    return model.eval()


def obeys(model):
    """Whether every weight is what its constraint makes of it; the constraints are the parts that came in."""
    held, modules = constraints(model), dict(model.named_modules())
    assert held.keys() == set(AllLinear()(model))
    return all(torch.equal(one.fold(modules[name].weight.detach()), modules[name].weight) for name, one in held.items())


# ----------------------------------------------------------------------------------------------------------- every delta


@pytest.mark.parametrize("name", sorted(DELTAS))
def test_a_mask_holds_or_nothing_is_trained(name, tiny, batch):
    delta, refused = small(name), ""
    try:
        kind = adapted(PRUNED, delta, AsLoaded()).kind
        tuned = attach(model(tiny, "mask"), None, delta, Default(), seed=0)
    except Problem as problem:
        refused = str(problem)
    if refused:
        assert "pruned" in refused or "constrained" in refused
        return
    assert kind == "model"
    before = logits(tuned, batch)
    after = logits(train(tuned, batch), batch)
    assert (after - before).abs().max() > 1e-4
    whole = merge(tuned)
    torch.testing.assert_close(logits(whole, batch), after, atol=2e-5, rtol=1e-4)
    held = constraints(whole)
    if not isinstance(delta, Full):
        assert obeys(whole)
    fold(whole)
    for at, one in held.items():
        assert isinstance(one, Mask)
        assert not whole.get_submodule(at).weight[~one.keep].any()


@pytest.mark.parametrize("name", sorted(DELTAS))
def test_a_grid_holds_or_nothing_is_trained(name, tiny, batch):
    """An adapter stays beside weights that stand still; what trains the weights trains them on their grid."""
    delta = small(name)
    assert adapted(QUANTISED, delta, AsLoaded()).kind == delta.kind
    if delta.kind == "model":
        tuned = model(tiny, "grid")
        before = tuned.model.layers[0].mlp.up_proj.weight.detach().clone()
        attach(tuned, AllLinear(), delta, Default(), seed=0)
        train(tuned, batch, steps=10)
        held = fold(tuned)
        constrain(tuned, held)
        assert obeys(tuned)
        assert not torch.equal(tuned.model.layers[0].mlp.up_proj.weight, before)
        return
    plain = model(tiny, "grid")
    fold(plain)
    before = {id(one): one.detach().clone() for one in plain.parameters()}
    tuned = train(attach(plain, None, delta, Default(), seed=0), batch)
    assert is_adapted(tuned)
    still = {id(one): one for one in tuned.parameters() if id(one) in before}
    assert all(torch.equal(before[at], one) for at, one in still.items())
    for at, weight in model(tiny, "grid").named_parameters():
        same = [one for one in still.values() if one.shape == weight.shape and torch.equal(one, weight)]
        assert same, f"{at} is no longer in the adapted model as it was"


@pytest.mark.parametrize("name", sorted(name for name, one in DELTAS.items() if one.kind == "adapter"))
def test_a_pruned_and_quantised_model_takes_no_adapter(name):
    both = Passport("model", tokenizer="t", numbers="int4-g16-sym", mask=0.5, architecture="LlamaForCausalLM")
    with pytest.raises(Problem, match="pruned"):
        adapted(both, small(name), AsLoaded())


@pytest.mark.parametrize("name", ["low-rank-experts", "side-ladder", "prompt-tuning", "loha"])
def test_a_passport_is_enough_to_refuse(name):
    with pytest.raises(Problem, match=r"`delta`: the model is pruned \(density 0\.5\), and"):
        adapted(PRUNED, small(name), AsLoaded())
    with pytest.raises(Problem, match="`dora: true` does not keep its mask; use plain `lora`, or `full`"):
        adapted(PRUNED, Lora(dora=True), AsLoaded())


# ------------------------------------------------------------------------------------------- those that compute inside it

INSIDE = {
    "lora": (Lora(rank=3), None),
    "svd-triplet": (SvdTriplet(rank=3), None),
    "svd-triplet-dropout": (SvdTriplet(rank=3, dropout=0.5), None),
    "tri-factor": (TriFactor(rank=4), None),
    "entries": (Entries(by="random", count=300), None),
    "entries-and-lora": (Entries(by="magnitude", count=600), StructuredIfDense(rank=1, ratio=1.5)),
}


@pytest.mark.parametrize("which", INSIDE)
@pytest.mark.parametrize("kind", ["mask", "grid"])
def test_what_computes_inside_a_constraint(which, kind, tiny, batch, tmp_path):
    """The model computes with P(W + change), learns through it, merges to it and back, and is not saved as if it were W + change."""
    delta, budget = INSIDE[which]
    if kind == "grid" and "dropout" in which:
        with pytest.raises(Problem, match=r"has adapter dropout 0\.5 on a quantised weight"):
            attach(model(tiny, kind), None, delta, Default(), seed=0, budget=budget)
        return
    tuned = attach(model(tiny, kind), None, delta, Default(), seed=0, budget=budget)
    base = logits(model(tiny, kind), batch)
    torch.testing.assert_close(logits(tuned, batch), base, atol=1e-3 if which == "tri-factor" else 1e-6, rtol=0)
    train(tuned.train(), batch, steps=20 if kind == "grid" else 3)
    after = logits(tuned, batch)
    assert (after - base).abs().max() > 1e-3
    layers = {name: one for name, one in tuned.named_modules() if isinstance(one, ConstrainedAdapter)}
    assert layers
    for layer in layers.values():
        under = layer.get_base_layer()
        x = torch.randn(4, under.in_features)
        whole = under.constraint.effective(under.weight + layer.get_delta_weight("default"))
        torch.testing.assert_close(layer(x), x @ whole.T, atol=1e-5, rtol=1e-4)
    with pytest.raises(Problem, match="works inside a mask or grid, which a PEFT folder cannot hold"):
        io.save_adapter(tuned, None, tmp_path, "base")
    tuned.base_model.merge_adapter()
    torch.testing.assert_close(logits(tuned, batch), after, atol=1e-5, rtol=1e-4)
    tuned.base_model.unmerge_adapter()
    torch.testing.assert_close(logits(tuned, batch), after, atol=0, rtol=0)
    merged = merge(tuned)
    torch.testing.assert_close(logits(merged, batch), after, atol=1e-5, rtol=1e-4)
    assert obeys(merged)


def test_entries_lie_inside_the_mask(tiny):
    tuned = attach(model(tiny, "mask"), None, Entries(by="random", share=0.9), Default(), seed=0)
    found = dict(sparse.layers(tuned))
    assert found
    for layer in found.values():
        assert layer.get_base_layer().constraint.keep.flatten()[layer.sparse_index["default"].long()].all()
