"""What computes faster computes the same: kernels against their formulas, layers against `transformers` and `peft`."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from temper.train.batching import Packed, collate
from temper.train.faster import allocator, decoder, faster, flat, native, ops
from temper.train.faster.nodes import Linear, Product
from temper.train.logprobs import causal_loss

BUILT = pytest.mark.skipif(native.library()[0] is None, reason=native.library()[1])


@pytest.fixture
def formula(monkeypatch):
    """Computes a function with torch in place of the kernels."""

    def by(function, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(native, "suits", lambda *_: False)
            return function(*arguments)

    return by


@pytest.fixture
def draw():
    """Draws normal numbers."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape, kind=torch.float32: torch.randn(*shape, generator=generator).to(kind)


def close(found, expected, kind):
    """Float32 within its rounding; bf16 within two roundings of the greatest number."""
    for one, two in zip(found, expected, strict=True):
        assert (one is None) == (two is None)
        if two is not None:
            assert one.dtype == two.dtype
            bound = (1e-2 if kind == torch.bfloat16 and two.dtype == torch.bfloat16 else 2e-3 if kind == torch.bfloat16 else 3e-6) * (
                two.float().abs().max() + 1
            )
            assert (one.float() - two.float()).abs().max() <= bound


# ------------------------------------------------------------------------------------------------- kernels

KINDS = pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])


@BUILT
@KINDS
@pytest.mark.parametrize("width", [7, 64, 129])
def test_kernels_between_products_are_their_formulas(kind, width, draw, formula):
    x, weight, dout, y = draw(70, width), draw(width), draw(70, width), draw(70, width, kind=kind)
    close([ops.add(x, y)], [formula(ops.add, x, y)], kind)
    (h, r), expected = ops.norm(x, weight, 1e-5, 1.0, kind), formula(ops.norm, x, weight, 1e-5, 1.0, kind)
    close([h, r], expected, kind)
    close([ops.normed(x, weight, r, 1.0, kind)], [h], torch.float32)
    close(ops.norm_backward(x, weight, r, 1.0, y, dout), formula(ops.norm_backward, x, weight, r, 1.0, y, dout), torch.float32)
    both, slope = draw(70, 2 * width, kind=kind), draw(70, width, kind=kind)
    for act in ("silu", "gelu"):
        close([ops.gate(both, act)], [formula(ops.gate, both, act)], kind)
        close(ops.gate_backward(both, slope.clone(), act), formula(ops.gate_backward, both, slope.clone(), act), kind)
    assert torch.equal(ops.drop(y, 0.2, 2**61 + 7), formula(ops.drop, y, 0.2, 2**61 + 7))


def test_norm_backward_is_the_gradient(draw, formula):
    x, weight, dh, dout = (draw(*shape).double() for shape in ((5, 9), (9,), (5, 9), (5, 9)))
    own = [one.clone().requires_grad_() for one in (x, weight)]
    h, r = ops.norm(*own, 1e-5, 1.0, torch.float64)
    expected = torch.autograd.grad((h * dh).sum() + (own[0] * dout).sum(), own)
    torch.testing.assert_close(ops.norm_backward(x, weight, r.detach(), 1.0, dh, dout), expected, rtol=1e-12, atol=1e-12)


def test_a_share_is_dropped_and_the_mean_stays():
    x = torch.ones(400, 500)
    one, two = ops.drop(x, 0.1, 12345678901234567), ops.drop(x, 0.1, 12345678901234568)
    assert one.unique().tolist() == [0.0, pytest.approx(1 / 0.9)]
    assert abs((one == 0).float().mean() - 0.1) < 5 * (0.09 / x.numel()) ** 0.5
    both = ((one == 0) & (two == 0)).float().mean()
    assert abs(both - 0.01) < 5 * (0.01 / x.numel()) ** 0.5, "neighbouring seeds draw independently"


@BUILT
@KINDS
def test_log_probabilities_and_their_slopes(kind, draw, formula):
    logits, slopes = draw(9, 75, kind=kind) * 5, draw(9)
    targets = torch.arange(9) * 8
    one, two = logits.clone(), logits.clone()
    found, expected = ops.log_probabilities(one, targets, slopes), formula(ops.log_probabilities, two, targets, slopes)
    close([found, one], [expected, two], kind)
    own = logits.float().requires_grad_()
    (own.log_softmax(-1)[torch.arange(9), targets] * slopes).sum().backward()
    close([one.float()], [own.grad], kind)


SEEN = {
    "causal": lambda places, begins: (begins, places + 1),
    "both sides": lambda places, begins: (begins, begins + 1000),
    "window": lambda places, begins: (torch.maximum(begins, places - 4), places + 1),
    "nothing for some": lambda places, begins: (begins, torch.where(places % 3 == 0, begins, places + 1)),
}


@BUILT
@KINDS
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 4, 64), (6, 2, 40), (3, 1, 18)])
@pytest.mark.parametrize("seen", SEEN)
def test_the_attention_kernel_is_its_formula(kind, heads, kv_heads, size, seen, draw, formula):
    lengths = torch.tensor([37, 1, 0, 70, 5])
    count, row = int(lengths.sum()), heads + 2 * kv_heads
    sequences = flat.causal(lengths)
    ends = sequences.begins[1:].repeat_interleave(lengths)
    first, last = SEEN[seen](torch.arange(count, dtype=torch.int32), sequences.first)
    sequences = dataclasses.replace(sequences, first=first.int(), last=torch.minimum(last, ends).int())
    angle = draw(count, size // 2).repeat(1, 2)
    turn = ops.Turn(angle.cos(), angle.sin(), draw(size), draw(size), 1e-6, 1.0)
    mixed, dout = draw(count, row, size, kind=kind), draw(count, heads, size, kind=kind)

    def computed(turn):
        given = mixed.split((heads, kv_heads, kv_heads), 1)
        out, log = ops.attention(given, 0.3, turn, sequences)
        gradient = torch.empty_like(mixed)
        rest = ops.attention_backward(given, 0.3, turn, sequences, out, log, dout, gradient.split((heads, kv_heads, kv_heads), 1))
        return out, gradient, *rest

    for one in (turn, ops.Turn(angle.cos(), angle.sin()), ops.Turn()):
        found, wide = computed(one), formula(computed, one)
        assert torch.isfinite(found[1].float()).all()
        if kind == torch.bfloat16:  # the formula rounds more often than the kernel: both are held to float32
            mixed, dout, narrow = mixed.float(), dout.float(), (mixed, dout)
            exact = formula(computed, one)
            mixed, dout = narrow
            for ours, plain, true in zip(found, wide, exact, strict=True):
                if true is not None:
                    assert (ours.float() - true).norm() <= 1.1 * (plain.float() - true).norm() + 1e-6
        else:
            for ours, plain in zip(found, wide, strict=True):
                assert (ours is None and plain is None) or (ours - plain).norm() <= 1e-5 * plain.norm()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_product_is_its_linear_layers(dropout, draw):
    def made(*shape):
        return draw(*shape).double().requires_grad_()

    linears = [
        Linear(made(6, 8), made(6), made(2, 8), made(6, 2), 1.5, dropout),
        Linear(made(4, 8)),
        Linear(made(4, 8), None, made(3, 8), made(4, 3), 0.5, dropout),
    ]
    product = Product(linears, torch.cat([one.weight.detach() for one in linears]), torch.float64)
    h, dy = made(5, 8), made(5, 14).detach()
    outs = []
    for one, seed in zip(linears, product.seeds, strict=True):
        outs.append(torch.nn.functional.linear(h, one.weight, one.bias))
        if one.down is not None:
            kept = ops.drop(torch.ones(5, 8, dtype=torch.float64), dropout, seed) if dropout else 1.0
            outs[-1] = outs[-1] + one.scale * (h * kept) @ one.down.t() @ one.up.t()
    tensors = [one for one in product.tensors if one is not None]
    expected = torch.autograd.grad((torch.cat(outs, 1) * dy).sum(), [h, *tensors])
    with torch.no_grad():
        y, low = product.forward(h)
        dh, dlow = product.backward(dy)
        found = product.gradients([True] * 12, dy, h, low, dlow)
    torch.testing.assert_close(y, torch.cat(outs, 1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close([dh, *(one for one in found if one is not None)], list(expected), rtol=1e-12, atol=1e-12)
    assert product.gradients([False] * 12, dy, h, low, dlow) == [None] * 12


# -------------------------------------------------------------------------------------------------- models

SHAPE = {"vocab_size": 128, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"max_position_embeddings": 128, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FUSED = {
    "Llama": {"num_key_value_heads": 2, "attention_bias": True},
    "Mistral": {"num_key_value_heads": 4, "sliding_window": 7},
    "Qwen2": {"num_key_value_heads": 1},
    "Qwen3": {"num_key_value_heads": 2, "head_dim": 18},
    "Gemma": {"num_key_value_heads": 1, "head_dim": 16},
    "SmolLM3": {"num_key_value_heads": 2, "no_rope_layer_interval": 2},
}
OWN = {
    "Granite": {"num_key_value_heads": 2, "residual_multiplier": 0.5},  # alike in its parts, and computes something else
    "Gemma2": {"num_key_value_heads": 2, "head_dim": 16},
    "Phi3": {},
    "GPTNeoX": {},
}


def made(name, **settings):
    config = getattr(transformers, f"{name}Config")(**{**SHAPE, **settings})
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for parameter_name, one in model.named_parameters():
        if one.ndim == 1:  # biases and norms at their first values would hide mistakes
            torch.nn.init.normal_(one, 1.0 if "norm" in parameter_name and name != "Gemma" else 0.0, 0.3)
    return model.train()


def gradients(model, batch, kind="float32"):
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "bf16"):
        loss = causal_loss(model, batch)
    loss.backward()
    return [loss.detach()] + [one.grad.clone() for one in model.parameters() if one.grad is not None]


def apart(found, expected):
    """The greatest relative distance of a tensor to what it should be."""
    assert len(found) == len(expected)
    return max(((one - two).norm() / (two.norm() + 1e-12)).item() for one, two in zip(found, expected, strict=True))


def strayed(found, expected):
    """The relative distance of all gradients together."""
    assert len(found) == len(expected)
    one, two = (torch.cat([one.flatten() for one in gradient[1:]]) for gradient in (found, expected))
    return ((one - two).norm() / two.norm()).item()


def sped(model, batch, kind="float32", fused=True):
    with faster(model, device="cpu") as taken:
        assert taken is fused
        return gradients(model, batch, kind)


@pytest.mark.parametrize("name", FUSED)
def test_layers_compute_what_transformers_do(name, examples):
    model, batch = made(name, **FUSED[name]), collate(examples(5, completion=True))
    expected = gradients(model, batch)
    keys, plain = list(model.state_dict()), gradients(model, batch, "bf16")
    assert apart(sped(model, batch), expected) < 2e-5
    assert strayed(sped(model, batch, "bf16"), expected) < 1.1 * strayed(plain, expected)
    assert list(model.state_dict()) == keys
    assert not any("forward" in vars(one) for one in model.modules())
    assert apart(gradients(model, batch), expected) == 0


@pytest.mark.parametrize("name", OWN)
def test_other_models_keep_their_layers(name, examples):
    model, batch, said = made(name, **OWN[name]), collate(examples(5)), []
    expected = gradients(model, batch)
    with faster(model, device="cpu", note=said.append) as taken:
        assert not taken
        assert apart(gradients(model, batch), expected) < 2e-5
    assert "layers compute by their own code" in said[-1]
    assert ALL_ATTENTION_FUNCTIONS["sdpa"].__module__.startswith("transformers")


def test_without_kernels_torch_computes_the_same(examples, monkeypatch):
    model, batch, said = made("Qwen3", **FUSED["Qwen3"]), collate(examples(5)), []
    expected = gradients(model, batch)
    monkeypatch.setattr(native, "library", lambda: (None, "none here"))
    with faster(model, device="cpu", note=said.append) as taken:
        assert taken
        assert apart(gradients(model, batch), expected) < 2e-5
    assert said == ["no kernels, torch's own operations in their place: none here"]


def test_entered_without_gradients_layers_are_compared_all_the_same(llama, examples):
    decoder._known.clear()
    model, batch = llama(), collate(examples(4))
    expected = model(**batch.inputs).logits
    with torch.no_grad(), faster(model, device="cpu") as taken:
        assert taken
        made = model(**batch.inputs).logits
    assert not made.requires_grad
    real = batch.attention_mask == 1
    assert (made - expected)[real].abs().max() < 1e-4 * expected.abs().max()


def test_models_that_are_no_decoders_are_left_alone(examples):
    config = transformers.BertConfig(**{**SHAPE, "num_hidden_layers": 1}, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = transformers.BertModel(config)
    batch = collate(examples(4))
    slopes = torch.randn(*batch.input_ids.shape, 48) * batch.attention_mask[..., None]

    def found():
        model.zero_grad()
        (model(**batch.inputs).last_hidden_state * slopes).sum().backward()
        return [torch.tensor(0.0), *(one.grad.clone() for one in model.parameters() if one.grad is not None)]

    expected = found()
    with faster(model, device="cpu") as taken:
        assert not taken
        assert strayed(found(), expected) < 1e-6  # together: a key's bias has a gradient of 0 and rounding
    mamba = made("Mamba", state_size=4, num_hidden_layers=1)
    expected = gradients(mamba, batch)
    assert apart(sped(mamba, batch, fused=False), expected) == 0


# -------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("window", [None, 6])
def test_packed_documents_stay_apart(window, examples, stream):
    model = made("Mistral", num_key_value_heads=2, sliding_window=window)
    for documents in ("separate", "joined"):
        (batch,) = Packed(length=33, size=3, documents=documents)(examples(9), stream).update(0)
        expected = gradients(model, batch)
        assert apart(sped(model, batch), expected) < 2e-5


@pytest.mark.parametrize("name", ["Llama", "Phi3"])
def test_masks_of_four_dimensions(name, examples):
    """A beginning that sees all of itself, rows without any padding, and a mask that is none of intervals."""
    model, batch = made(name), collate(examples(4))
    seen = torch.ones(batch.input_ids.shape[1], batch.input_ids.shape[1]).tril().bool()[None].repeat(4, 1, 1)
    seen[:, :3, :3] = True
    strange = seen.clone()
    strange[:, 5, 2] = False
    padding = batch.attention_mask.bool()
    for mask in (seen, strange, seen & padding[:, None] & padding[:, :, None]):
        given = dataclasses.replace(batch, attention_mask=mask[:, None])
        expected = gradients(model, given)
        assert apart(sped(model, given, fused=name == "Llama"), expected) < 2e-5


def test_nothing_is_computed_on_padding(llama, examples, monkeypatch):
    model, batch, counts = llama(), collate(examples(6)), []
    layer = decoder.Layer.forward
    monkeypatch.setattr(decoder.Layer, "forward", lambda self, x, **rest: (counts.append(x.shape[1]), layer(self, x, **rest))[1])
    left = dataclasses.replace(batch, input_ids=batch.input_ids.flip(1), attention_mask=batch.attention_mask.flip(1))
    with faster(model, device="cpu"):
        counts.clear()
        states = model.model(**batch.inputs).last_hidden_state
        flipped = model.model(**left.inputs).last_hidden_state
    assert set(counts) == {-(-batch.tokens // flat.STEP) * flat.STEP}
    assert (states[batch.attention_mask == 0] == 0).all()
    torch.testing.assert_close(flipped[left.attention_mask != 0], model.model(**left.inputs).last_hidden_state[left.attention_mask != 0])


def test_the_first_batch_leaves_no_trace(llama, examples):
    """A resumed run begins with another batch than the one it resumes, and goes on in the same bits."""
    one, two = collate(examples(5)), collate(examples(14, longest=40))
    model = llama(max_position_embeddings=64)
    fresh, other = sped(model, one, "bf16"), sped(copy.deepcopy(model), two, "bf16")
    assert apart(sped(model, one, "bf16"), fresh) == 0
    assert apart(sped(model, two, "bf16"), other) == 0


def test_weights_kept_in_bf16(llama, examples):
    model, batch = llama(), collate(examples(5))
    expected = gradients(model, batch)
    half = llama().bfloat16()
    plain, found = ([one.float() for one in way(half, batch)] for way in (gradients, sped))
    assert strayed(found, expected) < 1.1 * strayed(plain, expected)


def test_a_deep_model_is_compared_by_some_of_its_layers(examples):
    model = made("SmolLM3", num_key_value_heads=2, num_hidden_layers=12, no_rope_layer_interval=3)
    batch = collate(examples(3))
    expected = gradients(model, batch)
    assert apart(sped(model, batch), expected) < 1e-4


def test_generation_and_evaluation_go_on_within(llama, examples):
    model, batch = llama().eval(), collate(examples(3))
    expected = model.generate(batch.input_ids[:1, :3], max_new_tokens=5, do_sample=False)
    states = model(**batch.inputs, output_hidden_states=True).hidden_states
    with faster(model, device="cpu"), torch.no_grad():
        assert torch.equal(model.generate(batch.input_ids[:1, :3], max_new_tokens=5, do_sample=False), expected)
        for found, one in zip(model(**batch.inputs, output_hidden_states=True).hidden_states, states, strict=True):
            torch.testing.assert_close(found[batch.attention_mask != 0], one[batch.attention_mask != 0], rtol=1e-4, atol=1e-5)
        with faster(model, device="cpu") as taken:
            assert not taken, "the layers are the nodes' already"
        assert "forward" in vars(model.model)


def test_recomputed_activations_give_the_same_gradients(llama, examples):
    model, batch = llama(), collate(examples(5))
    expected = sped(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert apart(sped(model, batch), expected) == 0


def test_who_listens_to_a_layer_hears_it(llama, examples):
    model, batch, heard = llama(), collate(examples(5)), []
    expected = gradients(model, batch)
    with faster(model, device="cpu"):
        handle = model.model.layers[1].mlp.register_forward_hook(lambda _, __, out: heard.append(out.shape))
        assert apart(gradients(model, batch), expected) < 2e-5
        handle.remove()
        assert heard == [(*batch.input_ids.shape, 32)]
        gradients(model, batch)
        assert len(heard) == 1


# ------------------------------------------------------------------------------------------------------ adapters


def adapted(model, **settings):
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=3, lora_alpha=5, init_lora_weights=False, **{"target_modules": "all-linear", **settings}))


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
def test_adapters_compute_what_peft_does(targets, examples):
    model = adapted(made("Qwen2", num_key_value_heads=2), target_modules=targets, rank_pattern={"v_proj": 2})
    batch = collate(examples(5, completion=True))
    expected, plain = gradients(model, batch), gradients(model, batch, "bf16")
    assert apart(sped(model, batch), expected) < 2e-5
    assert strayed(sped(model, batch, "bf16"), expected) < 1.1 * strayed(plain, expected)
    with model.disable_adapter(), torch.no_grad():
        without = causal_loss(model, batch)
        with faster(model, device="cpu"):
            torch.testing.assert_close(causal_loss(model, batch), without)


def test_soft_prompts(llama, examples):
    from peft import PromptTuningConfig

    model = get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    batch = collate(examples(5))
    expected = gradients(model, batch)
    assert apart(sped(model, batch), expected) < 2e-5


def test_a_frozen_weight_that_changes_is_seen(llama, examples):
    model, batch = adapted(llama(), target_modules=["q_proj"]), collate(examples(5))
    with faster(model, device="cpu"):
        gradients(model, batch, "bf16")
        with torch.no_grad():
            model.get_base_model().model.layers[0].mlp.up_proj.weight.mul_(2)
        changed = gradients(model, batch, "bf16")
    assert apart(sped(model, batch, "bf16"), changed) == 0


def test_dropout_of_an_adapter(llama, examples):
    """Another mask by each seed, the same by the same, and on average what comes without any."""
    model, batch = adapted(llama(), lora_dropout=0.2), collate(examples(5))
    with faster(model, device="cpu") as taken, torch.no_grad():
        assert taken
        losses = []
        for seed in (0, 0, 1, 2, 3):
            torch.manual_seed(seed)
            losses.append(causal_loss(model, batch).item())
        assert losses[0] == losses[1]
        assert len(set(losses)) == 4
        model.eval()
        plain = causal_loss(model, batch).item()
    assert plain not in losses
    torch.testing.assert_close(causal_loss(model, batch).item(), plain, rtol=1e-5, atol=0)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"modules_to_save": ["input_layernorm"]}, {"lora_bias": True}])
def test_other_adapters_keep_the_model_s_layers(settings, llama, examples):
    model, batch = adapted(llama(), **settings), collate(examples(5))
    expected = gradients(model, batch)
    with faster(model, device="cpu"):
        assert apart(gradients(model, batch), expected) < 2e-5


# --------------------------------------------------------------------------------------------- memory and building


def resident():
    """Megabytes of this process that are in memory."""
    with open("/proc/self/statm") as file:  # noqa: PTH123
        return int(file.read().split()[1]) * 4096 / 2**20


@pytest.mark.skipif(not hasattr(allocator.ctypes.CDLL(None), "mallopt"), reason="not glibc")
def test_freed_memory_stays_and_then_goes_back(monkeypatch):
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    before = resident()
    with allocator.keeping_memory():
        torch.ones(40 * 2**20)
        assert resident() - before > 120
    assert resident() - before < 80
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    before = resident()
    with allocator.keeping_memory():
        torch.ones(40 * 2**20)
        assert resident() - before < 80, "what the user set up is left as it is"


def test_why_there_are_no_kernels(monkeypatch, tmp_path):
    monkeypatch.setenv("TEMPER_KERNELS", "off")
    assert native.library.__wrapped__() == (None, "TEMPER_KERNELS is off")
    monkeypatch.delenv("TEMPER_KERNELS")
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    assert native.library.__wrapped__() == (None, "there is no g++ to build the kernels with")
    monkeypatch.setenv("CXX", "false")
    assert "does not build the kernels" in native.library.__wrapped__()[1]
