"""Slot `store`: how codes leave."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from temper.parts import part, slot

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import nn

    from temper.models.constraints import Constraint, Mask, OnGrid
    from temper.models.grids import Grid


@slot(phased=False)
class Store(Protocol):
    """How do codes leave? `(model, grids, masks, folder)` writes a Hugging Face folder.

    The weights of the layers named in `grids` hold values of their grid; `masks` are those that the model came with.
    `check(name, module, grid)` raises `Problem` before any compute where the format cannot hold a layer.
    """

    def check(self, name: str, module: nn.Module, grid: Grid) -> None: ...

    def __call__(self, model: Any, grids: Mapping[str, OnGrid], masks: Mapping[str, Mask], folder: Path) -> None: ...


@part(name="compressed-tensors")
class CompressedTensors:
    """Packed codes that `transformers` loads with `compressed-tensors` alone, and vLLM; integer grids on Linear layers."""

    def check(self, name: str, module: nn.Module, grid: Grid) -> None:
        from temper.models import compressed

        compressed.check(name, module, grid)

    def __call__(self, model: Any, grids: Mapping[str, OnGrid], masks: Mapping[str, Mask], folder: Path) -> None:
        from temper.models import compressed
        from temper.models.constraints import save_constraints

        compressed.write(folder, model, grids)
        save_constraints(folder, masks)


@part
class Dequantised:
    """Plain weights that lie on the grid, for any grid and layer; scales and packed codes in a sidecar beside them.

    The folder is no smaller for it: the sidecar and the layers that were not quantised are what it could shrink to.
    """

    def check(self, name: str, module: nn.Module, grid: Grid) -> None:
        return None

    def __call__(self, model: Any, grids: Mapping[str, OnGrid], masks: Mapping[str, Mask], folder: Path) -> None:
        from temper.models.compressed import packed
        from temper.models.constraints import Stack, save_constraints
        from temper.models.parametrizations import oriented

        model.save_pretrained(folder)
        held: dict[str, Constraint] = {
            **masks,
            **{name: Stack(masks[name], grid) if name in masks else grid for name, grid in grids.items()},
        }
        layers = {name: model.get_submodule(name) for name in grids}
        save_constraints(folder, held, {name: packed(grids[name], oriented(module, module.weight)) for name, module in layers.items()})
