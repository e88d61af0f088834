"""Schedules against numbers worked out by hand, and against transformers and torch at every step."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_cosine_with_min_lr_schedule_with_warmup, get_linear_schedule_with_warmup

from temper.context import Context
from temper.parts import LiveSlot, Problem
from temper.train.optimizers import SGD, Adafactor, AdamW, Lion, Muon, SGDSaI
from temper.train.schedules import Constant, Cosine, Linear, OneCycle, Rewarm, Schedule, WarmupStableDecay, set_rates


@pytest.mark.parametrize(
    ("schedule", "points"),
    [
        (Constant(), {0.0: 1.0, 0.5: 1.0, 1.0: 1.0}),
        (Constant(warmup=0.2), {0.0: 0.0, 0.05: 0.25, 0.2: 1.0, 0.9: 1.0}),
        (Linear(warmup=0.0), {0.0: 1.0, 0.25: 0.75, 1.0: 0.0}),
        (Linear(warmup=0.2, floor=0.1), {0.1: 0.5, 0.2: 1.0, 0.6: 0.55, 1.0: 0.1}),
        (Cosine(warmup=0.0), {0.0: 1.0, 1 / 3: 0.75, 0.5: 0.5, 1.0: 0.0}),
        (Cosine(warmup=0.5, floor=0.2), {0.25: 0.5, 0.75: 0.6, 1.0: 0.2}),
        (WarmupStableDecay(warmup=0.1, decay=0.4, floor=0.0), {0.05: 0.5, 0.1: 1.0, 0.6: 1.0, 0.8: 0.5, 1.0: 0.0}),
        (WarmupStableDecay(warmup=0.0, decay=0.5, floor=0.5), {0.25: 1.0, 0.75: 0.75, 1.0: 0.5}),
        (WarmupStableDecay(warmup=0.0, decay=0.0), {0.0: 1.0, 1.0: 1.0}),
        (Cosine(warmup=1.0), {0.5: 0.5, 1.0: 1.0}),
        (Rewarm(peak=2.0, warmup=0.2, begin=0.5, floor=0.1), {0.0: 0.5, 0.1: 1.25, 0.2: 2.0, 0.6: 1.05, 1.0: 0.1}),
        (Rewarm(warmup=0.0, floor=0.0), {0.0: 1.0, 0.5: 0.5, 1.0: 0.0}),
        (Rewarm(warmup=1.0), {0.5: 0.5, 1.0: 1.0}),
        (OneCycle(rise=0.4, low=0.2, floor=0.01), {0.0: 0.2, 0.2: 0.6, 0.4: 1.0, 0.6: 0.6, 0.8: 0.2, 0.9: 0.105, 1.0: 0.01}),
        (OneCycle(rise=0.5, low=0.0), {0.25: 0.5, 0.5: 1.0, 0.75: 0.5, 1.0: 0.0}),
    ],
)
def test_closed_forms(schedule, points):
    for progress, multiplier in points.items():
        assert schedule(progress) == pytest.approx(multiplier, abs=1e-12)


@pytest.mark.parametrize("cls", [Constant, Linear, Cosine, WarmupStableDecay, Rewarm])
def test_warm_up_meets_the_rest_without_a_jump(cls):
    schedule = cls(warmup=0.3)
    assert math.isclose(schedule(0.3 - 1e-9), schedule(0.3 + 1e-9), abs_tol=1e-6)


def test_warm_up_and_decay_fit_in_one_run():
    with pytest.raises(ValueError, match="at most 1"):
        WarmupStableDecay(warmup=0.7, decay=0.7)


# ---------------------------------------------------------------------------------------------- against the peers

UPDATES = 60


def rates(make) -> list[float]:
    """The rates of a peer's scheduler at every step, over a rate of 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, found = make(optimizer), []
    for _ in range(UPDATES):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(
    ("schedule", "make"),
    [
        (Rewarm(warmup=0.2, floor=0.0), lambda one: get_cosine_schedule_with_warmup(one, 12, UPDATES)),
        (Rewarm(warmup=0.1, floor=0.1), lambda one: get_cosine_with_min_lr_schedule_with_warmup(one, 6, UPDATES, min_lr_rate=0.1)),
        (Cosine(warmup=0.2), lambda one: get_cosine_schedule_with_warmup(one, 12, UPDATES)),
        (Linear(warmup=0.2), lambda one: get_linear_schedule_with_warmup(one, 12, UPDATES)),
    ],
)
def test_transformers_asks_at_step_over_steps(schedule, make):
    """Its first update under warm-up has rate 0; ours are the same curve half an update later."""
    wanted = rates(make)
    assert [schedule(step / UPDATES) for step in range(UPDATES)] == pytest.approx(wanted, abs=1e-12)
    between = [(one + two) / 2 for one, two in itertools.pairwise(wanted)]
    assert [schedule((step + 0.5) / UPDATES) for step in range(UPDATES - 1)] == pytest.approx(between, abs=2e-3)


@pytest.mark.parametrize("share", [0.3, 0.45])
@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW])
def test_torchs_one_cycle_asks_at_step_over_steps_less_one(share, cls):
    """Its phases end at share steps - 1, 2 share steps - 2 and steps - 1, so its share is ours but for that one step."""
    settings = {"momentum": 0.5} if cls is torch.optim.SGD else {}
    optimizer = cls([torch.nn.Parameter(torch.zeros(1))], lr=1.0, **settings)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.7, total_steps=UPDATES, pct_start=share, anneal_strategy="linear", three_phase=True,
        div_factor=20.0, final_div_factor=500.0, base_momentum=0.8, max_momentum=0.93,
    )  # fmt: skip
    schedule = OneCycle(rise=(share * UPDATES - 1) / (UPDATES - 1), low=0.05, floor=0.05 / 500, momenta=(0.93, 0.8))
    ours = cls([torch.nn.Parameter(torch.zeros(1))], lr=0.7, **settings)
    for step in range(UPDATES):
        set_rates(ours, schedule, step / (UPDATES - 1))
        one, two = ours.param_groups[0], optimizer.param_groups[0]
        assert one["lr"] == pytest.approx(two["lr"], rel=1e-12, abs=1e-15)
        names = ("momentum",) if cls is torch.optim.SGD else ("betas",)
        for name in names:
            assert one[name] == pytest.approx(two[name], rel=1e-12)
        optimizer.step()
        if step < UPDATES - 1:
            scheduler.step()


# -------------------------------------------------------------------------------------------- what an optimizer gets


def held() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(3, 4)), torch.nn.Parameter(torch.ones(4))]


def test_every_group_gets_its_own_rate_times_the_multiplier():
    optimizer = torch.optim.SGD([{"params": [one], "lr": rate} for one, rate in zip(held(), (0.2, 0.5))])
    for progress, multiplier in ((0.5, 0.5), (0.25, 0.75), (1.0, 0.0)):
        set_rates(optimizer, Linear(warmup=0.0), progress)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.2 * multiplier, 0.5 * multiplier])


@pytest.mark.parametrize("part", [AdamW(), Lion(), SGD(), SGD(momentum=0.0), SGDSaI(), Muon()])
def test_a_schedule_moves_the_momentum(part, tmp_path):
    optimizer = part.build(held())
    before = [dict(group) for group in optimizer.param_groups]
    live = LiveSlot("schedule", OneCycle(rise=0.4, momenta=(0.95, 0.85)), Schedule.__slot__, Context.scratch(tmp_path))
    set_rates(optimizer, live, 0.2)
    for group, old in zip(optimizer.param_groups, before):
        assert group["lr"] == pytest.approx(0.55 * old["lr"])
        moved = group["betas"][0] if "betas" in group else group["momentum"]
        assert moved == pytest.approx(0.9)
        assert group.get("betas", (0, 0))[1:] == old.get("betas", (0, 0))[1:]


def test_a_schedule_without_momentum_leaves_it():
    optimizer = AdamW(betas=(0.7, 0.9)).build(held())
    for schedule in (Cosine(), OneCycle(momenta=None), lambda progress: 1.0):
        set_rates(optimizer, schedule, 0.5)
        assert all(group["betas"] == (0.7, 0.9) for group in optimizer.param_groups)


def test_a_momentum_that_an_optimizer_has_not_is_refused():
    optimizer = Adafactor().build(held())
    set_rates(optimizer, OneCycle(momenta=None), 0.5)
    with pytest.raises(Problem, match="the optimizer has none; give the schedule `momenta: none`"):
        set_rates(optimizer, OneCycle(), 0.5)
