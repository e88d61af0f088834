"""Trackers get every row of a curve, without a seam after a resume, and never stop a run."""

from __future__ import annotations

import time

import pytest
from accelerate import tracking as peers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from temper import tracking
from temper.context import Context
from temper.parts import Problem
from temper.recipe import read


def follow(context: Context, folder, names, rows):
    with tracking.following(context, names, folder, "project"):
        for step, loss in rows:
            context.log(step, loss=loss, lr=0.1)


def scalars(folder, step, name):
    found = EventAccumulator(str(folder / "tensorboard" / step))
    found.Reload()
    return [(one.step, pytest.approx(one.value)) for one in found.Scalars(name)]


def test_the_names_are_those_of_accelerate():
    assert set(tracking.NAMES) == set(peers.LOGGER_TYPE_TO_CLASS)


def test_a_curve_goes_to_tensorboard_and_a_resumed_one_has_no_seam(tmp_path):
    context = Context.scratch(tmp_path, step="tune")
    follow(context, tmp_path, ["tensorboard"], [(1, 4.0), (2, 3.0), (3, 2.5)])
    assert scalars(tmp_path, "tune", "loss") == [(1, 4.0), (2, 3.0), (3, 2.5)]
    time.sleep(1.1)  # event files are told apart by the second
    follow(context, tmp_path, ["tensorboard"], [(3, 2.4), (4, 2.0)])
    assert scalars(tmp_path, "tune", "loss") == [(1, 4.0), (2, 3.0), (3, 2.4), (4, 2.0)]
    assert [row["loss"] for row in context.curve()] == [4.0, 3.0, 2.5, 2.4, 2.0]


def test_a_step_without_a_curve_leaves_no_files(tmp_path):
    follow(Context.scratch(tmp_path), tmp_path / "runs", ["tensorboard"], [])
    assert not (tmp_path / "runs").exists()


def test_a_tracker_that_fails_is_noted_and_the_run_goes_on(tmp_path, monkeypatch):
    class Broken(peers.TensorBoardTracker):
        def log(self, values, step=None, **kwargs):
            raise ConnectionError("no route")

    monkeypatch.setitem(peers.LOGGER_TYPE_TO_CLASS, "tensorboard", Broken)
    context = Context.scratch(tmp_path)
    follow(context, tmp_path, ["tensorboard"], [(1, 4.0), (2, 3.0)])
    assert context.notes == ["the tracker `tensorboard` failed and was left out: ConnectionError: no route"]
    assert len(context.curve()) == 2


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("wandbb", "t.yaml:4:8: `track`: no tracker `wandbb`; did you mean `wandb`?"),
        ("[tensorboard, neptune]", "no tracker `neptune`"),
        ("7", "7: `track` is none or some of tensorboard, wandb"),
    ],
)
def test_a_recipe_names_trackers_that_exist(value, message, tmp_path):
    with pytest.raises(Problem) as caught:
        read(f"name: t\nmodel: new\ndata: house:library\ntrack: {value}\nsteps: [pretrain]\n", "t.yaml", tmp_path)
    assert message in str(caught.value.all[0])


def test_none_is_no_tracker_and_a_missing_package_is_named(tmp_path):
    plan = read("name: t\nmodel: new\ndata: house:library\ntrack: none\nsteps: [pretrain]\n", "t.yaml", tmp_path)
    assert plan.track == ()
    with pytest.raises(Problem, match="the tracker `comet_ml` needs its package; `pip install comet-ml`"):
        tracking.check(["tensorboard", "comet_ml"])
