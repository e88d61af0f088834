"""Direct preference optimisation, all weights and LoRA, beside TRL's DPOTrainer: at its defaults, and at the best setting of a sweep.

    python benchmarks/dpo.py [--workload full lora] [--updates 40] [--profile ours]

A Llama of hidden 256 and 4 layers (vocabulary 4,096, about 4 M parameters), not trained, learns to prefer answers in which some words
are a little more frequent than others. Rows are drawn from a seed: lengths log-normal, a prompt of about 96 tokens, answers of about 72
each, 512 in all at most. Every arm goes once through its rows, 32 pairs an update, with fused AdamW at a constant rate. Time is that of
the whole training call and of all that is asked of the reference: what either side computes of it beforehand counts; imports, loading
and tokenising do not (they stand in the file). TRL's default and the sweep see the first quarter of the rows that the others see.

What TRL 1.16 has but cannot use here stands in the sweep as failed (`group_by_length`); its `padding_free` does nothing for DPO.
"""

from __future__ import annotations

import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import harness
from harness import TUNED, Arm, Bench
from sft import FOLDER, NO_CHECKPOINTING, clocked, on_gpu

PAIRS, BLOCK, RATE, BETA, MOST = 32, 4, 3e-4, 0.1, 512  # of an update; updates of a block; the rate; DPO's beta; tokens of a row
KIND, SHARE = 32, 0.55  # words that good answers have more of, and bad ones; which share of an answer's words is of its kind


# ------------------------------------------------------------------------------------------- a model and its data


def prepare(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Writes a model and rows into the folder: `first` (a block), `all` and `test`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from temper.models import io
    from temper.pretrain.shape import Llama

    folder = Path(os.environ[FOLDER])
    words = ["<pad>", "</s>", *(f"w{index}" for index in range(settings["vocabulary"] - 2))]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>")
    model = Llama(**settings["shape"])(tokenizer, 1)
    io.save_model(model, tokenizer, folder / "model")

    draw = random.Random(0)
    block = [_lengths(draw, settings["prompt"], settings["answer"]) for _ in range(settings["block"])]
    rows = [_row(one, words, draw) for _ in range(settings["blocks"]) for one in draw.sample(block, len(block))]
    test = [_row(one, words, draw) for one in block[:128]]
    for name, some in (("first", rows[: len(block)]), ("all", rows), ("test", test)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf8")
    prompt, chosen, rejected = (statistics.fmean(one) for one in zip(*block))
    lengths = {"mean_prompt": prompt, "mean_answer": (chosen + rejected) / 2}
    return {"parameters": model.num_parameters(), "pairs": len(rows), **lengths}


def _lengths(draw: random.Random, prompt: float, answer: float) -> tuple[int, int, int]:
    """Tokens of a prompt, its chosen and its rejected answer, the answers' end not counted."""
    sigma = 0.6

    def length(mean: float, most: int) -> int:
        return min(most, max(4, round(draw.lognormvariate(math.log(mean) - sigma**2 / 2, sigma))))

    return length(prompt, MOST * 5 // 8), length(answer, MOST // 4), length(answer, MOST // 4)


def _row(lengths: tuple[int, int, int], words: Sequence[str], draw: random.Random) -> dict[str, str]:
    """A chosen answer has more words of the first kind than of the second, a rejected one fewer; a prompt has any."""
    good, bad = words[2 : 2 + KIND], words[2 + KIND : 2 + 2 * KIND]

    def answer(count: int, share: float) -> str:
        return "".join(f" {draw.choice(good if draw.random() < share else bad)}" for _ in range(count))

    prompt, chosen, rejected = lengths
    text = " ".join(draw.choices(words[2:], k=prompt))
    return {"prompt": text, "chosen": answer(chosen, SHARE), "rejected": answer(rejected, 1 - SHARE)}


# --------------------------------------------------------------------------------------------------------- the arms


def ours(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`temper.align` as users call it; the clock is around what it asks of the reference and what it calls to train."""
    begun = time.perf_counter()
    import temper
    from temper.align import engine, reference
    from temper.models import io
    from temper.store import RECORD, Store

    imported, folder = time.perf_counter(), Path(os.environ[FOLDER])
    clock: dict[str, Any] = {}
    beforehand: list[float] = []
    for place, name in ((engine, "layout_of"), (reference.Remembered, "prepare"), (engine, "_unmoved")):
        setattr(place, name, added(getattr(place, name), beforehand))
    engine.learn = clocked(engine.learn, clock, settings.get("profile", False))
    with tempfile.TemporaryDirectory(dir=folder) as store:
        result = temper.align(
            str(folder / "model"),
            {"file": {"path": str(folder / f"{settings['rows']}.jsonl"), "test": str(folder / "test.jsonl")}},
            method="dpo",
            store=Store(Path(store)),
            delta="lora" if settings["lora"] else "full",
            loss={"dpo": {"beta": BETA}},
            precision="bf16",
            optimizer={"adamw": {"lr": RATE, "weight_decay": 0.0}},
            schedule="constant",
            batching={"bucketed": {"size": PAIRS}},
            max_length=MOST,
            evaluate_every="none",
        )
        made = result.last
        curve = [json.loads(line) for line in (made.path / RECORD / "curve.jsonl").read_text().splitlines()]
        curve = [row for row in curve if "loss" in row]
        return {
            **_speeds(settings, clock["seconds"], sum(beforehand), [0.0, *(row["seconds"] for row in curve)], folder),
            "loss": held_loss(io.load_model(made, device="cuda" if on_gpu() else "cpu"), folder),
            "early_loss": statistics.fmean(row["loss"] for row in curve[:BLOCK]),
            "peak_memory": clock["peak_memory"],
            "import_seconds": round(imported - begun, 3),
            "ready_seconds": round(clock["begun"] - imported - sum(beforehand), 3),
            "decisions": result.made[next(iter(result.made))].record["decisions"],
            **({"profile": clock["profile"]} if "profile" in clock else {}),
        }


def trl(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`DPOTrainer.train` with the settings given, and what it computes of the reference before; what is not given is as TRL has it."""
    begun = time.perf_counter()
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    imported, folder = time.perf_counter(), Path(os.environ[FOLDER])
    ends: list[float] = []
    beforehand: list[float] = []
    DPOTrainer._precompute_ref_logps = added(DPOTrainer._precompute_ref_logps, beforehand)

    class Ends(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            if on_gpu():
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory(dir=folder) as out:
        config = DPOConfig(
            output_dir=out,
            num_train_epochs=1,
            learning_rate=RATE,
            beta=BETA,
            lr_scheduler_type="constant",
            max_length=MOST,
            report_to="none",
            disable_tqdm=True,
            use_cpu=not on_gpu(),
            **{"bf16": True, **settings["config"]},
        )
        rows = load_dataset("json", data_files=str(folder / f"{settings['rows']}.jsonl"), split="train", cache_dir=f"{out}/cache")
        trainer = DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, **settings.get("model", {})),
            args=config,
            train_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(folder / "model"),
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM") if settings["lora"] else None,
            callbacks=[Ends()],
        )
        clock: dict[str, Any] = {}
        clocked(trainer.train, clock, settings.get("profile", False))()
        logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        return {
            **_speeds(settings, clock["seconds"], sum(beforehand), [0.0, *(end - clock["begun"] for end in ends)], folder),
            **({"loss": held_loss(trainer.model, folder)} if settings["rows"] == "all" else {}),
            **({"early_loss": logged[0]} if logged else {}),
            "peak_memory": clock["peak_memory"],
            "import_seconds": round(imported - begun, 3),
            "ready_seconds": round(clock["begun"] - imported - sum(beforehand), 3),
            **({"profile": clock["profile"]} if "profile" in clock else {}),
        }


def added(function: Any, seconds: list[float]) -> Any:
    """`function`, which adds the seconds of each call to a list; those of a call within another count once."""
    within: list[Any] = []

    def timed(*given: Any, **named: Any) -> Any:
        if within:
            return function(*given, **named)
        within.append(True)
        begun = time.perf_counter()
        try:
            return function(*given, **named)
        finally:
            seconds.append(time.perf_counter() - begun)
            within.pop()

    return timed


def held_loss(model: Any, folder: Path) -> float:
    """Mean DPO loss of the held-out pairs in float32, a row at a time, beside the model that both sides began with."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    before = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).to(model.device).eval()
    model.eval()

    def said(reader: Any, prompt: str, answer: str) -> float:
        first = len(tokenizer(prompt)["input_ids"])
        ids = torch.tensor([[*tokenizer(prompt + answer)["input_ids"], tokenizer.eos_token_id]], device=reader.device)
        logits = reader(input_ids=ids).logits[0, first - 1 : -1].float()
        return -torch.nn.functional.cross_entropy(logits, ids[0, first:], reduction="sum").item()

    losses = []
    with torch.no_grad():
        for line in (folder / "test.jsonl").read_text(encoding="utf8").splitlines():
            row = json.loads(line)
            chosen, rejected = (
                said(model, row["prompt"], row[side]) - said(before, row["prompt"], row[side]) for side in ("chosen", "rejected")
            )
            losses.append(math.log1p(math.exp(-BETA * (chosen - rejected))))
    return statistics.fmean(losses)


def _speeds(settings: Mapping[str, Any], seconds: float, beforehand: float, ends: Sequence[float], folder: Path) -> dict[str, float]:
    """Pairs a second of all that was timed, and of the second half of the updates alone.

    ends: seconds from the beginning of training after which updates were done, 0 first.
    """
    pairs = len((folder / f"{settings['rows']}.jsonl").read_text(encoding="utf8").splitlines())
    half = (len(ends) - 1) // 2
    return {
        "pairs_per_second": pairs / (seconds + beforehand),
        "steady_pairs_per_second": pairs * (len(ends) - 1 - half) / (len(ends) - 1) / (ends[-1] - ends[half]),
        "seconds": round(seconds + beforehand, 3),
        "beforehand_seconds": round(beforehand, 3),
    }


ARMS = {"prepare": prepare, "ours": ours, "trl": trl}


# -------------------------------------------------------------------------------------------------- the peer's best


def batch(size: int, **more: Any) -> dict[str, Any]:
    """`size` pairs at a time, as many times as an update needs."""
    return {"per_device_train_batch_size": size, "gradient_accumulation_steps": PAIRS // size, **more}


DEFAULT = batch(8)
"""TRL's own, in as many micro-batches as an update of 32 pairs needs."""
BATCHES: dict[str, dict[str, Any]] = {f"{size} x {PAIRS // size}": batch(size, **NO_CHECKPOINTING) for size in (1, 2, 4, 8)}
OPTIONS: dict[str, dict[str, Any]] = {
    "reference beforehand": {"config": {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 8}},
    "reference beforehand, one at a time": {"config": {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 1}},
    "tuned malloc": {"environment": TUNED},
    "attention eager": {"model": {"attn_implementation": "eager"}},
    "float32": {"config": {"bf16": False}},
    "by length": {"config": {"train_sampling_strategy": "group_by_length"}},
    "a loader process": {"config": {"dataloader_num_workers": 1}},
}
"""What is tried on the best batch, one after the other; what is faster stays."""


def peer(rows: str, lora: bool, says: str, config: Mapping[str, Any]) -> Arm:
    return Arm("trl", {"rows": rows, "lora": lora, "config": dict(config)}, says=says)


def with_option(arm: Arm, name: str) -> Arm:
    """An arm with one of `OPTIONS` beside what it has."""
    option = OPTIONS[name]
    settings = {**arm.settings, "config": {**arm.settings["config"], **option.get("config", {})}}
    settings["model"] = {**arm.settings.get("model", {}), **option.get("model", {})}
    return Arm(arm.function, settings, {**arm.environment, **option.get("environment", {})}, f"{arm.says}, {name}")


def search(bench: Bench, name: str, arms: Sequence[Arm], options: Sequence[str]) -> Arm:
    """The fastest of these arms with the options that make it faster."""
    best = bench.sweep(name, arms, "pairs_per_second")
    for option in options:
        best = bench.sweep(name, [best, with_option(best, option)], "pairs_per_second")
    return best


# ------------------------------------------------------------------------------------------------------- in order

WORKLOADS = {"full": "DPO, all weights", "lora": "DPO, LoRA of rank 8 on all linear layers"}


def measure(bench: Bench, name: str) -> None:
    """Makes a workload's model and rows, finds TRL's best setting, compares."""
    quick, lora = bench.given.quick, name == "lora"
    made = {
        "vocabulary": 400 if quick else 4096,
        "shape": {"hidden": 32, "layers": 1, "heads": 2} if quick else {"hidden": 256, "layers": 4},
        "prompt": 24 if quick else 96,
        "answer": 16 if quick else 72,
        "block": PAIRS * (1 if quick else BLOCK),
        "blocks": 2 if quick else max(1, round(bench.given.updates / BLOCK)),
    }
    with tempfile.TemporaryDirectory(prefix="temper-benchmark-") as folder:
        os.environ[FOLDER] = folder
        found = harness.once(bench.given.file, Arm("prepare", made))["figures"]
        lengths = f"{found['mean_prompt']:.0f} + {found['mean_answer']:.0f} tokens"
        harness.say(f"{WORKLOADS[name]}: {found['pairs']:,} pairs of {lengths}, {found['parameters']:,} parameters")
        mine = Arm("ours", {"rows": "all", "lora": lora}, says="as Temper has it")
        if bench.given.profile:
            arm = mine if bench.given.profile == "ours" else peer("first", lora, "", DEFAULT)
            arm = Arm(arm.function, {**arm.settings, "rows": "first", "profile": True})
            sys.stdout.write(harness.once(bench.given.file, arm)["figures"]["profile"] + "\n")
            return
        default = peer("first", lora, "as TRL has it: 8 x 4, gradient checkpointing", DEFAULT)
        batches, options = list(BATCHES), list(OPTIONS)
        if quick:
            batches, options = batches[:1], options[:2]
        best = search(bench, name, [default, *(peer("first", lora, one, BATCHES[one]) for one in batches)], options)
        bench.compare(
            WORKLOADS[name],
            {"ours": mine, "default": default, "best": Arm("trl", {**best.settings, "rows": "all"}, best.environment, best.says)},
            "pairs_per_second",
            unit="pairs/s",
            goals={"default": 8.0, "best": 4.0},
            memory="best",
            equal={"loss": 0.05, "early_loss": 0.03},
            about={**made, **found, "pairs_an_update": PAIRS, "rate": RATE, "beta": BETA},
        )


def main() -> None:
    ask = harness.options(__doc__, __file__)
    ask.add_argument("--workload", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS), help="which (default: all)")
    ask.add_argument("--updates", type=int, default=40, help=f"of {PAIRS} pairs each, in whole blocks of {BLOCK} (default: 40)")
    ask.add_argument("--profile", choices=("ours", "trl"), help="print where this arm's time goes, and no more")
    given = harness.begin(ask, ARMS)
    bench = Bench(given)
    for name in given.workload:
        measure(bench, name)


if __name__ == "__main__":
    main()
