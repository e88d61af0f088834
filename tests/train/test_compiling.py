"""Compiled training equals eager training within rounding, leaves the model as it was, and is chosen only where it pays."""

from __future__ import annotations

import pytest
import torch

from temper.train import compiling
from temper.train.batching import Padded
from temper.train.objectives import Causal


def gradients(model, batches):
    losses = [Causal()(model, batch).total for batch in batches]
    return [one for loss in losses for one in (loss.detach(), *torch.autograd.grad(loss, list(model.parameters())))]


def test_compiled_equals_eager_and_leaves_no_trace(llama, examples, stream):
    model = llama()
    plan = Padded(size=4)(examples(completion=True), stream)
    batches = [*plan.update(0), *plan.update(1)]  # of other shapes
    eager, names = gradients(model, batches), [name for name, _ in model.named_modules()]
    with compiling.compiled(model):
        assert all(block._compiled_call_impl is not None for block in model.model.layers)
        found = gradients(model, batches)
    for one, two in zip(eager, found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    assert all(block._compiled_call_impl is None for block in model.model.layers)
    assert [name for name, _ in model.named_modules()] == names
    torch.testing.assert_close(gradients(model, batches), eager, rtol=0, atol=0)


@pytest.fixture
def timed(monkeypatch, llama, examples, stream):
    """`choose` with given seconds for an update, eager and compiled, and nothing really compiled."""

    def go(eager, fast, updates, fails=False):
        times = iter([eager, fast])
        monkeypatch.setattr(compiling, "seconds", lambda *_: next(times))

        def compiled_pass(*_):
            if fails:
                raise RuntimeError("no compiler\nat all")

        monkeypatch.setattr(compiling, "passes", compiled_pass)
        monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: None)
        batches = Padded(size=4)(examples(), stream).update(0)
        return compiling.choose(llama(), Causal(), batches, updates, "float32")

    return go


def test_it_is_chosen_where_it_pays_within_the_run(timed):
    assert timed(1.0, 0.5, 99) == (False, "99 updates are too few to pay for compiling")
    assert timed(0.1, 0.05, 1000) == (False, "the run takes about 100 s, too short to pay for compiling, which takes some 30 s")
    chosen, why = timed(1.0, 0.5, 1000)
    assert chosen
    assert why.startswith("compiled, an update takes 2.00 times less")
    assert not timed(1.0, 0.95, 1000)[0]
    assert timed(1.0, 0.5, 1000, fails=True) == (False, "compiling failed: RuntimeError: no compiler")
