"""Several processes train as one does: the same losses, the same weights, and checkpoints that any number of them goes on from."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy
import pytest
import sharing
import torch

from temper.context import Stream
from temper.train.batching import Bucketed, Packed, Padded
from temper.train.distribution import deal, spread
from temper.train.examples import Example
from temper.world import World

KINDS = ("replicate", "shard")


def launch(processes: int, *words: str, **environment: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *words]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


def same(one: dict, two: dict) -> None:
    for name in ("loss", "norm", "weights"):
        assert one[name] == pytest.approx(two[name], rel=1e-6, abs=1e-8)
    assert one["tokens"] == two["tokens"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """plan -> what one process makes of six updates."""
    return {plan: sharing.run(tmp_path_factory.mktemp("alone"), "replicate", plan, 6) for plan in sharing.PLANS}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Two processes, in one start: every plan under both kinds; runs that stop in their fifth update; and runs that one process began."""
    folder = tmp_path_factory.mktemp("shared")
    whole = [f"{kind}:{plan}:6:" for kind in KINDS for plan in sharing.PLANS]
    stopped = [f"{kind}:bucketed:6:5" for kind in KINDS]
    begun = [f"{kind}:padded:7:" for kind in KINDS]
    for kind in KINDS:
        sharing.run(folder / f"{kind}-padded-7-", "replicate", "padded", 7, stop=5)
    launch(2, sharing.__file__, str(folder), *whole, *stopped, *begun)
    return folder, json.loads((folder / "made.json").read_text())


@pytest.mark.parametrize("plan", sharing.PLANS)
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_as_one(alone, shared, kind, plan):
    made = shared[1][f"{kind}:{plan}:6:"]
    same(made, alone[plan])
    assert made["kept"][0] == pytest.approx(alone[plan]["kept"][0])


@pytest.mark.parametrize("kind", KINDS)
def test_one_process_goes_on_from_what_two_wrote(alone, shared, kind):
    made = sharing.run(shared[0] / f"{kind}-bucketed-6-5", "replicate", "bucketed", 6)
    assert made["resumed"] == 4
    same(made, alone["bucketed"])


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_go_on_from_what_one_wrote(shared, kind, tmp_path):
    made = shared[1][f"{kind}:padded:7:"]
    assert made["resumed"] == 4
    same(made, sharing.run(tmp_path, "replicate", "padded", 7))


# ------------------------------------------------------------------------------------------------- dealing an update


def examples(count: int = 24, sides: bool = False) -> list[Example]:
    draw = numpy.random.default_rng(1)
    made = []
    for index in range(count):
        length = int(draw.integers(3, 40))
        side = ("chosen", "rejected")[index % 2] if sides else None
        made.append(Example(draw.integers(1, 64, length).astype(numpy.int32), numpy.ones(length, bool), index // (1 + sides), side))
    return made


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("part", [Padded(size=8), Padded(size=3, accumulate=3), Bucketed(size=12, tokens=90), Packed(length=16, size=4)])
def test_every_row_of_an_update_is_dealt_once_and_everyone_has_as_many_pieces(part, size):
    batches = part(examples(), Stream("x")).update(0)
    hands = [deal(batches, rank, size) for rank in range(size)]
    assert len({len(hand) for hand in hands}) == 1
    pieces = [piece for hand in hands for piece in hand if piece.counts]
    assert sorted(key for piece in pieces for key in piece.batch.keys) == sorted(key for batch in batches for key in batch.keys)
    assert len({piece.number for piece in pieces}) == len(pieces)
    for name in ("targets", "tokens"):
        assert sum(getattr(piece.batch, name) for piece in pieces) == sum(getattr(batch, name) for batch in batches)
    for piece in pieces:
        assert piece.batch.targets == int(piece.batch.supervised.sum())
        assert len(piece.batch.keys) == len(piece.batch.input_ids)


def test_the_two_of_a_preference_are_dealt_together():
    batches = Padded(size=5)(examples(sides=True), Stream("x")).update(0)
    for rank in range(3):
        for piece in deal(batches, rank, 3):
            rows = piece.batch.rows
            assert rows[0::2] == rows[1::2]


def test_hands_cost_about_the_same():
    draw = numpy.random.default_rng(2)
    lengths = numpy.minimum(512, draw.lognormal(4.5, 0.8, 256).astype(int) + 8)
    rows = [Example(numpy.ones(n, numpy.int32), numpy.ones(n, bool), i) for i, n in enumerate(lengths)]
    batches = Bucketed(size=256, tokens=2048)(rows, Stream("x")).update(0)
    cost = [sum(piece.batch.input_ids.numel() for piece in deal(batches, rank, 4)) for rank in range(4)]
    assert max(cost) < 1.15 * min(cost)


def test_one_process_cannot_shard():
    with pytest.raises(ValueError, match="one process has nobody to share a model with; start several with `torchrun`"):
        spread(torch.nn.Linear(2, 2), World(), "shard", "cpu")
