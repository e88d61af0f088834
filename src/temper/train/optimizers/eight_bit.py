"""AdamW with its two means in 8 bits: dynamic tree code books, one scale per block."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any

from temper.lazy import F, torch
from temper.train.optimizers.common import FirstOrder
from temper.train.slices import SLICE

_ELSEWHERE = 2**24  # elements that are unpacked at a time where no cache counts


def dynamic_map(signed: bool) -> torch.Tensor:
    """The 256 values of the 8-bit dynamic tree type, float32 [256], ascending, from -0.993 (or 0) to 1 (Dettmers et al. 2022, section 1.3).

    The leading zeros of a code say the power of ten, seven of them from 1e-6 to 1; its other bits cut (0.1, 1] of that power evenly,
    more finely the larger it is. Equal to `create_dynamic_map` of bitsandbytes.
    """
    values = [torch.tensor([0.0, 1.0])]
    for power in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (power + (not signed)) + 1)
        centres = 10 ** (power - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [centres, -centres] if signed else [centres]
    return torch.cat(values).sort().values


@dataclasses.dataclass(frozen=True)
class Book:
    """A code book with what finds the nearest of its values in a few passes instead of a search.

    A number's 17 leading bits (sign, exponent, 8 of the mantissa) name a cell that holds at most one boundary between neighbours:
    `lower` is the cell's first code, uint8 [2^17], `bound` the boundary, float32 [2^17].
    """

    values: torch.Tensor
    lower: torch.Tensor
    bound: torch.Tensor

    @staticmethod
    @functools.cache
    def dynamic(signed: bool, device: str) -> Book:
        """The code book of the dynamic tree type on a device."""
        values = dynamic_map(signed)
        middles = (values[1:].double() + values[:-1].double()) / 2
        below = middles.float()  # the largest float32 that is not above the middle: x > below just where x > middle
        below = torch.where(below.double() > middles, torch.nextafter(below, torch.tensor(-math.inf)), below)
        cells = torch.arange(2**17, dtype=torch.int64)
        negative = cells >= 2**16
        # A cell's numbers grow with its bits where they are positive, and fall where they are negative.
        first, last = (cells << 15), (cells << 15) + 2**15 - 1
        edges = [(one - 2**32 * negative).to(torch.int32).view(torch.float32) for one in (first, last)]
        smallest = torch.where(negative, edges[1], edges[0]).nan_to_num(0.0)
        lower = torch.bucketize(smallest, below)
        bound = torch.cat([below, torch.tensor([math.inf])])[lower]
        return Book(*(one.to(device) for one in (values, lower.to(torch.uint8), bound)))

    def codes(self, numbers: torch.Tensor) -> torch.Tensor:
        """The code of the value nearest to each number (of two equally near, the lower): float32 [n], from -1 to 1 -> uint8 [n]."""
        cells = (numbers.view(torch.int32) >> 15).bitwise_and_(2**17 - 1)
        codes = self.lower.index_select(0, cells)
        return codes.add_(numbers > self.bound.index_select(0, cells))

    def numbers(self, codes: torch.Tensor) -> torch.Tensor:
        """uint8 [n] -> float32 [n]."""
        return self.values.index_select(0, codes.int())


def packed(numbers: torch.Tensor, block: int, book: Book) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers [n] -> codes, uint8 [n], and a scale per block, its largest magnitude, float32 [ceil(n / block)]."""
    count = len(numbers)
    rows = F.pad(numbers, (0, -count % block)).view(-1, block) if count % block else numbers.view(-1, block)
    scales = rows.abs().amax(1).float()  # ten times as fast here as the norm of order infinity
    relative = rows / scales.masked_fill(scales == 0, 1.0)[:, None]
    return book.codes(relative.float().view(-1))[:count], scales


def unpacked(codes: torch.Tensor, scales: torch.Tensor, block: int, book: Book) -> torch.Tensor:
    """Codes [n] and their blocks' scales -> numbers, float32 [n]."""
    numbers = book.numbers(codes)
    if len(codes) % block == 0:
        return numbers.view(-1, block).mul_(scales[:, None]).view(-1)
    return numbers.mul_(scales.repeat_interleave(block)[: len(codes)])


class AdamW8Bit(FirstOrder):
    """See the part `adamw-8bit`. State: of both means a code per weight and a scale per block; whole where a group's `bits` are 32."""

    def __init__(self, groups: Iterable[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float, block: int):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "block": block})

    def move(self, group: dict[str, Any], moving: list[torch.nn.Parameter]) -> None:
        for one in moving:
            if not self.state[one]:
                self._begin(one, group)
            self._move(one, group, self.state[one])

    def _begin(self, one: torch.nn.Parameter, group: dict[str, Any]) -> None:
        state, count = self.state[one], one.numel()
        state["step"] = 0
        for name in MEANS:
            if group["bits"] == 32:
                state[name] = torch.zeros(count, dtype=torch.promote_types(one.dtype, torch.float32), device=one.device)
            else:
                zero = torch.zeros(1, device=one.device)
                state[name] = _book(name, zero).codes(zero).repeat(count)
                state[f"{name}_scales"] = zero.repeat(math.ceil(count / group["block"]))

    def _move(self, one: torch.nn.Parameter, group: dict[str, Any], state: dict[str, Any]) -> None:
        """AdamW slice by slice: unpacks both means, moves them and the weights, packs the means again."""
        state["step"] += 1
        (beta1, beta2), rate, block = group["betas"], group["lr"], group["block"]
        corrections = 1 - beta1 ** state["step"], math.sqrt(1 - beta2 ** state["step"])
        weights, gradient = one.detach().reshape(-1), one.grad.reshape(-1)  # type: ignore[union-attr]
        length = max(1, (SLICE if one.device.type == "cpu" else _ELSEWHERE) // block) * block
        for start in range(0, len(weights), length):
            here, blocks = slice(start, start + length), slice(start // block, (start + length) // block)
            slopes = gradient[here].to(torch.promote_types(one.dtype, torch.float32))
            mean, square = (self._take(state, name, here, blocks, block).to(slopes.dtype) for name in MEANS)
            mean.lerp_(slopes, 1 - beta1)
            square.mul_(beta2).addcmul_(slopes, slopes, value=1 - beta2)
            weights[here].mul_(1 - rate * group["weight_decay"])
            weights[here].addcdiv_(mean, square.sqrt().div_(corrections[1]).add_(group["eps"]), value=-rate / corrections[0])
            if group["bits"] == 8:
                for name, numbers in zip(MEANS, (mean, square)):
                    state[name][here], state[f"{name}_scales"][blocks] = packed(numbers, block, _book(name, numbers))
        if weights.data_ptr() != one.data_ptr():  # a copy, where the parameter's numbers do not lie in order
            one.copy_(weights.view_as(one))

    @staticmethod
    def _take(state: dict[str, Any], name: str, here: slice, blocks: slice, block: int) -> torch.Tensor:
        held = state[name][here]
        return unpacked(held, state[f"{name}_scales"][blocks], block, _book(name, held)) if held.dtype == torch.uint8 else held


MEANS = ("mean", "square")
"""Of the gradients, and of their squares, which are never negative."""


def _book(name: str, beside: torch.Tensor) -> Book:
    return Book.dynamic(name == "mean", str(beside.device))
