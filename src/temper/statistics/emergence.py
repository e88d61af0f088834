"""What a metric alone makes of steady progress.  Schaeffer et al. 2023"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from temper.lazy import numpy
from temper.statistics.shared import finite


def token_chance(sizes: Any, scale: float, exponent: float) -> numpy.ndarray:
    """The chance of a right token where its cross-entropy is a power law of size: exp(-(N/scale)^exponent), exponent < 0.  Section 2"""
    return numpy.exp(-((finite(sizes, "sizes") / scale) ** exponent))


def exact_match(chance: Any, length: int) -> numpy.ndarray:
    """The chance that all of `length` tokens are right, each with that chance alone: p^L. Sharp in p, and in size."""
    return finite(chance, "chances") ** length


def expected_edits(chance: Any, length: int) -> numpy.ndarray:
    """How many of `length` tokens are wrong on average: L (1 - p). Straight in p, and so smooth in size."""
    return length * (1 - finite(chance, "chances"))


def seen(chance: Any, examples: int) -> numpy.ndarray:
    """The chance that a test of so many examples shows any success at all: 1 - (1 - p)^n. A small test makes a small chance look like 0."""
    return -numpy.expm1(examples * numpy.log1p(-finite(chance, "chances")))


def edit_distance(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """The fewest tokens put in, left out or replaced that turn one sequence into the other.  Levenshtein 1966

    Formula: D[i, j] = min(D[i-1, j] + 1, D[i, j-1] + 1, D[i-1, j-1] + [first_i != second_j]), a row of it at a time.
    """
    number = {token: index for index, token in enumerate(dict.fromkeys([*first, *second]))}
    second_numbers = numpy.array([number[token] for token in second], dtype=numpy.int64)
    steps = numpy.arange(len(second) + 1)
    row = steps
    for length, token in enumerate(first, 1):
        above = numpy.minimum(row[1:] + 1, row[:-1] + (second_numbers != number[token]))
        row = numpy.minimum.accumulate(numpy.concatenate([[length], above]) - steps) + steps  # tokens put in, all at once
    return int(row[-1])
