"""The range test: what it finds where that is known, and that it leaves no trace."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from temper.parts import Problem
from temper.train.optimizers import SAM, SGD, AdamW, Muon
from temper.train.range_test import RangeTest, range_test, set_rate


class Valley(torch.nn.Module):
    """L = curve w^2 / 2 in four weights, with a buffer that counts the passes and dropout that draws."""

    def __init__(self, curve: float = 1.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((2, 2), 3.0))
        self.fixed = torch.nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))
        self.dropout = torch.nn.Dropout(0.5)
        self.curve = curve

    def forward(self) -> torch.Tensor:
        self.passes += 1
        self.dropout(self.weight)
        return self.curve * self.weight.square().sum() / 2


def closures(model, losses=None):
    """What the loop gives: `(optimizer, update) -> closure`."""

    def make(optimizer, update):
        def closure():
            optimizer.zero_grad()
            loss = model()
            if torch.is_grad_enabled():
                loss.backward()
            if not math.isfinite(loss.item()):
                raise FloatingPointError("not finite")
            if losses is not None:
                losses.append((update, loss.item()))
            return loss.detach()

        return closure

    return make


def probe(model, **settings) -> RangeTest:
    return range_test(model, lambda: SGD(momentum=0.0).build([model.weight]), closures(model), **settings)


@pytest.mark.parametrize("steps", ["exponential", "linear"])
def test_rates_rise_and_losses_are_those_of_gradient_descent(steps):
    model, w = Valley(curve=1.0), 3.0
    found = probe(model, low=0.01, high=0.5, updates=20, steps=steps)
    for index, (rate, loss) in enumerate(zip(found.rates, found.losses, strict=True)):
        share = index / 19
        assert rate == pytest.approx(0.01 * 50**share if steps == "exponential" else 0.01 + 0.49 * share, rel=1e-12)
        assert loss == pytest.approx(2 * w * w, rel=1e-5)
        w -= rate * w
    assert len(found.losses) == 20


def test_the_smoothed_loss_is_a_mean_over_neighbours_and_a_tenth_of_its_lowest_rate_is_suggested():
    found = probe(Valley(), low=1e-3, high=10.0, updates=60)
    for index, one in enumerate(found.smoothed):
        near = [loss for place, loss in enumerate(found.losses) if abs(place - index) <= 3]
        assert one == pytest.approx(sum(near) / len(near), rel=1e-9)
    led = found.rates[found.smoothed.index(min(found.smoothed)) - 1]
    assert found.suggested == pytest.approx(led / 10)
    assert f"up to a rate of {led:.2g}, of which a tenth is taken" in found.reason


@pytest.mark.parametrize("curve", [0.1, 1.0, 10.0])
def test_it_finds_the_rate_up_to_which_descent_is_stable(curve):
    """Down a parabola of this curve the loss falls for rates below 2 / curve and rises above."""
    found = probe(Valley(curve), low=1e-4 / curve, high=100.0 / curve, updates=120)
    assert 1.0 <= 10 * found.suggested * curve <= 2.5
    assert found.rates[-1] < 100.0 / curve, "it stops where the loss has risen far"


def test_a_loss_that_is_not_finite_ends_it():
    found = probe(Valley(), low=0.01, high=1e30, updates=25)
    assert len(found.losses) < 25
    assert all(map(math.isfinite, found.losses))


def test_a_range_that_is_too_low_says_so():
    found = probe(Valley(), low=1e-4, high=1e-2, updates=30)
    assert found.suggested == pytest.approx(found.rates[-2] / 10)
    assert found.reason.endswith("a range that goes higher may find more")


@pytest.mark.parametrize("part", [SGD(), AdamW(), SAM(), Muon()])
@pytest.mark.parametrize("training", [True, False])
def test_it_leaves_everything_as_it_was(part, training):
    model = Valley().train(training)
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    modes = []
    model.register_forward_pre_hook(lambda module, given: modes.append(module.training))
    range_test(model, lambda: part.build([model.weight]), closures(model), low=1e-4, high=1.0, updates=20)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.training is training
    assert all(modes)
    assert model.weight.grad is None
    assert torch.equal(torch.get_rng_state(), random)


def test_it_leaves_everything_as_it_was_where_it_fails():
    model = Valley()

    def make(optimizer, update):
        if update == 3:
            raise KeyError("an error of the data")
        return closures(model)(optimizer, update)

    with pytest.raises(KeyError):
        range_test(model, lambda: SGD().build([model.weight]), make, updates=10)
    assert torch.equal(model.weight, torch.full((2, 2), 3.0))
    assert model.passes == 0


class Live:
    """Started slots that learn and count."""

    def __init__(self) -> None:
        self.head, self.count = torch.nn.Parameter(torch.ones(2)), torch.zeros(1)

    def parameters(self):
        return [self.head]

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"].clone()


def test_it_leaves_slots_as_they_were():
    model, live = Valley(), Live()

    def make(optimizer, update):
        def closure():
            optimizer.zero_grad()
            loss = model() + live.head.square().sum()
            live.count += 1
            loss.backward()
            return loss

        return closure

    range_test(model, lambda: SGD().build([model.weight, live.head]), make, low=1e-3, high=0.5, updates=10, live=live)  # type: ignore[arg-type]
    assert torch.equal(live.head, torch.ones(2))
    assert live.count == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"updates": 1}, "a range of 1 updates"),
        ({"low": 1.0, "high": 0.1}, "a range of 100 updates from 1 to 0.1"),
        ({"low": 0.0}, "a rate above 0"),
        ({"low": 3.0, "high": 9.0}, "the loss was lowest before any change"),
    ],
)
def test_a_range_that_leads_nowhere_is_refused(settings, words):
    with pytest.raises(Problem, match=words):
        probe(Valley(), **settings)


def test_a_model_whose_loss_is_not_finite_is_refused():
    model = Valley()
    with torch.no_grad():
        model.weight.fill_(math.inf)
    with pytest.raises(Problem, match="the loss was not finite before the first probing update"):
        probe(model)
    assert torch.isinf(model.weight).all()


def test_a_rate_is_given_to_all_groups_in_proportion():
    one, two = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [one], "lr": 0.1}, {"params": [two], "lr": 0.4}])
    set_rate(optimizer, 0.03)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.03, 0.12])
