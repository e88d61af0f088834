"""Examples -> micro-batches by update number: nothing lost, nothing twice, nothing that depends on the past."""

from __future__ import annotations

from collections import Counter

import numpy
import pytest
import torch

from temper.parts import Problem
from temper.train.batching import Bucketed, Packed, Padded, collate
from temper.train.examples import Example

PLANS = {
    "padded": Padded(size=3, accumulate=2),
    "bucketed": Bucketed(size=5, tokens=40),
    "joined": Packed(length=16, size=2, accumulate=2),
    "separate": Packed(length=16, size=2, accumulate=2, documents="separate"),
}


def same(one, two):
    return len(one) == len(two) and all(
        a.rows == b.rows and torch.equal(a.input_ids, b.input_ids) and torch.equal(a.supervised, b.supervised) for a, b in zip(one, two)
    )


def epoch(plan, number=0):
    count = plan.updates_per_epoch
    return [batch for update in range(number * count, (number + 1) * count) for batch in plan.update(update)]


def test_collate_pads_on_the_right_and_never_learns_padding_or_the_first_token():
    one = Example(numpy.array([5, 6, 7], numpy.int32), numpy.ones(3, bool), 4)
    two = Example(numpy.array([8, 9], numpy.int32), numpy.array([True, False]), 2)
    batch = collate([one, two], update=3)
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.supervised.tolist() == [[False, True, True], [False, False, False]]
    assert (batch.targets, batch.tokens, batch.rows, batch.update) == (2, 5, [4, 2], 3)
    assert batch.input_ids.dtype == torch.int64
    assert set(batch.inputs) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("part", PLANS.values(), ids=PLANS)
def test_an_update_depends_on_its_number_alone(part, examples, stream):
    made = examples()
    walked, jumped = part(made, stream), part(made, stream)
    seen = [walked.update(i) for i in range(2 * walked.updates_per_epoch + 1)]
    for i in reversed(range(len(seen))):
        assert same(jumped.update(i), seen[i])
    assert not same(seen[0], seen[walked.updates_per_epoch])  # another epoch, another order
    assert all(batch.update == i for i, update in enumerate(seen) for batch in update)


@pytest.mark.parametrize("name", ["padded", "bucketed"])
def test_every_epoch_holds_every_example_once(name, examples, stream):
    made = examples()
    plan = PLANS[name](made, stream)
    for number in range(2):
        rows = Counter(row for batch in epoch(plan, number) for row in batch.rows)
        assert rows == Counter(range(len(made)))
        assert sum(batch.targets for batch in epoch(plan, number)) == sum(one.targets for one in made)


def test_padded_has_the_size_and_the_accumulation_asked_for(examples, stream):
    plan = PLANS["padded"](examples(14), stream)
    assert plan.updates_per_epoch == 3
    assert [[len(batch.rows) for batch in plan.update(i)] for i in range(3)] == [[3, 3], [3, 3], [2]]


def test_bucketed_draws_what_padded_draws_and_keeps_the_budget(examples, stream):
    made = examples(64)
    bucketed, padded = Bucketed(size=16, tokens=60)(made, stream), Padded(size=16)(made, stream)
    paddings = []
    for i in range(4):
        groups, (whole,) = bucketed.update(i), padded.update(i)
        assert sorted(row for batch in groups for row in batch.rows) == sorted(whole.rows)
        assert all(batch.input_ids.numel() <= 60 for batch in groups)
        lengths = [batch.input_ids.shape[1] for batch in groups]
        assert lengths == sorted(lengths, reverse=True)
        paddings.append((sum(batch.input_ids.numel() for batch in groups), whole.input_ids.numel()))
    assert sum(one for one, _ in paddings) < 0.8 * sum(two for _, two in paddings)


def test_an_example_beyond_the_budget_stands_alone(examples, stream):
    groups = Bucketed(size=8, tokens=4)(examples(8), stream).update(0)
    assert [len(batch.rows) for batch in groups] == [1] * 8


@pytest.mark.parametrize("part", [Padded(size=2, accumulate=2), Bucketed(size=4, tokens=50)])
def test_the_two_answers_of_a_preference_stay_together(part, examples, stream):
    made = examples(14, side=True)
    chosen = {example.source: example for example in made[::2]}
    for batch in epoch(part(made, stream)):
        assert batch.rows[::2] == batch.rows[1::2]
        for row, source in enumerate(batch.rows[::2]):
            assert batch.input_ids[2 * row, : len(chosen[source])].tolist() == chosen[source].tokens.tolist()


def test_packing_refuses_preferences(examples, stream):
    with pytest.raises(Problem, match="use `padded` or `bucketed`"):
        Packed()(examples(side=True), stream)


@pytest.mark.parametrize("part", PLANS.values(), ids=PLANS)
def test_no_examples_is_an_error(part, stream):
    with pytest.raises(Problem, match="at least one"):
        part([], stream)


def test_packing_predicts_every_token_of_the_stream_once(examples, stream):
    made = examples(14)
    plan = PLANS["joined"](made, stream)
    for number in range(2):
        batches = epoch(plan, number)
        rows = [row for batch in batches for row in zip(batch.input_ids.tolist(), batch.supervised.tolist(), strict=True)]
        assert all(len(ids) == 16 for ids, _ in rows)
        assert sum(batch.targets for batch in batches) == sum(map(len, made)) - 1
        predicted = [token for ids, flags in rows for token, flag in zip(ids, flags) if flag]
        whole = [rows[0][0][0], *predicted]
        documents = Counter(tuple(one.tokens.tolist()) for one in made)
        while whole:  # the stream is the documents in some order
            found = next(one for one in documents if documents[one] and tuple(whole[: len(one)]) == one)
            documents[found] -= 1
            whole = whole[len(found) :]
        assert not +documents


def test_packing_marks_padding_in_the_last_row_alone(examples, stream):
    batches = epoch(PLANS["joined"](examples(14), stream))
    masks = torch.cat([batch.attention_mask for batch in batches])
    assert masks[:-1].all()
    assert 0 < masks[-1].sum() < 16
    assert not (torch.cat([batch.supervised for batch in batches]) & (masks == 0)).any()


def test_separate_documents_start_their_positions_anew(stream):
    made = [Example(numpy.full(length, 10 + length, numpy.int32), numpy.ones(length, bool), length) for length in (3, 5, 9)]
    (batch,) = Packed(length=8, size=3, documents="separate")(made, stream).update(0)
    assert batch.attention_mask is None
    ids, positions = batch.input_ids, batch.position_ids
    begins = positions == 0
    assert begins[:, 0].all()
    assert not (batch.supervised & begins).any()  # nothing of a document predicts its first token
    changes = ids[:, 1:] != ids[:, :-1]
    assert torch.equal(changes, begins[:, 1:])
    assert torch.equal(positions[:, 1:][~changes], positions[:, :-1][~changes] + 1)
    assert batch.targets == 2 + 4 + 8
    assert batch.tokens == int((ids > 0).sum())


def test_rows_of_a_packed_batch_are_those_within(examples, stream):
    made = examples(14)
    for batch in epoch(PLANS["joined"](made, stream)):
        held = set(batch.input_ids[batch.attention_mask == 1].tolist())
        assert all(set(made[row].tokens.tolist()) & held for row in batch.rows)
        assert len(batch.rows) == len(set(batch.rows))
