"""What can be checked on a GPU: the conformance tests on it, training beside TRL, how long a checkpoint keeps it waiting.

    python benchmarks/gpu.py                       (make gpu-check; without a GPU it says so and ends with 2)
    python benchmarks/gpu.py --device cpu --quick  (shows that the script works where there is no GPU)

Needs no network. Supervised tuning and DPO of a Llama of about 340 M parameters, not trained, in bf16 autocast: the same arms as in
`sft.py` and `dpo.py`, with TRL on SDPA and, where it is installed, on flash attention. Peak memory is the GPU's. A part that fails is
noted and the others go on. The file names the card, the driver and the date, which `results.py` puts into RESULTS.md and the README.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import checkpoint
import dpo
import harness
import sft
from harness import Arm, Bench

ROOT = Path(__file__).resolve().parents[1]
DATASHEET = {"B200": 2250, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312, "L40S": 362, "L4": 121}
"""TFLOP/s of dense bf16 matrix products that NVIDIA's datasheets say, by the words of a card's name."""
ROWS, MOST = 64, 2048  # of an update of supervised tuning; tokens of a row
LLAMA = {"hidden": 1024, "layers": 24, "heads": 16, "positions": MOST}


# --------------------------------------------------------------------------------------------------- on the machine


def card(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Name, memory (bytes), driver and CUDA of the GPU; nothing where there is none."""
    import subprocess

    import torch

    if not torch.cuda.is_available():
        return {}
    found = torch.cuda.get_device_properties(0)
    asked = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True, check=False
    )
    driver = asked.stdout.split("\n")[0].strip() if asked.returncode == 0 else "unknown"
    return {"name": found.name, "memory": found.total_memory, "driver": driver, "cuda": torch.version.cuda, "torch": torch.__version__}


def conformance(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The conformance tests on `TEMPER_DEVICE`: how many passed and failed, and which failed. Tests that left a GPU idle are an error."""
    import pytest
    import torch

    passed, failed = [], []

    class Tally:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.failed:
                failed.append(report.nodeid)
            elif report.when == "call" and report.passed:
                passed.append(report.nodeid)

    chosen = ["-k", settings["only"]] if settings["only"] else []
    code = pytest.main([str(ROOT / "tests/conformance"), "-q", "-p", "no:cacheprovider", *chosen], plugins=[Tally()])
    if code > 1:
        raise RuntimeError(f"pytest ended with {code}")
    if os.environ["TEMPER_DEVICE"] == "cuda" and not torch.cuda.max_memory_allocated():
        raise RuntimeError("the conformance tests did not use the GPU")
    which = sorted(set(failed))
    return {"passed": len(passed), "failed": len(which), "which": which}


def on_device(arm: Callable[[dict[str, Any]], dict[str, float]]) -> Callable[[dict[str, Any]], dict[str, float]]:
    """An arm of `checkpoint.py` whose state lies on the device. It is blocked until the device could go on."""

    def run(settings: dict[str, Any]) -> dict[str, float]:
        import torch

        made, measured = checkpoint.state_of, checkpoint.measure
        device = os.environ["TEMPER_DEVICE"]

        def state_of(size: int) -> dict[str, Any]:
            state = made(size)
            state["model"] = {name: one.to(device) for name, one in state["model"].items()}
            for held in state["optimizer"]["state"].values():
                held |= {name: held[name].to(device) for name in ("exp_avg", "exp_avg_sq")}
            return state

        def measure(settings: dict[str, Any], save: Callable[[Path, int], Callable[[], Any]]) -> dict[str, float]:
            def waiting(folder: Path, number: int) -> Callable[[], Any]:
                wait = save(folder, number)
                if device == "cuda":
                    torch.cuda.synchronize()
                return wait

            return measured(settings, waiting)

        checkpoint.state_of, checkpoint.measure = state_of, measure
        return arm(settings)

    return run


def copied(settings: dict[str, Any]) -> dict[str, float]:
    """The limit: the state's bytes copied to pinned memory that is already there."""
    import torch

    state = checkpoint.flat(checkpoint.state_of(settings["size"]))
    there = [torch.empty_like(one, device="cpu", pin_memory=torch.cuda.is_available()) for one in state]

    def save(folder: Path, number: int) -> Callable[[], Any]:
        for one, other in zip(there, state, strict=True):
            one.copy_(other, non_blocking=True)
        return lambda: None

    return checkpoint.measure(settings, save)


ARMS = {
    "card": card,
    "conformance": conformance,
    "sft_prepare": sft.prepare,
    "sft_ours": sft.ours,
    "sft_trl": sft.trl,
    "dpo_prepare": dpo.prepare,
    "dpo_ours": dpo.ours,
    "dpo_trl": dpo.trl,
    "checkpoint_ours": on_device(checkpoint.ours),
    "checkpoint_copy": on_device(copied),
    "checkpoint_save": on_device(checkpoint.torch_save),
    "checkpoint_async": on_device(checkpoint.dcp_async),
}


# -------------------------------------------------------------------------------------------------- the comparisons


def flash(bench: Bench) -> bool:
    """Whether TRL can be given flash attention."""
    return "flash-attn" in bench.at["versions"]


FLASH = {"attn_implementation": "flash_attention_2"}


def tune(bench: Bench) -> None:
    """Supervised tuning, all weights and LoRA."""
    quick = bench.given.quick
    made = {
        "vocabulary": 400 if quick else 32_000,
        "shape": {"hidden": 32, "layers": 1, "heads": 2} if quick else LLAMA,
        "location": 3.0 if quick else 6.0,
        "most": MOST,
        "text": 100_000 if quick else 12_000_000,
        "block": ROWS if quick else ROWS * 10,
        "blocks": 1 if quick else 4,
    }
    found = harness.once(bench.given.file, Arm("sft_prepare", made))["figures"]
    harness.say(f"supervised tuning: {found['rows']:,} rows of {found['mean_length']:.0f} tokens, {found['parameters']:,} parameters")
    for lora in (False, True):

        def arm(says: str, size: int, config: Mapping[str, Any], model: Mapping[str, Any] = {}, lora: bool = lora) -> Arm:
            sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": max(1, ROWS // size)}
            return Arm(
                "sft_trl",
                {"rows": "text-first", "lora": lora, "most": MOST, "config": {**sizes, **config}, "model": dict(model)},
                says=says,
            )

        free, grouped = sft.NO_CHECKPOINTING, {**sft.NO_CHECKPOINTING, **sft.BY_LENGTH}
        default = arm("as TRL has it: 8 rows x 8, gradient checkpointing", 8, {})
        arms = [default, arm("8 rows x 8, by length", 8, grouped), arm("32 rows x 2, by length", 32, grouped)]
        arms.append(arm("8 rows x 8, by length, torch_compile", 8, {**grouped, "torch_compile": True}))
        if flash(bench):
            # 16 rows of 2,048 hold about as many tokens as 64 documents
            packed = {"packing": True, "packing_strategy": "bfd", "gradient_accumulation_steps": 4, **free}
            arms.append(arm("packing bfd 4 x 4, flash attention", 4, packed, FLASH))
            arms.append(arm("padding-free 32 rows x 2, flash attention", 32, {**free, "padding_free": True}, FLASH))
        name = f"gpu-{'lora' if lora else 'full'}"
        best = bench.sweep(name, arms[:1] if quick else arms, "tokens_per_second")
        bench.compare(
            f"On a GPU: supervised tuning, {'LoRA of rank 8 on all linear layers' if lora else 'all weights'}",
            {
                "ours": Arm("sft_ours", {"rows": "text-all", "lora": lora, "most": MOST, "size": ROWS}, says="as Temper has it"),
                "default": default,
                "best": Arm("sft_trl", {**best.settings, "rows": "text-all"}, says=best.says),
            },
            "tokens_per_second",
            unit="tokens/s",
            goals={"default": 4.0, "best": 2.5},
            memory="best",
            equal={"loss": 0.02, "early_loss": 0.03},
            also={"second half": "steady_"},
            about={**made, **found},
        )


def prefer(bench: Bench) -> None:
    """DPO, all weights."""
    quick = bench.given.quick
    made = {
        "vocabulary": 400 if quick else 32_000,
        "shape": {"hidden": 32, "layers": 1, "heads": 2} if quick else LLAMA,
        "prompt": 24 if quick else 160,
        "answer": 16 if quick else 80,
        "block": dpo.PAIRS * (1 if quick else 10),
        "blocks": 1 if quick else 4,
    }
    found = harness.once(bench.given.file, Arm("dpo_prepare", made))["figures"]
    harness.say(f"DPO: {found['pairs']:,} pairs, {found['parameters']:,} parameters")

    def arm(says: str, size: int, config: Mapping[str, Any], model: Mapping[str, Any] = {}) -> Arm:
        return Arm("dpo_trl", {"rows": "first", "lora": False, "config": dpo.batch(size, **config), "model": dict(model)}, says=says)

    before = {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 32, **dpo.NO_CHECKPOINTING}
    default = arm("as TRL has it: 8 pairs x 4, gradient checkpointing", 8, {})
    arms = [default, arm("8 pairs x 4, reference beforehand", 8, before), arm("32 pairs x 1, reference beforehand", 32, before)]
    if flash(bench):
        arms.append(arm("32 pairs x 1, reference beforehand, flash attention", 32, before, FLASH))
    best = bench.sweep("gpu-dpo", arms[:1] if quick else arms, "pairs_per_second")
    bench.compare(
        "On a GPU: DPO, all weights",
        {
            "ours": Arm("dpo_ours", {"rows": "all", "lora": False}, says="as Temper has it"),
            "default": default,
            "best": Arm("dpo_trl", {**best.settings, "rows": "all"}, says=best.says),
        },
        "pairs_per_second",
        unit="pairs/s",
        goals={"best": 4.0},
        memory="best",
        equal={"loss": 0.03, "early_loss": 0.03},
        about={**made, **found},
    )


def keep(bench: Bench) -> None:
    """Checkpoints of a state on the GPU."""
    size = 4 if bench.given.quick else 4096
    settings = {"size": size * checkpoint.MIB, "saves": 1 if bench.given.quick else 3, "steps": 6}
    bench.compare(
        f"On a GPU: a checkpoint of {size:,} MiB",
        {
            "ours": Arm("checkpoint_ours", settings),
            "copy": Arm("checkpoint_copy", settings, says="the limit: pinned memory"),
            "torch.save": Arm("checkpoint_save", settings),
            "dcp.async": Arm("checkpoint_async", settings),
        },
        "blocked",
        unit="s blocked",
        higher=False,
        goals={"copy": 0.8, "torch.save": 1.0},
    )


# ------------------------------------------------------------------------------------------------------- in order

PARTS: dict[str, Callable[[Bench], None]] = {"tune": tune, "dpo": prefer, "checkpoint": keep}


def verify(bench: Bench) -> None:
    """The conformance tests' outcome, with the card and the date."""
    harness.say("conformance tests")
    found = harness.once(bench.given.file, Arm("conformance", {"only": "schedules" if bench.given.quick else ""}))["figures"]
    harness.say(f"  {found['passed']} passed, {found['failed']} failed")
    gpu = bench.at["machine"]["gpu"]
    bench.record["verified"] = {"date": bench.at["date"], "card": gpu["name"], "driver": gpu["driver"], "torch": gpu["torch"], **found}


def main() -> int:
    ask = harness.options(__doc__, __file__)
    ask.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tries the script itself, with --quick (default: cuda)")
    ask.add_argument("--part", nargs="+", choices=list(PARTS), default=list(PARTS), help="which comparisons (default: all)")
    given = harness.begin(ask, ARMS)
    if given.device == "cpu" and not given.quick:
        ask.error("--device cpu shows only that the script works; add --quick")
    os.environ["TEMPER_DEVICE"] = given.device
    gpu = harness.once(given.file, Arm("card"))["figures"]
    if given.device == "cuda" and not gpu:
        harness.say("no GPU that torch can use on this machine; nothing was checked")
        return 2
    gpu = gpu or {"name": "no GPU", "driver": "none", "torch": "none"}
    bench = Bench(given, given.device)
    bench.at["machine"]["gpu"] = gpu
    words = set(gpu["name"].replace("-", " ").split())
    if sheet := next((one for name, one in DATASHEET.items() if words.issuperset(name.split())), None):
        bench.at["peak"]["datasheet"] = sheet * 1e12
    broken: list[str] = []
    for name, part in {"conformance": verify, **{name: PARTS[name] for name in given.part}}.items():
        with tempfile.TemporaryDirectory(prefix="temper-benchmark-") as folder:
            os.environ[sft.FOLDER] = folder
            try:
                part(bench)
            except RuntimeError as error:
                harness.say(f"{name}: {error}")
                broken.append(name)
    verified = bench.record.get("verified", {"failed": 0})
    verified["broken"] = broken
    bench.close()
    return 1 if broken or verified["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
