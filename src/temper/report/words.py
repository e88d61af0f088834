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


SCALED = {"bytes", "s", "seconds", "count", "FLOP"}
"""Units that `measure` writes in the size that reads best."""


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
    """A figure with its unit: shares in per cent, what is `SCALED` in the size that reads best, other units behind."""
    if unit in {"share", "%"}:
        return f"{_percent(100 * value if unit == 'share' else value)}{NARROW}%"
    if unit == "bytes":
        return size(value)
    if unit in {"s", "seconds"}:
        return duration(value)
    if unit == "count":
        return count(value)
    if unit == "FLOP":
        return f"{_scaled(value, ('', 'k', 'M', 'G', 'T', 'P', 'E'))}FLOP"
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
    if not math.isfinite(seconds):
        return number(seconds)
    if seconds < 0:
        return f"−{duration(-seconds)}"
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
    if not math.isfinite(value):
        return number(value) + NARROW
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


# ---------------------------------------------------------------- studies

COSTS = {
    "seconds": ("time", "s"),
    "tokens": ("tokens", "count"),
    "updates": ("updates", "count"),
    "flops": ("operations", "FLOP"),
    "peak_memory": ("peak memory", "bytes"),
    "memory": ("peak memory", "bytes"),
    "bytes": ("size on disk", "bytes"),
    "trials": ("trials", "count"),
}
"""A cost's name in words and its unit."""


def capital(name: str) -> str:
    """A name in the code as a title."""
    return prose(name)[:1].upper() + prose(name)[1:]


def cost_name(name: str) -> str:
    """A cost as the page writes it."""
    return COSTS.get(name, (prose(name), ""))[0]


def spent(name: str, value: float) -> str:
    """A cost with its unit."""
    return measure(value, COSTS.get(name, ("", ""))[1])


def points(value: float, unit: str) -> tuple[float, str]:
    """A difference and its unit as people say them: shares and per cents differ by percentage points."""
    return (100 * value, "points") if unit == "share" else (value, "points") if unit == "%" else (value, unit)


def signed(value: float, unit: str = "", signs: bool = True) -> str:
    """A difference with its sign and unit: `+1.2 points`."""
    value, unit = points(value, unit)
    words = f"{_percent(value)}{NARROW}points" if unit == "points" else measure(value, unit)
    return f"+{words}" if signs and value > 0 and not words.startswith("<") else words


def ends(low: float | None, high: float | None, unit: str, signs: bool = True) -> str | None:
    """A difference's interval in words; None without one."""
    if low is None or high is None:
        return None
    first, last = signed(low, unit, signs), signed(high, unit, signs)
    bare, _, word = first.rpartition(NARROW)
    if bare and not word[:1].isdigit() and last.endswith(NARROW + word):
        first = bare
    return f"{first} to {last}"


def chance(p: float | None) -> str:
    """A p-value."""
    return "" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}" if math.isfinite(p) else number(p)
