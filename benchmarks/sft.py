"""Supervised tuning, all weights and LoRA, beside TRL's SFTTrainer: at its defaults, and at the best setting of a sweep.

    python benchmarks/sft.py [--workload full lora completion vocabulary] [--updates 30] [--profile ours]

A Llama of hidden 256 and 4 layers (vocabulary 4,096, about 4 M parameters), not trained, learns Python's standard library in pieces of
8 to 512 tokens: lengths log-normal, about 130 on average. Every arm goes once through its rows, 32 an update, in bf16 autocast, with
fused AdamW at a constant rate. Time is that of the whole training call: compilation and the checkpoint that both leave at the end
included, imports, loading and tokenising not (they stand in the file). TRL's default, its `wrapped` packing and the sweep see the first
block of the rows alone, a third or less; every block has the same lengths. *Second half* leaves the start of every arm out.

Equal semantics: a prediction sees its own document alone, and every token is predicted once an epoch. TRL's `wrapped` packing lets
documents see one another and cuts them: it is measured beside, and no goal counts it.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import harness
from harness import TUNED, Arm, Bench

ROWS, BLOCK, RATE, MOST = 32, 10, 1e-3, 512  # of an update; updates of a block; the rate; tokens of a row
FOLDER = "TEMPER_BENCHMARK"
"""Environment: the folder with the model and the rows that `prepare` made."""


# ------------------------------------------------------------------------------------------- a model and its data


def prepare(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Writes a model and rows into the folder: text and completion, `first` (a block), `all` and `test`. location: log of the median."""
    from temper.models import io
    from temper.pretrain.shape import Llama
    from temper.pretrain.tokenizer import ByteBPE
    from temper.tasks.library import Library

    folder = Path(os.environ[FOLDER])
    texts = [row["text"] for row in Library(limit=settings["text"]).load("train").rows]
    tokenizer = ByteBPE(vocabulary=settings["vocabulary"])(texts)
    if len(tokenizer) != settings["vocabulary"]:
        raise ValueError(f"{len(tokenizer)} tokens learnt, {settings['vocabulary']} wanted; give more text")
    model = Llama(**settings["shape"])(tokenizer, 1)
    io.save_model(model, tokenizer, folder / "model")

    draw, stream = random.Random(0), _stream(texts, tokenizer)
    lengths = [
        min(settings.get("most", MOST), max(8, round(draw.lognormvariate(settings["location"], 0.75)))) for _ in range(settings["block"])
    ]
    rows = [row for _ in range(settings["blocks"]) for row in _pieces(draw.sample(lengths, len(lengths)), stream, tokenizer)]
    test = list(_pieces(draw.sample(lengths, len(lengths))[:64], stream, tokenizer))
    for name, some in (("first", rows[: len(lengths)]), ("all", rows), ("test", test)):
        for shape, columns in (("text", ("text",)), ("completion", ("prompt", "completion"))):
            lines = [json.dumps({column: row[column] for column in columns}) + "\n" for row in some]
            (folder / f"{shape}-{name}.jsonl").write_text("".join(lines), encoding="utf8")
        (folder / f"lengths-{name}.json").write_text(json.dumps([row["length"] for row in some]))
    return {"parameters": model.num_parameters(), "mean_length": sum(lengths) / len(lengths), "rows": len(rows)}


def _stream(texts: Sequence[str], tokenizer: Any) -> Iterator[int]:
    """Tokens without end, the texts in a random order each time."""
    draw = random.Random(1)
    while True:
        for text in draw.sample(texts, len(texts)):
            yield from tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _pieces(lengths: Sequence[int], stream: Iterator[int], tokenizer: Any) -> Iterator[dict[str, Any]]:
    """Rows of these lengths, the beginning and the end token counted, whose text gives their tokens back: whole and cut in two."""

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    for length in lengths:
        held = list(itertools.islice(stream, length - 2))
        while True:
            cut = len(held) * 3 // 5
            text, prompt, answer = (tokenizer.decode(some) for some in (held, held[:cut], held[cut:]))
            if prompt + answer == text and ids(text) == held and ids(prompt) == held[:cut]:
                break
            held = [*held[1:], next(stream)]
        yield {"text": text, "prompt": prompt, "completion": answer, "length": length}


# --------------------------------------------------------------------------------------------------------- the arms


def ours(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`temper.tune` as users call it; the clock is around what it calls to train."""
    begun = time.perf_counter()
    import temper
    from temper.models import io
    from temper.store import RECORD, Store
    from temper.tune import engine

    folder, clock = Path(os.environ[FOLDER]), {}
    engine.learn = clocked(engine.learn, clock, settings.get("profile", False))
    with tempfile.TemporaryDirectory(dir=folder) as store:
        result = temper.tune(
            str(folder / "model"),
            {"file": {"path": str(folder / f"{settings['rows']}.jsonl"), "test": str(folder / f"{_test(settings)}.jsonl")}},
            method="lora" if settings["lora"] else "full",
            store=Store(Path(store)),
            precision="bf16",
            optimizer={"adamw": {"lr": RATE, "weight_decay": 0.0}},
            schedule="constant",
            batching={"bucketed": {"size": settings.get("size", ROWS)}},
            max_length=settings.get("most", MOST),
            evaluate_every="none",
        )
        made = result.last
        curve = [json.loads(line) for line in (made.path / RECORD / "curve.jsonl").read_text().splitlines()]
        curve = [row for row in curve if "loss" in row]
        return {
            **_speeds(settings, clock["seconds"], [0.0, *(row["seconds"] for row in curve)], folder),
            "tokens": curve[-1]["tokens"],
            "tokens_an_update": curve[-1]["tokens"] / len(curve),
            "early_loss": _mean([row["loss"] for row in curve[: settings.get("early", BLOCK)]]),
            "loss": held_loss(io.load_model(made, device="cuda" if on_gpu() else "cpu"), settings, folder),
            "peak_memory": clock["peak_memory"],
            "before_seconds": round(clock["begun"] - begun, 3),
            "decisions": result.made[next(iter(result.made))].record["decisions"],
            **({"profile": clock["profile"]} if "profile" in clock else {}),
        }


def trl(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`SFTTrainer.train` with the settings given; whatever is not given is as TRL has it."""
    begun = time.perf_counter()
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    folder, clock, ends = Path(os.environ[FOLDER]), {}, []

    class Ends(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            if on_gpu():
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory(dir=folder) as out:
        config = SFTConfig(
            output_dir=out,
            num_train_epochs=1,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            max_length=settings.get("most", MOST),
            logging_steps=settings.get("early", BLOCK),
            report_to="none",
            disable_tqdm=True,
            use_cpu=not on_gpu(),
            **{"bf16": True, **settings["config"]},
        )
        rows = load_dataset("json", data_files=str(folder / f"{settings['rows']}.jsonl"), split="train", cache_dir=f"{out}/cache")
        model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, **settings.get("model", {}))
        trainer = SFTTrainer(
            model=model,
            args=config,
            train_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(folder / "model"),
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM") if settings["lora"] else None,
            callbacks=[Ends()],
        )
        tokens = sum(map(len, trainer.train_dataset["input_ids"]))
        clocked(trainer.train, clock, settings.get("profile", False))()
        logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        return {
            **_speeds(settings, clock["seconds"], [0.0, *(end - clock["begun"] for end in ends)], folder),
            "tokens": tokens,
            "tokens_an_update": tokens / trainer.state.global_step,
            "early_loss": logged[0],
            **({"loss": held_loss(_saved(trainer), settings, folder)} if settings["rows"].endswith("all") else {}),
            "peak_memory": clock["peak_memory"],
            "before_seconds": round(clock["begun"] - begun, 3),
            **({"profile": clock["profile"]} if "profile" in clock else {}),
        }


def on_gpu() -> bool:
    """Whether the arms train on a GPU: where there is one, unless `TEMPER_DEVICE` says cpu."""
    import torch

    return torch.cuda.is_available() and os.environ.get("TEMPER_DEVICE") != "cpu"


def clocked(train: Callable[..., Any], clock: dict[str, Any], profile: bool = False) -> Callable[..., Any]:
    """`train`, which leaves in `clock` when it began, its seconds, the peak memory so far (of the GPU where there is one), and where
    `profile` is asked for what took the time of the processors."""
    import contextlib

    import torch

    from temper.machine import peak_memory

    @functools.wraps(train)
    def timed(*given: Any, **named: Any) -> Any:
        clock["begun"] = time.perf_counter()
        with torch.profiler.profile() if profile else contextlib.nullcontext() as measured:
            found = train(*given, **named)
            if on_gpu():
                torch.cuda.synchronize()
        clock["seconds"] = time.perf_counter() - clock["begun"]
        clock["peak_memory"] = torch.cuda.max_memory_allocated() if on_gpu() else peak_memory()
        if measured is not None:
            clock["profile"] = measured.key_averages().table(sort_by=f"self_{'cuda' if on_gpu() else 'cpu'}_time_total", row_limit=40)
        return found

    return timed


def held_loss(model: Any, settings: Mapping[str, Any], folder: Path) -> float:
    """Mean cross-entropy of the held-out rows in float32, a row at a time: of text every token, of completions theirs and the end."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    total = count = 0.0
    with torch.no_grad():
        model.eval()
        for line in (folder / f"{_test(settings)}.jsonl").read_text(encoding="utf8").splitlines():
            row = json.loads(line)
            prompt = tokenizer(row["prompt"])["input_ids"] if "prompt" in row else []
            whole = tokenizer(row.get("text") or row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id]
            ids, first = torch.tensor([whole], device=model.device), max(1, len(prompt))
            logits = model(input_ids=ids).logits[0, first - 1 : -1].float()
            total += torch.nn.functional.cross_entropy(logits, ids[0, first:], reduction="sum").item()
            count += ids.shape[1] - first
    return total / count


def _saved(trainer: Any) -> Any:
    """The model as others would load it: without what the trainer has put around it."""
    from transformers import AutoModelForCausalLM

    trainer.save_model(folder := f"{trainer.args.output_dir}/last")
    return AutoModelForCausalLM.from_pretrained(folder).to(trainer.args.device)


def _test(settings: Mapping[str, Any]) -> str:
    return f"{settings['rows'].rpartition('-')[0]}-test"


def _speeds(settings: Mapping[str, Any], seconds: float, ends: Sequence[float], folder: Path) -> dict[str, float]:
    """Tokens a second of the whole call and of its second half; operations a second that the model's rows need.

    ends: seconds from the beginning after which updates were done, 0 first. LoRA's own small matrices are not counted.
    """
    from transformers import AutoConfig

    lengths = json.loads((folder / f"lengths-{settings['rows'].rpartition('-')[2]}.json").read_text())
    flops = harness.training_flops(AutoConfig.from_pretrained(folder / "model"), lengths, trained=0.0 if settings["lora"] else 1.0)
    half = (len(ends) - 1) // 2
    late = (len(ends) - 1 - half) / (len(ends) - 1) / (ends[-1] - ends[half])  # shares of the work a second
    return {
        "tokens_per_second": sum(lengths) / seconds,
        "steady_tokens_per_second": sum(lengths) * late,
        "seconds": round(seconds, 3),
        "flops": flops / seconds,
        "steady_flops": flops * late,
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


ARMS = {"prepare": prepare, "ours": ours, "trl": trl}


# -------------------------------------------------------------------------------------------------- the peer's best


def batch(size: int, **more: Any) -> dict[str, Any]:
    """`size` rows at a time, as many times as an update needs."""
    return {"per_device_train_batch_size": size, "gradient_accumulation_steps": ROWS // size, **more}


BY_LENGTH = {"train_sampling_strategy": "group_by_length"}
NO_CHECKPOINTING = {"gradient_checkpointing": False}
DEFAULT = batch(8)
"""TRL's own, in as many micro-batches as an update of 32 rows needs."""


def packing(strategy: str, rows: int) -> dict[str, Any]:
    """Rows of 512 tokens: 8 of them hold about as many tokens as 32 documents."""
    sizes = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 8 // rows}
    return {"packing": True, "packing_strategy": strategy, **sizes}


BATCHES: dict[str, dict[str, Any]] = {
    "8 rows x 4": batch(8, **NO_CHECKPOINTING),
    "1 row x 32": batch(1, **NO_CHECKPOINTING),
    "8 rows x 4, by length": batch(8, **BY_LENGTH, **NO_CHECKPOINTING),
    "32 rows x 1, by length": batch(32, **BY_LENGTH, **NO_CHECKPOINTING),
    "padding-free 8 rows x 4": batch(8, padding_free=True, **NO_CHECKPOINTING),
    "packing bfd 8 x 1": {**packing("bfd", 8), **NO_CHECKPOINTING},
    "packing bfd 1 x 8": {**packing("bfd", 1), **NO_CHECKPOINTING},
    "packing bfd_split 1 x 8": {**packing("bfd_split", 1), **NO_CHECKPOINTING},
    "packing wrapped 8 x 1": {**packing("wrapped", 8), **NO_CHECKPOINTING},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "tuned malloc": {"environment": TUNED},
    "attention eager": {"model": {"attn_implementation": "eager"}},
    "float32": {"config": {"bf16": False}},
    "gradient checkpointing": {"config": {"gradient_checkpointing": True}},
    "torch_compile": {"config": {"torch_compile": True}},
    "a loader process": {"config": {"dataloader_num_workers": 1}},
    "chunked_nll": {"config": {"loss_type": "chunked_nll"}},
}
"""What is tried on the best batches, one after the other; what is faster stays."""


def equal(arm: Arm) -> bool:
    """Whether an arm trains on the same objective as ours."""
    return "wrapped" not in arm.says


def peer(settings: Mapping[str, Any], says: str, config: Mapping[str, Any]) -> Arm:
    return Arm("trl", {**settings, "config": dict(config)}, says=says)


def with_option(arm: Arm, name: str) -> Arm:
    """An arm with one of `OPTIONS` beside what it has."""
    option = OPTIONS[name]
    settings = {**arm.settings, "config": {**arm.settings["config"], **option.get("config", {})}}
    settings["model"] = {**arm.settings.get("model", {}), **option.get("model", {})}
    return Arm(arm.function, settings, {**arm.environment, **option.get("environment", {})}, f"{arm.says}, {name}")


def search(bench: Bench, name: str, arms: Sequence[Arm], options: Sequence[str]) -> tuple[Arm, Arm]:
    """The fastest of these arms with the options that make it faster; and `wrapped` packing with the same options."""
    best, adopted = bench.sweep(name, arms, "tokens_per_second", among=equal), []
    for option in options:
        if bench.sweep(name, [best, tried := with_option(best, option)], "tokens_per_second", among=equal) is tried:
            best = tried
            adopted.append(option)
    wrapped = next(arm for arm in arms if not equal(arm))
    return best, functools.reduce(with_option, adopted, wrapped)


# ------------------------------------------------------------------------------------------------------- in order

BRIEF = [name for name in BATCHES if name.endswith("by length") or name in ("1 row x 32", "packing bfd 1 x 8", "packing wrapped 8 x 1")]
WORKLOADS: dict[str, dict[str, Any]] = {
    "full": {"title": "Supervised tuning, all weights", "batches": list(BATCHES), "options": list(OPTIONS)},
    "lora": {"title": "Supervised tuning, LoRA of rank 8 on all linear layers", "lora": True, "block": 5},
    "completion": {"title": "Supervised tuning, all weights, completions alone learnt", "shape": "completion"},
    "vocabulary": {"title": "Supervised tuning, all weights, vocabulary 32,000", "vocabulary": 32_000, "block": 4, "share": 0.5},
}
"""What is not said: text, all weights, vocabulary 4,096, as many updates as asked for; of the batches `BRIEF`, of the options the first
three."""


def measure(bench: Bench, name: str) -> None:
    """Makes a workload's model and rows, finds TRL's best setting, compares."""
    asked, quick = WORKLOADS[name], bench.given.quick
    lora, shape = asked.get("lora", False), asked.get("shape", "text")
    block = 1 if quick else asked.get("block", BLOCK)
    made = {
        "vocabulary": 400 if quick else asked.get("vocabulary", 4096),
        "shape": {"hidden": 32, "layers": 1, "heads": 2} if quick else {"hidden": 256, "layers": 4},
        "location": 3.0 if quick else 4.6,
        "text": 100_000 if quick else 12_000_000,
        "block": ROWS * block,
        "blocks": 2 if quick else max(1, round(bench.given.updates * asked.get("share", 1.0) / block)),
    }
    with tempfile.TemporaryDirectory(prefix="temper-benchmark-") as folder:
        os.environ[FOLDER] = folder
        found = harness.once(bench.given.file, Arm("prepare", made))["figures"]
        harness.say(f"{asked['title']}: {found['rows']:,} rows of {found['mean_length']:.0f} tokens, {found['parameters']:,} parameters")
        first = {"rows": f"{shape}-first", "lora": lora, "early": block}
        whole = {**first, "rows": f"{shape}-all"}
        default = peer(first, "as TRL has it: 8 rows x 4, gradient checkpointing", DEFAULT)
        if bench.given.profile:
            arm = Arm("ours", first) if bench.given.profile == "ours" else default
            arm = Arm(arm.function, {**arm.settings, "profile": True})
            sys.stdout.write(harness.once(bench.given.file, arm)["figures"]["profile"] + "\n")
            return
        batches, options = asked.get("batches", BRIEF), asked.get("options", list(OPTIONS)[:3])
        if quick:
            batches, options = batches[-1:], options[:1]
        arms = [default, *(peer(first, one, BATCHES[one]) for one in batches)]
        best, wrapped = search(bench, name, arms, options)
        bench.compare(
            asked["title"],
            {
                "ours": Arm("ours", whole, says="as Temper has it"),
                "default": default,
                "best": Arm("trl", {**best.settings, **whole}, best.environment, best.says),
                "wrapped": wrapped,
            },
            "tokens_per_second",
            unit="tokens/s",
            goals={"default": 4.0, "best": 2.5},
            memory="best",
            equal={"loss": 0.02, "early_loss": 0.03, "tokens_an_update": 0.05},
            also={"second half": "steady_"},
            about={**made, **found, "rows_an_update": ROWS, "rate": RATE},
        )


def main() -> None:
    ask = harness.options(__doc__, __file__)
    ask.add_argument("--workload", nargs="+", choices=list(WORKLOADS), default=["full", "lora"], help="which (default: full lora)")
    ask.add_argument("--updates", type=int, default=30, help=f"of {ROWS} rows each, in whole blocks of {BLOCK} (default: 30)")
    ask.add_argument("--profile", choices=("ours", "trl"), help="print where this arm's time goes, and no more")
    given = harness.begin(ask, ARMS)
    bench = Bench(given)
    for name in given.workload:
        measure(bench, name)


if __name__ == "__main__":
    main()
