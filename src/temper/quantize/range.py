"""Slot `range`: scales and zero points, fitted before rounding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from temper.lazy import torch
from temper.models.grids import grouped, ranges
from temper.parts import Count, Share, part, slot

if TYPE_CHECKING:
    from temper.models.grids import Fit, Grid
    from temper.quantize.layer import Layer


@slot(phased=False)
class Range(Protocol):
    """Where do a group's values end? `(layer, grid) -> Fit`, the grid's scales (and zero points) for the layer's weight [R, C].

    A solver may ask for some columns alone (`layer.columns`), a group at a time.
    """

    def __call__(self, layer: Layer, grid: Grid) -> Fit: ...


@part
class MinMax:
    """From the smallest to the largest weight of the group; nothing is clipped."""

    def __call__(self, layer: Layer, grid: Grid) -> Fit:
        return grid.fit(*ranges(layer.weight, grid.group), layer.dtype)


@part(name="mse-search")
class MSESearch:
    """The share of the min-max range, out of evenly spaced ones, at which rounding errs least, for each group alone.

    Formula: argmin over s of sum h (w - round_s(w))^2, with h the diagonal of the objective's H (1 where it has none), s
    from 1 down to `lowest`. Of equals the widest range.
    """

    steps: Count = 40
    """Ranges tried."""
    lowest: Share = 0.4
    """The narrowest, as a share of the min-max range."""

    def __call__(self, layer: Layer, grid: Grid) -> Fit:
        low, high = ranges(layer.weight, grid.group)
        importance = 1.0 if layer.curvature is None else layer.curvature.diagonal()
        best: Fit = {}
        least = torch.full_like(low, float("inf"))
        for share in torch.linspace(1, self.lowest, self.steps).tolist():
            fit = grid.fit(low * share, high * share, layer.dtype)
            wrong = (grid.values(grid.codes(layer.weight, **fit), **fit) - layer.weight).square() * importance
            per_group = grouped(wrong, grid.group).sum(dim=2)
            better = per_group < least
            least = torch.where(better, per_group, least)
            best = {name: torch.where(better, tensor, best[name]) if best else tensor for name, tensor in fit.items()}
        return best
