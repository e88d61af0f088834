"""Penalties on what a delta does: closed forms against autograd in float64, and elastic weight consolidation against its dense form."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import numpy
import pytest
import torch
from peft import IA3Config, LoHaConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from temper.context import Context
from temper.models.deltas import attach, merge, trainable_parameters
from temper.models.deltas.budget import triplets
from temper.models.deltas.delta import Full, Lora, SvdTriplet
from temper.models.deltas.init import Default, Pissa
from temper.models.deltas.where import AllLinear, Attention, Names
from temper.models.statistics import Statistics
from temper.parts import Problem
from temper.train.anchors import Fisher, Orthogonal
from temper.train.batching import collate
from temper.train.examples import Example
from temper.train.objectives import Causal


def rows(count: int = 6) -> list[Example]:
    draw = numpy.random.default_rng(7)
    lengths = [5 + index % 3 for index in range(count)]
    return [Example(draw.integers(3, 20, one).astype(numpy.int32), numpy.ones(one, dtype=bool), index) for index, one in enumerate(lengths)]


def adapted(llama: Any, delta: Any, tmp_path: Any, where: Any = None, init: Any = None) -> tuple[Any, Context]:
    """A model of float64 with a delta away from its start, and the context in which its penalty starts."""
    plain = llama if isinstance(llama, torch.nn.Module) else llama()
    model = attach(plain, where, delta, init or Default(), seed=0).double()
    context = Context.scratch(tmp_path)
    context.give("model", model)
    context.give("general_statistics", Statistics(model, list, lambda: [collate([one]) for one in rows()], Causal()))
    return model, context


def moved(model: Any, seed: int = 1) -> list[torch.nn.Parameter]:
    draw = torch.Generator().manual_seed(seed)
    held = list(trainable_parameters(model).values())
    with torch.no_grad():
        for one in held:
            one.add_(0.1 * torch.randn(one.shape, generator=draw, dtype=one.dtype))
            one.grad = torch.full_like(one, 0.5)
    return held


def check(term: Any, held: list[torch.nn.Parameter], wanted: torch.Tensor, scale: float = 7.0) -> None:
    """The value, and `scale` times the gradient added to what is there; only the value where gradients are off."""
    slopes = torch.autograd.grad(wanted, held, allow_unused=True)
    with torch.no_grad():
        torch.testing.assert_close(term(held, scale), wanted.detach(), rtol=1e-10, atol=1e-12)
    assert all(torch.equal(one.grad, torch.full_like(one, 0.5)) for one in held)
    for times in (1, 2):  # a second pass, as under accumulation, adds as much again
        torch.testing.assert_close(term(held, scale), wanted.detach(), rtol=1e-10, atol=1e-12)
        for one, slope in zip(held, slopes):
            expected = 0.5 + times * scale * (0 if slope is None else slope)
            torch.testing.assert_close(one.grad, torch.as_tensor(expected, dtype=one.dtype).expand_as(one), rtol=1e-9, atol=1e-11)
    assert any(slope is not None and slope.abs().max() > 1e-9 for slope in slopes)


# ----------------------------------------------------------------------------------------------------- orthogonal


def test_orthogonal_is_the_papers_sum_of_squared_norms(llama, tmp_path):
    model, context = adapted(llama, SvdTriplet(rank=3), tmp_path)
    term, held = Orthogonal(strength=0.3).start(context), moved(model)
    wanted = torch.zeros((), dtype=torch.float64)
    for _, q, p in triplets(model).values():
        one = torch.eye(3, dtype=torch.float64)
        wanted = wanted + 0.3 * (torch.linalg.matrix_norm(p.T @ p - one).square() + torch.linalg.matrix_norm(q @ q.T - one).square())
    check(term, held, wanted)


def test_orthogonal_vectors_cost_nothing_and_descent_makes_them_so(llama, tmp_path):
    model, context = adapted(llama, SvdTriplet(rank=3), tmp_path)
    term = Orthogonal(strength=1.0).start(context)
    held = list(trainable_parameters(model).values())
    first = None
    for _ in range(400):
        for one in held:
            one.grad = torch.zeros_like(one)
        value = term(held, 1.0)
        first = first or value
        with torch.no_grad():
            for one in held:
                one.sub_(one.grad, alpha=0.05)
    assert value < 1e-6 * first
    for _, q, p in triplets(model).values():
        torch.testing.assert_close(q @ q.T, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-3)
        torch.testing.assert_close(p.T @ p, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-3)


def test_orthogonal_needs_triplets(llama, tmp_path):
    _, context = adapted(llama, Lora(), tmp_path)
    with pytest.raises(Problem, match="about the vectors of delta `svd-triplet`, and nothing has them"):
        Orthogonal().start(context)


# --------------------------------------------------------------------------------------------------------- fisher


def slow(model: Any, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """The empirical Fisher of plain weights: the mean over examples of the squared gradient of the example's summed loss."""
    weights = {name: model.get_submodule(name).weight.requires_grad_(True) for name in names}
    found = {name: torch.zeros_like(one) for name, one in weights.items()}
    for one in rows():
        slopes = torch.autograd.grad(Causal()(model, collate([one])).total, list(weights.values()))
        for name, slope in zip(found, slopes):
            found[name] += slope.square() / len(rows())
    return found


def dense(before: Any, after: Any, fisher: dict[str, torch.Tensor], strength: float) -> torch.Tensor:
    """Elastic weight consolidation of all the weights of a plain model."""
    return strength * sum(
        (one * (after.get_submodule(name).weight - before.get_submodule(name).weight).square()).sum() for name, one in fisher.items()
    )


@pytest.mark.parametrize("delta", [Lora(rank=3), Lora(rank=2, rank_stabilized=True), SvdTriplet(rank=3)])
@pytest.mark.parametrize("where", [None, Attention()])
def test_fisher_on_an_adapter_is_dense_consolidation_of_the_merged_weights(llama, tmp_path, delta, where):
    plain = llama().double()
    names = (where or AllLinear())(plain)
    model, context = adapted(llama, delta, tmp_path, where)
    term = Fisher(strength=0.4, samples=6).start(context)
    held = moved(model)
    fisher = {name: one.float().double() for name, one in slow(copy.deepcopy(plain), names).items()}
    with torch.no_grad():
        value = term(held, 1.0)
        torch.testing.assert_close(value, dense(plain, merge(copy.deepcopy(model)), fisher, 0.4), rtol=1e-6, atol=0)
    assert value > 1e-4


def test_the_gradient_on_an_adapter_is_autograds(llama, tmp_path):
    plain = llama().double()
    model, context = adapted(llama, Lora(rank=3), tmp_path)
    term, held = Fisher(strength=0.4, samples=6).start(context), moved(model)
    fisher = {name: one for name, (one, *_) in zip(AllLinear()(plain), term._terms)}
    named = trainable_parameters(model)
    wanted = torch.zeros((), dtype=torch.float64)
    for name, one in fisher.items():
        a, b = (named[f"base_model.model.{name}.lora_{which}.default.weight"] for which in "AB")
        wanted = wanted + 0.4 * (one.double() * (2 * (b @ a) * (16 / 3) / 2).square()).sum()
    check(term, held, wanted)


def test_fisher_under_full_tuning_is_plain_consolidation_and_leaves_the_rest_free(llama, tmp_path):
    plain = llama().double()
    model, context = adapted(llama, Full(), tmp_path)
    term, held = Fisher(strength=0.4, samples=6).start(context), moved(model)
    named = dict(model.named_modules())
    linear = [name for name, one in named.items() if isinstance(one, torch.nn.Linear)]
    fisher = slow(copy.deepcopy(plain), linear)
    wanted = dense(plain, model, {name: one.float().double() for name, one in fisher.items()}, 0.4)
    with torch.no_grad():
        torch.testing.assert_close(term(held, 1.0), wanted, rtol=1e-6, atol=0)
    exact = dense(plain, model, {name: one.double() for name, (one, *_) in zip(linear, term._terms)}, 0.4)
    check(term, held, exact)


def test_fisher_of_layers_that_keep_their_weight_transposed(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=20, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2, initializer_range=0.2
    )
    plain = GPT2LMHeadModel(config).double().eval()
    names = AllLinear()(plain)
    for delta in (Lora(rank=3), Full()):
        model, context = adapted(copy.deepcopy(plain), delta, tmp_path, Names(tuple(names)))
        term, held = Fisher(strength=0.4, samples=6).start(context), moved(model)
        fisher = {name: one.float().double() for name, one in slow(copy.deepcopy(plain), names).items()}
        with torch.no_grad():
            torch.testing.assert_close(term(held, 1.0), dense(plain, merge(copy.deepcopy(model)), fisher, 0.4), rtol=1e-6, atol=0)


def test_fisher_of_another_type_that_adds_to_the_weight(llama, tmp_path):
    model = get_peft_model(llama().double(), LoHaConfig(target_modules=["q_proj"], r=2)).double()
    context = Context.scratch(tmp_path)
    context.give("model", model)
    context.give("general_statistics", Statistics(model, list, lambda: [collate([one]) for one in rows()], Causal()))
    term, held = Fisher(strength=0.4, samples=6).start(context), moved(model)
    layers = [one for name, one in model.named_modules() if name.endswith("q_proj")]
    wanted = sum(0.4 * (f.double() * one.get_delta_weight("default").square()).sum() for (f, *_), one in zip(term._terms, layers))
    check(term, held, wanted)


def test_where_fisher_cannot_say_what_changes_it_refuses(llama, tmp_path):
    for delta, init, words in ((Lora(dora=True), Default(), "use delta `lora`"), (Lora(rank=2), Pissa(), "use init `default`")):
        _, context = adapted(llama, delta, tmp_path, init=init)
        with pytest.raises(Problem, match=words):
            Fisher().start(context)
    context.give("model", get_peft_model(llama(), IA3Config(target_modules=["q_proj"], feedforward_modules=[])))
    with pytest.raises(Problem, match="weighs what an adapter adds to a weight, which one of type IA3 does not say"):
        Fisher().start(context)
    context.give("model", attach(llama(), Names(("norm",)), Full(), Default(), seed=0))
    with pytest.raises(Problem, match="none is trained"):
        Fisher().start(context)
