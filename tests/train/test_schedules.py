"""Schedules against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

from temper.train.schedules import Constant, Cosine, Linear, WarmupStableDecay


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
    ],
)
def test_closed_forms(schedule, points):
    for progress, multiplier in points.items():
        assert schedule(progress) == pytest.approx(multiplier, abs=1e-12)


@pytest.mark.parametrize("cls", [Constant, Linear, Cosine, WarmupStableDecay])
def test_warm_up_meets_the_rest_without_a_jump(cls):
    schedule = cls(warmup=0.3)
    assert math.isclose(schedule(0.3 - 1e-9), schedule(0.3 + 1e-9), abs_tol=1e-6)


def test_warm_up_and_decay_fit_in_one_run():
    with pytest.raises(ValueError, match="at most 1"):
        WarmupStableDecay(warmup=0.7, decay=0.7)
