"""Slot `reward`: how good a response is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from temper.parts import part, slot
from temper.tasks import questions


@slot(phased=False)
class Reward(Protocol):
    """How good is each response? `(row, responses) -> [float]`, one number for each text, more is better.

    row: `prompt` and `completion` (texts, or lists of messages) and whatever further columns the data have, such as `task`.
    A plain function of a user's file (`rewards.py:score`) fits.
    """

    def __call__(self, row: Mapping[str, Any], responses: Sequence[str]) -> list[float]: ...


@part
class Verifier:
    """1 where the response is right, else 0: by the checker of the row's task where it names one, else by equality.

    Equality is with the row's own completion, give or take white space around it.  Lambert et al. 2024, "Tülu 3", section 6.
    """

    def __call__(self, row: Mapping[str, Any], responses: Sequence[str]) -> list[float]:
        return [float(questions.right(row, response)) for response in responses]
