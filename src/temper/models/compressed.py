"""Quantised folders in the ecosystem's format, `compressed-tensors` (pack-quantized): written, and read back to be tuned.

Such a folder loads in `transformers` with the `compressed-tensors` package alone, and in vLLM. It holds integer weights of
`nn.Linear` layers in 2 to 8 bits, one scale a group of columns or a row, with or without zero points.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor, pack_to_int32
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    QuantizationStrategy,
)
from compressed_tensors.utils.match import match_name
from safetensors import safe_open
from torch import Tensor, nn

from temper.models.constraints import Constraint, OnGrid, Stack, load_constraints
from temper.models.grids import Integer
from temper.parts import Problem

PACKED = CompressionFormat.pack_quantized.value


def is_compressed(folder: Path) -> bool:
    """Whether a folder's config says that its weights are in the `compressed-tensors` format."""
    return _quantization(folder).get("quant_method") == "compressed-tensors"


def check(name: str, module: nn.Module, grid: Any) -> None:
    """Raises `Problem` where the format cannot hold this layer on this grid."""
    if not isinstance(grid, Integer):
        raise Problem(f"compressed-tensors holds integer grids, not {grid.label}; write `store: dequantised`", ("store",))
    if type(module) is not nn.Linear:
        raise Problem(
            f"compressed-tensors holds Linear layers; `{name}` is a {type(module).__name__}; write `store: dequantised`", ("store",)
        )
    columns = module.in_features
    if grid.group and columns % grid.group:
        fitting = [size for size in range(grid.group, 1, -1) if columns % size == 0]
        smaller = f"group {fitting[0]}, " if fitting else ""
        raise Problem(
            f"`{name}` has {columns} columns, which groups of {grid.group} do not divide, and compressed-tensors cannot hold "
            f"a short group; take {smaller}group none (one scale a row), or `store: dequantised`",
            ("store",),
        )


def write(folder: Path, model: Any, grids: Mapping[str, OnGrid]) -> None:
    """Writes a model whose layers named in `grids` hold values of their grid; all other weights go as they are.

    Scales are stored in the layer's dtype, in which they must be representable (`grid.fit` sees to that).
    """
    schemes: dict[str, QuantizationScheme] = {}
    for name, on_grid in grids.items():
        check(name, model.get_submodule(name), on_grid.grid)
        schemes[name] = _scheme(on_grid.grid)
    groups = _groups(schemes)
    unpacked = any(not one.grid.symmetric for one in grids.values())  # type: ignore[attr-defined]
    if unpacked and len(groups) > 1:
        raise Problem("transformers cannot load several schemes with zero points among them; use one grid, or symmetric ones", ("store",))
    state: dict[str, Tensor] = dict(model.state_dict())
    for name, on_grid in grids.items():
        weight = state.pop(f"{name}.weight")
        values = on_grid.fold(weight.float())
        local = {"weight": values, **{_THEIRS[key]: tensor for key, tensor in on_grid.fitted.items()}}
        for key, tensor in PackedQuantizationCompressor.compress(local, schemes[name]).items():
            state[f"{name}.{key}"] = tensor.to(weight.dtype) if key == "weight_scale" else tensor
    model.save_pretrained(folder, state_dict=state)
    config = QuantizationConfig(
        config_groups=groups,
        format=PACKED,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=[name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in grids],
    )
    ModelCompressor(quantization_config=config).update_config(str(folder))
    if unpacked:
        # transformers' lazy path expects zero points unpacked, while the format packs them: let it unpack at once
        file = Path(folder) / "config.json"
        written = json.loads(file.read_text(encoding="utf8"))
        written["quantization_config"]["dequantize"] = True
        file.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf8")


_THEIRS = {"scale": "weight_scale", "zero": "weight_zero_point"}


def _scheme(grid: Integer) -> QuantizationScheme:
    strategy = QuantizationStrategy.GROUP if grid.group else QuantizationStrategy.CHANNEL
    arguments = QuantizationArgs(num_bits=grid.bits, symmetric=grid.symmetric, group_size=grid.group, strategy=strategy)
    return QuantizationScheme(targets=["Linear"], weights=arguments, format=CompressionFormat.pack_quantized)


def _groups(schemes: Mapping[str, QuantizationScheme]) -> dict[str, QuantizationScheme | list[str]]:
    """One scheme targets every Linear that is not ignored; several each name their layers."""
    kinds: dict[str, tuple[QuantizationScheme, list[str]]] = {}
    for name, scheme in schemes.items():
        kinds.setdefault(scheme.model_dump_json(), (scheme, []))[1].append(name)
    if len(kinds) > 1:
        for scheme, names in kinds.values():
            scheme.targets = names
    return {f"group_{index}": scheme for index, (scheme, _) in enumerate(kinds.values())}


def read(folder: Path, dtype: torch.dtype | None = None) -> tuple[dict[str, Tensor], dict[str, Constraint]]:
    """A quantised folder as plain tensors, and what holds its weights.

    First the state dict with dequantised weights; then module name -> `OnGrid` with the stored scales and zero points, or a
    `Stack` of a mask from the sidecar and that. Attached, they let the model be tuned on its grid. dtype: of the
    dequantised weights (default: of their scales); they are what transformers computes with in that dtype.
    Raises `Problem` for compressed-tensors formats other than packed integer weights.
    """
    config = QuantizationConfig.model_validate(_quantization(folder))
    for scheme in config.config_groups.values():
        _readable(folder, config, scheme)
    stored = _tensors(folder)
    state = {key: tensor for key, tensor in stored.items() if key.rpartition(".")[2] not in _STORED}
    held = load_constraints(folder)
    for name in (key.removesuffix(".weight_packed") for key in stored if key.endswith(".weight_packed")):
        scheme = _scheme_of(name, config)
        local = {part: stored[f"{name}.{part}"] for part in _STORED if f"{name}.{part}" in stored}
        local["weight_scale"] = local["weight_scale"].to(dtype or local["weight_scale"].dtype)
        dense = PackedQuantizationCompressor.decompress(local, scheme)
        state[f"{name}.weight"] = dense["weight"]
        fit = {"scale": local["weight_scale"].float()} | ({"zero": dense["weight_zero_point"]} if "weight_zero_point" in dense else {})
        on_grid = OnGrid(_grid(scheme), **fit)
        held[name] = Stack(held[name], on_grid) if name in held else on_grid
    return state, held


_STORED = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")


def _readable(folder: Path, config: QuantizationConfig, scheme: Any) -> None:
    weights = scheme.weights
    kind = str(getattr(scheme.format or config.format, "value", scheme.format or config.format))
    if kind != PACKED or weights is None or weights.type != "int" or scheme.input_activations or scheme.output_activations:
        raise Problem(
            f"{Path(folder).name}: quantised as {kind}{' with quantised activations' if scheme.input_activations else ''}; "
            f"only {PACKED} integer weights can be read: give the model from which it was made"
        )


def _grid(scheme: QuantizationScheme) -> Integer:
    weights = scheme.weights
    assert weights is not None
    group = weights.group_size if weights.strategy == "group" else None
    return Integer(bits=weights.num_bits, group=group, symmetric=weights.symmetric)


def _scheme_of(name: str, config: QuantizationConfig) -> QuantizationScheme:
    """Targets that name the layer come before those that name its class."""
    schemes: list[Any] = list(config.config_groups.values())
    named = [scheme for scheme in schemes if any(match_name(name, target) for target in scheme.targets)]
    classed = [scheme for scheme in schemes if "Linear" in scheme.targets]
    if not named + classed:
        raise Problem(f"`{name}` is packed, but no group of the folder's quantization_config targets it; the folder is damaged")
    return (named + classed)[0]


def _quantization(folder: Path) -> dict[str, Any]:
    file = Path(folder) / "config.json"
    config = json.loads(file.read_text(encoding="utf8")) if file.exists() else {}
    return config.get("quantization_config") or {}


def _tensors(folder: Path) -> dict[str, Tensor]:
    found = {}
    for file in sorted(Path(folder).glob("model*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            found.update({key: opened.get_tensor(key) for key in opened.keys()})  # noqa: SIM118
    return found


def packed_bytes(on_grid: OnGrid, shape: torch.Size, scale_bytes: int) -> int:
    """Bytes of one weight [R, C] with G groups a row in b bits, packed as in this format.

    Codes in whole int32 words a row, scales, zero points in whole words down the rows, and the shape:
    ceil(C b / 32) 4 R + G R scale_bytes [+ ceil(R b / 32) 4 G] + 16.
    """
    rows, columns = shape
    bits, groups = on_grid.grid.bits, on_grid.fitted["scale"].shape[1]
    zeros = math.ceil(rows * bits / 32) * 4 * groups if "zero" in on_grid.fitted else 0
    return math.ceil(columns * bits / 32) * 4 * rows + groups * rows * scale_bytes + zeros + 16


def packed(on_grid: OnGrid, weight: Tensor) -> Tensor:
    """A weight's codes [R, C] as int32 [R, ceil(C bits / 32)], counted from the grid's lowest code, least significant bits first."""
    codes = on_grid.codes(weight)
    lowest = 0 if isinstance(on_grid.grid, Integer) else 2 ** (on_grid.grid.bits - 1)  # codes of other grids start at 0
    return pack_to_int32(codes - lowest, on_grid.grid.bits)
