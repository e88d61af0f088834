"""Ladder side-tuning by the engine: learnt, left as an adapter, gone on with, interrupted, evaluated, refused."""

from __future__ import annotations

import dataclasses

import pytest

from temper.models import io
from temper.models.deltas.base import Merged
from temper.models.deltas.delta import SideLadder
from temper.models.deltas.init import PrunedCopy
from temper.parts import Problem
from temper.train.batching import BestFit, Bucketed
from temper.train.examples import encode
from temper.train.heldout import heldout
from temper.train.objectives import Causal
from temper.train.optimizers import AdamW
from temper.tune.engine import Tune

LST = Tune(
    delta=SideLadder(shrink=4),
    init=PrunedCopy(score="fisher", samples=8),
    updates=80,
    batching=Bucketed(size=16),
    optimizer=AdamW(lr=2e-2, weight_decay=0.0),
    precision="float32",
)


def test_it_learns_to_copy_and_goes_on(tuned, copies):
    made = tuned("lst", LST)
    first = made.figures["heldout_loss"].value
    assert first < 1.39  # log 4 = 1.39 nats would be guessing
    assert made.passport.kind == "adapter"
    on = tuned("on", dataclasses.replace(LST, updates=20, optimizer=AdamW(lr=5e-3, weight_decay=0.0)), model=made)
    assert on.figures["heldout_loss"].value < first
    assert "SIDE_LADDER) goes on training" in on.name
    with pytest.raises(Problem, match="its shrink is 4, not 8"):
        tuned("other", dataclasses.replace(LST, delta=SideLadder(shrink=8)), model=made)
    with pytest.raises(Problem, match="no change of the model's weights"):
        tuned("merged", dataclasses.replace(LST, base=Merged()), model=made)


def test_packed_documents(tuned):
    spec = dataclasses.replace(LST, batching=BestFit(length=48, size=4), updates=30)
    assert tuned("packed", spec).figures["train_loss"].value < 4


def test_what_is_left_is_what_was_trained(tuned, copies):
    made = tuned("lst", dataclasses.replace(LST, updates=20))
    measure = heldout(encode(copies.load("test"), io.load_tokenizer(made), max_length=64), Causal(), device="cpu", precision="float32")
    assert measure(io.load_model(made))["heldout_loss"] == pytest.approx(made.figures["heldout_loss"].value, rel=1e-5)


def test_an_interruption_changes_nothing(tuned, monkeypatch):
    """Stopped after the checkpoint of update 6 and begun again: the same weights, bit for bit."""
    spec = dataclasses.replace(LST, updates=12, checkpoint_every=6)
    whole = tuned("whole", spec)
    seen, step = [], AdamW.build

    def build(self, parameters):
        made = step(self, parameters)
        plain = made.step

        def failing(*given, **named):
            seen.append(1)
            if len(seen) == 9:
                raise KeyboardInterrupt
            return plain(*given, **named)

        made.step = failing
        return made

    monkeypatch.setattr(AdamW, "build", build)
    with pytest.raises(KeyboardInterrupt):
        tuned("cut", spec)
    cut = tuned("cut", spec)
    assert len(seen) < 9 + 12
    assert (cut.model / "adapter_model.safetensors").read_bytes() == (whole.model / "adapter_model.safetensors").read_bytes()
