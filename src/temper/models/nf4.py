"""Linear layers whose frozen weight lies in memory as 4-bit NormalFloat and is a matrix of floats only while it is multiplied with.

Dettmers et al. 2023, "QLoRA", sections 3 and appendix E. A weight is cut into blocks of 64 neighbouring numbers; each becomes the nearest
of 16 levels times its block's largest magnitude. Double quantisation holds these magnitudes, less their mean, as 8-bit integers, one
float32 factor for 256 of them. So torchao's `to_nf4` does it (linear steps); QLoRA's own code gives the 8 bits unevenly spaced values.
Levels are exact quantiles (`grids.nf4_levels`), which torchao rounds to 4 digits.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from temper.context import write
from temper.models.deltas.where import free_linears
from temper.models.grids import NF4, nf4_levels, ranges
from temper.parts import Problem

SIDECAR = "temper_base.json"
"""Beside an adapter: how the base was held that it was trained on."""
SCALES = 256
"""Magnitudes that share a factor."""
_CHUNK = 2**20
"""Weights quantised at once, which bounds the memory that it takes."""


class Packed(nn.Module):
    """A matrix [R, C] as NF4. Its tensors move with the module, are never cast and are in no state dict.

    codes: uint8 [ceil(R C / 2)], two a byte, the earlier one in the high bits; a short last block is filled up with zeros. scales: int8
    [blocks] with factors float32 [blocks / 256] and their mean, or float32 [blocks].
    """

    codes: Tensor
    scales: Tensor
    factors: Tensor
    mean: Tensor

    def __init__(self, weight: Tensor, *, block: int = 64, double: bool = True):
        super().__init__()
        self.shape, self.block, self.twice = weight.shape, block, double
        codes, scales = _quantised(weight.detach(), block)
        self.register_buffer("codes", codes, persistent=False)
        if double:
            scales, factors, mean = doubled(scales)
            self.register_buffer("factors", factors, persistent=False)
            self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("scales", scales, persistent=False)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is held."""
        return sum(one.numel() * one.element_size() for one in self.buffers())

    def floats(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight's values [R, C]; computed in float32, rounded to `dtype` at the end."""
        scales = undoubled(self.scales, self.factors, self.mean) if self.twice else self.scales
        pairs = F.embedding(self.codes.int(), _pairs(self.codes.device))  # [R C / 2, 2]
        values = pairs.view(-1, self.block).mul_(scales[:, None]).flatten()
        return values[: self.shape.numel()].view(self.shape).to(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)  # model.to(bfloat16) rounds no factor

    def extra_repr(self) -> str:
        return f"{list(self.shape)}, block={self.block}, double={self.twice}"


class NF4Linear(nn.Linear):
    """A linear layer whose weight is NF4 and frozen. Adapters sit on it as on any `nn.Linear`.

    The forward and the backward pass each make the weight's floats anew, in the format that they compute in, and keep none.
    """

    packed: Packed

    def __init__(self) -> None:
        raise Problem("an NF4 layer is made of a linear layer: `quantise(model)`")

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The values [out, in] in float32, made anew; they can be read and not written."""
        return _ReadOnly(self.packed.floats())

    def forward(self, input: Tensor) -> Tensor:
        device = input.device.type
        kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
        made: Tensor = _Product.apply(input.to(kind), self.packed)  # type: ignore[assignment]
        return made if self.bias is None else made + self.bias.to(kind)


class _Product(torch.autograd.Function):
    """x W^T, with a gradient to x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Packed) -> Tensor:
        ctx.packed = packed
        return F.linear(x, packed.floats(x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient @ ctx.packed.floats(gradient.dtype), None


class _ReadOnly(Tensor):
    """A tensor whose `data` cannot be exchanged: what peft would merge into it would be lost without a word."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, tensor: Tensor) -> _ReadOnly:
        return Tensor._make_subclass(cls, tensor)  # type: ignore[return-value]

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return self.detach()

    @data.setter
    def data(self, _: Tensor) -> None:
        raise Problem(
            "a weight held in NF4 stands still: nothing can be merged into it, and no init may move a share of it into the adapter; "
            "make it a matrix of floats first (`nf4.dequantise`), as `merge` does"
        )


# ------------------------------------------------------------------------------------------------- pure functions


def doubled(scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Magnitudes [N] as int8 [N], factors float32 [ceil(N / 256)] and their mean.

    Formula: round((scale - mean) f) within -128..127, f = 128 / largest |scale - mean| of its 256. The mean is summed in float64, so that
    it does not depend on the machine's threads.
    """
    mean = scales.double().mean().float()
    groups = F.pad(scales - mean, (0, -len(scales) % SCALES)).view(-1, SCALES)
    peaks = groups.abs().amax(dim=1)
    factors = torch.where(peaks > 0, 128 / peaks, 1.0)
    codes = (groups * factors[:, None]).round().clamp(-128, 127).to(torch.int8)
    return codes.flatten()[: len(scales)].clone(), factors, mean


def undoubled(codes: Tensor, factors: Tensor, mean: Tensor) -> Tensor:
    """The magnitudes [N] that `doubled` stands for."""
    return codes / factors.repeat_interleave(SCALES)[: len(codes)] + mean


def nearest(weight: Tensor, *, block: int = 64, double: bool = True) -> Tensor:
    """The values [R, C], float32, that a weight has once it is held in NF4."""
    return Packed(weight, block=block, double=double).floats()


def least_bits(block: int = 64, double: bool = True) -> float:
    """Bits that a weight takes at least: its code, its share of a magnitude, of a factor."""
    return 4 + ((8 + 32 / SCALES) if double else 32) / block


def _quantised(weight: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Codes, two a byte, and each block's largest magnitude."""
    flat = weight.float().flatten()
    rows = F.pad(flat, (0, -len(flat) % block)).view(-1, block)
    grid, codes, scales = NF4(group=None), [], []
    for some in rows.split(max(1, _CHUNK // block)):
        fit = grid.fit(*ranges(some, None), torch.float32)
        code = grid.codes(some, **fit).to(torch.uint8).view(-1, 2)
        codes.append(code[:, 0] << 4 | code[:, 1])
        scales.append(fit["scale"][:, 0])
    return torch.cat(codes), torch.cat(scales)


def _pairs(device: torch.device) -> Tensor:
    """Both levels of each of 256 bytes, float32 [256, 2]."""
    levels = torch.tensor(nf4_levels(), device=device)
    return torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1)


# --------------------------------------------------------------------------------------------------------- models


def quantise(model: nn.Module, *, block: int = 64, double: bool = True, modules: list[str] | None = None) -> nn.Module:
    """Holds linear layers of a plain model in NF4, in place, one after the other.

    modules: their names; None: all but the head and those whose weight another module shares. Embeddings and norms stay as they are.
    Biases do too, frozen. Raises `Problem` where there is no plain linear layer, and on layers that are more than that.
    """
    for name in free_linears(model) if modules is None else modules:
        module: Any = model.get_submodule(name)
        if type(module) is not nn.Linear:
            raise Problem(f"NF4 holds Linear layers, and `{name}` is a {type(module).__name__}; tune on the model as loaded")
        module.packed = Packed(module.weight, block=block, double=double)
        del module.weight
        module.__class__ = NF4Linear
        module.requires_grad_(False)
    if not any(layers(model)):
        raise Problem(f"{type(model).__name__} has no linear layer besides its head that NF4 could hold; tune on the model as loaded")
    return model


def dequantise(model: nn.Module) -> nn.Module:
    """Makes NF4 layers plain ones with the same values, in place; frozen, in float32."""
    for _, module in layers(model):
        _plain(module, module.packed.floats())
    return model


def _plain(module: Any, weight: Tensor) -> None:
    del module.packed
    module.__class__ = nn.Linear
    module.weight = nn.Parameter(weight, requires_grad=False)


def layers(model: nn.Module) -> Iterator[tuple[str, NF4Linear]]:
    """Name, as in the plain model, -> layer held in NF4."""
    return iter([(_plain_name(name), module) for name, module in model.named_modules() if isinstance(module, NF4Linear)])


@contextmanager
def merged(model: nn.Module, becomes: Callable[[str, Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Within, each NF4 layer computes with one matrix, in place of its own weight and the adapter beside it.

    becomes: (name, own floats [out, in], what the adapter adds [out, in]) -> that matrix. It is made in every pass and not kept.
    """
    changed: list[Any] = []

    def compute(name: str, layer: Any) -> Callable[..., Tensor]:
        def forward(x: Tensor, *_: Any, **__: Any) -> Tensor:
            base: Any = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
            own = base.packed.floats()
            weight = becomes(name, own, _merged(layer, own) - own if layer is not base else torch.zeros_like(own))
            return F.linear(x, weight.to(x.dtype), base.bias)

        return forward

    modules = dict(model.named_modules())
    for name, layer in modules.items():
        adapted = isinstance(layer, BaseTunerLayer) and isinstance(layer.get_base_layer(), NF4Linear)
        if adapted or (isinstance(layer, NF4Linear) and not name.endswith(".base_layer")):
            vars(layer)["forward"] = compute(_plain_name(name), layer)
            changed.append(layer)
    try:
        yield
    finally:
        for layer in changed:
            del layer.forward


def _merged(layer: Any, own: Tensor) -> Tensor:
    """What the adapter makes of its layer's weight, by its own way of merging."""
    one = copy.deepcopy(layer)
    _plain(one.get_base_layer(), own.clone())
    one.merge(safe_merge=True)
    return one.get_base_layer().weight.detach()


def _plain_name(name: str) -> str:
    """A module's name without what peft wraps around it."""
    return name.removeprefix("base_model.model.").removesuffix(".base_layer")


# -------------------------------------------------------------------------------------------------------- sidecar


def save(folder: Path, model: nn.Module) -> None:
    """Writes `temper_base.json` beside an adapter whose base is held in NF4; nothing for another."""
    if found := dict(layers(model)):
        packed = next(iter(found.values())).packed
        said = {"nf4": {"block": packed.block, "double": packed.twice, "modules": sorted(found)}}
        write(Path(folder) / SIDECAR, json.dumps(said, indent=1) + "\n")


def read(folder: Path) -> Mapping[str, Any] | None:
    """What `save` wrote, for `quantise`; None where there is no such file. Raises `Problem` on a base that this version does not know."""
    file = Path(folder) / SIDECAR
    if not file.exists():
        return None
    said = json.loads(file.read_text(encoding="utf8"))
    if set(said) != {"nf4"}:
        raise Problem(f"{SIDECAR} names a base ({', '.join(said)}) that this version does not know")
    return said["nf4"]


def frozen_bytes(model: nn.Module) -> int:
    """Bytes of all that a model holds and does not train: parameters once, NF4 as it is packed."""
    parameters = {one for one in model.parameters() if not one.requires_grad}
    return sum(one.numel() * one.element_size() for one in parameters) + size(model)[0]


def size(model: nn.Module) -> tuple[int, int]:
    """Bytes of all NF4 layers' weights, and the fewest that the format could take."""
    found = [layer.packed for _, layer in layers(model)]
    least = sum(one.shape.numel() * least_bits(one.block, one.twice) / 8 for one in found)
    return sum(one.nbytes for one in found), math.ceil(least)
