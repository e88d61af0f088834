"""Hiding, lifting out and rearranging tokens: by hand, by counting over many draws, and put back together."""

from __future__ import annotations

import collections
import itertools

import numpy
import pytest
import torch

from temper.train import corrupt


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def runs(flags: list[bool]) -> list[tuple[bool, int]]:
    return [(flag, len(list(group))) for flag, group in itertools.groupby(flags)]


# ----------------------------------------------------------------------------------------------------------- masking


@pytest.mark.parametrize(("length", "rate", "count"), [(100, 0.15, 15), (7, 0.15, 1), (1, 0.15, 1), (0, 0.15, 0), (10, 1.0, 10)])
def test_so_many_are_picked(length: int, rate: float, count: int):
    candidates = torch.arange(3 * length + 1) % 3 == 1
    picked = corrupt.pick(candidates, rate, seeded())
    assert picked.sum() == count
    assert not (picked & ~candidates).any()


def test_every_candidate_is_picked_as_often():
    generator, candidates = seeded(), torch.tensor([True] * 8 + [False] * 4)
    counts = torch.stack([corrupt.pick(candidates, 0.25, generator) for _ in range(4000)]).sum(0)
    assert (counts[:8] - 1000).abs().max() < 4 * (4000 * 0.25 * 0.75) ** 0.5
    assert not counts[8:].any()


def test_what_becomes_of_picked_tokens():
    tokens, picked = torch.arange(40_000) % 90 + 5, torch.arange(40_000) % 2 == 0
    made = corrupt.mask(tokens, picked, 3, 1000, 0.8, 0.1, seeded())
    assert torch.equal(made[~picked], tokens[~picked])
    shares = [(made == 3), (made == tokens), (made >= 95)]  # most random tokens stand beyond those of the text
    found = [float(one[picked].float().mean()) for one in shares]
    assert found == pytest.approx([0.8, 0.1, 0.1 * 905 / 1000], abs=0.007)


@pytest.mark.parametrize(("masked", "swapped"), [(1.0, 0.0), (0.0, 0.0)])
def test_all_or_nothing_is_hidden(masked: float, swapped: float):
    tokens = torch.arange(50)
    made = corrupt.mask(tokens, tokens > 9, 77, 100, masked, swapped, seeded())
    assert torch.equal(made, torch.where(tokens > 9, 77, tokens) if masked else tokens)


def test_what_is_drawn_does_not_depend_on_padding():
    tokens, candidates = torch.arange(30), torch.arange(30) % 4 > 0
    found = []
    for more in (0, 50):
        generator = seeded()
        long, able = torch.nn.functional.pad(tokens, (0, more)), torch.nn.functional.pad(candidates, (0, more))
        picked = corrupt.pick(able, 0.5, generator)
        found.append((picked[:30], corrupt.mask(long, picked, 99, 90, 0.5, 0.3, generator)[:30]))
    assert all(torch.equal(one, two) for one, two in zip(*found))


# ------------------------------------------------------------------------------------------------------------- spans


def test_every_composition_is_as_likely():
    generator = seeded()
    counts = collections.Counter(tuple(corrupt.composition(6, 3, generator)) for _ in range(5000))
    assert set(counts) == {(a, b, 6 - a - b) for a in range(1, 5) for b in range(1, 6 - a)}
    assert all(abs(count - 500) < 5 * 450**0.5 for count in counts.values())
    assert corrupt.composition(1, 1, generator) == [1]


@pytest.mark.parametrize(("span", "rate"), [(3.0, 0.15), (8.0, 0.15), (3.0, 0.5), (8.0, 0.5), (64.0, 0.15), (64.0, 0.5)])
def test_noise_matches_its_settings(span: float, rate: float):
    """Over 10,000 draws of the six settings together: the share of noise, and the mean length of its spans."""
    generator, lost, total, count = seeded(), 0, 0, 0
    shortest = round(12 * span / rate)  # of some dozen spans, so that rounding to whole ones says little
    for draw in range(1700):
        length = shortest + draw % 60
        flags = numpy.array(corrupt.noise(length, rate, span, 1000, generator))
        assert len(flags) == length
        assert not flags[0]
        assert flags[-1]
        lost, total, count = lost + flags.sum(), total + length, count + (flags[1:] & ~flags[:-1]).sum()
    assert lost / total == pytest.approx(rate, rel=0.005)
    assert lost / count == pytest.approx(span, rel=0.02)


def test_few_places_and_few_sentinels():
    generator = seeded()
    assert corrupt.noise(1, 0.15, 3.0, 9, generator) == [True]
    assert corrupt.noise(2, 0.99, 1.0, 9, generator) == [False, True]
    assert corrupt.noise(3, 0.01, 64.0, 9, generator).count(True) == 1
    flags = corrupt.noise(100, 0.5, 1.0, 4, generator)
    assert (sum(flags), sum(flag for flag, _ in runs(flags))) == (50, 4)


def test_lifting_by_hand():
    """Figure 2 of Raffel et al. 2020: Thank you <X> me to your party <Y> week."""
    words = ["Thank", "you", "for", "inviting", "me", "to", "your", "party", "last", "week"]
    flags = [word in ("for", "inviting", "last") for word in words]
    ids = list(range(len(words)))
    inputs, targets = corrupt.lift(ids, flags, [100, 101, 102])
    assert inputs == [0, 1, 100, 4, 5, 6, 7, 101, 9]
    assert targets == [100, 2, 3, 101, 8]
    assert corrupt.lift(ids, flags, [100]) == ([0, 1, 100, 4, 5, 6, 7, 8, 9], [100, 2, 3])


def test_input_and_targets_give_the_text_back():
    generator, sentinels = seeded(), list(range(1000, 1100))
    for length in range(1, 300):
        tokens = torch.randint(900, (length,), generator=generator).tolist()
        inputs, targets = corrupt.lift(tokens, corrupt.noise(length, 0.4, 2.5, 60, generator), sentinels)
        spans = {}
        for token in targets:
            if token >= 1000:
                here = spans[token] = []
            else:
                here.append(token)
        assert list(spans) == sentinels[: len(spans)]
        assert [token for one in inputs for token in spans.get(one, [one])] == tokens


@pytest.mark.parametrize(("share", "most"), [(0.25, 9), (0.5, 19), (0.9, 19)])
def test_tails(share: float, most: int):
    generator = seeded()
    counts = collections.Counter(corrupt.tail(20, share, generator) for _ in range(8000))
    assert set(counts) == set(range(1, most + 1))
    expected = 8000 / most
    assert all(abs(count - expected) < 5 * expected**0.5 for count in counts.values())
    assert {corrupt.tail(2, share, generator) for _ in range(5)} == {1}


# ---------------------------------------------------------------------------------------------------- fill in the middle


def test_cuts_fall_anywhere():
    generator = seeded()
    counts = collections.Counter(corrupt.cut(3, generator) for _ in range(8000))
    assert set(counts) == {(a, b) for a in range(4) for b in range(a, 4)}
    for (first, second), count in counts.items():
        expected = 8000 / 16 * (1 if first == second else 2)
        assert abs(count - expected) < 5 * expected**0.5


def test_rearranging_by_hand():
    """The orders that Bavarian et al. 2022 write down in section 3, for PSM and for the second variant of SPM."""
    pieces = [1, 2], [3], [4, 5]
    assert corrupt.rearrange(*pieces, (90, 91, 92), False) == [90, 1, 2, 91, 4, 5, 92, 3]
    assert corrupt.rearrange(*pieces, (90, 91, 92), True) == [90, 91, 4, 5, 92, 1, 2, 3]
