from __future__ import annotations

import dataclasses

import pytest
import torch
from align_toys import preferences
from safetensors.torch import load_file

from temper.align.layout import response_logprobs
from temper.align.likelihood import Whole
from temper.align.reference import Remembered, Start, passes
from temper.align.scores import compare
from temper.context import Context
from temper.models.deltas import prepare
from temper.models.deltas.base import AsLoaded
from temper.models.deltas.delta import Lora
from temper.models.deltas.init import Default
from temper.parts import Problem
from temper.tasks.rows import Rows
from temper.train.batching import collate
from temper.train.examples import encode


@pytest.fixture
def examples(tokenizer):
    return encode(Rows("preference", preferences(), "toy", "a test"), tokenizer, max_length=64)


def remembered(folder, policy, examples, layout="two rows") -> Remembered:
    made = Start().start(Context.scratch(folder))
    made.prepare(policy, examples, "float32", layout)
    return made


def test_tokens_of_the_response_and_nothing_else(llama, examples):
    batch = collate(examples[:6])
    with torch.no_grad():
        made = response_logprobs(llama, batch)
        full = llama(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.log_softmax(-1)
    assert torch.equal(made != 0, batch.supervised)
    for row, place in batch.supervised.nonzero().tolist():
        assert made[row, place].item() == pytest.approx(full[row, place - 1, batch.input_ids[row, place]].item(), abs=1e-6)
    each = full[:, :-1].gather(-1, batch.input_ids[:, 1:, None])[..., 0] * batch.supervised[:, 1:]
    torch.testing.assert_close(Whole()(made, batch.supervised), each.sum(-1))


def test_divergence_at_step_0_is_exactly_0_on_the_same_batch(llama, examples):
    batch = collate(examples[:8])
    with torch.no_grad():
        before = response_logprobs(llama, batch)
        model = prepare(llama, None, Lora(), Default(), AsLoaded(), seed=3)
        one = compare(response_logprobs(model, batch), before, batch.supervised, Whole())
    assert torch.equal(one.margin, torch.zeros(4))
    assert torch.equal(one.drift, torch.zeros(4))


@pytest.mark.parametrize("layout", ["two rows", "one row"])
def test_divergence_at_step_0_from_what_was_kept(tmp_path, llama, examples, layout):
    kept = remembered(tmp_path, llama, examples, layout)
    with torch.no_grad():
        for size in (2, 6, 48):  # other batches than those that it was computed in
            batch = collate(examples[-size:])
            one = compare(response_logprobs(llama, batch), kept(batch), batch.supervised, Whole())
            assert one.drift.max() <= 1e-10
            assert one.margin.abs().max() <= 1e-5


def test_computed_once(tmp_path, llama, examples):
    first = remembered(tmp_path, llama, examples)
    stored = load_file(tmp_path / "work" / "reference.safetensors")
    assert [len(one) for one in stored.values()] == [examples.supervised]
    batch = collate(examples[4:10])
    second = remembered(tmp_path, None, examples)  # there is no policy to ask
    assert torch.equal(first(batch), second(batch))


def test_another_runs_are_not_taken(tmp_path, llama, examples):
    remembered(tmp_path, llama, examples)
    fewer = remembered(tmp_path, llama, examples[:10])
    assert [len(one) for one in load_file(tmp_path / "work" / "reference.safetensors").values()] == [
        sum(one.targets for one in examples[:10])
    ]
    with pytest.raises(Problem, match="row 9 was not among the examples"):
        fewer(collate(examples[16:18]))
    with pytest.raises(ValueError, match="could not be told apart"):
        remembered(tmp_path / "twice", llama, [*examples[:2], *examples[:2]])


def test_passes_see_every_pair_once_and_whole(tmp_path, llama, examples):
    many = [dataclasses.replace(one, source=one.source + 24 * turn) for turn in range(25) for one in examples]
    batches = list(passes(llama, many, Context.scratch(tmp_path)))
    assert sorted(source for batch in batches for source in batch.rows) == sorted(one.source for one in many)
    assert all(batch.rows[0::2] == batch.rows[1::2] for batch in batches)
    assert all(batch.input_ids.numel() <= 2**13 for batch in batches)
