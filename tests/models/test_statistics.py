"""Statistics against loops over examples in float64, and what they leave behind: nothing."""

import copy
import dataclasses
import functools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from temper.context import Context
from temper.models.deltas.where import AllLinear
from temper.models.statistics import Kind, Statistics
from temper.parts import Problem
from temper.train.batching import collate
from temper.train.examples import Example
from temper.train.objectives import Causal, Sum
from temper.train.statistics import statistics_of

LENGTHS = [5, 9, 3, 7, 12, 4, 6, 8, 10, 2, 11]


def llama(dropout=0.0):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.3,
        attention_dropout=dropout,
    )
    return AutoModelForCausalLM.from_config(config)


def gpt():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=4, n_positions=32, initializer_range=0.3)
    return AutoModelForCausalLM.from_config(config)


def examples():
    rng = torch.Generator().manual_seed(1)
    made = []
    for source, length in enumerate(LENGTHS):
        tokens = torch.randint(0, 64, (length,), generator=rng).int().numpy()
        supervised = (torch.rand(length, generator=rng) < 0.6).numpy()
        supervised[-1] = True
        made.append(Example(tokens, supervised, source))
    return made


def batches(size=4):
    given = examples()
    return [collate(given[start : start + size], index) for index, start in enumerate(range(0, len(given), size))]


def remember(inputs, name, _layer, args):
    inputs[name] = args[0][0].detach()


def reference(model, names, rows):
    """Per example in float64: summed-loss gradients, targets, inputs of real tokens; by layer, weights in [out, in]."""
    model = copy.deepcopy(model).double().eval().requires_grad_()
    found = []
    for one in rows:
        batch, inputs = collate([one]), {}
        hooks = [model.get_submodule(name).register_forward_pre_hook(functools.partial(remember, inputs, name)) for name in names]
        logits = model(input_ids=batch.input_ids).logits[0].log_softmax(-1)
        for hook in hooks:
            hook.remove()
        places = batch.supervised[0].nonzero().flatten()
        loss = -torch.stack([logits[place - 1, batch.input_ids[0, place]] for place in places]).sum()
        weights = [model.get_submodule(name).weight for name in names]
        gradients = torch.autograd.grad(loss, weights)
        wide = [type(model.get_submodule(name)).__name__ == "Conv1D" for name in names]
        gradients = {name: one.T if turn else one for name, one, turn in zip(names, gradients, wide, strict=True)}
        found.append((gradients, len(places), inputs))
    return found


def expected(kind, name, found, size=4):
    match kind:
        case "gradient":
            return sum(one[0][name] for one in found) / sum(one[1] for one in found)
        case "fisher":
            return sum(one[0][name].square() for one in found) / len(found)
        case "squared-gradient":
            groups = [found[start : start + size] for start in range(0, len(found), size)]
            means = [torch.stack([one[0][name] for one in some]).sum(0) / sum(one[1] for one in some) for some in groups]
            return torch.stack(means).square().sum(0)
    inputs = torch.cat([one[2][name] for one in found])
    return {"covariance": inputs.T @ inputs / len(inputs), "moment": inputs.square().mean(0), "mean": inputs.mean(0)}[kind]


def close(actual, wanted):
    wanted = wanted.float()
    torch.testing.assert_close(actual, wanted, atol=float(wanted.abs().max()) * 2e-5, rtol=2e-5)


class Counted:
    """Batches that know how often they are gone through, and a loss that knows how often it is asked."""

    def __init__(self, size=4):
        self.given, self.passes, self.losses, self.count = batches(size), 0, 0, Causal()

    def __call__(self):
        self.passes += 1
        yield from self.given

    def loss(self, model, batch):
        self.losses += 1
        return self.count(model, batch)


ASKED: dict[Kind, int] = {"gradient": 11, "squared-gradient": 8, "fisher": 6, "covariance": 11, "moment": 3, "mean": 5}


@pytest.mark.parametrize("make", [llama, gpt])
def test_every_kind_in_one_pass(make):
    """Requests of different length over padded batches; the model, its gradients and the random numbers stay."""
    model, data = make().train(), Counted()
    model.requires_grad_(False)
    names = AllLinear()(model)
    model.get_submodule(names[0]).weight.requires_grad_(True).grad = torch.ones_like(model.get_submodule(names[0]).weight)
    model.get_submodule(names[1]).eval()
    before = {name: one.clone() for name, one in model.state_dict().items()}
    learning = [one.requires_grad for one in model.parameters()]
    modes = [one.training for one in model.modules()]
    state = torch.random.get_rng_state()
    statistics = Statistics(model, lambda: names, data, data.loss)
    asked = {kind: statistics.ask(kind, samples) for kind, samples in ASKED.items()}
    few = statistics.ask("gradient", 2, modules=names[-1:])
    values = {kind: one() for kind, one in asked.items()}
    assert data.passes == 1
    assert data.losses == 3
    found = reference(model, names, examples())
    for kind, samples in ASKED.items():
        assert list(values[kind]) == names
        assert asked[kind].seen == samples
        for name in names:
            close(values[kind][name], expected(kind, name, found[:samples]))
    assert list(few()) == names[-1:]
    close(few()[names[-1]], expected("gradient", names[-1], found[:2]))
    assert data.passes == 1
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert [one.requires_grad for one in model.parameters()] == learning
    assert [one.training for one in model.modules()] == modes
    gradients = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    assert list(gradients) == [f"{names[0]}.weight"]
    assert (gradients[f"{names[0]}.weight"] == 1).all()
    assert torch.equal(state, torch.random.get_rng_state())
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())


@pytest.mark.parametrize("kind", ASKED)
def test_a_statistic_does_not_depend_on_what_else_is_asked(kind):
    model, names = llama(), AllLinear()(llama())
    alone = Statistics(model, lambda: names, Counted(), Causal()).ask(kind, 7)
    together = Statistics(model, lambda: names, Counted(), Causal())
    others = [together.ask(other, samples) for other, samples in ASKED.items()]
    one = together.ask(kind, 7)
    assert others[0]()
    for name, value in alone().items():
        torch.testing.assert_close(one()[name], value, atol=1e-7, rtol=1e-5)


def test_no_more_is_computed_than_is_asked_for():
    """No batch beyond the longest request, no backward pass and (once it is known that it is not needed) no head for moments."""
    model, names, data = llama(), AllLinear()(llama()), Counted(size=2)
    heads, graphs = [], []
    model.lm_head.register_forward_hook(lambda *_: heads.append(1))
    model.model.norm.register_forward_hook(lambda _, args, out: graphs.append(out.requires_grad))
    statistics = Statistics(model, lambda: names, data, data.loss)
    statistics.ask("mean", 5)()
    assert (data.passes, data.losses, len(heads), graphs) == (1, 3, 1, [False] * 3)
    graphs.clear()
    short, long = statistics.ask("fisher", 2), statistics.ask("moment", 6)
    assert short()
    assert long()
    assert graphs == [True, False, False]
    assert data.passes == 2
    everything = statistics.ask("covariance", 1000)
    shared = everything()
    assert everything.seen == len(LENGTHS)
    layer = "model.layers.0.self_attn."
    assert shared[f"{layer}q_proj"] is shared[f"{layer}k_proj"]
    assert shared[f"{layer}q_proj"] is not shared[f"{layer}o_proj"]


def test_under_an_adapter_the_weights_without_it_are_meant():
    plain, names = llama(), AllLinear()(llama())
    wanted = Statistics(plain, lambda: names, Counted(), Causal()).ask("fisher", 7)()
    adapted = get_peft_model(copy.deepcopy(plain), LoraConfig(target_modules=["q_proj", "down_proj"], r=2))
    learning = [one.requires_grad for one in adapted.parameters()]
    found = Statistics(adapted, lambda: names, Counted(), Causal()).ask("fisher", 7)()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value)
    assert [one.requires_grad for one in adapted.parameters()] == learning


def test_a_loss_that_counts_in_its_own_way_is_asked_for_the_first_rows():
    """A batch of which only some rows are wanted, under a loss whose targets are not the supervised tokens."""

    def halved(model, batch):
        kept = dataclasses.replace(batch, supervised=batch.supervised & (torch.arange(batch.supervised.shape[1]) % 2 == 1))
        kept = dataclasses.replace(kept, targets=int(kept.supervised.sum()))
        return Causal()(model, kept)

    model, names = llama(), AllLinear()(llama())
    mean = Statistics(model, lambda: names, Counted(), halved).ask("gradient", 6)()
    alone = [Statistics(model, lambda: names, lambda one=one: [collate([one])], halved) for one in examples()[:6]]
    counts = [int(one.supervised[1::2].sum()) for one in examples()[:6]]
    gradients = [one.ask("gradient", 1)() for one in alone]
    for name, value in mean.items():
        close(value, sum(count * one[name] for count, one in zip(counts, gradients, strict=True)) / sum(counts))


def test_a_layer_that_is_called_twice():
    """Its gradients add up before they are squared."""
    model, name = llama(), "model.layers.0.mlp.down_proj"
    model.model.layers[1].mlp.down_proj = model.model.layers[0].mlp.down_proj
    found = Statistics(model, lambda: [name], Counted(), Causal())
    fisher, gradient = found.ask("fisher", 7), found.ask("gradient", 7)
    wanted = reference(model, [name], examples()[:7])
    close(fisher()[name], expected("fisher", name, wanted))
    close(gradient()[name], expected("gradient", name, wanted))


def test_refusals():
    model = llama()
    statistics = Statistics(model, lambda: ["model.norm", "model.layers.0.mlp.up_proj"], Counted(), Causal())
    assert list(statistics.ask("mean", 2)()) == ["model.layers.0.mlp.up_proj"]
    with pytest.raises(Problem, match="samples 0: a statistic needs at least one example"):
        statistics.ask("mean", 0)
    with pytest.raises(Problem, match=r"statistics are of linear layers, and `model.norm` is a LlamaRMSNorm; leave it out"):
        statistics.ask("mean", 2, modules=["model.norm"])()
    with pytest.raises(Problem, match=r"`model.layers.1.mlp.up_proj` was never called while the loss was computed"):
        Statistics(model, list, Counted(), lambda model, batch: Sum(model.model.layers[0].mlp.up_proj(torch.ones(4, 3, 16)).sum(), 1)).ask(
            "mean", 4, modules=["model.layers.1.mlp.up_proj"]
        )()


def test_drawn_from_the_stream_of_statistics(tmp_path):
    """The order is the seed's; the rows of a preference stay together."""
    model, names, rows = llama(), AllLinear()(llama()), examples()
    made = [statistics_of(model, rows, Causal(), lambda: names, Context.scratch(tmp_path, seed=seed), batch=3) for seed in (0, 0, 1)]
    one, two, three = (some.ask("moment", 4)() for some in made)
    assert all(torch.equal(one[name], two[name]) for name in names)
    assert not any(torch.equal(one[name], three[name]) for name in names)
    order = torch.randperm(len(rows), generator=Context.scratch(tmp_path).stream("statistics").generator()).tolist()
    found = reference(model, names, [rows[index] for index in order[:4]])
    close(one[names[0]], expected("moment", names[0], found))
    paired = [dataclasses.replace(one, side=("chosen", "rejected")[index % 2]) for index, one in enumerate(rows[:10])]
    statistics = statistics_of(model, paired, Causal(), lambda: names, Context.scratch(tmp_path), batch=2)
    fisher, order = statistics.ask("fisher", 3), torch.randperm(5, generator=Context.scratch(tmp_path).stream("statistics").generator())
    found = reference(model, names, [paired[2 * pair + side] for pair in order[:3].tolist() for side in (0, 1)])
    for name in names:
        pairs = [found[2 * index][0][name] + found[2 * index + 1][0][name] for index in range(3)]
        close(fisher()[name], sum(one.square() for one in pairs) / 3)
