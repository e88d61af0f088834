"""Slot `solver`: the codes that a weight gets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

from temper.lazy import torch
from temper.parts import Count, Problem, Rate, part, slot

if TYPE_CHECKING:
    from torch import Tensor

    from temper.models.grids import Fit, Grid
    from temper.quantize.layer import Layer
    from temper.quantize.range import Range


@slot(phased=False)
class Solver(Protocol):
    """Which codes does a weight get? `(layer, grid, ranging) -> (codes int8 [R, C], Fit)`.

    `ranging(layer, grid)` fits the grid to a layer or to some of its columns. Where `layer.keep` is False the code is that of 0.
    """

    def __call__(self, layer: Layer, grid: Grid, ranging: Range) -> tuple[Tensor, Fit]: ...


# ------------------------------------------------------------------------------------------------- pure functions


def damped(curvature: Tensor, damping: float) -> Tensor:
    """H plus `damping` times the mean of its diagonal, in float64. A dead input (zero on the diagonal) is uncoupled: 1 there."""
    made = curvature.double().clone()
    diagonal = made.diagonal()
    dead = diagonal == 0
    if not dead.all():
        diagonal += damping * diagonal[~dead].mean()
    diagonal[dead] = 1
    return made


def inverse_factor(curvature: Tensor) -> Tensor:
    """Upper Cholesky factor U of the inverse, H^-1 = U^T U, [C, C]. Row i of U, divided by U_ii, tells how an error in column i
    is made good by the columns after it, once all before it are settled (Frantar et al. 2023, GPTQ, step 3)."""
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(curvature)), upper=True)


# ---------------------------------------------------------------------------------------------------------- parts


@part
class Nearest:
    """Every weight to the nearest value of its grid."""

    def __call__(self, layer: Layer, grid: Grid, ranging: Range) -> tuple[Tensor, Fit]:
        fit = ranging(layer, grid)
        return grid.codes(layer.weight, **fit), fit


@part(cost=("block",))
class GPTQ:
    """Column by column; what rounding one spoils, the later ones make good.  Frantar et al. 2023, "GPTQ", algorithm 1.

    Formula: q_j = round(w_j), w_k <- w_k - (w_j - q_j) U_jk / U_jj for k > j, with H^-1 = U^T U, H damped. Exactly OBQ in a
    fixed order. Weights under a mask are quantised to 0 and made good in the same way. A column whose input never fires
    is rounded to nearest.
    """

    damping: Rate = 0.01
    """Added to the diagonal of H, as a share of its mean."""
    order: Literal["index", "activation"] = "index"
    """index: from the first column to the last. activation: columns with the largest H_jj first."""
    refit: bool = True
    """Fit a group's range when its first column is reached, to its weights as corrected so far. Off: all ranges before the start."""
    block: Count = 128
    """Columns after which the correction of all later columns is caught up."""

    def __call__(self, layer: Layer, grid: Grid, ranging: Range) -> tuple[Tensor, Fit]:
        rows, columns = layer.weight.shape
        curvature = torch.eye(columns, device=layer.weight.device) if layer.curvature is None else layer.curvature
        order = torch.arange(columns, device=layer.weight.device)
        if self.order == "activation":
            order = curvature.diagonal().argsort(descending=True, stable=True)
        place = order.argsort()  # of each column in that order
        try:
            factor = inverse_factor(damped(curvature, self.damping)[order][:, order]).to(layer.weight.dtype)
        except RuntimeError as error:  # torch.linalg.LinAlgError
            told = (
                f"damping {self.damping:g}: the inputs of `{layer.name}` leave its Hessian singular; raise it, or calibrate on more tokens"
            )
            raise Problem(told, ("solver", "damping")) from error

        weight = layer.weight[:, order]  # a copy, corrected as we go
        fit = {name: tensor.clone() for name, tensor in ranging(layer, grid).items()}
        waiting = dict(enumerate(grid.slices(columns))) if self.refit else {}
        groups = {column: index for index, cut in waiting.items() for column in range(cut.start, cut.stop)}
        codes = torch.empty(rows, columns, dtype=torch.int8, device=weight.device)
        for start in range(0, columns, self.block):
            stop = min(start + self.block, columns)
            errors = weight.new_zeros(rows, stop - start)
            for i in range(start, stop):
                column = int(order[i])
                if (cut := waiting.pop(groups.get(column, -1), None)) is not None:
                    now, there = weight[:, place[cut]], place[cut]
                    later = there >= stop  # these have not heard of this block's errors yet
                    now[:, later] -= errors[:, : i - start] @ factor[start:i, there[later]]
                    for name, tensor in ranging(layer.columns(cut, now), grid).items():
                        fit[name][:, groups[column]] = tensor[:, 0]
                keep = None if layer.keep is None else layer.keep[:, [column]]
                wanted = weight[:, [i]] if keep is None else weight[:, [i]].masked_fill(~keep, 0)
                own = grid.column(fit, column)
                codes[:, [column]] = code = grid.codes(wanted, **own)
                wrong = (weight[:, i] - grid.values(code, **own)[:, 0]) / factor[i, i]
                weight[:, i:stop] -= wrong[:, None] * factor[i, i:stop]
                errors[:, i - start] = wrong
            weight[:, stop:] -= errors @ factor[start:stop, stop:]
        return codes, fit
