"""Every optimizer against its recurrence in float64, worked out slowly, and its state through a checkpoint in the middle of a run."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
import types
from typing import Any

import numpy
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from temper.context import Context, Stream
from temper.models.deltas import attach
from temper.models.deltas.delta import Lora
from temper.models.deltas.init import Default
from temper.parts import Problem
from temper.train import checkpoints, optimizers, slices
from temper.train.optimizers import MeZO, Optimizer, common, eight_bit, galore, mezo, sgd_sai

PARTS = Optimizer.__slot__.parts()  # type: ignore[attr-defined]
SMALL = {"adamw-8bit": {"smallest": 20, "block": 7}, "galore": {"rank": 2, "gap": 4}}
"""Settings with which small tensors go the way of large ones."""
SHAPES = ((6, 5), (5,), (4, 9), (3,))


def part(name: str, **settings):
    return PARTS[name](**{**SMALL.get(name, {}), **settings})


def build(one, parameters, seed: int = 0):
    """What a started part builds."""
    parameters = list(parameters)
    context = Started(seed, {"model": stack(parameters)})
    return (one.start(context) if hasattr(one, "start") else one).build(parameters)


@dataclasses.dataclass
class Started:
    """As much of a context as optimizers use."""

    seed: int = 0
    gifts: dict = dataclasses.field(default_factory=dict)

    def stream(self) -> Stream:
        return Stream(f"{self.seed}|test|optimizer")

    def want(self, name: str):
        return self.gifts[name]


def stack(parameters) -> torch.nn.Module:
    """A model of as many layers as parameters: the first is below its blocks, the last after them."""
    model = torch.nn.Module()
    below, *blocks, above = [torch.nn.ParameterList([one]) for one in parameters] if len(parameters) > 2 else [None, *parameters, None]
    config = types.SimpleNamespace(num_hidden_layers=len(blocks), is_encoder_decoder=False)
    config.get_text_config = lambda: config
    model.config = config
    model.below = below
    model.blocks = torch.nn.ModuleList([one if below is not None else torch.nn.ParameterList([one]) for one in blocks])
    model.above = above
    return model


def weights(dtype=torch.float64, shapes=SHAPES) -> list[torch.nn.Parameter]:
    draw = torch.Generator().manual_seed(3)
    return [torch.nn.Parameter(torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)) for shape in shapes]


def slopes(updates: int, shapes=SHAPES) -> list[list[torch.Tensor]]:
    """Gradients that do not depend on the weights, each tensor's of its own size and with a mean of its own."""
    draw = torch.Generator().manual_seed(4)
    return [
        [(torch.randn(shape, generator=draw, dtype=torch.float64) + 0.3) * 10.0**-index for index, shape in enumerate(shapes)]
        for _ in range(updates)
    ]


def drive(optimizer, held, gradients) -> list[numpy.ndarray]:
    """Runs an optimizer down given gradients, with a rate that changes; what the weights are then."""
    first = [group["lr"] for group in optimizer.param_groups]
    for update, some in enumerate(gradients):

        def closure(some=some):
            optimizer.zero_grad()
            for one, slope in zip(held, some):
                one.grad = slope.to(one.dtype)
            return torch.tensor(1.5)

        for group, rate in zip(optimizer.param_groups, first):
            group["lr"] = rate * factor(update)
        assert optimizer.step(closure) == 1.5
    return [one.detach().double().numpy() for one in held]


def factor(update: int) -> float:
    """What a schedule would multiply the rate by."""
    return 1 / (1 + update % 3)


def recurrence(step, updates: int = 12, rate: float = 0.1, shapes=SHAPES) -> list[numpy.ndarray]:
    """Weights after a hand recurrence: `step(w, g, state, rate, t)` -> w, tensor by tensor, t from 1; state: a dict of its own each."""
    now, states = [one.detach().numpy().copy() for one in weights(shapes=shapes)], [{} for _ in shapes]
    for update, some in enumerate(slopes(updates, shapes)):
        for index, slope in enumerate(some):
            now[index] = step(now[index], slope.numpy(), states[index], rate * factor(update), update + 1)
    return now


def close(found, wanted, within: float = 1e-12) -> None:
    for one, two in zip(found, wanted, strict=True):
        numpy.testing.assert_allclose(one, two, rtol=within, atol=within)


def decay(weight) -> float:
    """The decay of the tests: of matrices alone."""
    return 0.2 if weight.ndim > 1 else 0.0


def adam(slope, state, t, betas, eps):
    state["m"] = betas[0] * state.get("m", 0) + (1 - betas[0]) * slope
    state["v"] = betas[1] * state.get("v", 0) + (1 - betas[1]) * slope**2
    return state["m"] / (1 - betas[0] ** t) / (numpy.sqrt(state["v"] / (1 - betas[1] ** t)) + eps)


# ---------------------------------------------------------------------------------------------------- one gradient


def test_adamw():
    def step(w, g, state, rate, t):
        return w - rate * decay(w) * w - rate * adam(g, state, t, (0.8, 0.95), 1e-3)

    one = part("adamw", lr=0.1, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.2)
    held = weights()
    close(drive(build(one, held), held, slopes(12)), recurrence(step))


def test_adamw_without_bias_correction():
    def step(w, g, state, rate, t):
        adam(g, state, t, (0.8, 0.95), 1e-3)
        return w - rate * decay(w) * w - rate * state["m"] / (numpy.sqrt(state["v"]) + 1e-3)

    one = part("adamw", lr=0.1, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.2, bias_correction=False)
    held = weights()
    close(drive(build(one, held), held, slopes(12)), recurrence(step))


def test_without_bias_correction_early_updates_are_up_to_six_and_a_half_times_as_large():
    """Under gradients of 1 a corrected update is the rate, as torch has it; an uncorrected one exceeds it most at the twelfth."""

    def path(build) -> numpy.ndarray:
        held = [torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))]
        optimizer, found = build(held), [0.0]
        for _ in range(40):
            held[0].grad = torch.ones_like(held[0])
            optimizer.step(lambda: torch.tensor(0.0))
            found.append(held[0].item())
        return -numpy.diff(found) / 0.1

    settings = {"lr": 0.1, "eps": 1e-12, "weight_decay": 0.0}
    corrected = path(part("adamw", **settings).build)
    numpy.testing.assert_allclose(corrected, path(lambda held: torch.optim.AdamW(held, **settings)), rtol=1e-12)
    numpy.testing.assert_allclose(corrected, 1.0, rtol=1e-9)
    plain = path(part("adamw", bias_correction=False, **settings).build)
    assert plain.argmax() + 1 == 12
    assert 6.5 < plain.max() < 6.6


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd(nesterov):
    def step(w, g, state, rate, t):
        g = g + decay(w) * w
        state["b"] = 0.7 * state["b"] + g if state else g
        return w - rate * (g + 0.7 * state["b"] if nesterov else state["b"])

    held = weights()
    one = part("sgd", lr=0.1, momentum=0.7, nesterov=nesterov, weight_decay=0.2)
    close(drive(build(one, held), held, slopes(12)), recurrence(step))


def test_adafactor():
    def step(w, g, state, rate, t):
        keep = 1 - t**-0.6
        relative, least = min(rate, t**-0.5), 1e-3
        size = max(least, math.sqrt((w**2).mean()))
        w = w - rate * decay(w) * w
        if g.ndim > 1:
            state["row"] = keep * state.get("row", 0) + (1 - keep) * (g**2).mean(-1, keepdims=True)
            state["column"] = keep * state.get("column", 0) + (1 - keep) * (g**2).mean(-2, keepdims=True)
            square = state["row"] @ state["column"] / state["row"].mean()
        else:
            state["v"] = square = keep * state.get("v", 0) + (1 - keep) * g**2
        change = g / numpy.sqrt(square)
        return w - relative * size * change / max(1, math.sqrt((change**2).mean()) / 1.01)

    held = weights()
    one = part("adafactor", lr=0.1, decay=-0.6, clip=1.01, weight_decay=0.2)
    close(drive(build(one, held), held, slopes(12)), recurrence(step), within=1e-9)


def test_adafactor_takes_steps_of_one_size_however_small_gradients_are():
    held = [weights(torch.float32, shapes=((6, 5), (5,))) for _ in range(2)]
    found = [
        drive(build(part("adafactor"), each), each, [[one * size for one in some] for some in slopes(5, shapes=((6, 5), (5,)))])
        for size, each in zip((1.0, 1e-6), held)
    ]
    close(*found, within=1e-5)


def test_lion():
    def step(w, g, state, rate, t):
        m = state.get("m", 0 * g)
        state["m"] = 0.9 * m + 0.1 * g
        return w - rate * (numpy.sign(0.6 * m + 0.4 * g) + decay(w) * w)

    held = weights()
    close(drive(build(part("lion", lr=0.1, betas=(0.6, 0.9), weight_decay=0.2), held), held, slopes(12)), recurrence(step))


def ratio(g) -> float:
    return numpy.linalg.norm(g) / (g.std(ddof=1) + 1e-8)


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("momentum", [0.8, 0.0])
def test_sgd_sai(normalised, momentum):
    largest = max(ratio(g.numpy()) for g in slopes(1)[0]) if normalised else 1.0

    def step(w, g, state, rate, t):
        if t == 1:
            state.update(m=g, scale=ratio(g) / largest)
        state["m"] = momentum * state["m"] + (1 - momentum) * g
        return w - rate * (decay(w) * w + state["scale"] * state["m"])

    held = weights()
    built = build(part("sgd-sai", lr=0.1, momentum=momentum, normalised=normalised, weight_decay=0.2), held)
    close(drive(built, held, slopes(12)), recurrence(step))


@pytest.mark.parametrize("shape", [(40,), (5, 7), (300, 200)])
def test_signal_to_noise_is_what_the_paper_says(shape):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.4
    count, mean = g.numel(), g.mean()
    found = sgd_sai.signal_to_noise(g, 0.0)
    torch.testing.assert_close(found, g.norm() / g.std(), rtol=1e-12, atol=0)
    torch.testing.assert_close(found, ((count - 1) * (1 + mean**2 / g.var(correction=0))).sqrt(), rtol=1e-12, atol=0)


def test_sgd_sai_waits_for_a_gradient_and_has_a_ratio_where_there_is_no_noise():
    held = weights(shapes=((4, 4), (3, 2), (1,)))
    optimizer = build(part("sgd-sai"), held)
    some = slopes(2, shapes=((4, 4), (3, 2), (1,)))
    some[0][1] = torch.zeros(3, 2, dtype=torch.float64)  # as of a factor whose partner is zero
    before = held[1].detach().clone()
    drive(optimizer, held, some[:1])
    largest = ratio(some[0][0].numpy())
    assert torch.equal(held[1], before)
    drive(optimizer, held, some[1:])
    scales = [optimizer.state[one]["scale"] for one in held]
    assert scales == pytest.approx([1.0, ratio(some[1][1].numpy()) / largest, 1 / largest], rel=1e-12)


# -------------------------------------------------------------------------------------------------- eight bits


@pytest.mark.parametrize(
    ("signed", "digest"),
    [
        (True, "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"),
        (False, "305f002cc11278fb769d13b25b9fd0c7c83c8402c40a878fe086f4039fde6398"),
    ],
)
def test_the_code_book_is_the_published_one(signed, digest):
    """Of `bitsandbytes.functional.create_dynamic_map(signed)` of version 0.50.2; and of the rule that makes it, in float64."""
    book = eight_bit.dynamic_map(signed)
    assert hashlib.sha256(book.numpy().tobytes()).hexdigest() == digest
    values = [0.0, 1.0]
    for power in range(7):
        count = 2**power if signed else 2 ** (power + 1)
        centres = [10.0 ** (power - 6) * (0.1 + 0.9 * (place + 0.5) / count) for place in range(count)]
        values += centres + [-one for one in centres if signed]
    numpy.testing.assert_allclose(book.double().numpy(), sorted(values), rtol=3e-7)


@pytest.mark.parametrize("signed", [True, False])
def test_every_code_is_the_nearest(signed):
    book = eight_bit.Book.dynamic(signed, "cpu")
    values = book.values.double()
    draw = torch.Generator().manual_seed(0)
    middles = ((values[1:] + values[:-1]) / 2).float()
    close_by = torch.cat([middles, torch.nextafter(middles, torch.tensor(2.0)), torch.nextafter(middles, torch.tensor(-2.0))])
    tiny = torch.rand(2000, generator=draw) * 10.0 ** -torch.randint(0, 44, (2000,), generator=draw)
    numbers = torch.cat([torch.linspace(-1, 1, 20001), close_by, tiny, -tiny, book.values, torch.tensor([0.0, -0.0, 1.0, -1.0])])
    numbers = numbers if signed else numbers.abs()
    codes = book.codes(numbers)
    apart = (numbers.double()[:, None] - values).abs()
    assert torch.equal((numbers.double() - values[codes.long()]).abs(), apart.min(1).values)
    assert torch.equal(book.codes(book.values), torch.arange(256, dtype=torch.uint8))
    assert torch.equal(book.numbers(codes), book.values[codes.long()])


@pytest.mark.parametrize("count", [1, 6, 7, 8, 700, 1001])
def test_blocks_come_back_within_half_a_gap_of_their_largest(count):
    numbers = torch.randn(count, generator=torch.Generator().manual_seed(1)) * 10.0 ** torch.linspace(-30, 8, count)
    numbers[: count // 3] = 0
    book = eight_bit.Book.dynamic(True, "cpu")
    codes, scales = eight_bit.packed(numbers, 7, book)
    assert (codes.dtype, len(codes), len(scales)) == (torch.uint8, count, math.ceil(count / 7))
    back = eight_bit.unpacked(codes, scales, 7, book)
    largest = torch.tensor([block.abs().max() for block in numbers.split(7)])
    assert torch.equal(scales, largest)
    gap = (book.values[1:] - book.values[:-1]).max()
    assert ((back - numbers).abs() <= 0.5001 * gap * largest.repeat_interleave(7)[:count]).all()
    assert (back[numbers == 0] == 0).all()


def nearest(numbers, book, block):
    """Numbers with each replaced by its code's value, block by block: scale, ratio and product are float32, as they are kept."""
    flat, found = numbers.reshape(-1), []
    for start in range(0, len(flat), block):
        some = flat[start : start + block]
        scale = numpy.float32(numpy.abs(some).max())
        for one in some:
            relative = float(numpy.float32(one / float(scale))) if scale else 0.0
            found.append(float(numpy.float32(book[numpy.abs(book - relative).argmin()]) * scale))
    return numpy.array(found).reshape(numbers.shape)


@pytest.mark.parametrize("block", [7, 64])
def test_adamw_in_eight_bits(block):
    books = [eight_bit.dynamic_map(signed).double().numpy() for signed in (True, False)]

    def step(w, g, state, rate, t):
        change = adam(g, state, t, (0.8, 0.95), 1e-3)
        if w.size >= 20:
            state["m"], state["v"] = nearest(state["m"], books[0], block), nearest(state["v"], books[1], block)
        return w - rate * decay(w) * w - rate * change

    held = weights()
    one = part("adamw-8bit", lr=0.1, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.2, block=block)
    optimizer = build(one, held)
    close(drive(optimizer, held, slopes(12)), recurrence(step), within=1e-10)
    assert {optimizer.state[each]["mean"].dtype for each in held} == {torch.uint8, torch.float64}


def test_eight_bits_take_two_bytes_a_weight_and_embeddings_stay_as_they_are(llama):
    model = llama()
    held = list(model.parameters())
    optimizer = optimizers.AdamW8Bit(smallest=1).start(Started(gifts={"model": model})).build(held)
    for one in held:
        one.grad = torch.ones_like(one)
    optimizer.step()
    for name, one in model.named_parameters():
        taken = sum(kept.numel() * kept.element_size() for kept in optimizer.state[one].values() if isinstance(kept, torch.Tensor))
        expected = (
            8 * one.numel()
            if name in ("model.embed_tokens.weight", "lm_head.weight")
            else 2 * one.numel() + 8 * math.ceil(one.numel() / 256)
        )
        assert taken == expected, name


def test_eight_bits_of_a_tensor_whose_numbers_lie_in_another_order():
    one, two = (torch.nn.Parameter(base) for base in (torch.randn(30, 20).t(), torch.empty(0)))
    two.data = one.detach().contiguous()
    for each in (one, two):
        optimizer = build(part("adamw-8bit"), [each])
        for count in range(3):
            each.grad = torch.linspace(-1, 1, 600).view(20, 30) * (1 + count)
            optimizer.step()
    assert torch.equal(one, two)


# ------------------------------------------------------------------------------------------------- in a subspace


def test_galore():
    def step(w, g, state, rate, t):
        w = w - rate * decay(w) * w
        if min(w.shape) <= 2 or w.ndim < 2:
            return w - rate * adam(g, state, t, (0.8, 0.95), 1e-3)
        left = w.shape[0] <= w.shape[1]
        if (t - 1) % 4 == 0:
            u, _, v = numpy.linalg.svd(g, full_matrices=False)
            p = u[:, :2] if left else v[:2].T
            state["p"] = p * numpy.sign(p[numpy.abs(p).argmax(0), range(2)])
        low = state["p"].T @ g if left else g @ state["p"]
        change = adam(low, state, t, (0.8, 0.95), 1e-3)
        return w - rate * 0.3 * (state["p"] @ change if left else change @ state["p"].T)

    shapes = ((6, 5), (5,), (4, 9), (3,), (5, 5), (2, 8))
    held = weights(shapes=shapes)
    one = part("galore", lr=0.1, betas=(0.8, 0.95), eps=1e-3, scale=0.3, weight_decay=0.2)
    optimizer = build(one, held)
    close(drive(optimizer, held, slopes(12, shapes)), recurrence(step, shapes=shapes), within=1e-10)
    kept = {name: tuple(one.shape) for name, one in optimizer.state[held[2]].items()}
    assert kept == {"step": (), "basis": (4, 2), "mean": (2, 9), "square": (2, 9)}


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (6, 6)])
def test_a_basis_is_orthonormal_keeps_the_most_and_has_settled_signs(shape):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = galore.basis(g, 3)
    rows = found.T if shape[0] <= shape[1] else found
    torch.testing.assert_close(rows @ rows.T, torch.eye(3, dtype=torch.float64))
    low = found.T @ g if shape[0] <= shape[1] else g @ found.T
    torch.testing.assert_close(low.square().sum(), torch.linalg.svdvals(g)[:3].square().sum())
    assert torch.equal(found, galore.basis(g.clone(), 3))
    torch.testing.assert_close(found, galore.basis(-g, 3))


def test_galore_and_muon_leave_embeddings_and_the_output_layer_to_adamw(llama):
    model = llama()
    context = Started(gifts={"model": model})
    alone = {id(model.model.embed_tokens.weight), id(model.lm_head.weight)}
    assert common.embeddings(context) == alone
    matrices = {id(one) for one in model.parameters() if one.ndim == 2}
    built = optimizers.GaLore(rank=2).start(context).build(model.parameters())
    assert {id(one) for group in built.param_groups if group["project"] for one in group["params"]} == matrices - alone
    hidden = optimizers.Muon().start(context).build(model.parameters()).inner[0]
    assert {id(one) for group in hidden.param_groups for one in group["params"]} == matrices - alone


def test_muon_is_torchs_for_matrices_and_adamw_for_the_rest():
    held, alone = weights(torch.float32), weights(torch.float32)
    found = drive(build(part("muon", lr=0.1, momentum=0.8, betas=(0.7, 0.9), weight_decay=0.2), held), held, slopes(12))
    matrices, rest = [alone[0], alone[2]], [alone[1], alone[3]]
    some = slopes(12)
    settings = {"momentum": 0.8, "weight_decay": 0.2, "adjust_lr_fn": "match_rms_adamw"}
    drive(torch.optim.Muon(matrices, lr=0.1, **settings), matrices, [[each[0], each[2]] for each in some])
    drive(torch.optim.AdamW(rest, lr=0.1, betas=(0.7, 0.9), weight_decay=0.0), rest, [[each[1], each[3]] for each in some])
    close(found, [one.detach().double().numpy() for one in alone], within=1e-6)


# --------------------------------------------------------------------------------------------------- a rate a layer


def scales(model, rate: float) -> dict[str, float]:
    """What timm's `param_groups_layer_decay` multiplies the rate by: rate^(highest layer - layer), layers counted from the stem's 0."""
    layer_of = {}
    for name, _ in model.named_parameters():
        place = re.search(r"(?:layers|layer|h)\.(\d+)\.", name)
        layer_of[name] = 0 if re.search("embed|wte|wpe", name) else int(place[1]) + 1 if place else 1 + model.config.num_hidden_layers
    top = max(layer_of.values())
    return {name: [rate ** (top - layer) for layer in range(top + 1)][layer] for name, layer in layer_of.items()}


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2", "lora"])
def test_layerwise_decay_is_timms_rate_for_every_parameter(kind, llama, tmp_path):
    small = {"vocab_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
    model: Any = {
        "llama": lambda: llama(**small),
        "lora": lambda: attach(llama(**small), None, Lora(rank=2), Default(), seed=0),
        "bert": lambda: BertForSequenceClassification(BertConfig(**small)),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=3, n_head=2)),
    }[kind]()
    context = Context.scratch(tmp_path).at("optimizer")
    context.give("model", model)
    held = {id(one): name for name, one in model.named_parameters() if one.requires_grad}
    optimizer = (
        optimizers.LayerwiseDecay(base=optimizers.AdamW(lr=0.01, weight_decay=0.3), rate=0.7)
        .start(context)
        .build([one for one in model.parameters() if one.requires_grad])
    )
    wanted, seen = scales(model, 0.7), set()
    for group in optimizer.param_groups:
        for one in group["params"]:
            name = held[id(one)]
            assert group["lr"] == pytest.approx(0.01 * wanted[name], rel=1e-12), name
            assert group["weight_decay"] == (0.3 if one.ndim > 1 else 0.0)
            seen.add(name)
    assert seen == set(held.values())
    assert optimizer.param_groups[0]["lr"] == max(group["lr"] for group in optimizer.param_groups)
    assert len({group["lr"] for group in optimizer.param_groups}) == (3 if kind == "lora" else 5)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "muon", "adamw-8bit"])
def test_layerwise_decay_is_its_base_at_each_layers_rate(name):
    held, alone = weights(), weights()
    found = drive(build(part("layerwise-decay", base=part(name, lr=0.05), rate=0.5), held), held, slopes(8))
    for place, one in enumerate(alone):
        base = build(part(name, lr=0.05 * 0.5 ** (len(alone) - 1 - place)), [one])
        drive(base, [one], [[some[place]] for some in slopes(8)])
    close(found, [one.detach().double().numpy() for one in alone])


def test_a_tied_head_moves_at_the_embeddings_rate_and_two_stacks_are_refused(llama, tmp_path):
    context = Context.scratch(tmp_path).at("optimizer")
    model = llama(tie_word_embeddings=True)
    context.give("model", model)
    optimizer = optimizers.LayerwiseDecay(base=optimizers.SGD(lr=1.0), rate=0.5).start(context).build(model.parameters())
    (rate,) = {group["lr"] for group in optimizer.param_groups if any(one is model.lm_head.weight for one in group["params"])}
    assert rate == 0.5**3
    config = T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    context.give("model", T5ForConditionalGeneration(config))
    with pytest.raises(Problem, match="has an encoder and a decoder"):
        optimizers.LayerwiseDecay().start(context).build(context.want("model").parameters())


# ------------------------------------------------------------------------------------------------------ two passes


@pytest.mark.parametrize("adaptive", [False, True])
def test_sam_on_a_quadratic(adaptive):
    """L = w A w / 2 over two tensors: the gradient at w + e is A (w + e)."""
    draw = numpy.random.default_rng(0)
    root = draw.normal(size=(10, 10))
    curve, w, b = root @ root.T / 10, draw.normal(size=10), 0.0
    held = [torch.nn.Parameter(torch.tensor(w[:6]).view(2, 3)), torch.nn.Parameter(torch.tensor(w[6:]))]
    optimizer = build(part("sam", base=optimizers.SGD(lr=0.05, momentum=0.9), rho=0.3, adaptive=adaptive), held)
    passes = []

    def closure():
        optimizer.zero_grad()
        flat = torch.cat([one.flatten() for one in held])
        loss = flat @ torch.tensor(curve) @ flat / 2
        loss.backward()
        passes.append(loss.item())
        return loss

    for update in range(12):
        g = curve @ w
        climb = 0.3 * w**2 * g / numpy.linalg.norm(w * g) if adaptive else 0.3 * g / numpy.linalg.norm(g)
        b = 0.9 * b + curve @ (w + climb)
        loss = w @ curve @ w / 2
        w = w - 0.05 * b
        assert optimizer.step(closure).item() == pytest.approx(loss, rel=1e-12)
        assert len(passes) == 2 * (update + 1)
        close([torch.cat([one.detach().flatten() for one in held]).numpy()], [w])


def test_sam_puts_the_weights_back_bit_for_bit_where_its_second_pass_fails():
    held = weights(torch.float32)
    optimizer = build(part("sam", rho=3.0), held)
    before, calls = [one.detach().clone() for one in held], []

    def closure():
        calls.append(1)
        if len(calls) == 2:
            assert not torch.equal(held[0], before[0])
            raise FloatingPointError("a loss of infinity")
        for one, slope in zip(held, slopes(1)[0]):
            one.grad = slope.float()
        return torch.tensor(0.0)

    with pytest.raises(FloatingPointError):
        optimizer.step(closure)
    assert all(map(torch.equal, held, before))


# ------------------------------------------------------------------------------------------------------ zeroth order


def parabola(held, curve):
    """w A w / 2 + sum of sines, without a graph."""
    flat = torch.cat([one.flatten() for one in held])
    return flat @ curve @ flat / 2 + flat.sin().sum()


CURVE = torch.diag(torch.linspace(0.5, 2.0, 74, dtype=torch.float64))  # SHAPES hold 74 weights


def noise(update: int, held) -> list[torch.Tensor]:
    """z of an update, parameter by parameter, drawn as the stream's keys say."""
    stream = Started().stream()
    made = [torch.Generator().manual_seed(stream.seed(update, index)) for index in range(len(held))]
    return [torch.randn(one.shape, generator=g, dtype=one.dtype) for one, g in zip(held, made)]


BASES = {
    "sgd": (optimizers.SGD(lr=0.01, momentum=0.0), lambda held: torch.optim.SGD(held, lr=0.01)),
    "momentum": (optimizers.SGD(lr=0.01), lambda held: torch.optim.SGD(held, lr=0.01, momentum=0.9)),
    "adam": (optimizers.AdamW(lr=0.01, weight_decay=0.0), lambda held: torch.optim.Adam(held, lr=0.01)),
}


@pytest.mark.parametrize("estimator", ["difference", "sign"])
@pytest.mark.parametrize("base", BASES)
def test_mezo_is_its_base_on_the_estimate(estimator, base):
    ours, theirs = BASES[base]
    held, other = weights(), weights()
    optimizer = build(MeZO(base=ours, epsilon=1e-3, estimator=estimator), held)
    reference = theirs(other)
    for update in range(12):
        z = noise(update, other)
        with torch.no_grad():
            up, down = (parabola([one + sign * 1e-3 * each for one, each in zip(other, z)], CURVE) for sign in (1, -1))
        slope = (up - down) / 2e-3
        for one, each in zip(other, z):
            one.grad = (slope.sign() if estimator == "sign" else slope) * each
        reference.step()
        assert optimizer.step(lambda: parabola(held, CURVE)).item() == pytest.approx(up.item(), rel=1e-12)
        close([one.detach().numpy() for one in held], [one.detach().numpy() for one in other], within=1e-8)


def test_mezo_chooses_the_best_of_three_where_it_is_conservative():
    held, other = weights(), weights()
    optimizer = build(MeZO(base=optimizers.SGD(lr=0.02, momentum=0.0), estimator="conservative"), held)
    chosen = set()
    for update in range(30):
        z = noise(update, other)
        with torch.no_grad():
            up, down = (parabola([one + sign * 1e-3 * each for one, each in zip(other, z)], CURVE) for sign in (1, -1))
            slope = (up - down) / 2e-3
            tried = [[one + move * 0.02 * slope * each for one, each in zip(other, z)] for move in (0, -1, 1)]
            losses = [parabola(some, CURVE).item() for some in tried]
            best = losses.index(min(losses))
            chosen.add(best)
            for one, value in zip(other, tried[best]):
                one.copy_(value)
        calls = []
        optimizer.step(lambda calls=calls: calls.append(1) or parabola(held, CURVE))
        assert len(calls) == 5
        close([one.detach().numpy() for one in held], [one.detach().numpy() for one in other], within=1e-9)
    assert chosen == {0, 1}, "the step that overshoots is refused, another is taken"


@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("sparsity", [0.0, 0.6])
def test_noise_that_is_drawn_again_restores_the_weights(dtype, within, sparsity):
    """At a rate of 0, 300 updates of three additions each. Their rounding is a random walk, about sqrt(updates) / 3 last places long."""
    held, before = weights(dtype), weights()
    optimizer = build(MeZO(sparsity=sparsity), held)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for _ in range(300):
        optimizer.step(lambda: parabola([one.double() for one in held], CURVE))
    apart = max((one.double() - two).abs().max().item() for one, two in zip(held, (one.to(dtype).double() for one in before)))
    assert 0 < apart < within


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_the_mean_estimate_is_the_masked_gradient_of_a_quadratic(sparsity):
    """An estimate z (z g) of a quadratic has mean g and variance |g|^2 + g^2, over the weights that move. 5 standard errors."""
    curve, draws = CURVE[:12, :12], 1500
    held = weights(shapes=((4, 3),))
    start = [one.detach().clone() for one in held]
    optimizer = build(MeZO(base=optimizers.SGD(lr=1.0, momentum=0.0), epsilon=0.1, sparsity=sparsity), held)
    moves = torch.cat([(one.abs() <= one.abs().flatten().kthvalue(round((1 - sparsity) * one.numel())).values).flatten() for one in start])
    flat = torch.cat([one.flatten() for one in start])
    gradient = (curve @ flat) * moves
    total = torch.zeros(12, dtype=torch.float64)
    for _ in range(draws):
        optimizer.step(lambda: held[0].flatten() @ curve @ held[0].flatten() / 2)
        with torch.no_grad():
            total += (start[0] - held[0]).flatten()
            held[0].copy_(start[0])
    error = ((gradient.square().sum() + gradient.square()) / draws).sqrt()
    assert ((total / draws - gradient).abs() <= 5 * error)[moves].all()
    assert (total[~moves].abs() < 1e-9).all()
    assert int(moves.sum()) == 12 - 12 * sparsity


def test_the_mean_estimate_is_the_gradient_of_the_smoothed_loss():
    """E cos(w + epsilon z) = exp(-epsilon^2 / 2) cos w, so of a sum of cosines the smoothed gradient is known."""
    epsilon, draws = 0.8, 1500
    held = weights(shapes=((4,),))
    start = held[0].detach().clone()
    optimizer = build(MeZO(base=optimizers.SGD(lr=1.0, momentum=0.0), epsilon=epsilon), held)
    found = []
    for _ in range(draws):
        optimizer.step(lambda: held[0].cos().sum())
        with torch.no_grad():
            found.append(start - held[0])
            held[0].copy_(start)
    estimates = torch.stack(found)
    error = estimates.std(0) / draws**0.5
    assert ((estimates.mean(0) + math.exp(-(epsilon**2) / 2) * start.sin()).abs() <= 5 * error).all()
    assert ((estimates.mean(0) + start.sin()).abs() > 5 * error).any(), "which is not the gradient itself"


def test_mezo_never_goes_backward_and_holds_one_gradient_at_a_time():
    held = weights()
    optimizer = build(MeZO(base=optimizers.AdamW(), sparsity=0.5), held)
    for index, base in enumerate(optimizer.inner):

        def step(index=index, step=base.step):
            assert [one.grad is not None for one in held] == [place == index for place in range(len(held))]
            return step()

        base.step = step

    def closure():
        loss = parabola(held, CURVE)
        assert not torch.is_grad_enabled()
        assert loss.grad_fn is None
        assert not loss.requires_grad
        assert all(one.grad is None for one in held)
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert all(one.grad is None for one in held)


def test_sparse_mezo_moves_small_weights_by_the_thresholds_of_the_start():
    held = weights()
    thresholds = [one.detach().abs().flatten().kthvalue(max(1, round(0.4 * one.numel()))).values for one in held]
    optimizer = build(MeZO(base=optimizers.SGD(lr=0.1, momentum=0.0), sparsity=0.6), held)
    stopped = 0
    for _ in range(10):
        before = [one.detach().clone() for one in held]
        optimizer.step(lambda: parabola(held, CURVE))
        for one, old, most in zip(held, before, thresholds):
            still = old.abs() > most
            assert torch.equal(one[still], old[still])
            assert (one[~still] != old[~still]).all()
            stopped += int((~still & (one.abs() > most)).sum())
    assert stopped, "a weight that has grown stands still from then on"
    assert [group["threshold"] for group in optimizer.param_groups] == [one.item() for one in thresholds]


@pytest.mark.parametrize("count", [1, 7, 8, 9, 64])
def test_a_mask_is_a_bit_a_weight(count):
    mask = torch.rand(count, generator=torch.Generator().manual_seed(count)) < 0.5
    bits = mezo._packed(mask)
    assert (bits.dtype, len(bits)) == (torch.uint8, math.ceil(count / 8))
    assert torch.equal(mezo._unpacked(bits, count), mask)


@pytest.mark.parametrize("fails", [1, 2])
def test_mezo_puts_the_weights_back_where_a_pass_fails(fails):
    held, before, calls = weights(), weights(), []
    optimizer = build(MeZO(epsilon=0.5), held)

    def closure():
        calls.append(1)
        if len(calls) == fails:
            raise FloatingPointError("a loss of infinity")
        return parabola(held, CURVE)

    with pytest.raises(FloatingPointError):
        optimizer.step(closure)
    close([one.detach().numpy() for one in held], [one.detach().numpy() for one in before], within=1e-14)
    optimizer.step(closure)
    assert len(calls) == fails + 2


# ------------------------------------------------------------------------------------------------------- all of them


def go_on(one, held, updates, optimizer):
    """Descends a curve from the weights as they are."""
    for _ in range(updates):

        def closure():
            optimizer.zero_grad()
            flat = torch.cat([each.flatten() for each in held]).float()
            loss = flat.square() @ torch.linspace(0.5, 2, len(flat)) + (2 * flat).sin().sum()
            if torch.is_grad_enabled():
                loss.backward()
            return loss

        optimizer.step(closure)
    return [each.detach().clone() for each in held]


EVERY = {
    **{name: part(name) for name in PARTS},
    "sam of 8 bits": part("sam", base=part("adamw-8bit")),
    "mezo of adam": MeZO(base=optimizers.AdamW(), sparsity=0.5),
    "mezo of muon": MeZO(base=optimizers.Muon(), epsilon=0.1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", EVERY)
def test_state_comes_back_from_a_checkpoint_bit_for_bit(name, dtype, tmp_path):
    one, held = EVERY[name], weights(dtype)
    optimizer = build(one, held)
    go_on(one, held, 6, optimizer)
    checkpoints.fill(tmp_path, {"optimizer": optimizer.state_dict(), "weights": [each.detach() for each in held]})
    through = go_on(one, held, 6, optimizer)

    saved = checkpoints.read(tmp_path)
    again = [torch.nn.Parameter(each.clone()) for each in saved["weights"]]
    fresh = build(one, again)
    fresh.load_state_dict(saved["optimizer"])
    back, kept = fresh.state_dict(), saved["optimizer"]
    assert back["param_groups"] == kept["param_groups"]
    for index, state in kept["state"].items():
        for key, value in state.items():
            assert type(back["state"][index][key]) is type(value)
            if isinstance(value, torch.Tensor):
                assert back["state"][index][key].dtype == value.dtype
                assert torch.equal(back["state"][index][key], value)
    assert all(map(torch.equal, go_on(one, again, 6, fresh), through))
    assert not all(map(torch.equal, through, saved["weights"]))


@pytest.mark.parametrize("name", ["lion", "sgd-sai", "adamw-8bit", "sam"])
def test_slices_change_nothing(name, monkeypatch):
    shapes = ((37, 11), (129,), (5, 5))
    whole = weights(torch.float32, shapes)
    optimizer = build(part(name, **({"block": 16} if name == "adamw-8bit" else {})), whole)
    drive(optimizer, whole, slopes(5, shapes))
    monkeypatch.setattr(slices, "SLICE", 32)
    monkeypatch.setattr(eight_bit, "SLICE", 32)
    cut = weights(torch.float32, shapes)
    drive(build(part(name, **({"block": 16} if name == "adamw-8bit" else {})), cut), cut, slopes(5, shapes))
    assert all(map(torch.equal, whole, cut))


@pytest.mark.parametrize("name", [name for name in PARTS if name != "mezo"])
def test_what_has_no_gradient_stands_still(name):
    held = weights()
    before = held[1].detach().clone()
    optimizer = build(part(name), held)
    for _ in range(3):
        optimizer.step(lambda: [setattr(one, "grad", torch.ones_like(one)) for one in (held[0], held[2])] and torch.tensor(0.0))
    assert torch.equal(held[1], before)


@pytest.mark.parametrize("name", ["adafactor", "muon", "adamw-8bit", "galore", "mezo"])
def test_what_needs_whole_tensors_refuses_shards(name):
    one = weights()[0]
    one.placements, one.to_local = (), lambda: one  # type: ignore[attr-defined]
    with pytest.raises(Problem, match=f"`{name}` needs whole tensors.*distribute: replicate"):
        build(part(name), [one])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: optimizers.SAM(base=optimizers.SAM()), "`sam` gives its base one gradient"),
        (lambda: optimizers.SAM(base=MeZO()), "`sam` gives its base one gradient"),
        (lambda: MeZO(base=optimizers.SAM()), "`mezo` moves one tensor at a time"),
        (lambda: MeZO(base=optimizers.SGDSaI()), "`mezo` moves one tensor at a time"),
        (lambda: MeZO(base=optimizers.SGD(), estimator="conservative"), "made for the base `sgd` with momentum 0"),
        (lambda: MeZO(base=optimizers.AdamW(), estimator="conservative"), "made for the base `sgd` with momentum 0"),
        (lambda: optimizers.SGD(momentum=0.0, nesterov=True), "nesterov looks ahead"),
        (lambda: optimizers.LayerwiseDecay(base=optimizers.SAM()), "`layerwise-decay` moves a layer at a time"),
        (lambda: optimizers.LayerwiseDecay(base=optimizers.SGDSaI()), "`layerwise-decay` moves a layer at a time"),
        (lambda: optimizers.LayerwiseDecay(rate=1.1), "less than or equal to 1"),
    ],
)
def test_what_does_not_fit_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_real_context_starts_every_part(tmp_path):
    context = Context.scratch(tmp_path).at("optimizer")
    context.give("model", stack(weights()))
    for name in PARTS:
        one = part(name)
        assert build(one, weights()).param_groups
        (one.start(context) if hasattr(one, "start") else one).build(weights())
