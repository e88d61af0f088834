"""Figures of which groups of rows are given beside the whole: the slot `Slice`."""

from __future__ import annotations

import bisect
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from temper.evaluate.records import equal_mass
from temper.lazy import numpy
from temper.parts import Count, Problem, part, slot

if TYPE_CHECKING:
    from temper.context import Context
    from temper.evaluate.subject import Subject
    from temper.tasks.rows import Rows

Labels = Mapping[str, Sequence[str | None]]
"""Slice -> a label for each of the rows; None: in no group of it."""


def beside(slices: Sequence[Callable[[Rows], Labels]]) -> Callable[[Rows], Labels]:
    """How a list of slices acts as one: side by side."""

    def labels(rows: Rows) -> Labels:
        made: dict[str, Sequence[str | None]] = {}
        for found in (one(rows) for one in slices):
            for name in found.keys() & made.keys():
                raise Problem(f"two slices are called `{name}`; give one of them", ("slice",))
            made |= found
        return made

    return labels


@slot(combine=beside, phased=False)
class Slice(Protocol):
    """Figures of which groups are given beside the whole?

    `(rows) -> {slice: labels}`, a label for each of the rows measured, None for those in no group. The labels are the same for all
    models, so their figures within a group are about the same rows.
    """

    def __call__(self, rows: Rows) -> Labels: ...


@part(name="field")
class ByField:
    """Rows by what stands in a column, such as `task`, `skill` or `module`."""

    key: str = "task"
    """The column."""
    most: Count = 10
    """Groups at most: the most frequent values. Rows of others are in no group."""

    def __call__(self, rows: Rows) -> Labels:
        """Raises a `Problem` where no row has the column."""
        values = [None if row.get(self.key) is None else str(row[self.key]) for row in rows.rows]
        counts = Counter(value for value in values if value is not None)
        if not counts:
            raise Problem(f"no row of {rows.name} has a column `{self.key}` to slice by; name another column", ("slice",))
        kept = sorted(counts, key=lambda value: (-counts[value], value))[: self.most]
        return {self.key: [value if value in kept else None for value in values]}


@part
class Length:
    """Rows by the characters of their text, or of prompt and answer together."""

    bins: Count = 4
    """Groups of as many rows each as equal lengths allow: `1/4` the shortest."""
    edges: tuple[Count, ...] = ()
    """In place of `bins`: the lengths at which a new group begins, such as [100, 1000] for `0-99`, `100-999` and `1000-`."""

    def __post_init__(self) -> None:
        if list(self.edges) != sorted(set(self.edges)):
            raise Problem(f"`edges` are {list(self.edges)}; give them from small to large, each once")

    def __call__(self, rows: Rows) -> Labels:
        lengths = [len(row["text"]) for row in rows.as_text().rows]
        if not self.edges:
            return {"length": _shares(numpy.array(lengths), self.bins)}
        names = [f"{low}-{high - 1}" for low, high in itertools.pairwise((0, *self.edges))] + [f"{self.edges[-1]}-"]
        return {"length": [names[bisect.bisect_right(self.edges, length)] for length in lengths]}


@part(needs=("reference",))
class Confidence:
    """Rows by how sure the reference model is of what is true.  Proskurina et al. 2024, "When Quantization Affects Confidence of Large
    Language Models?"

    Formula: p(true choice) of rows with choices, else exp(mean ln p(token)) over the row's own tokens.
    """

    bins: Count = 10
    """Groups of as many rows each as equal probabilities allow: `1/10` where the reference is least sure."""

    def start(self, context: Context) -> Callable[[Rows], Labels]:
        reference: Subject = context.want("reference")

        def labels(rows: Rows) -> Labels:
            made: list[str | None] = [None] * len(rows)
            row, sure = _sureness(reference, rows)
            for index, label in zip(row.tolist(), _shares(sure, self.bins)):
                made[index] = label
            return {"confidence": made}

        return labels


def _sureness(reference: Subject, rows: Rows) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Numbers of rows, and the probability that the reference gives to what is true in each."""
    if any("choices" in row for row in rows.rows):
        return reference.choices.row, reference.choices.truth
    row, nll, tokens = reference.nats
    return row, numpy.exp(-nll / tokens)


def _shares(values: numpy.ndarray[Any, Any], bins: int) -> list[str]:
    return [f"{index + 1}/{bins}" for index in equal_mass(values, bins).tolist()]
