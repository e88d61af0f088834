"""The anchor against autograd, and through a checkpoint."""

from __future__ import annotations

import pytest
import torch

from temper.context import Context
from temper.train import checkpoints
from temper.train.anchors import L2


def parameters(dtype=torch.float64) -> list[torch.nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)) for shape in ((3, 4), (5,))]


def move(held, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for one in held:
            one.add_(torch.randn(one.shape, generator=draw, dtype=torch.float64).to(one.dtype))


def test_value_and_gradient_are_those_of_half_the_squared_distance(tmp_path):
    held = parameters()
    start = [one.detach().clone() for one in held]
    anchor = L2(strength=0.3).start(Context.scratch(tmp_path))
    for update in range(10):
        losses = [(one**3).sum() for one in held]
        gradients = torch.autograd.grad(sum(losses), held)
        for one, gradient in zip(held, gradients):
            one.grad = 7 * gradient.clone()  # of a sum over 7 tokens
        value = anchor(held, 7.0)

        term = 0.15 * sum((one - before).square().sum() for one, before in zip(held, start))
        wanted = torch.autograd.grad(term + sum((one**3).sum() for one in held), held)
        torch.testing.assert_close(value, term.detach(), rtol=1e-12, atol=1e-15)
        for one, gradient in zip(held, wanted):
            torch.testing.assert_close(one.grad, 7 * gradient, rtol=1e-12, atol=1e-12)
        assert (value == 0) == (update == 0), "the start is where it was first asked"
        move(held, update)


def test_without_gradients_only_the_value_is_told(tmp_path):
    held = parameters()
    anchor = L2(strength=0.3).start(Context.scratch(tmp_path))
    anchor(held, 1.0)
    move(held, 1)
    for one in held:
        one.grad = torch.zeros_like(one)
    with torch.no_grad():
        value = anchor(held, 1.0)
    assert value > 0
    assert not any(one.grad.any() for one in held)
    assert torch.equal(value, anchor(held, 0.0))


def test_what_has_no_gradient_gets_none(tmp_path):
    held = parameters()
    anchor = L2().start(Context.scratch(tmp_path))
    anchor(held, 1.0)
    move(held[:1], 1)
    held[0].grad = torch.zeros_like(held[0])
    anchor(held, 1.0)
    assert held[0].grad.any()
    assert held[1].grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_start_comes_back_from_a_checkpoint(dtype, tmp_path):
    held = parameters(dtype)
    first = L2().start(Context.scratch(tmp_path))
    first(held, 1.0)
    move(held, 1)
    checkpoints.fill(tmp_path, {"live": first.state_dict()})
    again = L2().start(Context.scratch(tmp_path))
    again.load_state_dict(checkpoints.read(tmp_path)["live"])
    assert torch.equal(again(held, 1.0), first(held, 1.0))
    assert all(one.dtype == dtype for one in again.state_dict()["start"])
