"""Floating-point operations of training, against closed forms."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from peft import LoraConfig, get_peft_model

from temper.train import operations as module
from temper.train.batching import Bucketed, Packed
from temper.train.objectives import Causal
from temper.train.operations import operations

HIDDEN, WIDE, LAYERS, VOCABULARY = 32, 64, 2, 128


def linear(length: int, targets: int) -> tuple[int, int]:
    """Of the conftest's Llama in one pass forward over one document: its layers' matrices, and its output layer's."""
    return 2 * length * LAYERS * (4 * HIDDEN**2 + 3 * HIDDEN * WIDE), 2 * targets * HIDDEN * VOCABULARY


def attention(length: int) -> int:
    return LAYERS * 2 * 2 * length**2 * HIDDEN


def full(length: int) -> int:
    """Forward and backward: thrice, for the gradient of what goes in and of the weight."""
    return 3 * (sum(linear(length, length - 1)) + attention(length))


def counted(model, batches, **settings):
    found = operations(model, Causal(), batches, "float32", **{"paired": False, **settings})
    return round(found.per_token * found.tokens), found


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_llama_takes_what_its_matrices_say(llama, examples, stream, implementation, monkeypatch):
    monkeypatch.setattr(module, "_DOCUMENTS", 14)
    batches = Bucketed(size=14, tokens=40)(examples(), stream).update(0)
    model = llama(attn_implementation=implementation)
    made, found = counted(model, batches)
    lengths = [len(one) for one in examples()]
    assert (found.documents, found.tokens) == (14, sum(lengths))
    assert made == sum(map(full, lengths))


def test_what_waits_for_the_backward_pass():
    """Of x -> tanh(W2 relu(W1 x)): the inputs of both products and what the tanh gave, each once; weights are left out."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4), torch.nn.Tanh())
    given = torch.randn(5, 8)
    with module._keeping(model) as held:
        model(given).sum().backward()
    assert held.most == 4 * 5 * (8 + 16 + 4)
    model.requires_grad_(False)
    with module._keeping(model) as held:
        model(given)
    assert not held.most


def test_what_is_let_go_of_on_the_way_forward_does_not_wait():
    """As DoRA's norms, of which no gradient is asked: how often, and where the next tensor then lies, does not count."""
    first, second = torch.nn.Linear(4, 4), torch.nn.Linear(8, 8)
    given = torch.randn(5, 8)
    with module._keeping(torch.nn.ModuleList([first, second])) as held:
        norms = [first.weight.mul(2).square().sum().detach() for _ in range(9)]  # 4 x 16 bytes each, of one at a time
        (second(given) * sum(norms)).sum().backward()
    assert held.most == 4 * (5 * 8 + 1)  # the input and the factor, a scalar


def test_adapters_spare_the_gradients_of_frozen_weights(llama, examples, stream):
    rank, targets = 4, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(llama(), LoraConfig(r=rank, target_modules=targets, init_lora_weights=False))
    (example, *_) = examples()
    length = len(example)
    made, _ = counted(model, Bucketed(size=1)([example], stream).update(0))
    layers, head = linear(length, length - 1)
    adapters = 2 * length * rank * LAYERS * (11 * HIDDEN + 3 * WIDE)
    # Nobody asks for the gradient of the embeddings, which the first layer's q, k and v would give, and their adapters.
    spared = 2 * length * 3 * (HIDDEN**2 + rank * HIDDEN)
    assert made == 2 * (layers + head) + 3 * (adapters + attention(length)) - spared
    assert made < full(length)


def test_how_an_update_is_cut_does_not_count(llama, examples, stream):
    model = llama()
    found = [
        counted(model, Bucketed(size=14, tokens=tokens, layout=layout)(examples(), stream).update(0))[0]
        for tokens, layout in ((1000, "rows"), (21, "rows"), (64, "packed"), (300, "flat"))
    ]
    assert len(set(found)) == 1


def test_joined_rows_are_documents_and_padding_is_none(llama, examples, stream):
    plan = Packed(length=16, size=4)(examples(), stream)
    whole = counted(llama(), plan.update(0))[1]
    assert (whole.documents, whole.tokens) == (4, 64)
    assert whole.per_token == full(16) / 16
    last = counted(llama(), plan.update(plan.updates_per_epoch - 1))[1]
    assert last.tokens == plan.update(plan.updates_per_epoch - 1)[0].tokens


def test_pairs_stay_together(llama, examples, stream):
    (batch,) = Bucketed(size=3)(examples(6, side=True), stream).update(0)
    seen = []

    def loss(model, part):
        seen.append((part.rows, part.input_ids.shape))
        return Causal()(model, part)

    operations(llama(), loss, [batch], "float32", paired=True)
    # once for what is kept, once for what is computed
    assert sorted(rows for rows, _ in seen) == sorted(2 * [[0, 0], [1, 1], [2, 2]])
    assert sorted(shape[1] for _, shape in seen) == sorted(2 * [int(one.max()) for one in batch.attention_mask.sum(1).view(3, 2)])


def test_long_updates_are_counted_on_some_documents(llama, examples, stream, monkeypatch):
    plan = Bucketed(size=400, tokens=4096)(examples(400), stream)
    _, few = counted(llama(), plan.update(0))
    assert 4 <= few.documents <= 8
    monkeypatch.setattr(module, "_DOCUMENTS", 400)
    _, many = counted(llama(), plan.update(0))
    assert 250 < many.tokens <= 600
    assert few.per_token == pytest.approx(many.per_token, rel=0.1)
    lengths = [len(one) for one in examples(400)]
    assert many.per_token == pytest.approx(sum(map(full, lengths)) / sum(lengths), rel=0.05)


def test_forward_passes_alone(llama, examples, stream):
    (example, *_) = examples()
    length = len(example)
    made, _ = counted(llama(), Bucketed(size=1)([example], stream).update(0), forward_only=True)
    assert made == sum(linear(length, length - 1)) + attention(length)


def test_counting_leaves_no_trace(llama, examples, stream):
    model = llama(attention_dropout=0.5).train()
    before = [one.detach().clone() for one in model.parameters()]
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    drawn = torch.random.get_rng_state()
    (batch,) = Bucketed(size=4)(examples(), stream).update(0)
    kept = dataclasses.asdict(batch)
    counted(model, [batch])
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), before, strict=True))
    assert [name for name, one in model.named_parameters() if one.grad is not None] == ["lm_head.weight"]
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert all(torch.equal(one, kept[name]) if isinstance(one, torch.Tensor) else one == kept[name] for name, one in vars(batch).items())
