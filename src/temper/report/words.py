"""Numbers, units and names as people read them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from temper.passport import Figure

if TYPE_CHECKING:
    from temper.report import StepReport

NARROW = "\u202f"
"""A narrow space that does not break: between a number and its unit, and between thousands."""


def number(value: float, digits: int = 3) -> str:
    """A plain number, thousands grouped: integers whole, others with `digits` significant digits."""
    if isinstance(value, int):
        return f"{value:,}".replace(",", NARROW).replace("-", "−")
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}"))))  # of the rounded value: 0.9996 is 1.00
    if size < -4:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, digits - 1 - size)}f}".replace(",", NARROW).replace("-", "−")


def measure(value: float, unit: str = "") -> str:
    """A figure with its unit: shares in per cent, bytes and seconds in the size that reads best, other units behind the number."""
    if unit in {"share", "%"}:
        return f"{_percent(100 * value if unit == 'share' else value)}{NARROW}%"
    if unit == "bytes":
        return size(value)
    if unit in {"s", "seconds"}:
        return duration(value)
    return f"{number(value)}{NARROW}{unit}" if unit else number(value)


def _percent(value: float) -> str:
    """One decimal, as shares are read; two significant digits below one per cent, and no more than two decimals."""
    if not math.isfinite(value):
        return number(value)
    if 0 < abs(value) < 0.005:
        return "<0.01" if value > 1e-7 else "0"
    return (f"{value:.1f}" if abs(value) >= 1 or value == 0 else number(value, 2)).replace("-", "−")


def duration(seconds: float) -> str:
    """`0.8 s`, `43 s`, `4 min 03 s`, `2 h 05 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f}{NARROW}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}{NARROW}s"
    if whole < 3600:
        return f"{whole // 60}{NARROW}min {whole % 60:02d}{NARROW}s"
    minutes = round(seconds / 60)
    return f"{minutes // 60}{NARROW}h {minutes % 60:02d}{NARROW}min"


def size(value: float) -> str:
    """Bytes in decimal units: `812 B`, `1.31 MB`."""
    return f"{_scaled(value, ('', 'k', 'M', 'G', 'T'))}B"


def count(value: float) -> str:
    """A count: `812`, `1.31 M`, `7.00 B` (thousand million)."""
    return _scaled(value, ("", "k", "M", "B", "T")).strip()


def _scaled(value: float, prefixes: Sequence[str]) -> str:
    step = 0
    while abs(value) >= 999.5 and step < len(prefixes) - 1:
        value, step = value / 1000, step + 1
    return f"{number(value) if step else round(value)}{NARROW}{prefixes[step]}"


def prose(name: str) -> str:
    """A name in the code as words: `heldout/bits_per_byte` -> `heldout · bits per byte`."""
    return name.replace("_", " ").replace("/", " · ")


def interval(figure: Figure) -> str | None:
    """An interval's ends in words, the unit once where both share it; None without an interval."""
    if figure.low is None or figure.high is None:
        return None
    low, high = measure(figure.low, figure.unit), measure(figure.high, figure.unit)
    bare, _, unit = low.rpartition(NARROW)
    if unit and not unit[0].isdigit() and high.endswith(NARROW + unit):  # one unit for both ends
        low = bare
    return f"{low} to {high}"


def joined(words: Iterable[str | None]) -> str:
    """Facts side by side with dots between; what is None or empty is left out."""
    return "\u00a0· ".join(word for word in words if word)  # the dot stays with what it follows


def method(step: StepReport) -> str:
    """A step's engine and method."""
    return joined((step.engine, step.method))


def cost(step: StepReport) -> str:
    """Time, memory, size and form of what a step left, in a line."""
    return joined(
        (
            duration(step.seconds),
            f"peak {size(step.peak_memory)}" if step.peak_memory else None,
            f"{size(step.bytes)} on disk{' (adapter alone)' if step.kind == 'adapter' else ''}" if step.bytes else None,
            f"{count(step.parameters)} parameters" if step.parameters else None,
            step.numbers,
        )
    )


def examples(figure: Figure) -> str | None:
    """How many examples stand behind a figure."""
    return f"n\u00a0=\u00a0{figure.n}" if figure.n else None


def evidence(figure: Figure) -> str:
    """What a figure rests on: its interval and the examples behind it."""
    ends = interval(figure)
    return joined((f"interval {ends}" if ends else None, examples(figure)))


def direction(figure: Figure) -> str | None:
    """Which way is better, where one is."""
    return f"{figure.better} is better" if figure.better else None


def said(figure: Figure) -> str:
    """A figure in a line: value, interval, examples, which way is better."""
    return joined((measure(figure.value, figure.unit), interval(figure), examples(figure), direction(figure)))
