"""Grids: the values that a quantised weight may take.

A grid turns weights into small integers (codes) and back, given what was fitted to them: one scale, and for
asymmetric grids one zero point, per group of neighbouring columns of a row. Quantising and training under a grid
both stand on these functions.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Annotated, Protocol

from pydantic import Field

from temper.lazy import F, torch
from temper.parts import Count, part, slot

if TYPE_CHECKING:
    from torch import Tensor

    Fit = dict[str, Tensor]
    """What was fitted to one weight, by name: `scale` [R, G] float, for asymmetric grids `zero` [R, G] int8."""


@slot(phased=False)
class Grid(Protocol):
    """Which values may a weight take?

    For a weight [R, C] with G groups of columns a row:
    `fit(low [R, G], high [R, G], dtype) -> Fit`, scales representable in `dtype`, the dtype in which they are stored;
    `codes(weight [R, C], **fit) -> int8 [R, C]` nearest on the grid; `values(codes, **fit) -> [R, C]`, and
    `codes(values(codes)) == codes`; `inside(weight, **fit) -> bool [R, C]`, false where the grid clips;
    `column(fit, index) -> Fit` of one column; `slices(columns)`, the groups. 0 is on every grid.
    """

    bits: int
    """Bits of one code."""
    group: int | None
    """Columns that share a scale; None: the whole row."""

    @property
    def label(self) -> str: ...  # number format in a passport

    def fit(self, low: Tensor, high: Tensor, dtype: torch.dtype) -> Fit: ...

    def codes(self, weight: Tensor, scale: Tensor) -> Tensor: ...

    def values(self, codes: Tensor, scale: Tensor) -> Tensor: ...

    def inside(self, weight: Tensor, scale: Tensor) -> Tensor: ...

    def column(self, fit: Fit, index: int) -> Fit: ...

    def slices(self, columns: int) -> list[slice]: ...


# ------------------------------------------------------------------------------------------------- pure functions


def spread(per_group: Tensor, columns: int, group: int | None) -> Tensor:
    """[R, G] -> [R, columns]: every column gets its group's number; the last group may be short."""
    return per_group if group is None else per_group.repeat_interleave(group, dim=1)[:, :columns]


def grouped(weight: Tensor, group: int | None) -> Tensor:
    """[R, C] -> [R, G, group]: a short last group is filled up with zeros, which every grid holds anyway."""
    rows, columns = weight.shape
    size = group or columns
    return F.pad(weight, (0, -columns % size)).view(rows, -1, size)


def ranges(weight: Tensor, group: int | None) -> tuple[Tensor, Tensor]:
    """Smallest and largest weight of each group, [R, G] each; 0 always lies between."""
    low, high = torch.aminmax(grouped(weight, group), dim=2)
    return low.clamp(max=0), high.clamp(min=0)


def integer_fit(low: Tensor, high: Tensor, bits: int, symmetric: bool, dtype: torch.dtype) -> Fit:
    """Scale and zero point of an integer grid.

    Symmetric: scale = max(-low, high) / ((2^bits - 1) / 2). Asymmetric: scale = (high - low) / (2^bits - 1), zero point
    round(-2^(bits-1) - low / scale). Both as in compressed-tensors, which stores them. An empty group gets the
    smallest step of `dtype`.
    """
    steps, least = 2**bits - 1, -(2 ** (bits - 1))
    scale = torch.maximum(low.abs(), high.abs()) / (steps / 2) if symmetric else (high - low) / steps
    scale = scale.to(dtype).to(low.dtype)
    scale = torch.where(scale == 0, torch.finfo(dtype).eps, scale)
    if symmetric:
        return {"scale": scale}
    zero = (least - low / scale).clamp(least, least + steps).round()
    return {"scale": scale, "zero": zero.to(torch.int8)}


def integer_codes(weight: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """clamp(round(weight / scale + zero)) as int8 between -2^(bits-1) and 2^(bits-1) - 1; all [R, C]."""
    places = _places(weight, scale, zero)
    return places.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).round().to(torch.int8)


def _places(weight: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    places = weight / scale
    return places if zero is None else places + zero.to(places.dtype)


def integer_values(codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """(codes - zero) * scale in the dtype of `scale`; all [R, C]."""
    steps = codes.to(scale.dtype)
    return (steps if zero is None else steps - zero.to(scale.dtype)) * scale


@functools.cache
def nf4_levels() -> tuple[float, ...]:
    """The 16 levels of NF4: quantiles of the standard normal, 8 below 0 and 9 above with 0 shared, scaled to [-1, 1].

    Dettmers et al. 2023, "QLoRA", appendix E; outermost quantile 1 - (1/32 + 1/30) / 2, as in their code.
    """
    outer = 1 - (1 / 32 + 1 / 30) / 2
    above = torch.special.ndtri(torch.linspace(outer, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(outer, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([below, torch.zeros(1, dtype=torch.float64), above]).sort().values
    return tuple((levels / levels.max()).tolist())


# ----------------------------------------------------------------------------------------------------------- parts


class _Grouped:
    """What grids with one scale a group share."""

    group: int | None

    def column(self, fit: Fit, index: int) -> Fit:
        place = index // self.group if self.group else 0
        return {name: tensor[:, place : place + 1] for name, tensor in fit.items()}

    def slices(self, columns: int) -> list[slice]:
        size = self.group or columns
        return [slice(start, min(start + size, columns)) for start in range(0, columns, size)]

    def _spread(self, tensor: Tensor, weight: Tensor) -> Tensor:
        return spread(tensor, weight.shape[1], self.group)


@part
class Integer(_Grouped):
    """Evenly spaced values: (code - zero) * scale, code in -2^(bits-1) .. 2^(bits-1) - 1, the convention of compressed-tensors."""

    bits: Annotated[int, Field(ge=2, le=8)] = 4
    """Bits of one code."""
    group: Count | None = 32
    """Columns of a row that share a scale; none: the whole row (`channel`)."""
    symmetric: bool = True
    """No zero point: as many values below 0 as above, but for one."""

    @property
    def label(self) -> str:
        return f"int{self.bits}-{f'g{self.group}' if self.group else 'channel'}-{'sym' if self.symmetric else 'asym'}"

    def fit(self, low: Tensor, high: Tensor, dtype: torch.dtype) -> Fit:
        return integer_fit(low, high, self.bits, self.symmetric, dtype)

    def codes(self, weight: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        zero = None if zero is None else self._spread(zero, weight)
        return integer_codes(weight, self._spread(scale, weight), zero, self.bits)

    def values(self, codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        zero = None if zero is None else self._spread(zero, codes)
        return integer_values(codes, self._spread(scale, codes), zero)

    def inside(self, weight: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        zero = None if zero is None else self._spread(zero, weight)
        places = _places(weight, self._spread(scale, weight), zero).round()
        return (places >= -(2 ** (self.bits - 1))) & (places <= 2 ** (self.bits - 1) - 1)


@part
class NF4(_Grouped):
    """The 16 values of NormalFloat times a group's largest magnitude.  Dettmers et al. 2023, "QLoRA", appendix E."""

    group: Count | None = 64
    """Columns of a row that share a scale; none: the whole row."""

    @property
    def bits(self) -> int:
        return 4

    @property
    def label(self) -> str:
        return f"nf4-{f'g{self.group}' if self.group else 'channel'}"

    def fit(self, low: Tensor, high: Tensor, dtype: torch.dtype) -> Fit:
        scale = torch.maximum(low.abs(), high.abs()).to(dtype).to(low.dtype)
        return {"scale": torch.where(scale == 0, torch.finfo(dtype).eps, scale)}

    def codes(self, weight: Tensor, scale: Tensor) -> Tensor:
        levels = self._levels(weight)
        between = (levels[1:] + levels[:-1]) / 2
        return torch.bucketize(weight / self._spread(scale, weight), between).to(torch.int8)

    def values(self, codes: Tensor, scale: Tensor) -> Tensor:
        return self._levels(scale)[codes.long()] * self._spread(scale, codes)

    def inside(self, weight: Tensor, scale: Tensor) -> Tensor:
        return weight.abs() <= self._spread(scale, weight)

    def _levels(self, like: Tensor) -> Tensor:
        return torch.tensor(nf4_levels(), dtype=like.dtype, device=like.device)
