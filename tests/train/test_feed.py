"""Epochs' orders: today's shuffle bit for bit, and random subsets that use up the data evenly."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch

from temper.context import Stream
from temper.parts import Problem
from temper.train.batching import BestFit, Bucketed, Decomposed, Packed, Padded
from temper.train.feed import InOrder, RandomSubset, Shuffled

STREAM = Stream("0|test|batching")
BATCHINGS = [
    Padded(size=3),
    Bucketed(size=5, tokens=40),
    Packed(length=16, size=2),
    BestFit(length=24, size=2),
    Decomposed(longest=16, shortest=4, tokens=16, cycles=2),
]


def test_shuffled_is_torch_s_permutation_of_the_epoch_s_generator():
    for epoch in range(3):
        assert Shuffled()(50, STREAM, epoch) == torch.randperm(50, generator=STREAM.generator(epoch)).tolist()


def test_in_order():
    assert InOrder()(4, STREAM, 7) == [0, 1, 2, 3]


@pytest.mark.parametrize(("count", "fraction"), [(40, 0.1), (40, 0.25), (37, 0.3), (10, 0.7), (7, 0.9), (100, 0.01)])
def test_without_replacement_every_example_comes_once_in_every_one_over_fraction_epochs(count, fraction):
    feed, seen = RandomSubset(fraction=fraction), Counter()
    size = round(fraction * count)
    for epoch in range(25):
        held = feed(count, STREAM, epoch)
        assert len(set(held)) == len(held) == size
        seen.update(held)
        times = [seen[index] for index in range(count)]
        assert sum(times) == size * (epoch + 1)
        assert max(times) - min(times) <= 1
        if (epoch + 1) * size % count == 0:
            assert max(times) == min(times)
    assert feed(count, STREAM, 3) != feed(count, STREAM, 4)


def test_the_whole_as_a_subset_is_the_ordinary_run():
    for epoch in range(4):
        assert RandomSubset(fraction=1.0)(33, STREAM, epoch) == Shuffled()(33, STREAM, epoch)


def test_with_replacement_epochs_are_independent():
    feed = RandomSubset(fraction=0.5, replacement=True)
    epochs = [feed(20, STREAM, epoch) for epoch in range(200)]
    assert all(len(set(held)) == 10 for held in epochs)
    both = sum(len(set(one) & set(two)) for one, two in itertools.pairwise(epochs)) / 199
    assert 4.5 < both < 5.5  # half of an epoch's examples were in the one before; without replacement none


@pytest.mark.parametrize("part", BATCHINGS, ids=lambda one: type(one).__name__)
def test_every_batching_takes_every_feed(part, examples):
    made = examples(30)
    whole = part(made, STREAM)
    for feed in (Shuffled(), RandomSubset(fraction=1.0)):
        plan = part(made, STREAM, feed)
        for i in range(2 * whole.updates_per_epoch):
            same = zip(plan.update(i), whole.update(i), strict=True)
            assert all(torch.equal(one.input_ids, two.input_ids) and torch.equal(one.supervised, two.supervised) for one, two in same)
    half = part(made, STREAM, RandomSubset(fraction=0.5))
    assert half.updates_per_epoch < whole.updates_per_epoch
    rows = [row for batch in part(made, STREAM, InOrder()).update(0) for row in batch.rows]
    assert rows[0] < 5 or isinstance(part, BestFit)


def test_packed_epochs_of_a_subset_are_of_one_size(examples):
    made = examples(31)
    plan = Packed(length=8, size=2)(made, STREAM, RandomSubset(fraction=0.4))
    count = round(sum(map(len, made)) * 12 / 31)
    for epoch in range(6):
        batches = [one for i in range(plan.updates_per_epoch) for one in plan.update(epoch * plan.updates_per_epoch + i)]
        assert sum(one.targets for one in batches) == count - 1


def test_half_the_examples_are_half_the_updates(examples):
    plan = Padded(size=2)(examples(20), STREAM, RandomSubset(fraction=0.5))
    assert plan.updates_per_epoch == 5
    epochs = [sorted(row for i in range(5) for one in plan.update(5 * epoch + i) for row in one.rows) for epoch in range(2)]
    assert sorted(epochs[0] + epochs[1]) == list(range(20))


def test_a_feed_of_changing_size_is_refused(examples):
    plan = Padded(size=2)(examples(6), STREAM, lambda count, stream, epoch: list(range(count - epoch)))
    plan.update(0)
    with pytest.raises(Problem, match="gives 5 examples in epoch 1 and 6 in epoch 0"):
        plan.update(plan.updates_per_epoch)
    with pytest.raises(Problem, match="gives none of 6 examples"):
        Padded()(examples(6), STREAM, lambda count, stream, epoch: [])
