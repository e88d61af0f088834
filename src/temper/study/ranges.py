"""Where trials look for a setting's value: the slot `Range`."""

from __future__ import annotations

import math
from typing import Annotated, Any, Protocol

from pydantic import Field

from temper.parts import Problem, part, shown, slot


@slot(phased=False)
class Range(Protocol):
    """Which values are tried?

    `(share) -> value`: the value at a share, 0 to 1, of the range. Equal shares for every arm make their trials comparable.
    """

    def __call__(self, share: float) -> Any: ...


@part
class Uniform:
    """Numbers, each as likely.  Formula: low + share (high - low)"""

    low: float
    """Where it begins."""
    high: float
    """Where it ends."""

    def __post_init__(self) -> None:
        _ordered(self.low, self.high)

    def __call__(self, share: float) -> float:
        return self.low + share * (self.high - self.low)


@part
class Log:
    """Numbers whose logarithm is as likely: rates.  Formula: low (high / low)^share"""

    low: float
    """Where it begins, above 0."""
    high: float
    """Where it ends."""

    def __post_init__(self) -> None:
        _ordered(self.low, self.high)
        if self.low <= 0:
            raise Problem(f"low {shown(self.low)}: a logarithmic range begins above 0", ("low",))

    def __call__(self, share: float) -> float:
        return float(f"{self.low * math.exp(share * math.log(self.high / self.low)):.4g}")


@part
class Choice:
    """One of a list.  Formula: values[floor(share n)]"""

    values: Annotated[tuple[bool | int | float | str | tuple[float, ...], ...], Field(min_length=1)]
    """What is tried: words, numbers, or lists of numbers."""

    def __call__(self, share: float) -> Any:
        return self.values[min(int(share * len(self.values)), len(self.values) - 1)]


def _ordered(low: float, high: float) -> None:
    if not low < high:
        raise Problem(f"low {shown(low)}, high {shown(high)}: a range begins below its end")
