"""The benchmarks: what their harness derives from runs, what the tables say, that every script answers. Nothing is trained here."""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(FOLDER))

import harness  # noqa: E402
import results  # noqa: E402
import sft  # noqa: E402
from harness import Arm, Bench  # noqa: E402

SCRIPTS = sorted(file.name for file in FOLDER.glob("*.py") if "argparse" in file.read_text() or "harness.options" in file.read_text())
MEASURED = [file for file in sorted(FOLDER.glob("*.json")) if "rows" in json.loads(file.read_text())]
AT = {
    "command": "python benchmarks/made.py",
    "date": "2026-01-02",
    "quick": False,
    "others": 0.05,
    "machine": {"model": "A processor", "flags": ["avx2", "avx512vl", "avx512_bf16"], "cores": 2, "memory": 24 * 2**30},
    "versions": {"python": "3.11", "torch": "2.13"},
    "peak": {"bf16": 800e9, "float32": 200e9, "datasheet": 1600e9},
}


def run(arm: str, pair: int, speed: float, counts: bool = True, memory: int = 2**30, **figures: Any) -> dict[str, Any]:
    figures = {"speed": speed, "late_speed": 2 * speed, "flops": 4e9 * speed, **figures}
    return {"arm": arm, "pair": pair, "counts": counts, "figures": figures, "peak_memory": memory, "others": 0.01, "seconds": 1.0}


def row(runs: list[dict[str, Any]], **other: Any) -> dict[str, Any]:
    arms = {name: {"says": f"setting of {name}"} for name in dict.fromkeys(one["arm"] for one in runs)}
    made = {"workload": "made up", "at": AT, "arms": arms, "runs": runs, "figure": "speed", "unit": "tokens/s", "higher": True}
    made |= {"goals": {"best": 2.5}, "memory": "best", "equal": {"loss": 0.02}, "also": {"late": "late_"}, "complete": True} | other
    return {**made, "summary": harness.summary(made)}


THREE = [
    *(run("ours", pair, speed, memory=2**30, loss=2.0) for pair, speed in enumerate((100.0, 120.0, 90.0))),
    *(run("best", pair, speed, memory=2**31, loss=2.01) for pair, speed in enumerate((50.0, 40.0, 45.0))),
    run("best", 0, 1000.0, counts=False),
]


# -------------------------------------------------------------------------------------------------------- statistics


def test_ratios_are_of_pairs_and_leave_out_runs_that_do_not_count():
    assert harness.ratios(THREE, "best", "speed") == [2.0, 3.0, 2.0]
    assert harness.ratios(THREE, "best", "speed", higher=False) == [0.5, 1 / 3, 0.5]
    assert harness.spread([2.0, 3.0, 2.0]) == {"median": 2.0, "min": 2.0, "max": 3.0}


def test_a_summary_says_what_the_runs_say():
    found = row(THREE)["summary"]
    assert found["medians"] == {"ours": 100.0, "best": 45.0}
    assert found["ratios"] == {"best": {"median": 2.0, "min": 2.0, "max": 3.0}}
    assert found["memory"] == {"ours": 2**30, "best": 2**31}
    assert found["share_of_peak"]["ours"] == 0.5
    assert found["share_of_datasheet"]["ours"] == 0.25
    assert found["also"]["late"]["medians"]["ours"] == 200.0
    verdicts = {one["kind"]: (one["reached"], one["met"]) for one in found["goals"]}
    assert verdicts["ratio"] == (2.0, False)
    assert verdicts["memory"] == (0.5, True)
    assert verdicts["loss"] == (pytest.approx(1 - 2 / 2.01), True)


def test_goals_turn_with_the_figures():
    swapped = [{**one, "arm": {"ours": "best", "best": "ours"}[one["arm"]]} for one in THREE]
    found = row(swapped, goals={"best": 0.4}, equal={"loss": 0.001})["summary"]["goals"]
    assert {one["kind"]: one["met"] for one in found} == {"ratio": True, "memory": False, "loss": False}
    slower = row(THREE, higher=False, goals={"best": 0.4})["summary"]
    assert slower["ratios"]["best"] == {"median": 0.5, "min": 1 / 3, "max": 0.5}


def test_memory_that_an_arm_measured_itself_goes_before_the_processs():
    assert row([run("ours", 0, 1.0, peak_memory=5), run("best", 0, 1.0)])["summary"]["memory"] == {"ours": 5, "best": 2**30}


def test_a_figure_that_nobody_measured_is_no_goal():
    assert "loss" not in {one["kind"] for one in row([run("ours", 0, 1.0, loss=1.0), run("best", 0, 1.0)])["summary"]["goals"]}


def test_training_operations_are_those_that_torch_counts():
    """Besides attention, of which torch counts the masked half as well."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        attn_implementation="eager",
    )
    model, length = LlamaForCausalLM(config), 24
    for trained in (1.0, 0.0):
        model.requires_grad_(trained == 1)
        with FlopCounterMode(display=False) as counter:
            inputs = torch.randn(1, length, 32, requires_grad=True)
            model(inputs_embeds=inputs).logits.sum().backward()
        assert counter.get_total_flops() == harness.training_flops(config, [length], trained=trained) + 6 * 2 * 32 * length**2


# --------------------------------------------------------------------------------------------------------- processes

SCRIPT = """
import sys
sys.path.insert(0, {folder!r})
import harness

def made(settings):
    held = bytearray(settings.get("bytes", 1))
    if settings.get("fails"):
        raise ValueError("it broke")
    import os
    return {{"speed": settings.get("speed", 1.0), "given": os.environ.get("GIVEN", ""), "held": len(held)}}

harness.begin(harness.options("", __file__), {{"made": made}})
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    file = tmp_path / "made.py"
    file.write_text(SCRIPT.format(folder=str(FOLDER)))
    return file


def test_an_arm_runs_in_a_process_whose_memory_is_measured(script):
    code = f"""
import json, pathlib, sys
sys.path.insert(0, {str(FOLDER)!r})
from harness import Arm, once
arms = [Arm("made", environment={{"GIVEN": "yes"}}), Arm("made", {{"bytes": 200_000_000}})]
print(json.dumps([once(pathlib.Path({str(script)!r}), arm) for arm in arms]))
"""
    # A process begins with the peak memory of the one that started it, so this large one must not be that.
    small, large = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert small["figures"] == {"speed": 1.0, "given": "yes", "held": 1}
    assert 180_000_000 < large["peak_memory"] - small["peak_memory"] < 220_000_000
    assert small["others"] is None or 0 <= small["others"] <= 1
    assert 0 < small["processor_seconds"] <= os.cpu_count() * (small["seconds"] + 0.1)  # type: ignore[operator]


def test_an_arm_that_fails_is_told_with_its_last_words(script):
    with pytest.raises(RuntimeError, match="it broke"):
        harness.once(script, Arm("made", {"fails": True}))


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A benchmark whose arms say at once what `settings` hold, in turn where that is a list."""
    calls: dict[str, int] = {}

    def once(script: Path, arm: Arm) -> dict[str, Any]:
        if "fails" in arm.settings:
            raise RuntimeError("it ended:\nValueError: it broke")
        turn = calls[arm.says] = calls.get(arm.says, -1) + 1
        figures = {"speed": arm.settings.get("speed", 1.0), "late_speed": 1.0, "bf16": 1e9, "float32": 1e9}
        shares = arm.settings.get("others", [0.0])
        return {"figures": figures, "seconds": 1.0, "processor_seconds": 1.0, "peak_memory": 1, "others": shares[turn % len(shares)]}

    monkeypatch.setattr(harness, "once", once)
    monkeypatch.setattr(sys, "argv", ["made.py"])
    made = Bench(argparse.Namespace(file=tmp_path / "made.py", quick=False, pairs=2, only=None, others=0.05, out=tmp_path / "made.json"))
    calls.clear()
    return made


def test_a_disturbed_run_is_made_again_and_the_cleanest_counts(bench):
    runs = bench.run("ours", Arm("made", {"others": [0.5, 0.3, 0.01]}, says="late"))
    assert [(one["others"], one["counts"]) for one in runs] == [(0.5, False), (0.3, False), (0.01, True)]
    runs = bench.run("ours", Arm("made", {"others": [0.5, 0.2, 0.4, 0.3]}, says="never"))
    assert [one["counts"] for one in runs] == [False, True, False, False]
    assert len(runs) == harness.TRIES


def test_a_sweep_gives_the_best_that_is_admitted_and_keeps_all(bench):
    slow, fast, other = (Arm("made", {"speed": speed}, says=f"{speed}") for speed in (1.0, 2.0, 3.0))
    failing = Arm("made", {"fails": True}, says="failing")
    assert bench.sweep("peer", [slow, fast, other, failing], "speed", among=lambda arm: arm is not other) is fast
    faster = Arm("made", {"speed": 2.5}, says="2.5")
    assert bench.sweep("peer", [fast, faster], "speed") is faster
    kept = bench.record["sweeps"]["peer"]["runs"]
    assert [one["says"] for one in kept] == ["1.0", "2.0", "3.0", "failing", "2.5"], "nothing runs twice"
    assert [one["admitted"] for one in kept] == [True, True, False, True, True]
    assert kept[3]["failed"] == "ValueError: it broke"
    assert bench.sweep("lower", [slow, fast], "speed", higher=False) is slow
    with pytest.raises(RuntimeError, match="no setting of broken ran"):
        bench.sweep("broken", [failing], "speed")


def test_arms_take_turns_and_a_comparison_replaces_the_one_of_its_name(bench):
    arms = {"ours": Arm("made", {"speed": 4.0}, says="a"), "peer": Arm("made", {"speed": 2.0}, says="b")}
    bench.compare("first", arms, "speed", unit="x", goals={"peer": 2.0})
    bench.compare("second", arms, "speed", unit="x")
    found = bench.compare("first", arms, "speed", unit="x", goals={"peer": 3.0})
    assert [(one["arm"], one["pair"]) for one in found["runs"]] == [("ours", 0), ("peer", 0), ("ours", 1), ("peer", 1)]
    written = json.loads(bench.out.read_text())
    assert [one["workload"] for one in written["rows"]] == ["second", "first"]
    assert written["rows"][1]["summary"]["goals"] == [{"kind": "ratio", "of": "peer", "wanted": 3.0, "reached": 2.0, "met": False}]
    again = Bench(bench.given)
    assert [one["workload"] for one in again.record["rows"]] == ["second", "first"], "what is not measured again stays"


# ------------------------------------------------------------------------------------------------------------ tables


def test_the_table_says_ratios_settings_and_verdicts():
    text = harness.table(row(THREE))
    assert "2.00 (2.00 to 3.00)   setting of best" in text
    assert "MISSED  ratio of best: 2, wanted 2.5" in text
    assert "met     memory of best: 0.5, wanted 1" in text


def test_results_are_rendered_from_runs_not_from_stored_summaries(tmp_path):
    made = row(THREE)
    made["summary"] = {"medians": "something else"}
    tried = {"says": "size 8", "admitted": True, "runs": [THREE[3]]}
    failed = {"says": "size 1", "admitted": False, "failed": "ValueError"}
    sweeps = {"peer": {"at": AT, "figure": "speed", "higher": True, "runs": [failed, tried]}}
    verified = {"date": "2026-01-02", "card": "A card", "driver": "1.2", "torch": "2.13", "passed": 7, "failed": 0, "broken": []}
    whole = {"benchmark": "made", "rows": [made], "sweeps": sweeps, "verified": verified}
    (tmp_path / "made.json").write_text(json.dumps(whole))
    (tmp_path / "other.json").write_text('{"tasks": {}}')
    text = results.render(results.read(tmp_path))
    ours, best = [line for line in text.splitlines() if line.startswith("|")][2:]
    assert ours.startswith("| made up [1] | ours | setting of ours | 100 tokens/s, 200 tokens/s (late) |")
    assert "50% (25% of the datasheet's)" in ours
    assert "| 2.00 (2.00 to 3.00), 2.00 (2.00 to 3.00) (late) | 2.00 GiB |" in best
    assert "2.5x: **missed**; no more memory: met (0.50x); equal loss: met (0.5% apart, 2% allowed)" in best
    assert "A processor (avx2 avx512_bf16), 2 cores, 24 GiB; matrix peak, GFLOP/s: bf16 800, float32 200" in text
    assert "- peer, speed: size 8: 50; size 1 (another objective): failed" in text
    assert "Last verified on a GPU on 2026-01-02: A card, driver 1.2, torch 2.13; 7 conformance tests passed (`make gpu-check`)." in text


def test_the_readmes_line_about_gpus_is_replaced_in_its_place():
    assert results.GPU.sub("new", "before <!-- gpu -->old\nold<!-- /gpu --> after") == "before <!-- gpu -->new<!-- /gpu --> after"


@pytest.mark.parametrize("file", MEASURED, ids=lambda file: file.name)
def test_what_was_measured_bears_its_ratios(file):
    for one in json.loads(file.read_text())["rows"]:
        assert not one["at"]["quick"]
        counted: dict[str, list[float]] = {}
        for single in one["runs"]:
            if single["counts"]:
                counted.setdefault(single["arm"], []).append(single["figures"][one["figure"]])
        assert all(len(values) >= 5 for values in counted.values()), f"{one['workload']}: at least 5 pairs"
        for name, stored in one["summary"]["ratios"].items():
            pairs = sorted(a / b if one["higher"] else b / a for a, b in zip(counted["ours"], counted[name], strict=True))
            middle = (pairs[len(pairs) // 2] + pairs[(len(pairs) - 1) // 2]) / 2
            assert [stored["median"], stored["min"], stored["max"]] == pytest.approx([middle, pairs[0], pairs[-1]])


@pytest.mark.skipif(not MEASURED, reason="nothing was measured yet")
def test_the_committed_table_is_what_the_measurements_say():
    assert (FOLDER / "RESULTS.md").read_text(encoding="utf8") == results.render(results.read(FOLDER)), "run python benchmarks/results.py"


# ----------------------------------------------------------------------------------------------------------- scripts


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_answers_and_imports_nothing_large(name):
    """A child's peak memory begins with its parent's, so a benchmark may import torch in its arms alone."""
    code = f"""
import runpy, sys
sys.argv = [{name!r}, "--help"]
try:
    runpy.run_path({str(FOLDER / name)!r}, run_name="__main__")
except SystemExit as end:
    large = sys.modules.keys() & {{"torch", "transformers", "datasets", "numpy"}}
    sys.exit(end.code or sorted(large) or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=FOLDER)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage:")


def test_without_a_gpu_the_check_says_so_in_a_line():
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, str(FOLDER / "gpu.py")], capture_output=True, text=True, env=hidden)
    assert done.returncode == 2
    assert done.stderr == "no GPU that torch can use on this machine; nothing was checked\n"


# ------------------------------------------------------------------------------------------------- supervised tuning


def test_rows_have_their_lengths_and_the_tokens_of_their_two_halves(tiny):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    lengths = [random.Random(0).randint(4, 60) for _ in range(20)]
    stream = sft._stream(["def f(x): return x  # sort the letters", "a b c d e ="], tokenizer)
    for length, made in zip(lengths, sft._pieces(lengths, stream, tokenizer), strict=True):
        whole = tokenizer(made["text"])["input_ids"]  # with the beginning, without the end
        assert len(whole) + 1 == length == made["length"]
        assert made["prompt"] + made["completion"] == made["text"]
        prompt = tokenizer(made["prompt"])["input_ids"]
        assert whole[: len(prompt)] == prompt


def test_the_search_keeps_the_options_that_gain_and_leaves_out_other_objectives(bench, monkeypatch):
    speeds = {"slow": 1.0, "fast": 2.0, "wrapped": 9.0}
    gains = {"tuned malloc": 1.5, "attention eager": 0.5, "float32": 1.1}

    def sweep(name: str, arms: list[Arm], figure: str, among: Any) -> Arm:
        def speed(arm: Arm) -> float:
            first, *options = arm.says.split(", ")
            value = speeds[first]
            for option in options:
                value *= gains[option]
            return value

        return max(filter(among, arms), key=speed)

    monkeypatch.setattr(bench, "sweep", sweep)
    arms = [sft.peer({"rows": "text-first"}, says, {"bf16": True}) for says in speeds]
    best, wrapped = sft.search(bench, "full", arms, list(gains))
    assert best.says == "fast, tuned malloc, float32"
    assert wrapped.says == "wrapped, tuned malloc, float32"
    assert best.environment == harness.TUNED
    assert best.settings["config"] == {"bf16": False}


def test_every_setting_of_the_sweep_has_an_update_of_the_same_size():
    for says, config in {"default": sft.DEFAULT, **sft.BATCHES}.items():
        rows = config["per_device_train_batch_size"] * config["gradient_accumulation_steps"]
        assert rows == (8 if "packing" in says else sft.ROWS), says


def test_the_speed_of_the_second_half_leaves_the_start_out(tmp_path):
    from transformers import LlamaConfig

    LlamaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8).save_pretrained(
        tmp_path / "model"
    )
    (tmp_path / "lengths-all.json").write_text("[30, 10]")
    found = sft._speeds({"rows": "text-all", "lora": False}, 10.0, [0.0, 6.0, 7.0, 8.0, 9.0], tmp_path)
    assert found["tokens_per_second"] == 4.0
    assert found["steady_tokens_per_second"] == 20 / 2  # half of the tokens from 7 s to 9 s
