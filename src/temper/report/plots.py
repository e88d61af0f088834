"""Two charts for studies as inline SVG: rows of values with intervals, and a plane of points, lines and bands.

Pure functions, as those of `charts.py`. Arms differ by the shape of their marks and the dashes of their lines as well as by colour.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from temper.report.charts import WIDTH, Axis, short, svg, text, ticks_below
from temper.report.html import Html, tag

SHAPES = (
    "M-1,0a1,1 0 1,0 2,0a1,1 0 1,0 -2,0z",  # circle
    "M-.9,-.9h1.8v1.8h-1.8z",  # square
    "M0,-1.2L1.15,.85H-1.15z",  # triangle
    "M0,-1.3L1.3,0L0,1.3L-1.3,0z",  # diamond
    "M0,1.2L1.15,-.85H-1.15z",  # triangle on its point
    "M-.4,-1.2h.8v.8h.8v.8h-.8v.8h-.8v-.8h-.8v-.8h.8z",  # plus
    "M-1.1,-1.1H1.1L-1.1,1.1H1.1z",  # hourglass
)
COLOURS = 5
LETTER = 7.0
"""Width of a letter of a chart's text, in the drawing's units."""


def front(costs: Sequence[float], qualities: Sequence[float]) -> list[int]:
    """Which points no other point beats: none costs at most as much, is at least as good, and is better in one. From cheap to dear."""
    kept: list[int] = []
    for at in sorted(range(len(costs)), key=lambda at: (costs[at], -qualities[at])):
        same = kept and (costs[at], qualities[at]) == (costs[kept[-1]], qualities[kept[-1]])
        if not kept or qualities[at] > qualities[kept[-1]] or same:
            kept.append(at)
    return kept


def mark(look: int, x: float, y: float, solid: bool = True, size: float = 5) -> Html:
    """An arm's mark: `look` is its place in the study; hollow where not `solid`."""
    drawn = f"spot s{look % COLOURS}{'' if solid else ' open'}"
    return tag("path", d=SHAPES[look % len(SHAPES)], transform=f"translate({x},{y}) scale({size})", class_=drawn)


def key(look: int) -> Html:
    """An arm's mark in a line of text."""
    return tag("svg", mark(look, 7, 7), viewBox="0 0 14 14", aria_hidden="true", class_="key")


# ---------------------------------------------------------------- rows


@dataclass(frozen=True)
class Span:
    """A row: a value with its interval. bound: the margin that it is held against. points: what it is the mean of."""

    name: str
    words: str
    value: float
    low: float | None = None
    high: float | None = None
    bound: float | None = None
    points: Sequence[float] = ()
    look: int = 0
    solid: bool = True


def spans(label: str, rows: Sequence[Span], unit: str = "", across: str = "", zero: bool = False, bars: bool = False) -> Html:
    """Rows on one axis, each under its name and words. zero: a line at zero; bars: a bar from there to the value. Values are finite."""
    given = [value for row in rows for value in (row.value, row.low, row.high, row.bound, *row.points) if value is not None]
    low, high = min(given), max(given)
    axis = Axis(min(low, 0.0), max(high, 0.0), 24, WIDTH - 24) if zero else Axis(low, high, 24, WIDTH - 24)
    marks: list[Html] = []
    y = 0.0
    for row in rows:
        start, lines = y, textwrap.wrap(row.name, 50) or [""]
        beside = len(lines) == 1 and len(row.name) + len(row.words) < 48
        inside = [text(0, y + 15 * at, line, class_="name") for at, line in enumerate(lines, 1)]
        y += 15 * len(lines)
        if beside:
            inside.append(text(WIDTH, y, row.words, text_anchor="end", class_="tick"))
        else:
            y += 14
            inside.append(text(0, y, row.words, class_="tick"))
        y += 16
        middle = y - 4 if row.points else y  # the points have a line of their own
        inside += [tag("line", x1=axis(tick), x2=axis(tick), y1=y - 9, y2=y + 9, class_="grid") for tick in axis.ticks]
        if zero:
            inside.append(tag("line", x1=axis(0), x2=axis(0), y1=y - 9, y2=y + 9, class_="zero"))
        if row.bound is not None and not (zero and row.bound == 0):
            inside.append(tag("line", x1=axis(row.bound), x2=axis(row.bound), y1=y - 9, y2=y + 9, class_="bound"))
        if bars:
            left, right = sorted((axis(0), axis(row.value)))
            inside.append(tag("rect", x=left, y=y - 5, width=round(right - left, 1), height=10, class_=f"area s{row.look % COLOURS}"))
        inside += [tag("circle", cx=axis(point), cy=middle + 10, r=2.6, class_=f"seed s{row.look % COLOURS}") for point in row.points]
        inside += _interval(row.look, row.low, row.high, axis, middle)
        inside.append(mark(row.look, axis(row.value), middle, row.solid))
        marks.append(tag("g", tag("title", f"{row.name}: {row.words}"), inside))
        y = max(y + 20, start + 44)
    marks += ticks_below(axis, unit, y + 4)
    if across:
        marks.append(text(WIDTH / 2, y + 21, across, text_anchor="middle", class_="tick"))
    return svg(y + (26 if across else 10), label, marks)


def _interval(look: int, low: float | None, high: float | None, axis: Axis, y: float) -> list[Html]:
    if low is None or high is None:
        return []
    kind = f"s{look % COLOURS}"
    drawn = [tag("line", x1=axis(end), x2=axis(end), y1=y - 4, y2=y + 4, class_=f"whisker {kind}") for end in (low, high)]
    return [tag("line", x1=axis(low), x2=axis(high), y1=y, y2=y, class_=f"whisker {kind}"), *drawn]


# ---------------------------------------------------------------- a plane


Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


@dataclass(frozen=True)
class Spot:
    """A point of a plane. words: all that is known of it; name: its label, shown where there is room."""

    x: float
    y: float
    words: str
    low: float | None = None
    high: float | None = None
    name: str = ""
    look: int = 0
    solid: bool = True
    size: float = 5


@dataclass(frozen=True)
class Line:
    """A line of a plane through (x, y, low, high), with a band from low to high where they are given."""

    places: Sequence[tuple[float, float, float | None, float | None]]
    look: int = 0


def plane(
    label: str,
    across: str,
    up: str,
    spots: Sequence[Spot],
    lines: Sequence[Line] = (),
    stairs: Sequence[int] = (),
    units: tuple[str, str] = ("", ""),
    words: Sequence[str] = (),
    room: float = 0,
    spread: float = 30,
) -> Html:
    """Points, lines and bands over two axes; all values are finite.

    stairs: spots joined by steps, what they reach together. words: names of x = 0, 1, 2, ... in place of numbers. room: width at the
    right for the labels of lines' ends; 0: labels stand where there is room, and x need not begin at zero. spread: see `Axis`.
    """
    flat = [value for line in lines for place in line.places for value in place[1:] if value is not None]
    flat += [value for spot in spots for value in (spot.y, spot.low, spot.high) if value is not None]
    top, bottom = 26.0, 196.0
    y_axis = Axis(min(flat), max(flat), bottom, top, spread=spread)
    heights = y_axis.labels(units[1])
    left, right = 10 + LETTER * max(map(len, heights)), WIDTH - (room or 24)
    over = [spot.x for spot in spots] + [place[0] for line in lines for place in line.places]
    if words:
        x_axis = Axis(0, max(1, len(words) - 1), left + 20, right - 20, tight=True, whole=True)
    else:
        x_axis = Axis(0.0 if room else min(over), max(over), left, right, tight=bool(room), whole=bool(room), spread=spread)
    marks: list[Html | None] = [text(0, 11, up, class_="tick")]
    for value, word in zip(y_axis.ticks, heights, strict=True):
        marks.append(tag("line", x1=left, x2=right, y1=y_axis(value), y2=y_axis(value), class_="grid"))
        marks.append(text(left - 6, y_axis(value) + 4, word, text_anchor="end", class_="tick"))
    if words:
        most = int((right - left) / max(1, len(words)) / LETTER)
        cut = [word if len(word) <= most else word[: max(1, most - 1)] + "…" for word in words]
        marks += [text(x_axis(at), bottom + 16, word, text_anchor="middle", class_="tick") for at, word in enumerate(cut)]
    else:
        marks += [tag("line", x1=x_axis(value), x2=x_axis(value), y1=bottom, y2=bottom + 4, class_="grid") for value in x_axis.ticks]
        marks += ticks_below(x_axis, units[0], bottom + 16)
    marks.append(text((left + right) / 2, bottom + 34, across, text_anchor="middle", class_="tick"))
    for line in lines:
        marks += _line(line, x_axis, y_axis)
    if stairs:
        marks.append(_stairs([(x_axis(spots[at].x), y_axis(spots[at].y)) for at in stairs], right))
    taken: list[Box] = []
    for spot in spots:
        x, y, half = x_axis(spot.x), y_axis(spot.y), 1.4 * spot.size
        taken.append((x - half, y - half, x + half, y + half))
        upright = None
        if spot.low is not None and spot.high is not None:
            taken.append((x - 3, y_axis(spot.high), x + 3, y_axis(spot.low)))
            upright = tag("line", x1=x, x2=x, y1=y_axis(spot.low), y2=y_axis(spot.high), class_=f"whisker s{spot.look % COLOURS}")
        marks.append(tag("g", tag("title", spot.words), upright, mark(spot.look, x, y, spot.solid, spot.size)))
    named = sorted((spot for spot in spots if spot.name), key=lambda spot: y_axis(spot.y), reverse=True)  # from the lowest up
    marks += [_label(spot, x_axis(spot.x), y_axis(spot.y), taken, (left, 12, WIDTH + 4, bottom), bool(room)) for spot in named]
    return svg(bottom + 40, label, marks)


def _line(line: Line, x_axis: Axis, y_axis: Axis) -> list[Html]:
    drawn, kind = [], f"s{line.look % COLOURS}"
    band = [(x_axis(x), y_axis(low), y_axis(high)) for x, _, low, high in line.places if low is not None and high is not None]
    if len(band) > 1:
        edge = [f"{x},{high}" for x, _, high in band] + [f"{x},{low}" for x, low, _ in reversed(band)]
        drawn.append(tag("polygon", points=" ".join(edge), class_=f"band {kind}"))
    drawn.append(tag("polyline", points=" ".join(f"{x_axis(x)},{y_axis(y)}" for x, y, _, _ in line.places), class_=f"line {kind}"))
    return drawn


def _stairs(places: Sequence[tuple[float, float]], right: float) -> Html:
    """Steps from each place across to the next one's cost, then to its height; the last goes on to the right."""
    path = f"M{places[0][0]},{places[0][1]}" + "".join(f"H{x}V{y}" for x, y in places[1:])
    return tag("path", d=f"{path}H{right}", class_="stairs")


def _label(spot: Spot, x: float, y: float, taken: list[Box], inside: Box, right: bool) -> Html | None:
    """A name beside its mark at the first place that is free and inside, noted in `taken`; None where there is none."""
    name = short(spot.name, 18)
    wide, away = LETTER * len(name), 1.4 * spot.size + 3
    rises = range(4, -100, -3) if right else (4, -9, 17, -22, 30, -35, 43)
    offers = [(x + away, y + rise, "start") for rise in rises]
    if not right:
        others = [(x - away, y + rise, "end") for rise in rises]
        offers = [offers[1], others[1], offers[0], others[0], (x, y - 11, "middle"), (x, y + 20, "middle"), *offers[2:], *others[2:]]
    for at, base, anchor in offers:
        start = at - {"start": 0, "middle": wide / 2, "end": wide}[anchor]
        box = (start, base - 10, start + wide, base + 3)
        fits = box[0] >= inside[0] and box[1] >= inside[1] and box[2] <= inside[2] and box[3] <= inside[3]
        if fits and not any(box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3] for other in taken):
            taken.append(box)
            return text(round(at, 1), round(base, 1), name, text_anchor=anchor, class_=f"label s{spot.look % COLOURS}")
    return None


def finite(*values: float | None) -> bool:
    """Whether all are there and finite: what can be drawn."""
    return all(value is not None and math.isfinite(value) for value in values)
