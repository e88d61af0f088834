"""Adapter types of our own: they are to peft as its own are, and each equals what it is written as."""

from __future__ import annotations

import copy
import math
import subprocess
import sys

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, PeftType, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import temper.peft
from temper.context import Context
from temper.models import io
from temper.models.deltas import attach, continue_adapter, is_adapted, merge, to_plain_lora, trainable_parameters
from temper.models.deltas.delta import Full, Lora, LowRankExperts, TriFactor
from temper.models.deltas.init import Default, FirstUpdate, Gaussian
from temper.models.deltas.route import TokenTop1
from temper.models.deltas.tuners import low_rank_experts, tri_factor
from temper.models.deltas.where import AllLinear, Everything, Mlp, Names
from temper.models.sample import sample
from temper.parts import Function, Problem
from temper.train.batching import collate
from temper.train.examples import Example
from temper.train.faster import faster
from temper.train.objectives import Causal, added
from temper.train.objectives.balance import LoadBalance, balance

DELTAS = [
    TriFactor(rank=3),
    TriFactor(rank=3, scale=2.5),
    LowRankExperts(rank=2, experts=3),
    LowRankExperts(rank=2, experts=3, route=TokenTop1(scaled=False)),
]
NAME = "model.layers.0.mlp.up_proj"


def logits(model, batch):
    with torch.no_grad():
        return model.eval()(**batch).logits[batch["attention_mask"].bool()]


def shaken(model, size=0.1):
    """The model with every trained number moved."""
    with torch.no_grad():
        for index, one in enumerate(trainable_parameters(model).values()):
            one += size * torch.randn(one.shape, generator=torch.Generator().manual_seed(index))
    return model.eval()


def close(a, b, atol=2e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-4)


def gpt():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, initializer_range=0.2)
    return AutoModelForCausalLM.from_config(config).eval()


def examples(*lengths, prompt=3):
    draw = torch.Generator().manual_seed(3)
    made = []
    for index, length in enumerate(lengths):
        tokens = torch.randint(3, 64, (length,), generator=draw).numpy()
        made.append(Example(tokens, torch.arange(length).numpy() >= prompt, index))
    return made


# ------------------------------------------------------------------------------------------------- to peft as its own


def test_registered_once_and_for_all():
    for _ in range(2):
        temper.peft.register()
    assert PeftType("TRI_FACTOR") is PeftType.TRI_FACTOR  # pyright: ignore[reportAttributeAccessIssue]
    assert copy.deepcopy(PeftType["TRI_FACTOR"]) is PeftType["TRI_FACTOR"]
    assert {"TRI_FACTOR", "LOW_RANK_EXPERTS"} <= {one.value for one in PeftType}
    assert len({one.value for one in PeftType}) == len(list(PeftType))
    for kind in ("TRI_FACTOR", "LOW_RANK_EXPERTS"):
        assert isinstance(peft.get_peft_config({"peft_type": kind, "target_modules": ["q_proj"]}), peft.PeftConfig)


@pytest.mark.parametrize("delta", DELTAS, ids=str)
@pytest.mark.parametrize("kind", ["llama", "gpt"])
def test_saved_equals_reloaded(tiny, tmp_path, batch, delta, kind):
    def fresh():
        return gpt() if kind == "gpt" else tiny()

    model = attach(fresh(), None, delta, Default(), seed=0)
    close(logits(model, batch), logits(fresh(), batch), atol=2e-3)
    shaken(model)
    before = logits(model, batch)
    assert (before - logits(fresh(), batch)).abs().max() > 0.1
    with model.disable_adapter():  # pyright: ignore[reportCallIssue]
        close(logits(model, batch), logits(fresh(), batch))
    config, tensors = to_plain_lora(model)
    assert all("default" not in name for name in tensors)
    assert config.peft_type == delta_kind(delta)
    model.save_pretrained(tmp_path)  # pyright: ignore[reportCallIssue]
    again = PeftModel.from_pretrained(fresh(), tmp_path)
    assert not trainable_parameters(again)
    assert torch.equal(logits(again, batch), before)
    assert set(trainable_parameters(continue_adapter(again))) == set(trainable_parameters(model))
    assert torch.equal(logits(again, batch), before)


def delta_kind(delta):
    return tri_factor.KIND if isinstance(delta, TriFactor) else low_rank_experts.KIND


def test_a_folder_loads_by_one_import(tiny, tokenizer, tmp_path, batch):
    io.save_model(tiny(), tokenizer, tmp_path / "base")
    save_file(batch, tmp_path / "batch.safetensors")
    wanted = {}
    for name, delta in (("one", DELTAS[1]), ("two", DELTAS[2])):
        model = shaken(attach(io.load_model(tmp_path / "base"), None, delta, Default(), seed=0))
        io.save_adapter(model, tokenizer, tmp_path / name, "base")
        wanted[name] = logits(model, batch)
        close(logits(io._load_adapter(io.load_model(tmp_path / "base"), tmp_path / name), batch), wanted[name])
    subprocess.run([sys.executable, "-c", LOADS, str(tmp_path)], check=True, capture_output=True, text=True, timeout=300)
    found = load_file(tmp_path / "out.safetensors")
    for name, one in wanted.items():
        close(found[name], one)


LOADS = """
import sys, torch, peft
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

folder = sys.argv[1]

def load(name):
    return peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder + "/base"), f"{folder}/{name}").eval()

try:
    load("one")
except (ValueError, KeyError):
    pass
else:
    raise SystemExit("peft knew the type")
import temper.peft

assert not any(name.startswith(("temper.train", "temper.tune", "temper.tasks")) for name in sys.modules)
batch, found = load_file(folder + "/batch.safetensors"), {}
for name in ("one", "two"):
    with torch.no_grad():
        found[name] = load(name)(**batch).logits[batch["attention_mask"].bool()]
save_file(found, folder + "/out.safetensors")
"""
"""A process that knows `peft` and the one import."""


@pytest.mark.parametrize("delta", [DELTAS[1], DELTAS[2]], ids=str)
def test_two_adapters_on_a_model(tiny, batch, delta):
    model = shaken(attach(tiny(), None, delta, Default(), seed=0))
    first = logits(model, batch)
    inner: PeftModel = model  # pyright: ignore[reportAssignmentType]
    inner.add_adapter("second", copy.deepcopy(inner.peft_config["default"]))
    assert torch.equal(logits(inner, batch), first)
    inner.set_adapter("second")
    assert all("second" in name for name in trainable_parameters(inner))
    close(logits(inner, batch), logits(tiny(), batch), atol=2e-3)
    second = logits(shaken(inner), batch)
    inner.set_adapter("default")
    assert torch.equal(logits(inner, batch), first)
    assert set(get_peft_model_state_dict(inner, adapter_name="second")) == set(get_peft_model_state_dict(inner))
    inner.delete_adapter("default")
    inner.set_adapter("second")
    assert torch.equal(logits(inner, batch), second)
    with pytest.raises(ValueError, match="mixes adapters"):
        inner.base_model.get_submodule(f"model.{NAME}")(torch.zeros(1, 2, 32), adapter_names=["second"])


def test_adapters_of_a_16_bit_model_are_in_float32(tiny, batch):
    for delta in (DELTAS[1], DELTAS[2]):
        model = attach(tiny().bfloat16(), None, delta, Default(), seed=0)
        assert {one.dtype for one in trainable_parameters(model).values()} == {torch.float32}
        assert logits(shaken(model), batch).dtype == torch.bfloat16
        assert len(trainable_parameters(model)) == {"TRI_FACTOR": 14, "LOW_RANK_EXPERTS": 18}[delta_kind(delta)]


# -------------------------------------------------------------------------------------------------------- tri-factor


def test_tri_factor_is_written_as_it_is(tiny, batch):
    model = shaken(attach(tiny(), Names((NAME,)), TriFactor(rank=3, scale=2.5), Default(), seed=0))
    ((_, layer),) = tri_factor.layers(model)
    b, r, a = (getattr(layer, f"tri_factor_{one}")["default"].double() for one in "BRA")
    weight = layer.get_base_layer().weight.double()
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    close(layer(x.float()), (x @ (weight + 2.5 * b @ r @ a).T).float())
    assert set(trainable_parameters(model)) == {f"base_model.model.{NAME}.tri_factor_R.default"}
    layer(x.float()).square().sum().backward()
    full = torch.autograd.grad((x @ (w := (weight + 2.5 * b @ r @ a).detach().requires_grad_()).T).square().sum(), w)[0]
    close(layer.tri_factor_R["default"].grad.double(), 2.5 * b.T @ full @ a.T, atol=1e-3)  # grad_R = s B' G A'


@pytest.mark.parametrize("kind", ["llama", "gpt"])
def test_tri_factor_starts_from_the_principal_part(tiny, kind):
    where = Names(("transformer.h.0.mlp.c_fc",)) if kind == "gpt" else Names((NAME,))
    base = gpt() if kind == "gpt" else tiny()
    ((_, layer),) = tri_factor.layers(attach(base, where, TriFactor(rank=4), Default(), seed=0))
    weight = layer.get_base_layer().weight
    weight = weight.T if kind == "gpt" else weight
    u, s, v = torch.linalg.svd(weight.detach(), full_matrices=False)
    b, a = layer.tri_factor_B["default"], layer.tri_factor_A["default"]
    close(b @ a, (u[:, :4] * s[:4]) @ v[:4])
    close(b.T @ b, torch.eye(4))
    close(a @ a.T, torch.diag(s[:4].square()), atol=1e-4)
    assert 0 < layer.tri_factor_R["default"].abs().max() < 1e-4


def test_tri_factor_merges_and_comes_off_again(tiny, batch):
    for fresh in (tiny, gpt):
        model = shaken(attach(fresh(), None, TriFactor(rank=3, scale=1.5), Default(), seed=0))
        before = logits(model, batch)
        model.merge_adapter()  # pyright: ignore[reportCallIssue]
        close(logits(model, batch), before, atol=1e-4)
        model.unmerge_adapter()  # pyright: ignore[reportCallIssue]
        close(logits(model, batch), before)
        with model.disable_adapter():  # pyright: ignore[reportCallIssue]
            close(logits(model, batch), logits(fresh(), batch))
        merged = merge(model)
        assert not is_adapted(merged)
        assert set(merged.state_dict()) == set(fresh().state_dict())
        close(logits(merged, batch), before, atol=1e-4)


def test_tri_factor_is_a_lora_exactly(tiny, batch):
    model = shaken(attach(tiny(), None, TriFactor(rank=3, scale=1.5), Default(), seed=0))
    plain = get_peft_model(tiny(), LoraConfig(target_modules=AllLinear()(tiny()), r=3, lora_alpha=4.5))  # pyright: ignore
    found = dict(plain.named_modules())
    for name, layer in tri_factor.layers(model):
        a, b, scale = layer.low_rank("default")
        assert scale == 1.5
        close(layer.delta_weight("default"), scale * b @ a)
        found[name].lora_A["default"].weight.data.copy_(a)
        found[name].lora_B["default"].weight.data.copy_(b)
    close(logits(plain, batch), logits(model, batch))


def test_ranks_of_single_modules(tiny):
    temper.peft.register()
    config = tri_factor.TriFactorConfig(target_modules=["up_proj", "q_proj"], r=4, rank_pattern={"layers.1.mlp.up_proj": 2})
    sizes = {name: len(layer.tri_factor_R["default"]) for name, layer in tri_factor.layers(get_peft_model(tiny(), config))}
    assert sorted(sizes.values()) == [2, 4, 4, 4]
    assert sizes["base_model.model.model.layers.1.mlp.up_proj"] == 2


class Known:
    """Statistics that are given."""

    def __init__(self, found):
        self.found = found

    def ask(self, kind, samples, modules=None):
        self.asked = kind, samples
        return lambda: self.found


@pytest.mark.parametrize("sign", [True, False])
def test_first_update_is_the_best_of_its_rank(tiny, batch, tmp_path, sign):
    names = AllLinear()(tiny())
    draw = torch.Generator().manual_seed(0)
    given = {name: torch.randn(tiny().get_submodule(name).weight.shape, generator=draw) for name in names}
    context, statistics = Context.scratch(tmp_path), Known(given)
    context.give("statistics", statistics)
    init = FirstUpdate(samples=7, rate=0.01, sign=sign).start(context)
    assert statistics.asked == ("gradient", 7)
    model = attach(tiny(), None, TriFactor(rank=3, scale=2.0), init, seed=0)
    for name, layer in tri_factor.layers(model):
        gradient = given[name.removeprefix("base_model.model.")]
        update = -0.01 * (gradient.sign() if sign else gradient)
        u, s, v = torch.linalg.svd(update)
        close(layer.delta_weight("default"), (u[:, :3] * s[:3]) @ v[:3])  # Eckart and Young
        lost = (update - layer.delta_weight("default")).norm()
        close(lost, s[3:].norm())
        b, a = layer.tri_factor_B["default"], layer.tri_factor_A["default"]
        close(b.T @ b, torch.eye(3))
        close(a @ a.T, torch.eye(3))
        assert torch.equal(layer.get_base_layer().weight, tiny().get_submodule(name.removeprefix("base_model.model.")).weight)
    assert (logits(model, batch) - logits(tiny(), batch)).abs().max() > 1e-3  # the update is kept
    with pytest.raises(Problem, match="`first-update` starts three factors; use delta `tri-factor`"):
        attach(tiny(), None, Lora(), init, seed=0)
    with pytest.raises(Problem, match="`first-update` starts three factors"):
        attach(tiny(), None, Full(), init, seed=0)


def test_refusals(tiny):
    with pytest.raises(Problem, match=r"`tri-factor` finds 32 directions in `model.layers.0.self_attn.q_proj`; rank 33 is more"):
        attach(tiny(), Names(("q_proj",)), TriFactor(rank=33), Default(), seed=0)
    with pytest.raises(Problem, match=r"goes to linear layers, and `transformer.wpe` is a Embedding"):
        attach(gpt(), Names(("wpe",)), TriFactor(rank=3), Default(), seed=0)
    with pytest.raises(Problem, match="`low-rank-experts` goes to linear layers and embeddings, and"):
        attach(tiny(), Everything(), LowRankExperts(), Default(), seed=0)
    with pytest.raises(Problem, match="init `gaussian` starts low-rank factors"):
        attach(tiny(), None, TriFactor(rank=3), Gaussian(), seed=0)
    with pytest.raises(Problem, match="each token in a way of its own and are no change of a weight; keep them as an adapter"):
        merge(attach(tiny(), None, LowRankExperts(), Default(), seed=0))
    with pytest.raises(Problem, match="brings no code, so a function cannot route"):
        attach(tiny(), None, LowRankExperts(route=Function("own.py:mine", "0")), Default(), seed=0)
    config = low_rank_experts.LowRankExpertsConfig(target_modules=["up_proj"], route={"own.py:mine": {}})
    with pytest.raises(ValueError, match=r"no way `own.py:mine` of routing tokens"):
        get_peft_model(tiny(), config)


# -------------------------------------------------------------------------------------------------- low-rank experts


@pytest.mark.parametrize("scaled", [True, False])
def test_experts_are_written_as_they_are(tiny, scaled):
    delta = LowRankExperts(rank=2, experts=3, alpha=5.0, route=TokenTop1(scaled=scaled))
    (layer,) = low_rank_experts.layers(shaken(attach(tiny(), Names((NAME,)), delta, Default(), seed=0)))
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    a, b, router = (getattr(layer, f"low_rank_experts_{one}")["default"].double() for one in ("A", "B", "router"))
    out, wide = layer.get_base_layer()(x).double(), x.double()
    for row in range(2):
        for place in range(5):
            gates = (router @ wide[row, place]).softmax(0)
            k = int(gates.argmax())
            out[row, place] += 2.5 * (gates[k] if scaled else 1.0) * b[k] @ (a[k] @ wide[row, place])
    close(layer(x), out.float())
    layer(x).square().sum().backward()
    learnt = layer.low_rank_experts_router["default"].grad
    assert (learnt is not None and learnt.abs().max() > 0) == scaled


def test_one_expert_is_a_lora(tiny, batch):
    experts = attach(tiny(), None, LowRankExperts(rank=3, experts=1, alpha=6.0), Default(), seed=0)
    lora = attach(tiny(), Mlp(), Lora(rank=3, alpha=6.0), Default(), seed=0)
    held = dict(lora.named_modules())
    for name, layer in experts.named_modules():
        if isinstance(layer, low_rank_experts.LowRankExpertsLayer):
            for one in "AB":
                held[name].get_submodule(f"lora_{one}.default").weight.data.copy_(getattr(layer, f"low_rank_experts_{one}")["default"][0])  # pyright: ignore
    for model in (experts, lora):
        optimizer = torch.optim.SGD(trainable_parameters(model).values(), lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            model(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).loss.backward()
            optimizer.step()
    assert (logits(lora, batch) - logits(tiny(), batch)).abs().max() > 1e-2
    close(logits(experts, batch), logits(lora, batch))


def test_experts_sample_with_the_cache(tiny):
    model = shaken(attach(tiny(), None, LowRankExperts(rank=2, experts=3), Default(), seed=0), 0.3)
    prompts = [[5, 9, 11, 4], [7, 8]]
    said = sample(model, prompts, max_new_tokens=8, temperature=0, stop=())
    for prompt, one in zip(prompts, said, strict=True):
        tokens = list(prompt)
        for _ in range(8):  # without the cache
            with torch.no_grad():
                tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
        assert list(one.tokens) == tokens[len(prompt) :]


# ------------------------------------------------------------------------------------------------------ load balance


def test_balance_is_that_of_transformers():
    found = torch.randn(2, 20, 4, generator=torch.Generator().manual_seed(0)) * 3
    close(balance(found[0]), load_balancing_loss_func((found[0],), num_experts=4, top_k=1))  # pyright: ignore
    assert balance(torch.zeros(8, 4) + torch.eye(4).repeat(2, 1) * 1e-6).item() == pytest.approx(1, abs=1e-4)
    assert balance(torch.eye(4)[:1] * 50).item() == pytest.approx(4)


def test_load_balance_leaves_padding_out_and_adds_up(tiny, tmp_path):
    model = shaken(attach(tiny(), None, LowRankExperts(rank=2, experts=3), Default(), seed=0), 0.5)
    context = Context.scratch(tmp_path)
    context.give("model", model)
    live = LoadBalance(weight=0.5).start(context)
    short, long = examples(6, 12)
    alone = [collate([one]) for one in (short, long)]
    together = collate([short, long])

    def found(batch):
        first = Causal()(model, batch)
        layers = [layer.recorded["default"].detach() for layer in low_rank_experts.layers(model)]  # pyright: ignore
        assert layers[0].shape == (*batch.input_ids.shape, 3)
        return first, live(model, batch), layers

    _, one, layers = found(together)
    real = together.attention_mask.flatten()  # pyright: ignore
    wanted = [load_balancing_loss_func((x.flatten(0, 1),), num_experts=3, top_k=1, attention_mask=real) for x in layers]  # pyright: ignore
    close(one.total, 0.5 * together.targets * torch.stack(wanted).mean())  # pyright: ignore
    assert one.count == together.targets
    one.total.backward()
    routers = [one for name, one in trainable_parameters(model).items() if "router" in name]
    assert all(router.grad.abs().max() > 0 for router in routers)  # pyright: ignore
    sums = [found(batch)[1] for batch in alone]
    padded = collate([short, long])
    assert sum(one.count for one in sums) == padded.targets
    rows = [load_balancing_loss_func((x[:1, :6].flatten(0, 1),), num_experts=3, top_k=1) for x in layers]  # pyright: ignore
    close(sums[0].total, 0.5 * alone[0].targets * torch.stack(rows).mean())  # pyright: ignore
    both = added([Causal(), live])
    mean = both(model, together)
    assert mean.count == together.targets
    close(mean.extras["load-balance"], one.total.detach())
    live.close()
    Causal()(model, together)
    assert all(layer.recorded is None for layer in low_rank_experts.layers(model))
    copy.deepcopy(model)


def test_load_balance_refuses(tiny, tmp_path):
    context = Context.scratch(tmp_path)
    context.give("model", tiny())
    with pytest.raises(Problem, match="the model has none; use delta `low-rank-experts`"):
        LoadBalance().start(context)
    model = attach(tiny(), None, LowRankExperts(), Default(), seed=0)
    context.give("model", model)
    live = LoadBalance().start(context)
    with pytest.raises(Problem, match="write it last in a list of losses"):
        live(model, collate(examples(6)))
    Causal()(model, collate(examples(7)))
    with pytest.raises(Problem, match=r"a batch of shape \[1, 6\] and the loss before it made one of \[1, 7\]"):
        live(model, collate(examples(6)))


def test_fused_layers_leave_the_experts_to_the_model(tiny):
    """The nodes know no such layer, so the model computes by its own code, with the same gradients."""
    for delta in (DELTAS[1], DELTAS[2]):
        model = shaken(attach(tiny(), None, delta, Default(), seed=0))
        batch = collate(examples(6, 12))
        held = list(trainable_parameters(model).values())
        plain = torch.autograd.grad(Causal()(model, batch).mean, held)
        with faster(model, device="cpu", note=lambda _: None):
            fused = torch.autograd.grad(Causal()(model, batch).mean, held)
        for one, two in zip(plain, fused, strict=True):
            close(one, two)
        assert math.isfinite(sum(one.abs().sum().item() for one in plain))


def test_the_names_of_our_types_are_those_that_are_registered():
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    from temper.models.deltas import tuners

    tuners.register()
    ours = {kind.value for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items() if config.__module__.startswith("temper.")}
    assert ours == set(tuners.KINDS)
