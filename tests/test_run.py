"""Runs: cached, resumable, explained; killed at any moment they lose no more than the work since the last checkpoint."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import temper
from temper.explaining import why
from temper.parts import Problem
from temper.recipe import read
from temper.run import Failed, run
from temper.store import Store

RECIPE = """
name: small
model: new
data: rows.jsonl
export: all
steps:
  - pretrain:
      name: base
      tokenizer: {byte-bpe: {vocabulary: 300}}
      shape: {llama: {hidden: 32, layers: 1, heads: 2, feed_forward: 64}}
      batching: {packed: {length: 32, size: 2}}
      updates: 12
      checkpoint_every: 3
      keep: [6]
      evaluate_every: 6
  - tune: {updates: 10, checkpoint_every: 2, batching: {bucketed: {size: 4}}, delta: {lora: {rank: 2, dropout: 0.1}}}
  - quantize: {name: small, grid: {integer: {group: 16}}}
  - evaluate: {model: [base, base@6, tune, small], method: language, resample: {bootstrap: {samples: 100}}}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [{"prompt": f"sort {i} {i % 7} =", "completion": f" {i % 7} {i}"} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "small.yaml").write_text(RECIPE)
    return tmp_path


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def plan(folder: Path, *sets: str, text: str = RECIPE):
    return read(text, "small.yaml", folder, sets)


def test_a_run_is_answered_from_the_store_the_second_time(folder):
    store = Store(folder / "store")
    first = run(plan(folder), store, out=folder / "out")
    assert {made.status for made in first.made.values()} == {"made"}
    assert set(first.folders) == {"base", "tune", "small"}
    assert first.report is not None
    assert first.report.is_file()
    second = run(plan(folder), store, out=folder / "out")
    assert second.anew == 0
    assert [one.artefact for one in second.made.values()] == [one.artefact for one in first.made.values()]
    assert set(store.verify().values()) == {"whole"}

    figures = first["evaluate"].figures
    assert {name.rpartition(".")[0] for name in figures} == {"base", "base@6", "tune", "small"}
    assert figures["base@6.perplexity"] != figures["base.perplexity"]

    # passports along the chain
    base, tune, small = (first[name].passport for name in ("base", "tune", "small"))
    assert (base.kind, tune.kind, small.kind) == ("model", "adapter", "model")
    assert tune.base == base.base
    assert tune.adapters == (first["tune"].id,) == small.adapters
    assert tune.parents["model"] == first["base"].id
    assert small.numbers == "int4-g16-sym"
    assert base.tokenizer == tune.tokenizer == small.tokenizer

    # one changed setting reruns its step and what follows, and says why
    changed = plan(folder, "tune.delta.lora.rank=4")
    reasons = {one.step: one for one in why(changed, store)}
    assert reasons["base"].state == "from the store"
    assert reasons["tune"].because == ["setting `delta.lora.rank`: 2 -> 4"]
    assert reasons["small"].because == ["its input `tune` is made anew"]
    third = run(changed, store)
    assert [one.status for one in third.made.values()] == ["from the store", "made", "made", "made"]

    # a changed row reruns all; the same rows elsewhere rerun nothing
    moved = folder / "moved"
    moved.mkdir()
    (moved / "rows.jsonl").write_bytes((folder / "rows.jsonl").read_bytes())
    assert {one.state for one in why(plan(moved), store)} == {"from the store"}
    with (moved / "rows.jsonl").open("a") as file:
        file.write('{"prompt": "x", "completion": " y"}\n')
    assert [one.because for one in why(plan(moved), store, "base")] == [["input: `data.data` changed"]]

    # a damaged artefact is set aside and made again, bit for bit
    before = first["tune"].content
    weights = first["tune"].model / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    said: list[str] = []
    fourth = run(plan(folder), store, say=said.append)
    assert fourth.made["tune"].status == "made"
    assert fourth["tune"].content == before
    assert any("does not match its checksum" in text for text in said)


def test_other_seeds_give_other_models_and_the_same_seed_the_same(folder):
    short = RECIPE.split("  - tune")[0]
    contents = [
        run(plan(folder, f"seed={seed}", text=short), Store(folder / name))["base"].content for seed, name in ((0, "a"), (0, "b"), (1, "c"))
    ]
    assert contents[0] == contents[1] != contents[2]


def test_a_failed_step_says_so_and_goes_on_later(folder, monkeypatch):
    from temper.tune import engine

    store = Store(folder / "store")
    real = engine.run
    monkeypatch.setattr(engine, "run", lambda *given: (_ for _ in ()).throw(RuntimeError("no luck")))
    with pytest.raises(Failed, match="step `tune` failed: RuntimeError: no luck"):
        run(plan(folder), store)
    assert store.runs()[-1]["state"] == "failed"
    monkeypatch.setattr(engine, "run", real)
    again = run(plan(folder), store)
    assert [made.status for made in again.made.values()] == ["from the store", "made", "made", "made"]


def test_until_ends_a_repetition(folder):
    text = RECIPE.replace(
        "  - tune: {updates: 10, checkpoint_every: 2, batching: {bucketed: {size: 4}}, delta: {lora: {rank: 2, dropout: 0.1}}}\n",
        "  - repeat:\n      times: 3\n      until: figs.nats_per_token < 100\n      steps:\n"
        "        - tune: {updates: 2, batching: {bucketed: {size: 4}}}\n        - evaluate: {name: figs}\n",
    )
    said: list[str] = []
    result = run(plan(folder, text=text), Store(folder / "store"), say=said.append)
    assert list(result.made) == ["base", "tune", "figs", "small", "evaluate"]
    assert result["small"].passport.parents["model"] == result["tune"].id
    assert said == ["`until` holds after figs: no further repetition"]


def command(folder: Path, store: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "temper",
        "run",
        str(folder / "small.yaml"),
        "--store",
        str(folder / store),
        "--out",
        str(folder / f"out-{store}"),
        "--json",
    ]


def contents(folder: Path, store: str) -> dict[str, str]:
    at = Store(folder / store)
    return {step["name"]: at.record(step["key"])["content"] for step in at.runs()[-1]["steps"]}


def test_killed_at_any_moment_it_ends_in_the_same_bits(folder):
    """SIGKILL after random times, until a run comes through: the artefacts equal those of a run that nobody disturbed."""
    quiet = subprocess.run(command(folder, "quiet"), capture_output=True, text=True, cwd=folder, check=False)
    assert quiet.returncode == 0, quiet.stderr
    whole = json.loads(quiet.stdout)
    assert [step["status"] for step in whole["steps"]] == ["made"] * 4
    rng = random.Random(0)
    kills = 0
    # Kills fall while the work is under way: begun once the first step has left a trace of itself.
    for _ in range(12):
        process = subprocess.Popen(command(folder, "killed"), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=folder)
        started = time.monotonic()
        before = traces(folder / "killed")
        while process.poll() is None and time.monotonic() - started < 60 and traces(folder / "killed") == before:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.6))
        if process.poll() is None and kills < 6:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        if process.wait() == 0:
            break
        assert set(Store(folder / "killed").verify().values()) <= {"whole"}
    assert process.returncode == 0
    assert kills >= 2
    assert contents(folder, "killed") == contents(folder, "quiet")


def traces(root: Path) -> int:
    """How many files the work has left so far."""
    return sum(1 for name in ("work", "artefacts") for _ in (root / name).rglob("*"))


def test_two_runs_on_one_store_do_the_work_once(folder):
    processes = [
        subprocess.Popen(command(folder, "shared"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder) for _ in range(2)
    ]
    told = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    statuses = [[step["status"] for step in json.loads(out)["steps"]] for out, _ in told]
    assert all(sorted(pair) == ["from the store", "made"] for pair in zip(*statuses, strict=True))
    assert set(Store(folder / "shared").verify().values()) == {"whole"}


def test_one_step_from_python(folder, tiny):
    made = temper.tune(
        tiny,
        folder / "rows.jsonl",
        method="lora",
        updates=2,
        delta={"lora": {"rank": 2}},
        store=Store(folder / "store"),
        out=folder / "mine",
    )
    assert made.last.passport.kind == "adapter"
    assert (folder / "mine" / "adapter_config.json").is_file()
    assert "lineage" in (folder / "mine" / "README.md").read_text().lower()
    with pytest.raises(Problem, match="did you mean `updates`"):
        temper.tune(tiny, folder / "rows.jsonl", update=2, store=Store(folder / "store"))


def test_a_choice_by_measurement_is_made_once_a_machine(tmp_path):
    from temper.context import Context

    machine = tmp_path / "machine.json"
    first, second, third = (Context.scratch(tmp_path / name) for name in ("a", "b", "c"))
    first.machine = second.machine = third.machine = machine
    assert first.decide("precision", lambda: ("bf16", "1.21 times"), "512 x 192") == "bf16"
    assert second.decide("precision", lambda: ("float32", "1.19 times"), "512 x 192") == "bf16"
    assert second.decisions() == first.decisions()
    assert third.decide("precision", lambda: ("float32", "0.6 times"), "32 x 64") == "float32"
    assert first.decide("precision", lambda: ("float32", "never asked again"), "32 x 64") == "bf16"
