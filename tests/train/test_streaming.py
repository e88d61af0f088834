"""Plans over streams: the batches of blocks one after another, taken up anywhere without what lies before."""

from __future__ import annotations

import csv
import itertools
import json
from types import SimpleNamespace

import datasets
import numpy
import pyarrow.parquet
import pytest
import torch

from temper.context import Stream
from temper.parts import Problem
from temper.tasks import files
from temper.tasks.files import File
from temper.tasks.rows import Rows
from temper.train.batching import BestFit, Bucketed, Decomposed, Packed, Padded, StreamedPlan, planned
from temper.train.examples import Streamed, encode
from temper.train.feed import InOrder, RandomSubset, Shuffled

WORDS = ["the", "forecast", "of", "a", "cat", "dog", "rain", "and"]
PARTS = {
    "padded": Padded(size=3, accumulate=2),
    "bucketed": Bucketed(size=7, tokens=200),
    "packed": Packed(length=32, size=2, accumulate=2),
    "separate": Packed(length=32, size=3, documents="separate"),
    "best-fit": BestFit(length=64, size=2, accumulate=2),
    "decomposed": Decomposed(longest=32, shortest=4, tokens=64, cycles=2),
}
STREAM = Stream("0|test|batching")


def texts(count):
    draw = numpy.random.default_rng(3)
    return [{"text": f"{number}: " + " ".join(draw.choice(WORDS, int(draw.integers(2, 30))))} for number in range(count)]


ROWS = texts(70)


@pytest.fixture
def jsonl(tmp_path):
    file = tmp_path / "big.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def source(path, **settings):
    return File(**{"path": str(path), "streaming": True, "buffer": 20, "test_count": 5, **settings})


def made(file, tokenizer, part, feed=None):
    return planned(part, encode(file.load("train"), tokenizer, max_length=None), STREAM, feed or Shuffled())


def same(one, two):
    fields = ("input_ids", "supervised", "attention_mask", "position_ids")
    for a, b in zip(one, two, strict=True):
        assert (a.rows, a.targets, a.tokens, a.update, list(a.keys)) == (b.rows, b.targets, b.tokens, b.update, list(b.keys))
        for name in fields:
            assert (getattr(a, name) is None) == (getattr(b, name) is None)
            assert getattr(a, name) is None or torch.equal(getattr(a, name), getattr(b, name))


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("feed", [Shuffled(), RandomSubset(fraction=0.5)], ids=["shuffled", "subset"])
def test_a_stream_is_its_blocks_one_after_another(part, feed, jsonl, tokenizer):
    """Beside the blocks batched in memory; 65 rows in blocks of 20 are four blocks a pass."""
    plan, number = made(source(jsonl), tokenizer(), part, feed), 0
    for block, begin in enumerate([5, 25, 45, 65, 5, 25]):
        rows = Rows("text", ROWS[begin : begin + 20], "big.jsonl", "")
        alone = encode(rows, tokenizer(), max_length=None)
        for one in alone:
            object.__setattr__(one, "source", one.source + begin - 5)  # rows of the stream are counted from its first
        inner = part(alone, Stream(f"{STREAM.root}|{block}"), feed)
        for i in range(inner.updates_per_epoch):
            batches = [type(one)(**{**vars(one), "update": number}) for one in inner.update(i)]
            same(plan.update(number), batches)
            number += 1


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_a_plan_is_taken_up_at_any_update(part, jsonl, tokenizer):
    """From a state that went through JSON, also where the plan has run ahead, and across the end of the stream."""
    whole = made(source(jsonl), tokenizer(), part)
    count = 40
    seen = [whole.update(i) for i in range(count)]
    states = [json.loads(json.dumps(whole.state_dict(i))) for i in range(count)]
    assert sum(state["row"] == 0 for state in states[1:]) > 1  # the premise: the stream began again
    for i in range(0, count, 3):
        again = made(source(jsonl), tokenizer(), part)
        again.load_state_dict(states[i])
        for j in range(i, min(i + 4, count)):
            same(again.update(j), seen[j])
        assert again.state_dict(i) == states[i] == json.loads(json.dumps(again.state_dict(i)))
        if i == 21:
            with pytest.raises(Problem, match="what lies before is not read"):
                again.update(states[i]["update"] - 1)


def test_a_state_is_there_before_the_next_block_is_asked_for(jsonl, tokenizer):
    plan, again = (made(source(jsonl), tokenizer(), Padded(size=20)) for _ in range(2))
    plan.update(0)  # a block is one update
    state = plan.state_dict(1)
    assert (state["update"], state["block"], state["row"]) == (1, 1, 20)
    again.load_state_dict(json.loads(json.dumps(state)))
    same(again.update(1), plan.update(1))


def test_what_lies_before_is_not_read_again(jsonl, tokenizer, monkeypatch):
    plan = made(source(jsonl), tokenizer(), Padded(size=5))
    plan.update(9)
    state, (expected,) = plan.state_dict(10), [plan.update(10)]
    again = made(source(jsonl), tokenizer(), Padded(size=5))
    again.load_state_dict(state)
    lines = []
    monkeypatch.setattr(files, "_json", lambda raw, where: lines.append(where) or json.loads(raw))
    same(again.update(10), expected)
    again.update(12)  # the last block
    assert lines[0] == "big.jsonl, line 46"
    assert len(lines) <= 25


def formats(folder):
    """The same rows in every format that streams."""
    plain = [row["text"] for row in ROWS]
    path = folder / "rows.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["text"], *([f"{text}\n," if n % 3 else text] for n, text in enumerate(plain))])
    yield path
    path = folder / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": plain}), path, row_group_size=15)
    yield path
    path = folder / "parts"
    path.mkdir()
    for name, some in itertools.groupby(range(70), key=lambda n: n // 16):
        (path / f"{name}.jsonl").write_text("".join(json.dumps({"text": plain[n]}) + "\n\n" for n in some))
    yield path
    path = folder / "documents"
    path.mkdir()
    for number, text in enumerate(plain):
        (path / f"{number:03}.txt").write_text(text)
    yield path
    path = folder / "saved"
    datasets.Dataset.from_list(ROWS).save_to_disk(path)
    yield path


def test_every_format_streams_and_is_taken_up(tmp_path, tokenizer):
    for path in formats(tmp_path):
        file = source(path)
        loaded = file.load("train").rows
        whole = File(path=str(path))
        expected = [row for _, row in sorted((int(r["text"].split(":")[0]), r) for s in ("train", "test") for r in whole.load(s).rows)]
        assert loaded[:100] == expected[5:], path.name
        assert file.load("test").rows == expected[:5]
        for begin in (1, 15, 29, 30, 31, 64):
            reading = loaded.read(None)
            *_, (_, after) = itertools.islice(reading, begin)
            state = json.loads(json.dumps(after()))
            assert [row for row, _ in loaded.read(state)] == expected[5 + begin :], (path.name, begin)


def test_a_data_set_of_the_hub_streams_and_is_taken_up(jsonl, tokenizer, monkeypatch):
    def load_dataset(repository, name, split, revision, streaming):
        assert (repository, split, revision, streaming) == ("owner/big", "train", "a" * 40, True)
        return datasets.load_dataset("json", data_files=str(jsonl), split="train", streaming=True)

    monkeypatch.setattr(files, "datasets", SimpleNamespace(load_dataset=load_dataset))
    file = source("hub:owner/big", revision="a" * 40)
    whole = made(file, tokenizer(), Bucketed(size=6))
    local = made(source(jsonl), tokenizer(), Bucketed(size=6))
    for i in range(16):
        same(whole.update(i), local.update(i))
    for i in (3, 5, 11):
        again = made(file, tokenizer(), Bucketed(size=6))
        again.load_state_dict(json.loads(json.dumps(whole.state_dict(i))))
        same(again.update(i), local.update(i))


def test_rows_without_anything_to_learn_make_no_empty_updates(tmp_path, tokenizer):
    file = tmp_path / "asked.jsonl"
    rows = [{"prompt": "the " * (1 if n // 10 % 2 == 0 else 20), "completion": str(n)} for n in range(35)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    held = source(file, buffer=10, test=str(file))  # held-out data of its own, so that all rows are trained on
    examples = encode(held.load("train"), tokenizer(), max_length=12)
    plan = planned(Padded(size=5), examples, STREAM, InOrder())
    sources = [plan.update(i)[0].rows for i in range(6)]
    assert sources == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [20, 21, 22, 23, 24], [25, 26, 27, 28, 29], [0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    again = planned(Padded(size=5), encode(held.load("train"), tokenizer(), max_length=12), STREAM, InOrder())
    again.load_state_dict(plan.state_dict(3))
    assert again.update(3)[0].rows == sources[3]


def test_what_a_stream_says_of_itself(jsonl, tokenizer):
    examples = encode(source(jsonl).load("train"), tokenizer(), max_length=None)
    assert isinstance(examples, Streamed)
    assert len(examples) == examples.rows == 20
    assert examples.report.startswith("a stream, read 20 rows at a time; of it the first 20 rows -> 20 examples of ")
    plan = planned(Padded(size=5), examples, STREAM)
    assert isinstance(plan, StreamedPlan)
    assert plan.updates_per_epoch is None
    assert plan.tokens_per_update == examples.tokens / 4
    layouts = planned(Bucketed(size=5), examples, STREAM).layouts
    assert list(layouts) == ["rows", "packed", "flat"]
    rows, packed = layouts["rows"].update(2), layouts["packed"].update(2)
    assert sorted(row for batch in rows for row in batch.rows) == sorted(row for batch in packed for row in batch.rows)
    assert packed[0].attention_mask is None
    assert planned(Padded(size=5), list(examples), STREAM).updates_per_epoch == 4


def test_a_bad_row_far_down_is_named(jsonl, tokenizer):
    with jsonl.open("a") as file:
        file.write('{"txt": 1}\n')
    plan = made(source(jsonl), tokenizer(), Padded(size=20))
    for i in range(3):
        plan.update(i)
    with pytest.raises(Problem, match=r"big\.jsonl, line 71: no column `text`"):
        plan.update(3)
