"""The check before a run: what it predicts, and what it warns of. What it refuses is in test_bad_recipes."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from temper import preflight
from temper.parts import Problem
from temper.recipe import read
from temper.run import run
from temper.store import Store

RECIPE = """
model: tiny
data: rows.jsonl
steps:
  - tune: {updates: 2, batching: {bucketed: {size: 4}}}
  - align: {method: checked-dpo, base: merged, delta: full}
  - quantize: {grid: {integer: {group: 16}}}
  - tune: {name: again, updates: 2, batching: {bucketed: {size: 4}}}
"""


@pytest.fixture
def folder(tmp_path: Path, tiny: Path) -> Path:
    (tmp_path / "tiny").symlink_to(tiny)
    rows = [{"prompt": f"sort {i} =", "completion": f" {i}"} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_a_chain_is_followed_through_its_passports(folder):
    found = preflight.check(read(RECIPE, "r.yaml", folder), Store(folder / "store"))
    assert [one.gives for one in found.steps] == ["adapter float32", "model float32", "model int4-g16-sym", "adapter int4-g16-sym"]
    assert all(one.state == "will run" and one.memory and one.memory > 0 for one in found.steps)
    assert found.warnings == []


def test_what_is_predicted_is_what_comes(folder):
    text = RECIPE.replace("  - align: {method: checked-dpo, base: merged, delta: full}\n", "")
    plan, store = read(text, "r.yaml", folder), Store(folder / "store")
    predicted = [one.gives for one in preflight.check(plan, store).steps]
    made = run(plan, store).made.values()
    assert [f"{one.artefact.passport.kind} {one.artefact.passport.numbers}" for one in made] == predicted
    assert {one.state for one in preflight.check(plan, store).steps} == {"from the store"}


def test_a_disk_too_small_is_refused(folder, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10, 10))
    with pytest.raises(Problem, match=r"the results take about .* GB and 0\.0 GB are free at the store; free some, or give --store"):
        preflight.check(read(RECIPE, "r.yaml", folder), Store(folder / "store"))


def test_memory_too_small_is_a_warning(folder, monkeypatch):
    monkeypatch.setattr(preflight, "_memory", lambda: 1000)
    found = preflight.check(read(RECIPE, "r.yaml", folder), Store(folder / "store"))
    assert len(found.warnings) == 4
    assert found.warnings[0].startswith("tune: about ")
    assert found.warnings[0].endswith("make its micro-batches smaller")
