"""Laws through points, many bootstrap draws at once; and where a learning curve will end.

Each law is linear in all but its exponent b: for a given b the rest is linear least squares. So b alone is searched for, on a grid and
then ever closer around the best of it (variable projection, Golub and Pereyra 1973): there is no starting point that could be bad.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from temper.lazy import numpy
from temper.parts import Problem, nearest
from temper.statistics.shared import finite


@dataclasses.dataclass(frozen=True)
class Law:
    """y as a function of x > 0. logs: the squares of log y are made least, so that equal ratios count alike, instead of those of y."""

    name: str
    formula: str
    parameters: tuple[str, ...]
    logs: bool = False


LAWS: Mapping[str, Law] = {
    law.name: law
    for law in (
        Law("power-law", "y = a x^b", ("a", "b")),
        Law("power-law-offset", "y = a x^b + c", ("a", "b", "c")),
        Law("log-law", "y = a log(x) + c", ("a", "c")),
        Law("log-log-line", "log y = log(a) + b log(x)", ("a", "b"), logs=True),
    )
}

STEEPEST = 5.0
"""Exponents of power laws are searched from -5 to 5; a fit at the end of that is no power law."""


@dataclasses.dataclass(frozen=True, eq=False)
class Fitted:
    """A law through points, or one through each of B draws."""

    law: Law
    parameters: dict[str, Any]
    """Name -> number, or array [B]."""
    residual: numpy.ndarray
    """What the law leaves of y (of log y where the law is one of logs), [N] or [B, N]."""
    r2: Any
    """The share of the weighted variance of y (of log y) that the law explains, or [B]; 1 where nothing varies."""

    def predict(self, x: Any) -> Any:
        """y at one x: a number, or [B]; at x [M]: [M], or [B, M]."""
        x = numpy.asarray(x, dtype=numpy.float64)
        a, b, c = (numpy.expand_dims(self.parameters.get(name, 0.0), tuple(range(-x.ndim, 0))) for name in "abc")
        y = a * (x**b if "b" in self.parameters else numpy.log(x)) + c
        return y if y.ndim else float(y)


def fit(law: Law | str, x: Any, y: Any, weights: Any = None) -> Fitted:
    """The law closest to points: weighted squares summed are least.

    x [N] above 0 with y [N]; or y [B, N], a row for each draw, with x [N] or [B, N]. weights: [N] or as y, 0 leaves a point out; all
    alike by default. `Problem` where there are fewer different x than parameters, or a law of logs meets y that is 0 or less.
    """
    law = _named(law)
    x, y = finite(x, "x"), finite(y, "y")
    if x.shape[-1] != y.shape[-1]:
        raise Problem(f"{x.shape[-1]} x and {y.shape[-1]} y: a point has one of each")
    if (x <= 0).any() or (law.logs and (y <= 0).any()):
        raise Problem(f"x from {x.min():g}, y from {y.min():g}: `{law.name}` needs x{' and y' if law.logs else ''} above 0")
    weights = numpy.ones(1) if weights is None else finite(weights, "weights")
    if (weights < 0).any():
        raise Problem(f"a weight of {weights.min():g}: weights are from 0")
    rows = [numpy.atleast_2d(one) for one in (numpy.log(x), numpy.log(y) if law.logs else y, numpy.broadcast_to(weights, y.shape))]
    distinct = _distinct(rows[0], rows[2])
    if distinct < len(law.parameters):
        raise Problem(f"{distinct} different x: `{law.name}` has {len(law.parameters)} parameters and needs as many; add points")
    pieces = [_solve(law, rows, piece) for piece in _pieces(*rows[1].shape)]
    a, b, c, residual, r2 = (numpy.concatenate(column) for column in zip(*pieces, strict=True))
    values = {name: value if y.ndim > 1 else float(value[0]) for name, value in (("a", a), ("b", b), ("c", c)) if name in law.parameters}
    return Fitted(law, values, residual.reshape(y.shape), r2 if y.ndim > 1 else float(r2[0]))


def leave_last_out(law: Law | str, x: Any, y: Any) -> tuple[Any, Any]:
    """What the other points say of the one at the greatest x: its predicted y, and the error relative to the y that was seen.

    x [N], y [N] or [B, N] -> numbers, or arrays [B]. The test of a law that is meant to look ahead.
    """
    x, y = finite(x, "x", 2), finite(y, "y", 2)
    last = int(x.argmax())
    predicted = fit(law, numpy.delete(x, last), numpy.delete(y, last, axis=-1)).predict(x[last])
    return predicted, predicted / y[..., last] - 1


@dataclasses.dataclass(frozen=True, eq=False)
class Forecast:
    """Where a learning curve ends, as told by its beginnings. Level l is the curve's first l points, l = 3 .. N."""

    asymptotes: numpy.ndarray
    """[N - 2], where the curve through the first 3, 4, ... N points ends; infinite where that one does not flatten."""
    prediction_level: int | None
    """The level from which on every asymptote was one that the curve can have."""
    stop: int | None
    """The first level past the prediction level whose asymptote is within the threshold of the one before: no more need be measured."""
    fitted: Fitted
    """The law at `stop`, or through all points."""


def forecast(x: Any, y: Any, threshold: float, *, lowest: float = -math.inf, highest: float = math.inf) -> Forecast:
    """Predicts a learning curve from its beginnings, and says when they suffice.  After Vilares Ferro et al. 2017

    y [N], such as accuracy, at x [N] rising, such as examples. Formula: A_l(x) = a_l x^b_l + c_l through the first l points; its
    asymptote is c_l where b_l < 0. From the prediction level on, asymptotes lie between `lowest` and `highest` (0 and 1 for accuracy).
    The proximity condition is |c_l - c_(l-1)| < threshold, both from there on. The anchors with which the paper holds early curves down
    are left out: levels before the prediction level are waited for instead.
    """
    x, y = finite(x, "x", 3), finite(y, "y", 3)
    if (numpy.diff(x) <= 0).any() or not threshold > 0:
        raise Problem(f"a threshold of {threshold:g}, {len(x)} points: the threshold is above 0, and each x greater than the one before")
    levels = range(3, len(x) + 1)
    beginnings = numpy.arange(len(x)) < numpy.array(levels)[:, None]
    law = LAWS["power-law-offset"]
    curves = fit(law, x, numpy.broadcast_to(y, beginnings.shape), beginnings)
    a, b, c = (curves.parameters[name] for name in "abc")
    asymptotes = numpy.where(b < 0, c, numpy.copysign(math.inf, a))
    feasible = numpy.isfinite(asymptotes) & (asymptotes >= lowest) & (asymptotes <= highest)
    prediction_level = stop = None
    for index, level in enumerate(levels):
        if not feasible[index]:
            prediction_level = None
        elif prediction_level is None:
            prediction_level = level
        elif abs(asymptotes[index] - asymptotes[index - 1]) < threshold:
            stop = level
            break
    return Forecast(asymptotes, prediction_level, stop, fit(law, x[:stop], y[:stop]))


def _named(law: Law | str) -> Law:
    if isinstance(law, Law):
        return law
    if law not in LAWS:
        raise Problem(f"no law `{law}`{nearest(law, LAWS)}")
    return LAWS[law]


def _distinct(logs: numpy.ndarray, weights: numpy.ndarray) -> int:
    """How many different x have weight, in the row that has fewest."""
    kept = numpy.sort(numpy.where(weights > 0, logs, math.nan))  # left out ones come last, and differ from nothing
    return int(((numpy.diff(kept) > 0).sum(1) + ~numpy.isnan(kept[:, 0])).min())


def _pieces(draws: int, points: int) -> list[slice]:
    """Draws at once, such that all of the grid's curves take some 32 MB."""
    at_once = max(1, 2**22 // (len(_grid()) * points))
    return [slice(first, first + at_once) for first in range(0, draws, at_once)]


def _grid() -> numpy.ndarray:
    return numpy.linspace(-STEEPEST, STEEPEST, 200)  # an even number: 0 is not among them


def _solve(law: Law, rows: list[numpy.ndarray], piece: slice) -> tuple[numpy.ndarray, ...]:
    """a, b, c [B], residuals [B, N] and r2 [B] of some of the draws."""
    logs, y, weights = (one[piece] if len(one) > 1 else one for one in rows)
    weights = weights / weights.sum(1, keepdims=True)
    middle = logs.mean(1, keepdims=True)  # powers are of x over its geometric mean: no unit of x overflows
    u, middle = logs - middle, numpy.broadcast_to(middle[:, 0], len(y))
    offset = law.logs or "c" in law.parameters
    if law.logs or "b" not in law.parameters:
        b = None
        slope, constant, residual = _line(numpy.broadcast_to(u, y.shape), y, weights, offset)
    else:
        b = _exponent(u, y, weights, offset)
        slope, constant, residual = _line(_curve(u, b[:, None], offset), y, weights, offset)
    total = (weights * (y - (weights * y).sum(1, keepdims=True)) ** 2).sum(1)
    left = (weights * residual**2).sum(1)
    r2 = numpy.where(total > 0, 1 - left / numpy.where(total > 0, total, 1), 1.0)
    if law.logs:
        return numpy.exp(constant - slope * middle), slope, numpy.zeros(len(y)), residual, r2
    if b is None:
        return slope, numpy.zeros(len(y)), constant - slope * middle, residual, r2
    if offset:
        slope = slope / b
    return slope * numpy.exp(-b * middle), b, constant - slope if offset else constant, residual, r2


def _line(curve: numpy.ndarray, y: numpy.ndarray, weights: numpy.ndarray, offset: bool) -> tuple[numpy.ndarray, ...]:
    """slope and constant [...] with y = slope curve + constant closest, and residuals [..., N]; weights sum to 1."""
    curve_mean = (weights * curve).sum(-1) if offset else numpy.zeros(curve.shape[:-1])
    y_mean = (weights * y).sum(-1) if offset else numpy.zeros(y.shape[:-1])
    about, rest = curve - curve_mean[..., None], y - y_mean[..., None]
    slope = (weights * about * rest).sum(-1) / (weights * about**2).sum(-1)
    return slope, y_mean - slope * curve_mean, rest - slope[..., None] * about


def _curve(u: numpy.ndarray, b: numpy.ndarray, offset: bool) -> numpy.ndarray:
    """x^b; beside an offset (x^b - 1)/b, which goes over into log x where b goes through 0."""
    return numpy.expm1(b * u) / b if offset else numpy.exp(b * u)


def _exponent(u: numpy.ndarray, y: numpy.ndarray, weights: numpy.ndarray, offset: bool) -> numpy.ndarray:
    """The exponent [B] whose curve leaves least."""

    def left(b: numpy.ndarray) -> numpy.ndarray:  # [B or 1, G] exponents -> [B, G] weighted squares
        residual = _line(_curve(u[:, None], b[..., None], offset), y[:, None], weights[:, None], offset)[2]
        return (weights[:, None] * residual**2).sum(-1)

    candidates = numpy.broadcast_to(_grid(), (len(y), len(_grid())))
    best = numpy.take_along_axis(candidates, left(_grid()[None]).argmin(1)[:, None], 1)
    width = _grid()[1] - _grid()[0]
    for _ in range(8):  # each time 8 times closer
        candidates = _away_from_zero(numpy.clip(best + width * numpy.linspace(-1, 1, 17), -STEEPEST, STEEPEST))
        best = numpy.take_along_axis(candidates, left(candidates).argmin(1)[:, None], 1)
        width /= 8
    for _ in range(3):  # squares tell exponents apart to 1e-8 only: Gauss-Newton steps on residuals give the other digits
        curve = _curve(u, best, offset)
        slope, _, residual = _line(curve, y, weights, offset)
        change = (u * numpy.exp(best * u) - curve) / best if offset else u * curve
        change = slope[:, None] * _line(curve, change, weights, offset)[2]
        steepness = (weights * change**2).sum(1, keepdims=True)
        step = (weights * change * residual).sum(1, keepdims=True) / numpy.where(steepness > 0, steepness, 1)
        closer = _away_from_zero(numpy.clip(best + step, -STEEPEST, STEEPEST))
        best = numpy.where(left(closer) <= left(best), closer, best)
    return best[:, 0]


def _away_from_zero(b: numpy.ndarray) -> numpy.ndarray:
    """At 0 the law is a logarithm, and its a and c infinite."""
    return numpy.where(abs(b) < 1e-8, numpy.copysign(1e-8, b), b)
