"""GPTQ against a textbook OBQ with explicit inverses, and the laws of solver, range and objective."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from temper.models.grids import NF4, Grid, Integer, ranges
from temper.parts import Problem
from temper.quantize.layer import Layer, error
from temper.quantize.objective import LayerOutput, Weights
from temper.quantize.range import MinMax, MSESearch
from temper.quantize.solver import GPTQ, Nearest, damped


def problem(rows: int = 7, columns: int = 24, dtype: torch.dtype = torch.float64, masked: bool = False) -> Layer:
    """A random weight and the Hessian of correlated inputs."""
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, columns, generator=draw, dtype=torch.float64) @ torch.randn(
        columns, columns, generator=draw, dtype=torch.float64
    )
    inputs = inputs * torch.rand(columns, generator=draw, dtype=torch.float64).mul(3)
    weight = torch.randn(rows, columns, generator=draw, dtype=torch.float64)
    keep = torch.rand(rows, columns, generator=draw) < 0.6 if masked else None
    layer = Layer("layer", weight.to(dtype), dtype, (inputs.T @ inputs / 200).to(dtype), keep)
    return dataclasses.replace(layer, weight=layer.masked(layer.weight))


def obq(layer: Layer, grid: Grid, ranging: Any, damping: float, order: list[int], refit: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Frantar & Alistarh 2022, "Optimal Brain Compression", eq. 7, columns in a given order.

    Column j of all rows is rounded; the columns F still open take -(w_j - q_j) / [H_F^-1]_jj * [H_F^-1]_j. The inverse
    of every H_F is computed anew.
    """
    assert layer.curvature is not None
    hessian = layer.curvature.double() + torch.eye(len(order)).double() * damping * layer.curvature.double().diagonal().mean()
    weight, codes = layer.weight.double().clone(), torch.zeros(layer.weight.shape, dtype=torch.int8)
    fit = {name: tensor.clone() for name, tensor in ranging(layer, grid).items()}
    seen: set[int] = set()
    for step, column in enumerate(order):
        left = order[step:]
        inverse = torch.linalg.inv(hessian[left][:, left])
        group = column // grid.group if grid.group else 0
        if refit and group not in seen:
            cut = grid.slices(len(order))[group]
            seen.add(group)
            for name, tensor in ranging(layer.columns(cut, weight[:, cut]), grid).items():
                fit[name][:, [group]] = tensor
        wanted = weight[:, [column]] if layer.keep is None else weight[:, [column]] * layer.keep[:, [column]]
        own = {name: tensor[:, [group]] for name, tensor in fit.items()}
        codes[:, [column]] = grid.codes(wanted, **own)
        wrong = weight[:, [column]] - grid.values(codes[:, [column]], **own)
        weight[:, left] -= wrong / inverse[0, 0] * inverse[0]
    return codes, fit


@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
@pytest.mark.parametrize("refit", [True, False], ids=["refit", "fixed"])
@pytest.mark.parametrize("by", ["index", "activation"])
@pytest.mark.parametrize(
    "grid", [Integer(bits=3, group=8), Integer(bits=4, group=None, symmetric=False), NF4(group=10)], ids=lambda g: g.label
)
def test_gptq_is_obq(grid: Grid, by: Any, refit: bool, masked: bool) -> None:
    layer = problem(masked=masked)
    assert layer.curvature is not None
    order = list(range(24)) if by == "index" else layer.curvature.diagonal().argsort(descending=True).tolist()
    for ranging in (MinMax(), MSESearch(steps=10)):
        codes, fit = GPTQ(damping=0.02, order=by, refit=refit, block=7)(layer, grid, ranging)
        expected, expected_fit = obq(layer, grid, ranging, 0.02, order, refit)
        assert torch.equal(codes, expected)
        assert all(torch.allclose(fit[name].double(), expected_fit[name].double(), rtol=1e-9) for name in fit)
        if layer.keep is not None:
            assert grid.values(codes, **fit)[~layer.keep].eq(0).all()


def test_choices_of_gptq_differ() -> None:
    layer, grid = problem(), Integer(bits=3, group=8)
    made = [GPTQ(order=order, refit=refit)(layer, grid, MinMax())[0] for order in ("index", "activation") for refit in (True, False)]
    assert all(not torch.equal(one, two) for i, one in enumerate(made) for two in made[:i])
    assert not torch.equal(GPTQ(damping=1.0)(layer, grid, MinMax())[0], made[0])


@pytest.mark.parametrize("block", [1, 5, 24, 500])
def test_blocks_change_nothing(block: int) -> None:
    layer, grid = problem(), Integer(bits=3, group=6)
    for order in ("index", "activation"):
        codes, fit = GPTQ(order=order, block=block)(layer, grid, MinMax())
        expected, expected_fit = GPTQ(order=order, block=11)(layer, grid, MinMax())
        assert torch.equal(codes, expected)
        assert torch.allclose(fit["scale"], expected_fit["scale"])


def test_float32_does_what_float64_does() -> None:
    wide, narrow, grid = problem(), problem(dtype=torch.float32), Integer(bits=4, group=8)
    codes, _ = GPTQ()(wide, grid, MinMax())
    again, _ = GPTQ()(narrow, grid, MinMax())
    assert (codes != again).float().mean() < 0.02  # a tie may fall the other way and change what follows


@pytest.mark.parametrize(
    "grid", [Integer(bits=2, group=None), Integer(bits=3, group=8), Integer(bits=4, group=8), NF4(group=8)], ids=lambda g: g.label
)
def test_gptq_errs_less_than_rounding(grid: Grid) -> None:
    layer = problem(rows=32)

    def wrong(solver: Any) -> float:
        codes, fit = solver(layer, grid, MinMax())
        return error(grid.values(codes, **fit) - layer.weight, layer.curvature)

    assert wrong(GPTQ()) < 0.9 * wrong(Nearest())
    assert wrong(GPTQ(order="activation")) < 0.9 * wrong(Nearest())


def test_without_curvature_gptq_rounds_to_nearest() -> None:
    layer = dataclasses.replace(problem(), curvature=None)
    for grid in (Integer(bits=3, group=8), Integer(bits=3, group=None, symmetric=False)):
        codes, fit = GPTQ()(layer, grid, MinMax())
        expected, expected_fit = Nearest()(layer, grid, MinMax())
        assert torch.equal(codes, expected)
        assert all(torch.equal(fit[name], expected_fit[name]) for name in fit)


def test_a_dead_column_is_rounded_and_disturbs_nothing() -> None:
    layer, grid = problem(), Integer(bits=4, group=None)
    assert layer.curvature is not None
    dead = layer.curvature.clone()
    dead[5] = dead[:, 5] = 0
    codes, fit = GPTQ(refit=False)(dataclasses.replace(layer, curvature=dead), grid, MinMax())
    assert torch.equal(codes[:, 5], grid.codes(layer.weight, **fit)[:, 5])
    alive = [column for column in range(24) if column != 5]
    small = Layer("small", layer.weight[:, alive], layer.dtype, dead[alive][:, alive])
    same = {"scale": fit["scale"]}
    others, _ = GPTQ(refit=False)(small, grid, lambda _layer, _grid: same)
    assert torch.equal(codes[:, alive], others)
    everything = dataclasses.replace(layer, curvature=torch.zeros(24, 24))
    assert torch.equal(GPTQ()(everything, grid, MinMax())[0], Nearest()(layer, grid, MinMax())[0])


def test_damping() -> None:
    curvature = torch.diag(torch.tensor([2.0, 0.0, 4.0]))
    assert damped(curvature, 0.5).diagonal().tolist() == [2 + 1.5, 1, 4 + 1.5]  # half the mean of what is alive
    assert curvature.diagonal().tolist() == [2, 0, 4]
    flat = dataclasses.replace(problem(), curvature=torch.ones(24, 24).double())
    with pytest.raises(Problem, match=r"damping 1e-30: the inputs of `layer` leave its Hessian singular; raise it"):
        GPTQ(damping=1e-30)(flat, Integer(group=8), MinMax())


# ---------------------------------------------------------------------------------------------- range and objective


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    "grid", [Integer(bits=3, group=8), Integer(bits=3, group=None, symmetric=False), NF4(group=7)], ids=lambda g: g.label
)
def test_mse_search_is_the_best_of_its_ranges(grid: Grid, weighted: bool) -> None:
    layer = problem(dtype=torch.float32)
    layer = layer if weighted else dataclasses.replace(layer, curvature=None)
    importance = torch.ones(24) if layer.curvature is None else layer.curvature.diagonal()
    low, high = ranges(layer.weight, grid.group)
    found = MSESearch(steps=13, lowest=0.4)(layer, grid)
    tried = [grid.fit(low * share, high * share, torch.float32) for share in torch.linspace(1, 0.4, 13).tolist()]

    def wrong(fit: dict[str, Tensor], row: int, group: int, cut: slice) -> float:
        own = {name: tensor[[row]][:, [group]] for name, tensor in fit.items()}
        weight = layer.weight[[row]][:, cut]
        return float(((grid.values(grid.codes(weight, **own), **own) - weight).square() * importance[cut]).sum())

    for group, cut in enumerate(grid.slices(24)):
        for row in range(7):
            least = min(wrong(fit, row, group, cut) for fit in tried)
            assert wrong(found, row, group, cut) == pytest.approx(least)
            assert least <= wrong(MinMax()(layer, grid), row, group, cut) + 1e-6
    assert not torch.equal(found["scale"], MinMax()(layer, grid)["scale"])
    for other in (MSESearch(steps=12, lowest=0.4), MSESearch(steps=13, lowest=0.7)):
        assert not torch.equal(other(layer, grid)["scale"], found["scale"])
    one = MSESearch(steps=1)(layer, grid)
    assert all(torch.equal(one[name], tensor) for name, tensor in MinMax()(layer, grid).items())


def test_scales_are_stored_in_the_layers_dtype() -> None:
    layer = dataclasses.replace(problem(dtype=torch.float32), dtype=torch.bfloat16)
    for ranging in (MinMax(), MSESearch()):
        scale = ranging(layer, Integer(group=8))["scale"]
        assert torch.equal(scale.bfloat16().float(), scale)


def test_the_error_is_that_of_the_outputs() -> None:
    inputs, change = torch.randn(30, 5), torch.randn(4, 5)
    curvature = LayerOutput()(inputs)
    assert error(change, curvature) == pytest.approx(float((inputs @ change.T).square().sum()), rel=1e-5)
    assert error(change, None) == pytest.approx(float(change.square().sum()), rel=1e-5)
    assert LayerOutput()(inputs.bfloat16()).dtype == torch.float32
    assert Weights()(inputs) is None
