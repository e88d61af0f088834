"""Examples -> micro-batches by update number: nothing lost, nothing twice, nothing that depends on the past."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

import numpy
import pytest
import torch

from temper.context import Stream
from temper.parts import Problem
from temper.train.batching import BestFit, Bucketed, Decomposed, Packed, Padded, best_fit, can_separate, collate, decompose
from temper.train.examples import Example
from temper.train.objectives import Causal

PLANS = {
    "padded": Padded(size=3, accumulate=2),
    "bucketed": Bucketed(size=5, tokens=40),
    "joined": Packed(length=16, size=2, accumulate=2),
    "separate": Packed(length=16, size=2, accumulate=2, documents="separate"),
    "best-fit": BestFit(length=16, size=2, accumulate=2),
    "decomposed": Decomposed(longest=16, shortest=4, tokens=16, accumulate=2, cycles=2),
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


@pytest.mark.parametrize("part", [Packed(), BestFit(), Decomposed()], ids=["packed", "best-fit", "decomposed"])
def test_packing_refuses_preferences(part, examples, stream):
    with pytest.raises(Problem, match="use `padded` or `bucketed`"):
        part(examples(side=True), stream)


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


# ------------------------------------------------------------------------------------------------------ best fit


def drawn_lengths(seed: int, count: int, most: int) -> list[int]:
    """Log-normal, as documents are."""
    return numpy.random.default_rng(seed).lognormal(math.log(most / 4), 1.0, count).clip(1, most).astype(int).tolist()


def slow_best_fit(lengths, room):
    """The rule word by word: the longest first, each into the open row with the least room that is enough, of several the oldest."""
    rows = []
    for index in sorted(range(len(lengths)), key=lambda one: -lengths[one]):
        fitting = [row for row in rows if room - sum(lengths[one] for one in row) >= lengths[index]]
        if fitting:
            # Of rows with equal room, the one that got it first.
            least = min(room - sum(lengths[one] for one in row) for row in fitting)
            min((row for row in fitting if room - sum(lengths[one] for one in row) == least), key=lambda row: row.stamp).append(index)
        else:
            rows.append(Row([index]))
        changed = next(row for row in rows if row[-1] == index)
        changed.stamp = sum(map(len, rows))
    return [list(row) for row in rows]


class Row(list):
    stamp = 0


@pytest.mark.parametrize("room", [7, 64, 100])
def test_best_fit_follows_the_rule(room):
    for seed in range(5):
        lengths = drawn_lengths(seed, 120, room)
        assert best_fit(lengths, room) == slow_best_fit(lengths, room)


def test_best_fit_gives_the_rows_of_trl(stream):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    lengths = drawn_lengths(3, 400, 600)
    data = datasets.Dataset.from_dict({"input_ids": [[length] * length for length in lengths]})
    theirs = trl.pack_dataset(data, 128, strategy="bfd_split", map_kwargs={"batch_size": 400})["seq_lengths"]
    made = [Example(numpy.full(length, length, numpy.int32), numpy.ones(length, bool), row) for row, length in enumerate(lengths)]
    plan = BestFit(length=128)(made, stream)
    assert [list(map(len, row)) for row in plan.rows] == [list(row) for row in theirs]


def test_best_fit_keeps_every_token_and_cuts_no_document_that_fits(examples, stream):
    made = examples(40, longest=50)
    plan = BestFit(length=16, size=3)(made, stream)
    pieces = [piece for row in plan.rows for piece in row]
    assert max(sum(map(len, row)) for row in plan.rows) <= 16
    assert sum(map(len, pieces)) == sum(map(len, made))
    for one in made:
        parts = sorted((piece for piece in pieces if piece.source == one.source), key=lambda piece: -len(piece))
        assert len(parts) == math.ceil(len(one) / 16)  # a document that fits is whole, and a longer one has no cut more than it must
        found = Counter(tuple(piece.tokens.tolist()) for piece in parts)
        assert found == Counter(tuple(one.tokens[start : start + 16].tolist()) for start in range(0, len(one), 16))
    cut = sum(len(one) > 16 for one in made)
    assert plan.report.endswith(f"{cut} of 40 documents cut")
    room = 16 * len(plan.rows)
    assert f"{1 - sum(map(len, made)) / room:.2%} of them padding" in plan.report


def test_best_fit_rows_come_once_an_epoch_in_another_order(examples, stream):
    made = examples(40)
    plan = BestFit(length=24, size=2, accumulate=2)(made, stream)
    epochs = [[tuple(row) for batch in epoch(plan, number) for row in batch.input_ids.tolist()] for number in range(2)]
    assert Counter(epochs[0]) == Counter(epochs[1])
    assert epochs[0] != epochs[1]
    assert len(epochs[0]) == len(plan.rows)
    assert all(batch.input_ids.shape[1] == 24 for batch in epoch(plan))
    assert sum(batch.targets for batch in epoch(plan)) == sum(len(one) - 1 for one in made)


# ---------------------------------------------------------------------------------------------------- decomposed


def test_buckets_hold_every_token_once_in_powers_of_two(examples):
    made = examples(40, longest=90)
    buckets = decompose(made, 32)
    assert set(buckets) <= {1, 2, 4, 8, 16, 32}
    assert all(len(chunk) == length for length, chunks in buckets.items() for chunk in chunks)
    for one in made:
        chunks = [chunk for length in sorted(buckets, reverse=True) for chunk in buckets[length] if chunk.source == one.source]
        assert numpy.concatenate([chunk.tokens for chunk in chunks]).tolist() == one.tokens.tolist()
        # 90 = 32 + 32 + 16 + 8 + 2: as many chunks as ones in the binary number, and whole ones of the longest
        assert len(chunks) == len(one) // 32 + (len(one) % 32).bit_count()


def test_every_update_is_of_one_length_and_has_as_many_tokens(examples, stream):
    made = examples(60, longest=90)
    plan = Decomposed(longest=32, shortest=2, tokens=32, accumulate=2, cycles=3)(made, stream)
    seen = Counter()
    for i in range(plan.updates_per_epoch):
        batches = plan.update(i)
        (length,) = {batch.input_ids.shape[1] for batch in batches}
        assert [batch.tokens for batch in batches] == [batch.input_ids.numel() for batch in batches] == [32, 32]
        assert all(batch.attention_mask is None and batch.position_ids is None for batch in batches)
        assert [key for batch in batches for key in batch.keys] == list(range(64 // length))
        seen[length] += 64 // length
    buckets = decompose(made, 32)
    whole = {length: len(chunks) * length // 64 * 64 // length for length, chunks in buckets.items() if length >= 2}
    assert seen == Counter({length: count for length, count in whole.items() if count})
    held = sum(length * count for length, count in seen.items())
    assert plan.report.endswith(f"{1 - held / sum(map(len, made)):.1%} of the tokens left out")


def lengths_of(plan, number=0):
    count = plan.updates_per_epoch
    return [plan.update(i)[0].input_ids.shape[1] for i in range(number * count, (number + 1) * count)]


def test_the_curriculum_goes_from_short_to_long_in_every_cycle(examples, stream):
    made = examples(400, longest=60)
    steep = Decomposed(longest=16, shortest=2, tokens=16, cycles=4, growth=1e9)(made, stream)
    found = lengths_of(steep)
    falls = [place for place in range(1, len(found)) if found[place] < found[place - 1]]
    assert len(falls) == 3  # with such odds the shortest always comes first: a cycle is sorted, and four follow one another
    cycles = [Counter(found[begin:end]) for begin, end in zip([0, *falls], [*falls, len(found)])]
    for length in cycles[0]:
        assert max(one[length] for one in cycles) - min(one[length] for one in cycles) <= 1
    falling = lengths_of(Decomposed(longest=16, shortest=2, tokens=16, cycles=1, growth=1e-9)(made, stream))
    assert falling == sorted(falling, reverse=True)


def test_the_first_length_is_drawn_with_the_odds_of_the_formula(examples):
    made = examples(120, longest=60)
    part = Decomposed(longest=16, shortest=2, tokens=16, cycles=1, growth=2.0)
    plan = part(made, Stream("0"))
    updates = Counter(lengths_of(plan))
    odds = {length: count * 2.0 ** -math.log2(length) for length, count in updates.items()}
    first = Counter(plan._lengths(epoch)[0][0] for epoch in range(800))
    for length, odd in odds.items():
        share = odd / sum(odds.values())
        assert abs(first[length] / 800 - share) < 4 * math.sqrt(share * (1 - share) / 800)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"longest": 24}, "longest 24: chunks are powers of two; give 16 or 32"),
        ({"shortest": 64, "longest": 32}, "shortest 64 is above longest 32"),
        ({"longest": 32, "tokens": 48}, "tokens 48.*give a multiple of 32"),
    ],
)
def test_chunks_that_do_not_fit_are_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        Decomposed(**settings)


def test_too_little_for_one_update_is_refused(examples, stream):
    with pytest.raises(Problem, match="give smaller `tokens`, or more data"):
        Decomposed(longest=16, tokens=4096)(examples(4), stream)


# ------------------------------------------------------------------------------------------------------- layouts


def gradient(model, batches):
    """Of the mean over an update's micro-batches, and that mean."""
    model.zero_grad()
    sums = [Causal()(model, batch) for batch in batches]
    count = sum(one.count for one in sums)
    (torch.stack([one.total for one in sums]).sum() / count).backward()
    return torch.stack([one.total.detach() for one in sums]).sum() / count, [one.grad for one in model.parameters()]


def close(one, two):
    assert torch.allclose(one[0], two[0], rtol=1e-6)
    for a, b in zip(one[1], two[1], strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-7)


def test_layouts_hold_the_same_examples_and_give_the_same_gradient(llama, examples, stream):
    made, model = examples(40, completion=True), llama()
    plan = Bucketed(size=12, tokens=64)(made, stream)
    assert list(plan.layouts) == ["rows", "packed", "flat"]
    assert same(plan.update(1), Bucketed(size=12, tokens=64, layout="rows")(made, stream).update(1))
    for i in (0, 3):
        rows = plan.layouts["rows"].update(i)
        assert same(rows, plan.update(i))
        for name in ("packed", "flat"):
            packed = plan.chosen(name).update(i)
            assert sorted(row for batch in packed for row in batch.rows) == sorted(row for batch in rows for row in batch.rows)
            assert sum(batch.tokens for batch in packed) == sum(batch.tokens for batch in rows)
            assert sum(batch.targets for batch in packed) == sum(batch.targets for batch in rows)
            keys = [key for batch in packed for key in batch.keys]
            assert len(set(keys)) == len(keys)
            assert max(batch.positions for batch in packed) == max(batch.input_ids.shape[1] for batch in rows)
            assert all(batch.attention_mask is None and batch.input_ids.numel() <= 64 for batch in packed)
            close(gradient(model, rows), gradient(model, packed))
    assert all(len(batch.input_ids) == 1 for batch in plan.chosen("flat").update(0))
    assert sum(batch.input_ids.numel() for batch in plan.chosen("packed").update(0)) < 1.25 * sum(batch.tokens for batch in plan.update(0))


def test_preferences_keep_to_rows(examples, stream):
    made = examples(14, side=True)
    assert list(Bucketed(size=4)(made, stream).layouts) == ["rows"]
    with pytest.raises(Problem, match="use `layout: rows`"):
        Bucketed(size=4, layout="packed")(made, stream)


@pytest.mark.parametrize("rows", [1, 2])
def test_attention_models_keep_packed_documents_apart_and_others_do_not(llama, rows):
    import transformers

    for attention in ("sdpa", "eager"):
        model = llama(attn_implementation=attention)
        assert can_separate(model, rows)
        assert model.training == llama().training
    config = transformers.GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2)
    assert can_separate(transformers.GPT2LMHeadModel(config), rows)  # absolute positions
    config = transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4)
    assert not can_separate(transformers.MambaForCausalLM(config), rows)
    config = transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=2)
    assert not can_separate(transformers.BloomForCausalLM(config), rows)  # takes no positions


# -------------------------------------------------------------------------------------------------- equivalences


PACKED = {"best-fit": BestFit(length=24, size=100), "separate": Packed(length=400, size=100, documents="separate")}


@pytest.mark.parametrize("part", PACKED.values(), ids=PACKED)
def test_packed_documents_give_the_loss_and_gradient_of_documents_alone(part, llama, examples, stream):
    made, model = examples(14), llama(max_position_embeddings=400)
    (packed,) = part(made, stream).update(0)
    (padded,) = Padded(size=14)(made, stream).update(0)
    assert (packed.targets, packed.tokens) == (padded.targets, padded.tokens)
    close(gradient(model, [packed]), gradient(model, [padded]))


def test_accumulated_batches_give_the_loss_and_gradient_of_one(llama, examples, stream):
    made, model = examples(12, completion=True), llama()
    whole = gradient(model, Padded(size=12)(made, stream).update(0))
    for part in (Padded(size=3, accumulate=4), Padded(size=4, accumulate=3), Bucketed(size=12, tokens=50)):
        close(gradient(model, part(made, stream).update(0)), whole)
    rows = BestFit(length=24, size=2, accumulate=3)(made, stream), BestFit(length=24, size=6)(made, stream)
    close(*(gradient(model, plan.update(0)) for plan in rows))
    chunks = [Decomposed(longest=8, shortest=2, tokens=32 // many, accumulate=many)(made, stream) for many in (1, 4)]
    close(*(gradient(model, plan.update(0)) for plan in chunks))


@pytest.mark.parametrize("name", ["padded", "joined", "separate", "best-fit"])
def test_padding_never_changes_a_loss(name, llama, examples, stream):
    model = llama()
    for i in range(PLANS[name](examples(14), stream).updates_per_epoch):
        for batch in PLANS[name](examples(14), stream).update(i):
            begins = (batch.input_ids == 0).int().argmax(1)  # of the padding, where a row has some; no example has token 0
            real = (batch.input_ids != 0).sum(1)
            padding = torch.arange(batch.input_ids.shape[1]) >= real[:, None]
            assert torch.equal(padding, batch.input_ids == 0)
            assert ((begins == real) | ~padding.any(1)).all()
            other = batch.input_ids.masked_fill(padding, 99)
            losses = [float(Causal()(model, one).total.detach()) for one in (batch, dataclasses.replace(batch, input_ids=other))]
            assert losses[0] == losses[1]
            assert not (batch.supervised & padding).any()
