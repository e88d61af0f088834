"""Divergences of predictions: closed forms, pieces, and the targets that an adapter on an NF4 base may be merged to."""

from __future__ import annotations

import copy

import pytest
import torch

from temper.models import divergence as divergences
from temper.models import nf4
from temper.models.deltas import merge, prepare, trainable_parameters
from temper.models.deltas.base import NF4
from temper.models.deltas.delta import Delta, Lora
from temper.models.deltas.init import Default
from temper.models.divergence import Divergence, apart, divergence, merge_targets
from temper.parts import Problem


def test_closed_form():
    reference, other = torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.tensor([[2.0, 0.0], [1.0, 1.0]])
    kl, gap = divergence(reference, other)
    p = torch.tensor(2.0).sigmoid()
    torch.testing.assert_close(kl, torch.stack([-torch.log(torch.tensor(2.0)) - 0.5 * (p.log() + (1 - p).log()), torch.tensor(0.0)]))
    assert gap.tolist() == [2.0, 0.0]
    made = Divergence()
    made.add(reference, other)
    made.add(reference[1:], other[1:])
    assert (made.tokens, made.gap) == (3, 2.0)
    assert made.mean == pytest.approx(kl.sum().item() / 3)


@pytest.mark.parametrize("chunk", [1, 40, 2**21])
def test_pieces_and_narrow_formats(monkeypatch, chunk):
    monkeypatch.setattr(divergences, "_CHUNK", chunk)
    one, two = torch.randn(2, 23, 17, generator=torch.Generator().manual_seed(0)).bfloat16()
    kl, gap = divergence(one, two)
    q, p = (torch.distributions.Categorical(logits=logits.double()) for logits in (one, two))
    torch.testing.assert_close(kl.double(), torch.distributions.kl_divergence(q, p), atol=1e-6, rtol=1e-5)
    assert torch.equal(gap, (one.float() - two.float()).abs().amax(-1))
    far = torch.tensor([[0.0, -200.0, 0.0], [0.0, -90.0, 1.0]])
    kl, _ = divergence(far, far.flip(1))
    q, p = (torch.distributions.Categorical(logits=logits.double()) for logits in (far, far.flip(1)))
    torch.testing.assert_close(kl.double(), torch.distributions.kl_divergence(q, p), atol=1e-6, rtol=1e-5)
    near = divergence(far, far + 1e-4 * torch.tensor([1.0, 1.0, -1.0]))[0]
    assert near[0].item() == pytest.approx(5e-9, rel=0.05)  # the variance of the changes over 2, which plain sums in float32 lose
    with pytest.raises(Problem, match="vocabularies of 17 and 16 tokens cannot be compared"):
        divergence(one, two[:, 1:])


def logits(model, batch):
    return model(**batch).logits[batch["attention_mask"].bool()]


@pytest.mark.parametrize("delta", [Lora(rank=3), Lora(rank=3, dora=True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_targets_are_what_merged_models_say(tiny, batch, delta: Delta, dtype):
    model = prepare(tiny(), None, delta, Default(), NF4(), seed=0)
    optimizer = torch.optim.SGD(trainable_parameters(model).values(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
    model.eval()
    before = dict(model.state_dict())
    found = apart(model, [batch, batch], logits, merge_targets(model, tiny(), dtype))
    assert model.state_dict().keys() == before.keys()
    assert not any("forward" in vars(one) for one in model.modules())

    whole = merge(copy.deepcopy(model))
    names = list(dict(nf4.layers(model)))
    wanted = {name: copy.deepcopy(whole) for name in found}
    for name in names:
        weight, own = whole.get_submodule(name).weight.data, dict(nf4.layers(model))[name].packed.floats()
        wanted["merged_dequantised"].get_submodule(name).weight.data = weight.to(dtype).float()
        wanted["merged_float"].get_submodule(name).weight.data = (tiny().get_submodule(name).weight.data + weight - own).to(dtype).float()
        wanted["requantised"].get_submodule(name).weight.data = nf4.nearest(weight)
    with torch.no_grad():
        for name, other in wanted.items():
            kl, gap = divergence(logits(model, batch), logits(other.eval(), batch))
            assert found[name].mean == pytest.approx(kl.double().mean().item(), rel=1e-3, abs=1e-10)
            assert found[name].gap == pytest.approx(gap.max().item(), rel=1e-3, abs=1e-5)
            assert found[name].tokens == 2 * len(kl)
    exact, mistaken, again = (found[name].mean for name in ("merged_dequantised", "merged_float", "requantised"))
    assert exact < (1e-9 if dtype == torch.float32 else 1e-3) < mistaken
    assert again > exact
