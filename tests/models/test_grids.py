"""Grids against compressed-tensors (bit for bit), the published NF4 table, and their own laws."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, fake_quantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams

from temper.models.grids import NF4, Grid, Integer, grouped, nf4_levels, ranges, spread
from temper.parts import Problem, build, fill

# Dettmers et al. 2023, "QLoRA", appendix E
PUBLISHED_NF4 = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]
GRIDS = [Integer(bits=b, group=g, symmetric=s) for b in (2, 3, 4, 8) for g in (8, None) for s in (True, False)] + [
    NF4(group=8),
    NF4(group=None),
]


def weight(rows: int = 6, columns: int = 24, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    made = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    made[0] = 0  # an empty group
    made[1] = made[1].abs()  # one-sided rows: 0 must still be on the grid
    made[2] = -made[2].abs()
    return made.to(dtype)


def theirs(grid: Integer) -> QuantizationArgs:
    return QuantizationArgs(
        num_bits=grid.bits, symmetric=grid.symmetric, group_size=grid.group or -1, strategy="group" if grid.group else "channel"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grid", [grid for grid in GRIDS if isinstance(grid, Integer)], ids=lambda grid: grid.label)
def test_integer_equals_compressed_tensors(grid: Integer, dtype: torch.dtype) -> None:
    w = weight(dtype=dtype)
    low, high = ranges(w, grid.group)
    fit = grid.fit(low, high, dtype)
    scale, zero = calculate_qparams(low, high, theirs(grid))
    assert torch.equal(fit["scale"], scale)
    if grid.symmetric:
        assert set(fit) == {"scale"}
    else:
        assert torch.equal(fit["zero"][1:], zero[1:])  # theirs is 0 / 0 where a group is empty
        zero = fit["zero"]
    codes = grid.codes(w, **fit)
    zero = fit.get("zero")
    assert torch.equal(codes, quantize(w, scale, zero, theirs(grid), dtype=torch.int8))
    assert torch.equal(grid.values(codes, **fit), dequantize(codes, scale, zero, theirs(grid)))
    assert torch.equal(grid.values(codes, **fit), fake_quantize(w, scale, zero, theirs(grid)))


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.label)
def test_round_trip_and_zero(grid: Grid) -> None:
    w = weight()
    fit = grid.fit(*ranges(w, grid.group), torch.float32)
    codes = grid.codes(w, **fit)
    values = grid.values(codes, **fit)
    assert torch.equal(grid.codes(values, **fit), codes)
    assert len(codes.unique()) <= 2**grid.bits
    assert grid.values(grid.codes(torch.zeros_like(w), **fit), **fit).eq(0).all()
    step = spread(fit["scale"], w.shape[1], grid.group)
    inside = grid.inside(w, **fit)
    assert ((w - values).abs() <= (step * 0.51 if isinstance(grid, Integer) else step * 0.16))[inside].all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grid", [grid for grid in GRIDS if isinstance(grid, Integer)], ids=lambda grid: grid.label)
def test_codes_survive_storage_in_half_precision(grid: Integer, dtype: torch.dtype) -> None:
    """Scales are representable in the storage dtype, so values rounded to it still have their codes."""
    w = weight()
    fit = grid.fit(*ranges(w, grid.group), dtype)
    assert torch.equal(fit["scale"], fit["scale"].to(dtype).float())
    codes = grid.codes(w, **fit)
    stored = grid.values(codes, **fit).to(dtype)
    survive = torch.equal(grid.codes(stored.float(), **fit), codes)
    # 255 steps from 0 need 8 bits and one for rounding; bfloat16 has 8. The engine refuses that pair.
    assert survive == (dtype == torch.float16 or grid.bits < 8 or grid.symmetric)
    assert torch.equal(stored, grid.values(codes, **{name: t.to(dtype) if name == "scale" else t for name, t in fit.items()}))


@pytest.mark.parametrize(
    "grid", [Integer(group=8), Integer(group=8, symmetric=False), Integer(group=None), NF4(group=8)], ids=lambda g: g.label
)
def test_columns_and_slices_agree_with_the_whole(grid: Grid) -> None:
    w = weight(columns=21)  # the last group is short
    fit = grid.fit(*ranges(w, grid.group), torch.float32)
    whole = grid.codes(w, **fit)
    assert torch.equal(torch.cat([grid.codes(w[:, [j]], **grid.column(fit, j)) for j in range(21)], dim=1), whole)
    parts = [grid.fit(*ranges(w[:, cut], grid.group), torch.float32) for cut in grid.slices(21)]
    assert all(torch.equal(torch.cat([part[name] for part in parts], dim=1), fit[name]) for name in fit)
    assert [cut.stop - cut.start for cut in grid.slices(21)] == ([8, 8, 5] if grid.group else [21])


def test_hand_made_numbers() -> None:
    w = torch.tensor([[1.5, -0.7, 0.2, 0.0]])
    fit = Integer(bits=2, group=None).fit(*ranges(w, None), torch.float32)
    assert fit["scale"].item() == 1.0  # 1.5 / (3 / 2)
    assert Integer(bits=2, group=None).codes(w, **fit).tolist() == [[1, -1, 0, 0]]  # clipped at 2^1 - 1
    assert Integer(bits=2, group=None).inside(w, **fit).tolist() == [[False, True, True, True]]
    grid = Integer(bits=2, group=None, symmetric=False)
    w = torch.tensor([[2.0, -1.0, 0.4, 0.6]])
    fit = grid.fit(*ranges(w, None), torch.float32)
    assert (fit["scale"].item(), fit["zero"].item()) == (1.0, -1)  # 3 / 3 and -2 - (-1) / 1
    assert grid.codes(w, **fit).tolist() == [[1, -2, -1, 0]]
    assert grid.values(grid.codes(w, **fit), **fit).tolist() == [[2.0, -1.0, 0.0, 1.0]]
    assert grouped(torch.arange(3.0)[None], 2).tolist() == [[[0, 1], [2, 0]]]


def test_nf4_is_the_published_table() -> None:
    assert nf4_levels() == pytest.approx(PUBLISHED_NF4, abs=2e-7)  # the table is float32 of a float32 quantile function
    scaled = torch.tensor([PUBLISHED_NF4]) * 3
    grid = NF4(group=None)
    fit = grid.fit(*ranges(scaled, None), torch.float32)
    assert grid.codes(scaled, **fit).tolist() == [list(range(16))]
    w = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    fit = grid.fit(*ranges(w, None), torch.float32)
    brute = (w[..., None] / fit["scale"][..., None] - torch.tensor(nf4_levels())).abs().argmin(dim=-1)
    assert torch.equal(grid.codes(w, **fit).long(), brute)


def test_settings_and_names() -> None:
    question = Grid.__slot__  # type: ignore[attr-defined]
    assert list(question.parts()) == ["integer", "nf4"]
    assert fill(question, {"integer": {"bits": 8, "group": "none", "symmetric": False}}).label == "int8-channel-asym"
    assert (Integer().label, NF4().label) == ("int4-g32-sym", "nf4-g64")
    with pytest.raises(Problem, match="at most 8"):
        build(Integer, {"bits": 9})
    with pytest.raises(Problem, match="above 0"):
        build(Integer, {"group": 0})
