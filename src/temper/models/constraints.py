"""Constraints on one weight, and the file that keeps them: masks, grids, and a mask before a grid.

What puts them on a model's modules is in `parametrizations`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from temper.models.grids import Grid
from temper.parts import Problem, dump, fill, nearest

SIDECAR = "temper_constraints.safetensors"


class Constraint(nn.Module):
    """A projection P of one weight. Its tensors move with the module, are never cast and are in no state dict.

    Weights are [R, C]: outputs by inputs.
    """

    linear = False
    """Whether P(a + b) = P(a) + P(b)."""

    def effective(self, weight: Tensor) -> Tensor:
        """P(weight), differentiable in `weight`."""
        raise NotImplementedError

    def fold(self, weight: Tensor) -> Tensor:
        """P(weight), exactly what `effective` computes with; P(P(weight)) = P(weight)."""
        with torch.no_grad():
            return self.effective(weight)

    def fits(self, shape: torch.Size) -> bool:
        """Whether a weight of this shape can be put under it."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """What the sidecar holds."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """JSON beside the tensors, with its `kind`."""
        raise NotImplementedError

    @classmethod
    def read(cls, settings: Mapping[str, Any], tensors: dict[str, Tensor]) -> Self:
        """The constraint that `settings()` and `tensors()` came from."""
        raise NotImplementedError

    def _keep(self, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.detach().clone(), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # model.to(bfloat16) must move a scale, never round it: the codes would change
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)


class Mask(Constraint):
    """Zero where `keep` is False."""

    linear = True
    keep: Tensor

    def __init__(self, keep: Tensor):
        super().__init__()
        self._keep(keep=keep.bool())

    @property
    def density(self) -> float:
        """Share of weights kept, 0 to 1."""
        return self.keep.float().mean().item()

    def effective(self, weight: Tensor) -> Tensor:
        return weight.masked_fill(~self.keep, 0)

    def fits(self, shape: torch.Size) -> bool:
        return self.keep.shape == shape

    def tensors(self) -> dict[str, Tensor]:
        return {"keep": pack_bits(self.keep)}

    def settings(self) -> dict[str, Any]:
        return {"kind": "mask", "shape": list(self.keep.shape)}

    @classmethod
    def read(cls, settings: Mapping[str, Any], tensors: dict[str, Tensor]) -> Mask:
        return cls(unpack_bits(tensors["keep"], settings["shape"]))

    def extra_repr(self) -> str:
        return f"density={self.density:.3g}"


class OnGrid(Constraint):
    """The nearest value of a grid whose scales stand still: fake quantisation.

    The gradient passes straight through where the grid does not clip, and is 0 where it does (Bengio et al. 2013,
    "Estimating or Propagating Gradients Through Stochastic Neurons", straight-through estimator; as torch's
    `fake_quantize`). Computed in float32 whatever the weight's dtype, and rounded to it at the end.
    """

    def __init__(self, grid: Grid, **fit: Tensor):
        super().__init__()
        self.grid = grid
        self._names = tuple(fit)
        self._keep(**fit)

    @property
    def fitted(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self._names}

    def codes(self, weight: Tensor) -> Tensor:
        """int8 [R, C]."""
        return self.grid.codes(wide(weight.detach()), **self.fitted)

    def effective(self, weight: Tensor) -> Tensor:
        values = self.grid.values(self.codes(weight), **self.fitted).to(weight.dtype)
        return _Straight.apply(weight, values, self.grid.inside(wide(weight.detach()), **self.fitted))

    def fits(self, shape: torch.Size) -> bool:
        per_group = (shape[0], len(self.grid.slices(shape[1])))
        return all(tensor.shape == per_group for tensor in self.fitted.values())

    def tensors(self) -> dict[str, Tensor]:
        return self.fitted

    def settings(self) -> dict[str, Any]:
        return {"kind": "grid", "grid": dump(self.grid)}

    @classmethod
    def read(cls, settings: Mapping[str, Any], tensors: dict[str, Tensor]) -> OnGrid:
        return cls(fill(Grid.__slot__, settings["grid"]), **tensors)  # type: ignore[attr-defined]

    def extra_repr(self) -> str:
        return self.grid.label


class _Straight(torch.autograd.Function):
    """Forward `values`, backward the identity where `passes`."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, values: Tensor, passes: Tensor) -> Tensor:
        ctx.save_for_backward(passes)
        return values

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (passes,) = ctx.saved_tensors
        return gradients[0] * passes, None, None


class Stack(Constraint):
    """Constraints one after another. A mask goes before a grid, and the grid must keep its zeros."""

    def __init__(self, *parts: Constraint):
        super().__init__()
        if not parts or any(isinstance(part, Stack) for part in parts) or any(isinstance(part, Mask) for part in parts[1:]):
            told = " -> ".join(type(part).__name__ for part in parts)
            raise Problem(f"a stack of constraints ({told}): at most one mask, and it comes first; put the mask before the grid")
        if isinstance(parts[0], Mask):
            zeros = torch.zeros(parts[0].keep.shape, device=parts[0].keep.device)
            for part in parts[1:]:
                if part.fold(zeros).any():
                    raise Problem("this grid has no exact 0, so pruned weights would not stay 0; use a grid that has one (symmetric)")
        self.parts = nn.ModuleList(parts)

    def effective(self, weight: Tensor) -> Tensor:
        for part in self.parts:
            weight = part.effective(weight)  # type: ignore[operator]
        return weight

    def fits(self, shape: torch.Size) -> bool:
        return all(part.fits(shape) for part in self.parts)  # type: ignore[operator]

    def tensors(self) -> dict[str, Tensor]:
        return {f"{i}.{name}": tensor for i, part in enumerate(self.parts) for name, tensor in part.tensors().items()}  # type: ignore

    def settings(self) -> dict[str, Any]:
        return {"kind": "stack", "parts": [part.settings() for part in self.parts]}  # type: ignore[operator]

    @classmethod
    def read(cls, settings: Mapping[str, Any], tensors: dict[str, Tensor]) -> Stack:
        return cls(*(_read(one, _under(tensors, str(index))) for index, one in enumerate(settings["parts"])))


def wide(tensor: Tensor) -> Tensor:
    """In float32 at least: codes and sums of half-precision weights are computed there."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def part_of(constraint: Constraint, kind: type[Constraint]) -> Any:
    """The `Mask` or the `OnGrid` in a constraint, or None."""
    parts = constraint.parts if isinstance(constraint, Stack) else [constraint]
    return next((part for part in parts if isinstance(part, kind)), None)


def magnitude_mask(weight: Tensor, density: float) -> Mask:
    """Keeps the `density` share of largest magnitudes; of equals, those that come first."""
    if not 0 <= density <= 1:
        raise Problem(f"density {density}: must be a share, from 0 to 1")
    keep = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    keep[weight.detach().abs().flatten().argsort(descending=True, stable=True)[: round(density * weight.numel())]] = True
    return Mask(keep.view_as(weight))


# ---------------------------------------------------------------------------------------------------------- sidecar


def save_constraints(folder: Path, parts: Mapping[str, Constraint], codes: Mapping[str, Tensor] | None = None) -> None:
    """Writes `temper_constraints.safetensors` beside a model: masks as bits, scales and zero points as they are.

    codes: module name -> packed codes to keep with them (`compressed.packed`).
    """
    if not parts:
        return
    tensors = {f"{name}:{key}": tensor.cpu().contiguous() for name, part in parts.items() for key, tensor in part.tensors().items()}
    tensors |= {f"{name}:codes": tensor.cpu().contiguous() for name, tensor in (codes or {}).items()}
    settings = json.dumps({name: part.settings() for name, part in parts.items()}, sort_keys=True)
    save_file(tensors, Path(folder) / SIDECAR, metadata={"temper": settings})


def load_constraints(folder: Path) -> dict[str, Constraint]:
    """What `save_constraints` wrote; empty where there is no such file."""
    file = Path(folder) / SIDECAR
    if not file.exists():
        return {}
    with safe_open(file, framework="pt") as opened:
        settings = json.loads((opened.metadata() or {}).get("temper", "{}"))
        keys: dict[str, dict[str, Tensor]] = {name: {} for name in settings}
        for key in opened.keys():  # noqa: SIM118 (not a mapping)
            name, _, tensor = key.rpartition(":")
            if tensor != "codes":
                keys[name][tensor] = opened.get_tensor(key)
    return {name: _read(settings[name], keys[name]) for name in settings}


def _read(settings: Mapping[str, Any], tensors: dict[str, Tensor]) -> Constraint:
    kinds: dict[str, type[Constraint]] = {"mask": Mask, "grid": OnGrid, "stack": Stack}
    if settings["kind"] not in kinds:
        raise Problem(f"`{settings['kind']}` is no constraint that this version knows{nearest(settings['kind'], kinds)}")
    return kinds[settings["kind"]].read(settings, tensors)


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{prefix}."): tensor for key, tensor in tensors.items() if key.startswith(f"{prefix}.")}


def pack_bits(bits: Tensor) -> Tensor:
    """Bools of any shape -> uint8 [ceil(n / 8)], lowest bit first."""
    flat = F.pad(bits.flatten().to(torch.uint8), (0, -bits.numel() % 8)).view(-1, 8)
    return (flat << torch.arange(8, dtype=torch.uint8, device=flat.device)).sum(dim=1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, shape: list[int]) -> Tensor:
    """The bools that `pack_bits` packed."""
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.flatten()[: torch.Size(shape).numel()].view(shape).bool()
