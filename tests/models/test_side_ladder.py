"""Ladder side-tuning: against loops in float64 from the formula, the gates' limits, what is kept for a backward pass, folders."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

import temper.peft  # noqa: F401  (our types, in peft)
from temper.models import io
from temper.models.deltas import attach, continue_adapter, merge, prepare, trainable_parameters
from temper.models.deltas.base import AsLoaded, Merged
from temper.models.deltas.delta import Full, Lora, SideLadder
from temper.models.deltas.init import Default, PrunedCopy
from temper.models.deltas.tuners import side_ladder
from temper.models.deltas.where import Attention
from temper.models.sample import sample
from temper.models.statistics import Statistics
from temper.parts import Problem
from temper.train.batching import Batch
from temper.train.faster import faster
from temper.train.logprobs import causal_loss
from temper.train.objectives import Causal


def put(model, init=None, **settings):
    return attach(model, None, SideLadder(**{"shrink": 4, **settings}), init or Default(), seed=0)


def side_of(model) -> Any:
    return model.base_model.ladder.side_ladder_nets["default"]


def stirred(model):
    """All that is trained, moved by random amounts."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for one in trainable_parameters(model).values():
            one.add_(0.3 * torch.randn(one.shape, generator=draw).to(one))
    return model


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits[batch["attention_mask"].bool()]


def copies(batch) -> Batch:
    """The batch as training has it: every token but the first of a row is learnt."""
    supervised = batch["attention_mask"].bool()
    supervised[:, 0] = False
    count = int(supervised.sum())
    return Batch(batch["input_ids"], supervised, batch["attention_mask"], None, rows=[0, 1, 2], keys=[0, 1, 2], targets=count, tokens=count)


# ------------------------------------------------------------------------------------------- the formula, slowly


def normed(x, weight, eps):
    return torch.stack([row / math.sqrt(float((row * row).mean()) + eps) for row in x]) * weight


def turned(x, place, theta):
    """A head's vector, turned by its place: pairs (j, j + size / 2)."""
    half, out = len(x) // 2, x.clone()
    for j in range(half):
        angle = place * theta ** (-2 * j / len(x))
        out[j] = x[j] * math.cos(angle) - x[j + half] * math.sin(angle)
        out[j + half] = x[j + half] * math.cos(angle) + x[j] * math.sin(angle)
    return out


def block(x, module, heads, shared, theta, eps):
    """A Llama block on the tokens [T, H] of one document."""
    weight = {name: one.detach().double() for name, one in module.named_parameters()}
    a = normed(x, weight["input_layernorm.weight"], eps)
    q, k, v = (a @ weight[f"self_attn.{one}_proj.weight"].T for one in "qkv")
    size = q.shape[1] // heads
    rows = []
    for t in range(len(x)):
        found = []
        for h in range(heads):
            g = h // (heads // shared)
            mine = turned(q[t, h * size : (h + 1) * size], t, theta)
            scores = [float(mine @ turned(k[s, g * size : (g + 1) * size], s, theta)) / math.sqrt(size) for s in range(t + 1)]
            shares = torch.tensor(scores, dtype=torch.float64).softmax(0)
            found.append(sum(shares[s] * v[s, g * size : (g + 1) * size] for s in range(t + 1)))
        rows.append(torch.cat(found))
    x = x + torch.stack(rows) @ weight["self_attn.o_proj.weight"].T
    b = normed(x, weight["post_attention_layernorm.weight"], eps)
    gate, up = (b @ weight[f"mlp.{one}_proj.weight"].T for one in ("gate", "up"))
    return x + (gate * torch.sigmoid(gate) * up) @ weight["mlp.down_proj.weight"].T


def slowly(model, tokens, kept, temperature, join):
    """Logits [T, V] of one document, from the formula alone."""
    base, side = model.get_base_model(), side_of(model)
    c = base.config
    theta, eps = c.rope_parameters["rope_theta"], c.rms_norm_eps
    held = {name: one.detach().double() for name, one in side.named_parameters()}
    state = base.model.embed_tokens.weight.detach().double()[tokens]
    h = state @ held["first.weight"].T + held["first.bias"]
    for i, module in enumerate(base.model.layers):
        state = block(state, module, c.num_attention_heads, c.num_key_value_heads, theta, eps)
        if i in kept:
            at = kept.index(i)
            mu = 1 / (1 + math.exp(-float(held["gates"][at]) / temperature))
            h = mu * h + (1 - mu) * (state @ held[f"downs.{at}.weight"].T + held[f"downs.{at}.bias"])
            h = block(h, side.body.layers[at], c.num_attention_heads, c.num_key_value_heads, theta, eps)
    out = normed(h, held["body.norm.weight"], eps) @ held["up.weight"].T + held["up.bias"]
    if join == "add":
        out = out + normed(state, base.model.norm.weight.detach().double(), eps)
    return out @ base.lm_head.weight.detach().double().T


@pytest.mark.parametrize(("skip", "join"), [((), "replace"), ((1,), "add")])
def test_what_is_computed(tiny, batch, skip, join):
    """Rows with padding, and documents packed in a row, as each document alone by the formula."""
    model = stirred(put(tiny(num_hidden_layers=3), skip=skip, join=join, temperature=0.3, alpha=-0.1).double())
    kept = [one for one in (0, 1, 2) if one not in skip]
    documents = [row[seen.bool()] for row, seen in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    expected = torch.cat([slowly(model, one, kept, 0.3, join) for one in documents])
    assert expected.abs().max() > 1
    torch.testing.assert_close(logits(model, batch), expected, atol=2e-5, rtol=1e-5)
    packed = {"input_ids": torch.cat(documents)[None], "position_ids": torch.cat([torch.arange(len(one)) for one in documents])[None]}
    with torch.no_grad():
        torch.testing.assert_close(model(**packed, use_cache=False).logits[0], expected, atol=2e-5, rtol=1e-5)


def test_gates_at_their_limits(tiny, batch):
    """mu = 1 hears no rung, mu = 0 nothing of the blocks below."""
    model = stirred(put(tiny()))
    side = side_of(model)

    def moved(*modules):
        other = copy.deepcopy(model)
        inner = side_of(other)
        with torch.no_grad():
            for one in modules:
                for parameter in inner.get_submodule(one).parameters():
                    parameter.add_(1)
        return (logits(other, batch) - logits(model, batch)).abs().max()

    assert min(moved("downs"), moved("first"), moved("body.layers.0")) > 1e-3
    side.gates.data.fill_(1e4)
    assert moved("downs") < 1e-4 < 1e-2 < moved("first")  # nothing but rounding: down + mu (h - down)
    side.gates.data.fill_(-1e4)
    assert moved("first", "downs.0", "body.layers.0") == 0 < moved("downs.1")


def test_the_start(tiny, batch):
    """As in the paper the start is another model's; added, it changes nothing. Gates start in the middle."""
    plain = logits(tiny(), batch)
    assert (logits(put(tiny()), batch) - plain).abs().max() > 0.1
    assert torch.equal(logits(put(tiny(), join="add"), batch), plain)
    assert torch.equal(side_of(put(tiny())).gates, torch.zeros(2))
    model = put(tiny())
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), plain)
    assert torch.equal(logits(model.unload(), batch), plain)


# ------------------------------------------------------------------------------------------------ what is kept


class Kept:
    """Within, what autograd keeps for a backward pass: storages by where they begin."""

    def __init__(self) -> None:
        self.held: dict[int, torch.UntypedStorage] = {}

    def __enter__(self):
        def pack(one):
            self.held.setdefault(one.untyped_storage().data_ptr(), one.untyped_storage())
            return one

        self.hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one)
        self.hooks.__enter__()
        return self

    def __exit__(self, *told):
        self.hooks.__exit__(*told)

    def bytes(self, model) -> int:
        """Of activations: weights are there anyway."""
        weights = {one.untyped_storage().data_ptr() for one in model.parameters()}
        return sum(one.nbytes() for begin, one in self.held.items() if begin not in weights)


@pytest.mark.parametrize("quick", [False, True])
def test_nothing_goes_back_through_the_model(tiny, batch, quick):
    model = put(tiny(num_hidden_layers=4), skip=(1,)).train()
    base, made, ends = model.get_base_model(), list[torch.Tensor](), list[torch.Tensor]()

    def keep(_module, _args, out):
        made.extend(one for one in (out if isinstance(out, tuple) else (out,)) if isinstance(one, torch.Tensor))

    keep.takes_flat = True  # type: ignore[attr-defined]
    for module in base.model.modules():
        if not quick:
            module.register_forward_hook(keep)
    net = side_of(model)
    net.register_forward_pre_hook(lambda _, args: ends.extend(args[0]))
    inside = faster(model, device="cpu") if quick else torch.enable_grad()
    causal_loss(model, copies(batch))  # the first of all tries the head
    ends.clear()
    made.clear()
    with inside, Kept() as kept:
        loss = causal_loss(model, copies(batch))
        loss.backward()
    weights = {one.untyped_storage().data_ptr() for one in base.model.parameters()}
    assert not weights & set(kept.held)
    assert len(ends) == 1 + 3
    assert not any(one.requires_grad for one in [*ends, *made])
    inner = {one.untyped_storage().data_ptr() for one in made} & set(kept.held)
    assert inner <= {one.untyped_storage().data_ptr() for one in ends}  # the rungs' own inputs, for the gradient of W_down
    assert all(one.grad is None and not one.requires_grad for one in base.parameters())
    assert all(one.grad is not None for one in trainable_parameters(model).values())


def test_memory(tiny):
    """Activations kept for a step: several times less than LoRA's at as many trained numbers, and than those of full tuning."""
    tokens = torch.randint(3, 64, (4, 48), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}

    def kept(delta) -> tuple[int, int]:
        model = attach(tiny(hidden_size=64, intermediate_size=192, num_hidden_layers=6), None, delta, Default(), seed=0).train()
        with Kept() as found:
            out = model(**batch, use_cache=False).logits.float().logsumexp(-1).sum()
        out.backward()
        return found.bytes(model), sum(one.numel() for one in trainable_parameters(model).values())

    side, lora, full = kept(SideLadder(shrink=8)), kept(Lora(rank=1)), kept(Full())
    assert 0.8 < side[1] / lora[1] < 1.7
    assert side[0] < 0.3 * lora[0]
    assert side[0] < 0.25 * full[0]


def test_a_failing_pass_leaves_gradients_on(tiny, batch):
    model = put(tiny())
    model.get_base_model().model.layers[1].mlp.forward = lambda _: 1 / 0
    with pytest.raises(ZeroDivisionError):
        model(**batch)
    assert torch.is_grad_enabled()
    del model.get_base_model().model.layers[1].mlp.forward
    assert model(**batch).logits.requires_grad


# -------------------------------------------------------------------------------------- training, as the loop does


def gradients(model, batch):
    loss = causal_loss(model, copies(batch))
    return [loss.detach(), *torch.autograd.grad(loss, list(trainable_parameters(model).values()))]


def test_faster_computes_the_same(tiny, batch):
    model = stirred(put(tiny(), skip=(0,)))
    slow = gradients(model, batch)
    with faster(model, device="cpu") as fused:
        quick = gradients(model, batch)
        assert "forward" in vars(model.get_base_model().model.layers[0])
        assert "forward" in vars(side_of(model).body.layers[0])  # its nodes too
    assert fused
    for one, two in zip(slow, quick, strict=True):
        torch.testing.assert_close(two, one, atol=2e-4 * float(one.abs().max()), rtol=1e-4)


def test_recomputing_and_bf16(tiny, batch):
    model = stirred(put(tiny())).train()
    plain = gradients(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for one, two in zip(plain, gradients(model, batch), strict=True):
        torch.testing.assert_close(two, one)
    model.gradient_checkpointing_disable()
    with torch.autocast("cpu", torch.bfloat16):
        rough = gradients(model, batch)
    assert abs(float(rough[0] / plain[0]) - 1) < 0.05
    half = put(tiny().to(torch.bfloat16))
    assert half(**batch).logits.dtype == torch.bfloat16
    assert side_of(half).up.weight.dtype == torch.float32


def test_it_learns(tiny, batch):
    model = put(tiny(), PrunedCopy().start(None)).train()  # type: ignore[arg-type]
    optimizer = torch.optim.Adam(trainable_parameters(model).values(), lr=0.02)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = causal_loss(model, copies(batch))
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.1 * losses[0]


# ---------------------------------------------------------------------------------------------------- the sampler


def test_sampling_equals_a_full_pass(tiny):
    model = stirred(put(tiny(), skip=(0,)))
    prompts = [[5, 6, 7], [9, 8], [4] * 6, [5, 6, 7]]
    for prompt, made in zip(prompts, sample(model, prompts, max_new_tokens=9, seeds=[1, 2, 3, 4]), strict=True):
        ids = torch.tensor([prompt + list(made.tokens)])
        with torch.no_grad():
            found = model(input_ids=ids).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(found.gather(-1, ids[0, len(prompt) :, None])[:, 0], torch.tensor(made.logprobs), atol=1e-5, rtol=0)


def test_generate_with_a_cache_and_without(tiny, batch):
    model = stirred(put(tiny()))
    how = {"input_ids": batch["input_ids"][:1], "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(**how), model.generate(**how, use_cache=False))
    assert model.generate(**how, num_beams=3).shape == (1, 20)
    with pytest.raises(ValueError, match="do not fit a static cache"):
        model.generate(**how, cache_implementation="static")


# -------------------------------------------------------------------------------------------------------- folders


def test_saved_equals_reloaded(tiny, batch, tmp_path):
    model = stirred(put(tiny(), skip=(1,), join="add", temperature=0.2))
    io.save_model(tiny(), None, tmp_path / "base")
    io.save_adapter(model, None, tmp_path / "adapter", "base")
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        (tmp_path / "adapter" / "adapter_config.json").read_text().replace('"base"', f'"{tmp_path / "base"}"')
    )
    again = io.load_model(tmp_path / "adapter")
    assert torch.equal(logits(again, batch), logits(model, batch))
    alone: Any = peft.PeftModel.from_pretrained(tiny(), tmp_path / "adapter", adapter_name="mine")
    assert torch.equal(logits(alone, batch), logits(model, batch))
    assert not trainable_parameters(again)
    assert set(trainable_parameters(prepare(again, None, SideLadder(), Default(), AsLoaded(), seed=0))) == set(trainable_parameters(model))
    assert continue_adapter(again).peft_config["default"].peft_type == "SIDE_LADDER"


def test_two_side_networks_on_a_model(tiny, batch):
    model: Any = stirred(put(tiny()))
    first = logits(model, batch)
    model.add_adapter("other", side_ladder.SideLadderConfig(task_type="CAUSAL_LM", shrink=2, join="add"))
    assert torch.equal(logits(model, batch), first)
    model.set_adapter("other")
    assert torch.equal(logits(model, batch), logits(tiny(), batch))
    assert all(".other." in name for name in trainable_parameters(model))
    model.set_adapter("default")
    assert torch.equal(logits(model, batch), first)
    model.delete_adapter("other")
    assert torch.equal(logits(copy.deepcopy(model), batch), first)


# --------------------------------------------------------------------------------------------------- pruned copies


def small(kind: str):
    """A model without groups, with groups, with norms of its heads, with biases."""
    settings: dict[str, Any] = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    settings |= {"num_attention_heads": 4, "max_position_embeddings": 32, "initializer_range": 0.2, "head_dim": 8}
    settings |= {
        "num_key_value_heads": 4 if kind == "plain" else 2,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
        "attention_bias": kind == "biased",
    }
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Qwen3ForCausalLM(Qwen3Config(**settings)) if kind == "normed" else LlamaForCausalLM(LlamaConfig(**settings))
        for name, one in model.named_parameters():
            if "norm" in name or "bias" in name:
                torch.nn.init.uniform_(one, 0.5, 1.5)
    return model.eval()


@pytest.mark.parametrize("kind", ["plain", "grouped", "normed", "biased"])
def test_a_copy_of_all_is_the_model(kind):
    """Nothing left out, the embedded tokens handed on as they are and no rung heard: the side network is the model."""
    ids = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(2))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    model = put(small(kind), PrunedCopy().start(None), shrink=1, alpha=1e4)  # type: ignore[arg-type]
    side = side_of(model)
    with torch.no_grad():
        for one in (side.first, side.up):
            one.weight.copy_(torch.eye(32))
            one.bias.zero_()
    torch.testing.assert_close(logits(model, batch), logits(small(kind), batch), atol=1e-5, rtol=1e-5)


def best(scores, count):
    return sorted(sorted(range(len(scores)), key=lambda one: -scores[one])[:count])


@pytest.mark.parametrize("score", ["magnitude", "fisher"])
def test_what_is_left_out(score):
    """The rows of one weight are the columns of the next: chosen again by loops, for heads of 8 of which 4 rows stay."""
    model = small("plain")
    ids = torch.randint(0, 40, (4, 9), generator=torch.Generator().manual_seed(2))

    def one_row(row):
        seen = torch.ones(1, 9, dtype=torch.bool)
        seen[:, 0] = False
        return Batch(ids[row : row + 1], seen, torch.ones(1, 9, dtype=torch.int64), None, rows=[row], keys=[row], targets=8, tokens=9)

    statistics = Statistics(model, list, lambda: map(one_row, range(4)), Causal())
    context: Any = SimpleNamespace(want={"model": model, "statistics": statistics}.__getitem__)
    init = PrunedCopy(score=score, samples=3).start(context)  # type: ignore[arg-type]
    weights = {name: one.detach().double() for name, one in model.model.named_parameters()}
    matter = {name.removesuffix(".weight"): one.abs() for name, one in weights.items() if one.ndim == 2}
    if score == "fisher":
        matter = dict.fromkeys(matter, 0.0)
        for row in range(3):
            found = torch.autograd.grad(Causal()(model, one_row(row)).total, list(model.model.parameters()))
            for name, one in zip(weights, found, strict=True):
                if one.ndim == 2:
                    matter[name.removesuffix(".weight")] = matter[name.removesuffix(".weight")] + one.double() ** 2 / 3
    side = side_of(put(model, init, shrink=2, skip=(1,)))
    if score == "magnitude":
        width = best(matter["embed_tokens"].sum(0).tolist(), 16)
    else:
        width = best(sum(matter[f"layers.0.self_attn.{one}_proj"] for one in "qkv").sum(0).tolist(), 16)
    for i in range(3):
        q, k, v, o = (matter[f"layers.{i}.self_attn.{one}_proj"] for one in "qkvo")
        each = [float(sum(q[r, c] * k[r, c] * v[r, c] for c in width)) for r in range(32)]
        rows = []
        for head in range(4):
            pairs = best([each[8 * head + j] + each[8 * head + j + 4] for j in range(4)], 2)
            rows += [8 * head + j for j in pairs] + [8 * head + j + 4 for j in pairs]
        between = best(o[:, rows].sum(1).tolist(), 16)
        gate, up, down = (matter[f"layers.{i}.mlp.{one}_proj"] for one in ("gate", "up", "down"))
        inner = best([float(sum(gate[r, c] * up[r, c] for c in between)) for r in range(48)], 24)
        out = best(down[:, inner].sum(1).tolist(), 16)
        if i != 1:
            made = {name: one.double() for name, one in side.body.layers[(0, None, 1)[i]].named_parameters()}
            layer = f"layers.{i}."
            for name, (some, others) in {
                "self_attn.q_proj": (rows, width),
                "self_attn.k_proj": (rows, width),
                "self_attn.v_proj": (rows, width),
                "self_attn.o_proj": (between, rows),
                "mlp.gate_proj": (inner, between),
                "mlp.up_proj": (inner, between),
                "mlp.down_proj": (out, inner),
            }.items():
                assert torch.equal(made[f"{name}.weight"], weights[f"{layer}{name}.weight"][some][:, others]), name
            assert torch.equal(made["input_layernorm.weight"], weights[f"{layer}input_layernorm.weight"][width])
            assert torch.equal(made["post_attention_layernorm.weight"], weights[f"{layer}post_attention_layernorm.weight"][between])
        width = out
    assert torch.equal(side.body.norm.weight.double(), weights["norm.weight"][width])


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"shrink": 8}, "shrink 8 leaves heads 1 wide of a hidden size of 32; they must be of even width"),
        ({"shrink": 64}, "shrink 64 leaves heads 0 wide"),
        ({"skip": (2,)}, "skip names block 2, and the model has blocks 0 to 1"),
        ({"skip": (0, 1)}, "skip names all 2 blocks; leave one at least"),
    ],
)
def test_what_cannot_be(tiny, settings, told):
    with pytest.raises(Problem, match=told):
        put(tiny(), **settings)


def test_where_it_cannot_stand(tiny):
    with pytest.raises(Problem, match="stands beside the whole model; leave `where` out"):
        attach(tiny(), Attention(), SideLadder(shrink=4), Default(), seed=0)
    gpt = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=32))
    with pytest.raises(Problem, match="as Llama is made, not beside GPT2LMHeadModel"):
        put(gpt)
    with pytest.raises(Problem, match="the delta has none; use delta `side-ladder`"):
        attach(tiny(), None, Lora(), PrunedCopy().start(None), seed=0)  # type: ignore[arg-type]


def test_it_is_not_merged(tiny):
    with pytest.raises(Problem, match="no change of the model's weights; keep it as an adapter"):
        merge(put(tiny()))
    with pytest.raises(Problem, match="no change of the model's weights"):
        prepare(put(tiny()), None, Lora(), Default(), Merged(), seed=0)
