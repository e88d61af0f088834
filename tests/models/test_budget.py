"""Budgets that change a delta during the run: masks, schedules and what is left, against peft's own."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.adalora.layer import RankAllocator

from temper.context import Context
from temper.models import io
from temper.models.deltas import attach, merge, trainable_parameters
from temper.models.deltas.budget import Allocation, SensitivityCubic, triplets
from temper.models.deltas.delta import Full, Lora, SvdTriplet
from temper.models.deltas.init import Default, ReinitTop
from temper.models.deltas.where import AllLinear, Attention, Everything, Layers, Names
from temper.parts import Problem, Progress


def adapted(tiny, part: SensitivityCubic, tmp_path, rank: int = 6, seed: int = 0, **changes: Any) -> tuple[Any, Allocation]:
    context = Context.scratch(tmp_path, seed)
    live = part.start(context.at("budget"))
    model = attach(tiny(**changes), None, SvdTriplet(rank=rank), Default(), seed=seed, budget=live)
    context.give("model", model)
    return model, live


def descend(model, optimizer, batch, update: int) -> None:
    """An update on one row of the batch, whose gradients stay."""
    one = {name: tensor[update % 3 : update % 3 + 1] for name, tensor in batch.items()}
    optimizer.zero_grad()
    labels = one["input_ids"].masked_fill(one["attention_mask"] == 0, -100)
    logits = model(**one).logits
    torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100).backward()
    optimizer.step()


def lambdas(model) -> dict[str, torch.Tensor]:
    return {name: held[0].detach().clone() for name, held in triplets(model).items()}


def logits(model, batch) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch).logits[batch["attention_mask"].bool()]


@pytest.mark.parametrize(("warmup", "final", "interval", "target"), [(0.1, 0.3, 3, 2), (0.0, 0.0, 1, 1), (0.25, 0.5, 4, 4)])
def test_every_update_masks_what_pefts_allocator_masks(tiny, batch, tmp_path, warmup, final, interval, target):
    """Two models descend alike; ours goes by the part, the other by peft, each on its own gradients."""
    updates = 20
    part = SensitivityCubic(target=target, warmup=warmup, final=final, interval=interval, betas=(0.85, 0.7))
    model, live = adapted(tiny, part, tmp_path)
    other, _ = adapted(tiny, part, tmp_path)
    config = other.peft_config["default"]
    assert (config.target_r, config.deltaT, config.beta1, config.beta2) == (target, interval, 0.85, 0.7)
    config.total_step, config.tinit, config.tfinal = updates, round(warmup * updates), round(final * updates)
    tuner = other.base_model
    tuner.rankallocator = RankAllocator(tuner.model, config, "default")
    optimizers = [torch.optim.AdamW(trainable_parameters(one).values(), lr=0.01) for one in (model, other)]
    counts = []
    for update in range(updates):
        for one, optimizer in zip((model, other), optimizers):
            descend(one, optimizer, batch, update)
        live.after(Progress(update + 1, updates))
        tuner.update_and_allocate(update + 1)
        for name, values in lambdas(other).items():
            assert torch.equal(lambdas(model)[name], values), (update, name)
        counts.append(sum(int((one != 0).sum()) for one in lambdas(model).values()))
    matrices = len(lambdas(model))
    assert counts[0] == 6 * matrices or warmup == 0
    assert counts[-1] == target * matrices
    pattern = model.peft_config["default"].rank_pattern
    assert pattern == {name.replace(".default", ""): left for name, left in config.rank_pattern.items()}
    figures = live.figures()
    assert figures["rank"] == target
    assert {name: figures[f"rank.{name}"] for name in lambdas(model)} == {
        name: int((one != 0).sum()) for name, one in lambdas(model).items()
    }
    assert len(set(figures.values())) > 1, "matrices differ in rank"


def test_the_budget_falls_by_a_cube(tiny, batch, tmp_path):
    part = SensitivityCubic(target=2, warmup=0.2, final=0.2, interval=1)
    model, live = adapted(tiny, part, tmp_path)
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=0.01)
    assert live.figures() == {}
    for update in range(10):
        descend(model, optimizer, batch, update)
        live.after(Progress(update + 1, 10))
        left = sum(int((one != 0).sum()) for one in lambdas(model).values())
        share = min(1.0, max(0.0, (update + 1 - 2) / 6))
        assert left == int(14 * (2 + 4 * (1 - share) ** 3)), update


def test_what_leaves_has_the_ranks_that_remain_and_peft_alone_loads_it(tiny, batch, tmp_path, tokenizer):
    model, live = adapted(tiny, SensitivityCubic(target=1, interval=2), tmp_path)
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=0.05)
    for update in range(12):
        descend(model, optimizer, batch, update)
        live.after(Progress(update + 1, 12))
    said = logits(model, batch)
    ranks = {name: int(live.figures()[f"rank.{name}"]) for name in lambdas(model)}
    assert 0 in ranks.values(), "a matrix that lost everything"
    assert len(set(ranks.values())) > 2
    io.save_adapter(model, tokenizer, tmp_path / "adapter", "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = PeftModel.from_pretrained(tiny(), tmp_path / "adapter")
    assert {name: one.shape[0] for name, one in lambdas(loaded).items()} == ranks
    torch.testing.assert_close(logits(loaded, batch), said, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(said, logits(tiny(), batch), atol=1e-2)
    torch.testing.assert_close(logits(merge(model), batch), said, rtol=1e-4, atol=2e-5)


def test_a_fresh_delta_changes_nothing_and_is_w_plus_scaled_triplets(tiny, batch, tmp_path):
    model, _ = adapted(tiny, SensitivityCubic(target=2), tmp_path, rank=4)
    assert torch.equal(logits(model, batch), logits(tiny(), batch))
    name = "model.layers.1.mlp.up_proj"
    values, right, left = triplets(model)[name]
    with torch.no_grad():
        values.copy_(torch.randn(values.shape, generator=torch.Generator().manual_seed(1)))
    before = tiny().get_submodule(name).weight
    wanted = before + 24.0 / (4 + 1e-5) * left @ torch.diag(values[:, 0]) @ right
    torch.testing.assert_close(merge(model).get_submodule(name).weight, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stop", [3, 9, 16])
def test_a_run_that_stops_goes_on_to_the_same_bits(tiny, batch, tmp_path, stop):
    part, updates = SensitivityCubic(target=2, interval=3), 20

    def run(first: int, last: int, model: Any, live: Allocation, optimizer: torch.optim.Optimizer) -> None:
        for update in range(first, last):
            descend(model, optimizer, batch, update)
            live.after(Progress(update + 1, updates))

    def fresh() -> tuple[Any, Allocation, torch.optim.Optimizer]:
        model, live = adapted(tiny, part, tmp_path)
        return model, live, torch.optim.AdamW(trainable_parameters(model).values(), lr=0.02)

    whole = fresh()
    run(0, updates, *whole)
    first, second = fresh(), fresh()
    run(0, stop, *first)
    with torch.no_grad():
        for name, one in trainable_parameters(second[0]).items():
            one.copy_(trainable_parameters(first[0])[name])
    second[1].load_state_dict(first[1].state_dict())
    second[2].load_state_dict(first[2].state_dict())
    run(stop, updates, *second)
    for name, one in trainable_parameters(whole[0]).items():
        assert torch.equal(one, trainable_parameters(second[0])[name]), name
    assert whole[1].figures() == second[1].figures()
    assert whole[0].peft_config["default"].rank_pattern == second[0].peft_config["default"].rank_pattern


def test_ranks_do_not_stand_before_their_share_where_updates_are_only_estimated(tiny, batch, tmp_path):
    model, live = adapted(tiny, SensitivityCubic(target=2, interval=1, warmup=0.0, final=0.5), tmp_path)
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=0.02)
    for step, expected in ((1, float("inf")), (2, 12.5), (3, 11.0), (4, 9.7), (5, 10.0)):
        descend(model, optimizer, batch, step)
        live.after(Progress(step, expected))
        assert bool(live.figures()) == (step == 5), step


def test_a_run_of_one_update_has_its_ranks(tiny, batch, tmp_path):
    model, live = adapted(tiny, SensitivityCubic(target=2), tmp_path)
    descend(model, torch.optim.AdamW(trainable_parameters(model).values(), lr=0.02), batch, 0)
    live.after(Progress(1, 1))
    assert live.figures()["rank"] == 2


def test_what_does_not_go_together_is_refused(tiny, tmp_path):
    context = Context.scratch(tmp_path)
    with pytest.raises(ValueError, match=r"warmup 0\.6 and final 0\.5 leave no run between them"):
        SensitivityCubic(warmup=0.6, final=0.5)
    with pytest.raises(Problem, match="takes triplets away, and a LORA adapter has none"):
        attach(tiny(), None, Lora(), Default(), seed=0, budget=SensitivityCubic().start(context))
    with pytest.raises(Problem, match="target 8 is above the delta's rank 4"):
        attach(tiny(), None, SvdTriplet(rank=4), Default(), seed=0, budget=SensitivityCubic().start(context))
    with pytest.raises(Problem, match=r"`svd-triplet` goes to linear layers, and `model\.embed_tokens` is a Embedding"):
        attach(tiny(), Names(("embed_tokens",)), SvdTriplet(), Default(), seed=0)
    model, live = adapted(tiny, SensitivityCubic(target=2), tmp_path)
    with pytest.raises(Problem, match="scores by gradients, which this optimizer does not leave"):
        live.after(Progress(1, 10))
    other = SensitivityCubic(target=2).start(context)
    context.give("model", model)
    with pytest.raises(Problem, match="an adapter that came in goes on with its own"):
        other.after(Progress(1, 10))


def full(tiny, where, init=None):
    return attach(tiny(num_hidden_layers=3), where, Full(), init or Default(), seed=0)


def test_the_last_layers_of_what_another_part_names(tiny):
    model = tiny(num_hidden_layers=3)
    assert Layers(last=2)(model) == [name for name in AllLinear()(model) if re.search(r"layers\.[12]\.", name)]
    assert Layers(last=1, of=Attention())(model) == [f"model.layers.2.self_attn.{one}_proj" for one in "qkvo"]
    lower = {name for name in Everything()(model) if "embed" in name or "layers.0." in name}
    assert set(Layers(last=2, of=Everything())(model)) == set(Everything()(model)) - lower
    trained = trainable_parameters(full(tiny, Layers(last=2, of=Everything())))
    assert not any("embed" in name or "layers.0." in name for name in trained)
    assert {"model.norm.weight", "lm_head.weight"} < set(trained)
    tied = tiny(num_hidden_layers=3, tie_word_embeddings=True)
    assert "lm_head" not in Layers(last=2, of=Everything())(tied)
    with pytest.raises(Problem, match="last 4: LlamaForCausalLM has 3 blocks"):
        Layers(last=4)(model)
    with pytest.raises(Problem, match="the last 1 blocks hold none of the modules that `names` names"):
        Layers(last=1, of=Names(("embed_tokens",)))(model)


@pytest.mark.parametrize("last", [1, 2])
def test_the_top_starts_anew_and_all_else_is_bit_for_bit_what_it_was(tiny, tmp_path, tokenizer, last):
    io.save_model(tiny(num_hidden_layers=3), tokenizer, tmp_path / "model")
    before = io.load_model(tmp_path / "model").state_dict()
    model = attach(io.load_model(tmp_path / "model"), None, Full(), ReinitTop(last=last), seed=3)
    again = attach(io.load_model(tmp_path / "model"), None, Full(), ReinitTop(last=last), seed=3).state_dict()
    other = attach(io.load_model(tmp_path / "model"), None, Full(), ReinitTop(last=last), seed=4).state_dict()
    for name, one in model.state_dict().items():
        anew = any(f"layers.{place}." in name for place in range(3 - last, 3))
        gain = "norm" in name
        assert torch.equal(one, again[name])
        assert torch.equal(one, before[name]) == (not anew or gain), name
        assert torch.equal(one, other[name]) == (not anew or gain), name
        if anew and gain:
            assert (one == 1).all()
        elif anew:
            assert one.std() == pytest.approx(0.2, rel=0.1)
    assert all(one.requires_grad for one in model.parameters())


def test_gains_of_the_top_start_at_one_and_a_start_anew_is_of_weights(tiny):
    model = tiny()
    with torch.no_grad():
        for one in model.model.layers:
            one.input_layernorm.weight.fill_(3.0)
    attach(model, None, Full(), ReinitTop(last=1), seed=0)
    assert [float(one.input_layernorm.weight[0]) for one in model.model.layers] == [3.0, 1.0]
    with pytest.raises(Problem, match="which an adapter leaves as they are; use delta `full`"):
        attach(tiny(), None, Lora(), ReinitTop(), seed=0)
    with pytest.raises(Problem, match="last 3: LlamaForCausalLM has 2 blocks"):
        attach(tiny(), None, Full(), ReinitTop(last=3), seed=0)
