"""Three charts as inline SVG: figures over stages, curves over training, a history as lanes.

Pure functions. Colours come from the page's style sheet (`--t0` .. `--t4`), so charts follow the dark and the light scheme and
print; every mark carries its words in a `<title>` or in a label beside it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from temper.report.html import Html, tag
from temper.report.words import NARROW, SCALED, count, measure, number

TINTS = 5
"""Number of stage tints in the style sheet."""


# ---------------------------------------------------------------- axes


def ticks(low: float, high: float, about: int = 4, whole: bool = False) -> list[float]:
    """Round values (1, 2, 2.5 or 5 times a power of ten) that cover [low, high]: the first at or below `low`. whole: integers."""
    if high - low <= max(1e-12, 1e-9 * max(abs(low), abs(high))):
        low, high = (low - abs(low) * 0.1, high + abs(high) * 0.1) if abs(low) > 1e-9 else (0.0, 1.0)
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(nice * power for nice in (1, 2, 2.5, 5, 10) if nice * power >= rough * (1 - 1e-9))
    step = math.ceil(step) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    places = 2 - math.floor(math.log10(step))
    return [round(index * step, places) for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten that cover [low, high] (both positive), with 2 and 5 between where there are few."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    fine = [nice * 10.0**power for power in range(first, last + 1) for nice in (1, 2, 5)]
    below = max(value for value in fine if value <= low * 1.000001)
    above = min(value for value in [*fine, 10.0 ** (last + 1)] if value >= high * 0.999999)
    kept = [value for value in fine if below <= value <= above]
    return kept if len(kept) <= 6 else [10.0**power for power in range(first, last + 1)]


class Axis:
    """Maps values onto a stretch of the drawing; logarithmic where values are positive and span more than a factor of `spread`.

    The stretch reaches from the first to the last tick, or exactly from `low` to `high` where `tight`, with the ticks between; `whole`
    keeps ticks to integers.
    """

    def __init__(self, low: float, high: float, start: float, end: float, tight: bool = False, whole: bool = False, spread: float = 30):
        self.log = low > 1e-12 and high / low > spread
        self.ticks = log_ticks(low, high) if self.log else ticks(low, high, whole=whole)
        if tight and self.ticks[0] <= low < high <= self.ticks[-1]:
            self.ticks = [value for value in self.ticks if low <= value <= high]
            self._low, self._high = self._of(low), self._of(high)
        else:
            self._low, self._high = self._of(self.ticks[0]), self._of(self.ticks[-1])
        self._start, self._end = start, end

    def _of(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def __call__(self, value: float) -> float:
        share = (self._of(value) - self._low) / (self._high - self._low)
        return round(self._start + share * (self._end - self._start), 1)

    def labels(self, unit: str = "") -> list[str]:
        """The ticks in words, with as many decimals as tell neighbours apart."""
        if unit in SCALED:
            return [measure(value, unit) for value in self.ticks]
        shares = [100 * value for value in self.ticks] if unit == "share" else self.ticks
        end = NARROW + "%" if unit in {"share", "%"} else ""
        if self.log:
            return [f"{value:g}{end}" for value in shares]
        places = next(
            places for places in range(16) if all(abs(round(value, places) - value) < 1e-9 * (1 + abs(value)) for value in shares)
        )
        return [f"{value:.{places}f}{end}".replace("-", "−") for value in shares]


# ---------------------------------------------------------------- charts

WIDTH = 360
"""Drawing width of every chart: about its width on a phone and in a three-column page, so text keeps its size."""


def tint(index: int, total: int) -> str:
    """The colour of stage `index` of `total`, from first to last of the tempering colours."""
    return f"var(--t{round(index * (TINTS - 1) / max(1, total - 1))})"


def svg(height: float, label: str, *children: object) -> Html:
    """A drawing of the common width; `label` says what it shows."""
    return tag("svg", tag("title", label), *children, viewBox=f"0 0 {WIDTH} {round(height)}", role="img", class_="chart")


def text(x: float, y: float, words: str, **more: object) -> Html:
    """Words at a place."""
    return tag("text", words, x=x, y=y, **more)


def short(words: str, length: int) -> str:
    """Words cut to a length, with an ellipsis where something is cut."""
    return words if len(words) <= length else words[: length - 1] + "…"


def dots(label: str, rows: Sequence[tuple[str, float, float | None, float | None]], unit: str = "") -> Html:
    """One figure over stages: a row per stage (name, value, low, high) with a dot, a bar for the interval, and the value in words."""
    left, right, line, top = 84.0, 14 + 7.0 * max(len(measure(value, unit)) for _, value, _, _ in rows), 30, 8
    values = [value for _, *given in rows for value in given if value is not None]
    axis = Axis(min(values), max(values), left, WIDTH - right)
    bottom = top + line * len(rows)
    marks = [tag("line", x1=axis(value), x2=axis(value), y1=top, y2=bottom, class_="grid") for value in axis.ticks]
    marks += ticks_below(axis, unit, bottom + 14)
    places = [(axis(value), top + line * (index + 0.5)) for index, (_, value, _, _) in enumerate(rows)]
    marks.append(tag("polyline", points=" ".join(f"{x},{y}" for x, y in places), class_="path"))
    for index, ((name, value, low, high), (x, y)) in enumerate(zip(rows, places, strict=True)):
        words = f"{name}: {measure(value, unit)}"
        interval = None
        if low is not None and high is not None:
            words += f", interval {measure(low, unit)} to {measure(high, unit)}"
            interval = [
                tag("line", x1=axis(low), x2=axis(high), y1=y, y2=y, class_="span"),
                [tag("line", x1=axis(end), x2=axis(end), y1=y - 4, y2=y + 4, class_="end") for end in (low, high)],
            ]
        marks.append(
            tag(
                "g",
                tag("title", words),
                tag("rect", x=0, y=y - line / 2, width=WIDTH, height=line, class_="hit"),
                text(left - 12, y + 4, short(name, 13), text_anchor="end", class_="name"),
                interval,
                tag("circle", cx=x, cy=y, r=5, class_="dot"),
                text(WIDTH - right + 10, y + 4, measure(value, unit), class_="value"),
                style=f"--tint:{tint(index, len(rows))}",
            )
        )
    return svg(bottom + 20, label, marks)


def ticks_below(axis: Axis, unit: str, y: float) -> list[Html]:
    """Labels of a horizontal axis; every second, third, ... where neighbours would touch (a letter is about 6 units wide)."""
    places, words = [axis(value) for value in axis.ticks], axis.labels(unit)

    def touch(every: int) -> bool:
        kept = list(range(0, len(words), every))
        return any(places[b] - places[a] < 3 * (len(words[a]) + len(words[b])) + 8 for a, b in itertools.pairwise(kept))

    every = next(every for every in range(1, len(words) + 1) if not touch(every))
    kept = zip(places[::every], words[::every], strict=True)
    return [text(x, y, word, text_anchor="middle", class_="tick") for x, word in kept]


def curves(label: str, series: Sequence[tuple[str, Sequence[tuple[float, float]]]], across: str = "step", bins: int = 60) -> Html:
    """Lines over training: the first series with its range (least to greatest in each of `bins` bins) behind its mean, others with markers.

    `series`: (name, [(x, y), ...]) with finite values. Where there are no more points than bins, the line is the points themselves.
    """
    left, right, top, bottom = 40.0, 48.0, 12.0, 176.0
    points = [point for _, line in series for point in line]
    x_axis = Axis(min(0.0, *(x for x, _ in points)), max(x for x, _ in points), left, WIDTH - right, tight=True, whole=True)
    # Early losses are far above the rest; the axis still shows them all, since a cut axis would flatter the curve.
    y_axis = Axis(min(y for _, y in points), max(y for _, y in points), bottom, top)
    marks: list[Html] = []
    for value, word in zip(y_axis.ticks, y_axis.labels(), strict=True):
        marks.append(tag("line", x1=left, x2=WIDTH - right, y1=y_axis(value), y2=y_axis(value), class_="grid"))
        marks.append(text(left - 6, y_axis(value) + 4, word, text_anchor="end", class_="tick"))
    marks += ticks_below(x_axis, "", bottom + 16)
    marks.append(text((left + WIDTH - right) / 2, bottom + 34, across, text_anchor="middle", class_="tick"))
    ends: list[tuple[float, int, float]] = []
    for index, (name, line) in enumerate(series):
        grouped = _grouped(sorted(line), bins)
        means = [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in grouped]
        middle = [(x_axis(x), y_axis(y)) for x, y in means]
        if any(len(group) > 1 for group in grouped):
            upper = [(place[0], y_axis(max(y for _, y in group))) for place, group in zip(middle, grouped, strict=True)]
            lower = [(place[0], y_axis(min(y for _, y in group))) for place, group in zip(middle, grouped, strict=True)]
            marks.append(tag("polygon", points=" ".join(f"{x},{y}" for x, y in upper + lower[::-1]), class_=f"band s{index}"))
        marks.append(tag("polyline", points=" ".join(f"{x},{y}" for x, y in middle), class_=f"line s{index}"))
        if index:
            marks += [tag("rect", x=x - 3, y=y - 3, width=6, height=6, class_=f"mark s{index}") for x, y in middle]
        ends.append((middle[-1][1], index, means[-1][1]))
        if not index:
            edges = [left, *((a[0] + b[0]) / 2 for a, b in itertools.pairwise(middle)), WIDTH - right]
            marks += [_hover(name, across, group, edges[at], edges[at + 1], top, bottom) for at, group in enumerate(grouped)]
    above = math.inf
    for y, index, value in sorted(ends, reverse=True):  # from the lowest up, each clear of the one below it
        above = min(y, above - 13)
        marks.append(text(WIDTH - right + 8, above + 4, number(value), class_=f"value s{index}"))
    return svg(bottom + 40, label, marks)


def _grouped(line: Sequence[tuple[float, float]], bins: int) -> list[list[tuple[float, float]]]:
    """Neighbouring points together, at most `bins` groups of equal length."""
    each = max(1, math.ceil(len(line) / bins))
    return [list(line[at : at + each]) for at in range(0, len(line), each)]


def _hover(name: str, across: str, group: Sequence[tuple[float, float]], start: float, end: float, top: float, bottom: float) -> Html:
    first, values = group[0][0], [y for _, y in group]
    words = f"{across} {count(first)}: {name} {number(values[0])}"
    if len(group) > 1:
        mean = number(sum(values) / len(values))
        words = f"{across}s {count(first)} to {count(group[-1][0])}: {name} {mean} ({number(min(values))} to {number(max(values))})"
    return tag("rect", tag("title", words), x=round(start, 1), y=top, width=round(end - start, 1), height=bottom - top, class_="hit")


def lanes(parents: Sequence[Sequence[int]], tints: Sequence[str], row: int = 60, lane: int = 22) -> Html:
    """A history as lanes, one row a node, as `git log --graph` draws it: `parents[i]` are earlier rows from which row `i` was made.

    A node stays in its lane until its last child, so a line never runs through another node.
    """
    last = {parent: child for child, above in enumerate(parents) for parent in above}
    held: list[int | None] = []  # held[lane] = the node whose output is still needed
    where: list[int] = []
    for node, above in enumerate(parents):
        for at, other in enumerate(held):  # lanes whose node has no child from here on are free again
            if other is not None and last.get(other, other) < node:
                held[at] = None
        ending = [where[parent] for parent in above if last[parent] == node]
        free = [at for at, other in enumerate(held) if other is None]
        place = min(ending) if ending else free[0] if free else len(held)
        if place == len(held):
            held.append(None)
        held[place] = node
        where.append(place)
    width = lane * (max(where, default=0) + 1) + 6

    def centre(node: int) -> tuple[float, float]:
        return lane * (where[node] + 0.5) + 3, row * (node + 0.5)

    lines = []
    for node, above in enumerate(parents):
        x, y = centre(node)
        for parent in above:
            px, py = centre(parent)
            path = f"M{px},{py}V{y}" if px == x else f"M{px},{py}V{y - row * 0.75}C{px},{y - row * 0.2} {x},{y - row * 0.55} {x},{y}"
            lines.append(tag("path", d=path, class_="edge"))
    centres = [centre(node) for node in range(len(parents))]
    nodes = [tag("circle", cx=x, cy=y, r=6, class_="dot", style=f"--tint:{colour}") for (x, y), colour in zip(centres, tints, strict=True)]
    height = row * len(parents)
    return tag("svg", lines, nodes, viewBox=f"0 0 {width} {height}", width=width, height=height, class_="lanes", aria_hidden="true")
