"""Data to packed rows: 10 MB of text -> ids -> rows of 1,024 tokens that hold whole documents side by side.

    python benchmarks/packing.py [--pairs 5]

The text is this Python's own library in pieces, gone through again until there is enough of it; the tokenizer a byte-level BPE of 4,096
tokens learnt from it, which puts a token before and after every document. Timed is everything from texts in memory to rows: for ours to
the batches of a whole epoch, as tensors; for TRL to its packed dataset, from which batches are yet to be made.

trl: the dataset preparation of SFTTrainer with packing, its defaults but `bfd_split`, which as ours keeps every token. map: the same by
hand, `datasets.map` in batches and `trl.pack_dataset`, at the best of the batch sizes and process counts tried. Both pack a batch of
documents at a time, ours all at once. Every arm has the threads that the tokenizers library takes by itself: one a core. On up to three
cores ours asks the tokenizer for every word once (`temper.train.recall`); `RAYON_NUM_THREADS=4` shows it without.
"""

from __future__ import annotations

import itertools
import time
from typing import Any

import harness
from harness import Arm

LENGTH = 1024


def texts(size: int) -> list[str]:
    """About `size` bytes of text, always the same of one Python."""
    from temper.tasks.library import Library

    rows = [row["text"] for split in ("train", "test") for row in Library(limit=10**9).load(split).rows]
    found, held = [], 0
    for text in itertools.cycle(rows):
        if held >= size:
            return found
        found.append(text)
        held += len(text.encode())
    raise AssertionError


def tokenizer_of(some: list[str]) -> Any:
    from temper.pretrain.tokenizer import ByteBPE

    made = ByteBPE(vocabulary=4096)(some[::5])
    made(some[:64])  # what a tokenizer does once is not part of it
    return made


def told(seconds: float, some: list[str], rows: int, tokens: int) -> dict[str, float]:
    size = sum(len(text.encode()) for text in some)
    return {"megabytes_per_second": size / seconds / 1e6, "timed": seconds, "rows": rows, "tokens": tokens, "documents": len(some)}


def ours(settings: dict[str, Any]) -> dict[str, float]:
    import torch  # noqa: F401  (imports are not timed)

    from temper.context import Stream
    from temper.tasks.rows import Rows
    from temper.train.batching import BestFit
    from temper.train.examples import encode

    some = texts(settings["size"])
    tokenizer = tokenizer_of(some)
    rows = Rows("text", [{"text": text} for text in some], "library", "this Python's library")
    begun = time.perf_counter()
    plan = BestFit(length=LENGTH)(encode(rows, tokenizer, max_length=None), Stream("0"))
    batches = [batch for i in range(plan.updates_per_epoch or 0) for batch in plan.update(i)]
    seconds = time.perf_counter() - begun
    return told(seconds, some, sum(len(one.input_ids) for one in batches), sum(one.tokens for one in batches))


def trl(settings: dict[str, Any]) -> dict[str, float]:
    import tempfile

    import datasets
    from trl import SFTConfig, SFTTrainer

    from temper.pretrain.shape import Llama

    datasets.disable_caching()
    datasets.disable_progress_bars()
    some = texts(settings["size"])
    tokenizer = tokenizer_of(some)
    model = Llama(hidden=32, layers=1, heads=2)(tokenizer, 0)
    with tempfile.TemporaryDirectory() as folder:
        asked = SFTConfig(output_dir=folder, packing=True, packing_strategy="bfd_split", max_length=LENGTH, report_to=[], use_cpu=True)
        tiny = datasets.Dataset.from_dict({"text": some[:8]})
        trainer = SFTTrainer(model, args=asked, train_dataset=tiny, processing_class=tokenizer)
        data = datasets.Dataset.from_dict({"text": some})
        begun = time.perf_counter()
        packed = trainer._prepare_dataset(data, tokenizer, asked, True, None, "train")
        seconds = time.perf_counter() - begun
        return told(seconds, some, len(packed), sum(map(sum, packed["seq_lengths"])))


def mapped(settings: dict[str, Any]) -> dict[str, float]:
    import datasets
    from trl.data_utils import pack_dataset

    datasets.disable_caching()
    datasets.disable_progress_bars()
    some = texts(settings["size"])
    tokenizer, how = tokenizer_of(some), {"batch_size": settings["batch_size"], "num_proc": settings["num_proc"]}

    def ids(batch: dict[str, list[str]]) -> dict[str, Any]:
        return {"input_ids": tokenizer([text + tokenizer.eos_token for text in batch["text"]], return_attention_mask=False)["input_ids"]}

    data = datasets.Dataset.from_dict({"text": some})
    begun = time.perf_counter()
    packed = pack_dataset(data.map(ids, batched=True, remove_columns=["text"], **how), LENGTH, "bfd_split", map_kwargs=how)
    seconds = time.perf_counter() - begun
    return told(seconds, some, len(packed), sum(map(sum, packed["seq_lengths"])))


ARMS = {one.__name__: one for one in (ours, trl, mapped)}


def main() -> None:
    given = harness.begin(harness.options(__doc__, __file__), ARMS)
    bench = harness.Bench(given)
    size = {"size": 300_000 if given.quick else 10_000_000}
    ways = [(1000, None)] if given.quick else [(1000, None), (4000, None), (10**6, None), (1000, 2)]
    tried = [
        Arm("mapped", {**size, "batch_size": batch, "num_proc": many}, says=f"batches of {batch}, {many or 1} processes")
        for batch, many in ways
    ]
    best = bench.sweep("map", tried, "megabytes_per_second")
    bench.compare(
        f"{size['size'] / 1e6:g} MB of text to packed rows of {LENGTH} tokens",
        {"ours": Arm("ours", size), "trl": Arm("trl", size, says="SFTTrainer's preparation"), "map": best},
        "megabytes_per_second",
        unit="MB/s",
        goals={"trl": 3.0, "map": 1.5},
        equal={"tokens": 0.0},
    )
    bench.close()


if __name__ == "__main__":
    main()
