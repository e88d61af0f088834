"""A run that was interrupted gives the weights of one that was not, bit for bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from temper.context import Context, Stream
from temper.train import loop
from temper.train.batching import Bucketed, Packed, Padded
from temper.train.examples import Example
from temper.train.loop import train, trainable
from temper.train.objectives import Causal
from temper.train.optimizers import SGD, AdamW
from temper.train.schedules import Cosine

UPDATES = 9
PLANS = {
    "padded": Padded(size=2, accumulate=2),
    "bucketed": Bucketed(size=4, tokens=30),
    "packed": Packed(length=16, size=2, accumulate=2),
    "separate": Packed(length=16, size=2, accumulate=2, documents="separate"),
}  # 4 updates an epoch each, on the data below


class Stop(Exception):
    pass


def data():
    draw = numpy.random.default_rng(0)
    lengths = draw.integers(3, 25, 16)
    return [Example(draw.integers(1, 64, n).astype(numpy.int32), numpy.ones(n, bool), i) for i, n in enumerate(lengths)]


ADAMW = AdamW(lr=0.01)


def run(work: Path, part, optimizer=ADAMW, stop_at=None, updates=UPDATES, width=32, **settings):
    """One session with a model and an optimizer of its own; `stop_at`: raises during the evaluation after that update."""
    torch.seed()  # whatever the process drew before must not matter
    context = Context.scratch(work, seed=3)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=width, num_hidden_layers=2, num_attention_heads=2, attention_dropout=0.2
    )
    model = LlamaForCausalLM(config)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for one in model.parameters():
            one.copy_(torch.randn(one.shape, generator=draw) * 0.2 + (one.ndim == 1))

    def evaluate(_):
        step = context.curve()[-1]["step"]
        if step == stop_at:
            raise Stop
        return {"held_out": float(step)}

    built = optimizer.build(trainable(model))
    plan = part(data(), Stream("batching"))
    assert plan.updates_per_epoch == 4
    history = train(
        model,
        plan,
        Causal(),
        optimizer=built,
        schedule=Cosine(warmup=0.2),
        updates=updates,
        context=context,
        evaluate=evaluate,
        evaluate_every=1,
        **{"checkpoint_every": 1, **settings},
    )
    return model, built, history, context


def assert_same_run(one, two):
    (model, optimizer, history, _), (other, built, again, _) = one, two
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(optimizer.state.values(), built.state.values(), strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
    timeless = [[{key: value for key, value in row.items() if key != "seconds"} for row in each.rows] for each in (history, again)]
    assert timeless[0] == timeless[1]
    assert (history.updates, history.tokens) == (again.updates, again.tokens)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Runs that nothing interrupted, each made once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = run(tmp_path_factory.mktemp(name), PLANS[name])
        return made[name]

    return get


@pytest.mark.parametrize("stop_at", [3, 5], ids=["inside an epoch", "on its edge"])
@pytest.mark.parametrize("name", PLANS)
def test_an_interrupted_run_ends_as_an_unbroken_one(tmp_path, unbroken, name, stop_at):
    with pytest.raises(Stop):
        run(tmp_path, PLANS[name], stop_at=stop_at)
    resumed = run(tmp_path, PLANS[name])
    assert resumed[2].resumed == stop_at - 1
    assert_same_run(resumed, unbroken(name))


def test_dropout_was_at_work(tmp_path, unbroken, monkeypatch):
    monkeypatch.setattr(loop, "_seed", lambda device, seed: None)
    model, *_ = run(tmp_path, PLANS["padded"])
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), unbroken("padded")[0].parameters()))


def test_updates_since_the_last_checkpoint_are_made_again(tmp_path, unbroken):
    for stop_at in (2, 6, 7):
        with pytest.raises(Stop):
            run(tmp_path, PLANS["padded"], stop_at=stop_at, checkpoint_every=3)
    resumed = run(tmp_path, PLANS["padded"], checkpoint_every=3)
    assert resumed[2].resumed == 6
    assert_same_run(resumed, unbroken("padded"))


def test_checkpoints_by_the_clock(tmp_path):
    with pytest.raises(Stop):
        run(tmp_path, PLANS["padded"], stop_at=4, checkpoint_every=None, checkpoint_seconds=0.0)
    assert sorted(path.name for path in (tmp_path / "work" / "checkpoints").iterdir()) == ["00000002", "00000003"]


def test_sgd_with_momentum_resumes(tmp_path):
    optimizer = SGD(lr=0.05, momentum=0.9)
    whole = run(tmp_path / "whole", PLANS["padded"], optimizer=optimizer)
    with pytest.raises(Stop):
        run(tmp_path / "broken", PLANS["padded"], optimizer=optimizer, stop_at=4)
    assert_same_run(run(tmp_path / "broken", PLANS["padded"], optimizer=optimizer), whole)


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json"])
def test_a_torn_checkpoint_costs_one_checkpoint(tmp_path, unbroken, name):
    with pytest.raises(Stop):
        run(tmp_path, PLANS["packed"], stop_at=6)
    torn = tmp_path / "work" / "checkpoints" / "00000005" / name
    torn.write_bytes(torn.read_bytes()[:-7])
    resumed = run(tmp_path, PLANS["packed"])
    assert resumed[2].resumed == 4
    assert resumed[3].notes == [f"checkpoint 00000005 is damaged ({name} does not match its checksum) and was passed over"]
    assert_same_run(resumed, unbroken("packed"))


def test_a_finished_run_only_comes_back(tmp_path, unbroken):
    run(tmp_path, PLANS["bucketed"])
    again = run(tmp_path, PLANS["bucketed"])
    assert again[2].resumed == UPDATES
    assert_same_run(again, unbroken("bucketed"))


def test_kept_updates_stay_and_are_made_once(tmp_path):
    made = []

    def on_keep(update, folder):
        made.append(update)
        (folder / "note.txt").write_text(str(update))

    with pytest.raises(Stop):
        run(tmp_path, PLANS["padded"], stop_at=6, keep=(2, 5), on_keep=on_keep, checkpoint_every=4)
    run(tmp_path, PLANS["padded"], keep=(2, 5), on_keep=on_keep)
    assert made == [2, 5]
    assert [(tmp_path / "work" / "kept" / str(update) / "note.txt").read_text() for update in (2, 5)] == ["2", "5"]


def test_an_update_beyond_the_run_cannot_be_kept(tmp_path):
    with pytest.raises(ValueError, match="update 10 cannot be kept; the run has updates 1 to 9"):
        run(tmp_path, PLANS["padded"], keep=(3, 10))


@pytest.mark.parametrize("other", [{"updates": 9}, {"updates": 3, "width": 24}])
def test_a_checkpoint_of_another_run_is_refused(tmp_path, other):
    run(tmp_path, PLANS["padded"], updates=3)
    with pytest.raises(ValueError, match=r"checkpoint after update 3 is of another run \(3 updates of 21 tensors; here \d of 21"):
        run(tmp_path, PLANS["padded"], **other)


# ------------------------------------------------------------------------------------------------------------ SIGKILL


def sessions(work: Path, name: str, kills: int = 3) -> None:
    """Runs in a process of its own: starts a session, kills it after some progress, again and again; the last one comes to its end."""
    torch.set_num_threads(1)
    draw, checkpoints = random.Random(7), work / "work" / "checkpoints"
    for kill in range(kills + 1):
        before = newest(checkpoints)
        child = os.fork()
        if child == 0:
            try:
                model, *_ = run(work, PLANS[name])
                numpy.savez(work / "weights.npz", *(one.detach().numpy() for one in model.parameters()))
                os._exit(0)
            finally:
                os._exit(1)
        if kill < kills:
            while newest(checkpoints) <= before:
                time.sleep(0.001)
            time.sleep(draw.uniform(0, 0.02))  # into an update or into the next checkpoint's writing
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        print(newest(checkpoints), os.waitstatus_to_exitcode(status))


def newest(folder: Path) -> int:
    return max((int(path.name) for path in folder.glob("*") if path.name.isdigit()), default=0)


def test_killed_again_and_again(tmp_path, unbroken):
    code = "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import test_resume; "
    code += "test_resume.sessions(Path(sys.argv[2]), 'bucketed')"
    done = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    reached, ends = zip(*(map(int, line.split()) for line in done.stdout.splitlines()), strict=True)
    assert ends == (-signal.SIGKILL, -signal.SIGKILL, -signal.SIGKILL, 0)
    assert 0 < reached[0] < reached[1] < UPDATES  # killed on the way
    with numpy.load(tmp_path / "weights.npz") as held:
        for one, name in zip(unbroken("bucketed")[0].parameters(), held.files, strict=True):
            numpy.testing.assert_array_equal(one.detach().numpy(), held[name])
