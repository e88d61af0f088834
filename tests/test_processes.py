"""A recipe under a launcher: several processes run it, one speaks and writes, and what comes out is what one process makes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import safetensors.torch
import torch

from temper.store import Store
from temper.world import World

RECIPE = """
name: small
model: new
data: rows.jsonl
export: all
steps:
  - pretrain:
      name: base
      tokenizer: {byte-bpe: {vocabulary: 300}}
      shape: {llama: {hidden: 32, layers: 2, heads: 2, feed_forward: 64}}
      batching: {packed: {length: 32, size: 4}}
      updates: 6
      evaluate_every: 3
      keep_best: true
      precision: float32
  - tune:
      model: base@best
      updates: 4
      batching: {bucketed: {size: 4}}
      delta: {lora: {rank: 2}}
      precision: float32
      distribute: DISTRIBUTE
  - evaluate: {model: [base, tune], method: language, resample: {bootstrap: {samples: 100}}}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    rows = [{"prompt": f"sort {i} {i % 7} =", "completion": f" {i % 7} {i}"} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def launched(folder, launcher, *words):
    command = [sys.executable, "-m", *launcher, "-m", "temper", *words]
    done = subprocess.run(command, cwd=folder, env=os.environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1")


@pytest.mark.parametrize(
    ("launcher", "distribute"), [(TORCHRUN, "replicate"), (ACCELERATE, "shard")], ids=["torchrun replicate", "accelerate shard"]
)
def test_a_recipe_runs_on_two_processes_as_on_one(folder, launcher, distribute):
    (folder / "two.yaml").write_text(RECIPE.replace("DISTRIBUTE", distribute))
    (folder / "one.yaml").write_text(RECIPE.replace("DISTRIBUTE", "replicate"))
    words = ["--store", "store", "--json"]
    two = json.loads(launched(folder, launcher, "run", "two.yaml", "--out", "two", *words))  # one document: one process spoke
    one = subprocess.run(
        [sys.executable, "-m", "temper", "run", "one.yaml", "--out", "one", "--store", "other", "--json"],
        cwd=folder, capture_output=True, text=True, check=True,
    )  # fmt: skip
    alone = json.loads(one.stdout)
    assert [step["status"] for step in two["steps"]] == ["made"] * 3
    for mine, its in zip(two["steps"], alone["steps"], strict=True):
        for name, figure in its["figures"].items():
            if figure["unit"] in ("s", "FLOP", "bytes"):  # the clock's, and what is not counted of shards
                continue
            assert mine["figures"][name]["value"] == pytest.approx(figure["value"], rel=1e-3)
    for name in ("base/model.safetensors", "tune/adapter_model.safetensors"):
        mine, its = (safetensors.torch.load_file(folder / out / name) for out in ("two", "one"))
        assert mine.keys() == its.keys()
        for key in mine:
            torch.testing.assert_close(mine[key], its[key], rtol=1e-3, atol=1e-5)
    assert set(Store(folder / "store").verify().values()) == {"whole"}
    assert not [path for path in (folder / "store" / "work").glob("*") if path.is_dir()]


def test_alone_a_world_is_the_identity():
    world = World()
    assert world.main
    assert world.group is None
    assert world.tell({"a": 1}) == {"a": 1}
    assert world.agree(True, False) == (True, False)
    tensor = torch.ones(2)
    assert world.sum(tensor) is tensor
    with world.main_first():
        world.wait()
