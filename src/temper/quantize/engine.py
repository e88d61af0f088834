"""`quantize`: a model into one whose weights take few values.

Block by block: the inputs that reach the layers (through the blocks quantised so far) say which errors matter, the range is
fitted, the solver finds the codes, the weights take their values. Slots to come, each with its first part: `transform`
(before the walk), `split` and `allocate` (a grid for each layer, or several), `compensate` (around the solver, with clean
inputs beside the quantised ones), `activations`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from temper.context import Context, write
from temper.lazy import torch
from temper.models import io
from temper.models.deltas import is_adapted, merge
from temper.models.deltas.where import AllLinear, Where, shared
from temper.models.grids import Grid, Integer
from temper.models.walk import linears, walk, watching
from temper.parts import Problem, Slot, Spec, mark_of, spec, starting_order
from temper.passport import Artefact, Figure, Input, Inputs, Output, Passport, child
from temper.quantize.calibrate import Calibrate
from temper.quantize.layer import Layer, error
from temper.quantize.objective import Objective, Weights
from temper.quantize.range import MinMax, Range
from temper.quantize.solver import Nearest, Solver
from temper.quantize.store import CompressedTensors, Store

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from temper.models.constraints import Mask, OnGrid

INPUTS = {
    "model": Input(kinds=("model", "adapter"), default="last", about="what is quantised; an adapter is merged into its base first"),
    "data": Input(kinds=("text", "completion", "chat"), optional=True, default="data", about="what `calibrate` draws its inputs from"),
}


@spec
class Quantize(Spec):
    """Low-bit weights: round to nearest with min-max ranges, 4 bits in groups of 32, written as compressed-tensors."""

    where: Slot[Where] = AllLinear()
    """Layers that are quantised; of what it names, the linear ones."""
    grid: Slot[Grid] = Integer()
    """Values that their weights may take."""
    range: Slot[Range] = MinMax()
    """Scales and zero points, fitted before rounding."""
    objective: Slot[Objective] = Weights()
    """The error that range and solver keep small."""
    solver: Slot[Solver] = Nearest()
    """How the codes are found."""
    calibrate: Slot[Calibrate] | None = None
    """Inputs on which the error is measured; none where nothing needs them."""
    store: Slot[Store] = CompressedTensors()
    """How the codes leave."""


def passport(spec: Quantize, parents: Mapping[str, Any]) -> Passport:
    """What a step gives for such parents, or a `Problem`, without torch."""
    model, data, grid = parents["model"], parents.get("data"), cast("Any", spec.grid)
    starting_order(spec)  # refuses an objective that needs inputs where nothing calibrates
    if model.kind == "model" and model.numbers and not model.numbers.startswith(("float16", "float32", "float64", "bfloat16")):
        raise Problem(f"{model.origin or 'the model'} is {model.numbers} already; quantise the model that it was made from", ("model",))
    if model.kind == "adapter" and model.base is None:
        raise Problem(
            "it is not known what the adapter sits on; name the step that made it, or merge it and give the merged model", ("model",)
        )
    if spec.calibrate is not None and data is None:
        name = mark_of(spec.calibrate).name
        raise Problem(f"calibrate `{name}` needs data; give the step `data`, or the recipe a `data:` of its own", ("data",))
    if spec.calibrate is not None and data is not None and data.kind == "chat" and model.template is None:
        raise Problem("the data are chats and the model has no chat template; give data with texts, or a model with a template", ("data",))
    if isinstance(spec.store, CompressedTensors) and not isinstance(grid, Integer):
        raise Problem(f"compressed-tensors holds integer grids, not {grid.label}; write `store: dequantised`", ("store",))
    return child(model, kind="model", numbers=grid.label)


def run(spec: Quantize, inputs: Inputs, context: Context) -> Output:
    """Quantises `inputs.model` into `context.out/model`, with a table of layers in `layers.json`."""
    from temper.models.constraints import OnGrid

    live, grid = context.start(spec), cast("Any", spec.grid)
    tokenizer = io.load_tokenizer(inputs.model)
    model, masks = plain(inputs.model, context)
    layers = chosen(model, live.where, live.store, grid)
    batches = live.calibrate(inputs.data.load("train"), tokenizer, longest(model)) if live.calibrate else None
    before = size(model)

    grids: dict[str, OnGrid] = {}
    table = []
    with context.track(len(layers), context.step, unit="layer") as bar:
        for layer, module in met(model, layers, live.objective, batches, masks):
            codes, fit = live.solver(layer, grid, live.range)
            grids[layer.name] = OnGrid(grid, **fit)
            values = grid.values(codes, **fit)
            settle(module, layer, grids[layer.name], codes, values)
            table.append(row(layer, grids[layer.name], values))
            bar.advance(1, error=table[-1]["weight_error" if layer.curvature is None else "output_error"])

    folder = context.out / "model"
    with io.quiet():
        live.store(model, grids, masks, folder)
    tokenizer.save_pretrained(folder)
    write(context.out / "layers.json", json.dumps(table, indent=1))
    return Output(figures(model, grids, table, folder, before))


# -------------------------------------------------------------------------------------------------------- its stages


def plain(source: Artefact, context: Context) -> tuple[nn.Module, dict[str, Mask]]:
    """The model, an adapter merged, and the masks that its weights obey. Refuses weights on a grid."""
    from temper.models.constraints import Mask

    masks = {}
    for name, constraint in io.held(source).items():
        if not isinstance(constraint, Mask):
            raise Problem(f"`{name}` is on a grid already ({constraint}); quantise the model that it was made from", ("model",))
        masks[name] = constraint.to(context.device)
    model = io.load_model(source, dtype="auto", device=context.device, constraints=False)
    if is_adapted(model):
        model = merge(model)
        context.note("the adapter was merged into its base before quantising")
    return model, masks


def longest(model: Any) -> int:
    """Tokens that the model's positions reach."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def chosen(model: nn.Module, where: Where, store: Store, grid: Grid) -> dict[str, nn.Module]:
    """Name -> linear layer to be quantised. Refuses tied weights and what the store cannot hold."""
    layers = linears(model, where)
    tied = shared(model)
    if not layers:
        raise Problem(f"`where` names no linear layer of {type(model).__name__}; take `all-linear`, or name some", ("where",))
    for name, module in layers.items():
        if name in tied:
            raise Problem(f"`{name}` shares its weight with `{tied[name]}`, which would change too; leave it out", ("where",))
        store.check(name, module, grid)
    return layers


def met(
    model: nn.Module, layers: Mapping[str, nn.Module], objective: Objective, batches: Sequence[Any] | None, masks: Mapping[str, Mask]
) -> Iterator[tuple[Layer, nn.Module]]:
    """Every layer with its curvature, measured with everything before its block as already quantised."""
    from temper.models.parametrizations import oriented

    def layer(name: str, curvature: Tensor | None = None) -> tuple[Layer, nn.Module]:
        module: Any = layers[name]
        weight = oriented(module, module.weight.detach())
        keep = masks[name].keep if name in masks else None
        return Layer(name, weight.float(), weight.dtype, curvature, keep), module

    waiting, real = dict.fromkeys(layers), None
    if batches is not None:
        for block in walk(model, batches):
            inside = {name.removeprefix(f"{block.name}."): name for name in layers if name.startswith(f"{block.name}.")}
            sums = Sums(objective, inside)
            block.feed(sums.see)
            for short, name in inside.items():
                waiting.pop(name)
                yield layer(name, sums.mean(short))
        sums = Sums(objective, waiting)  # outside the blocks: the head, say
        with torch.no_grad(), watching(model, sums.see, lambda: real):
            for batch in batches if waiting else ():
                given = {name: tensor.to(model.device) for name, tensor in batch.items()}
                real = given["attention_mask"].bool() if "attention_mask" in given else None
                model(**given, use_cache=False)
    for name in waiting:
        yield layer(name, sums.mean(name) if batches is not None else None)


class Sums:
    """Adds up an objective's H over batches, for several layers at a time."""

    def __init__(self, objective: Objective, names: Iterable[str]):
        self._totals: dict[str, Tensor | None] = dict.fromkeys(names)
        self._tokens = dict.fromkeys(self._totals, 0)
        self.see = {name: self._adder(name, objective) for name in self._totals}

    def _adder(self, name: str, objective: Objective) -> Any:
        def add(inputs: Tensor) -> None:
            found, total = objective(inputs), self._totals[name]
            self._totals[name] = found if total is None or found is None else total + found
            self._tokens[name] += len(inputs)

        return add

    def mean(self, name: str) -> Tensor | None:
        """H over the tokens that the layer saw; None where the objective has none or nothing came."""
        total = self._totals[name]
        return None if total is None else total / self._tokens[name]


def settle(module: Any, layer: Layer, on_grid: OnGrid, codes: Tensor, values: Tensor) -> None:
    """Writes the values into the layer. Refuses where the weight's dtype is too coarse to tell them apart."""
    from temper.models.parametrizations import oriented

    stored = values.to(layer.dtype)
    if not torch.equal(on_grid.codes(stored), codes):
        raise Problem(
            f"{layer.dtype} cannot hold the values of {on_grid.grid.label} apart (`{layer.name}`); "
            "take a symmetric grid or fewer bits, or load the model in float16 or float32",
            ("grid",),
        )
    if layer.keep is not None and values[~layer.keep].any():
        raise Problem(f"{on_grid.grid.label} moves pruned weights of `{layer.name}` off 0; take a symmetric grid", ("grid",))
    module.weight.data = oriented(module, stored).contiguous()


def row(layer: Layer, on_grid: OnGrid, values: Tensor) -> dict[str, Any]:
    """A line of `layers.json`: shape, format, bits a weight with scales, and errors relative to what was there."""
    change = values - layer.weight

    def relative(curvature: Tensor | None) -> float:
        return error(change, curvature) / max(error(layer.weight, curvature), 1e-30)

    return {
        "name": layer.name,
        "rows": layer.weight.shape[0],
        "columns": layer.weight.shape[1],
        "numbers": on_grid.grid.label,
        "bits": bits(on_grid, layer.weight.shape, layer.dtype) / layer.weight.numel(),
        "weight_error": relative(None),
        "output_error": None if layer.curvature is None else relative(layer.curvature),
    }


def bits(on_grid: OnGrid, shape: torch.Size, dtype: torch.dtype) -> int:
    """Bits of a weight's codes, scales and zero points."""
    grid, fitted = on_grid.grid, on_grid.fitted
    scales = fitted["scale"].numel() * dtype.itemsize * 8
    zeros = fitted["zero"].numel() * grid.bits if "zero" in fitted else 0
    return shape.numel() * grid.bits + scales + zeros


def size(model: nn.Module) -> int:
    """Bytes of a model's tensors; tied ones count once."""
    return sum({tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()}.values())


def figures(model: Any, grids: Mapping[str, OnGrid], table: list[dict[str, Any]], folder: Path, before: int) -> dict[str, Figure]:
    """What the step reports. Errors are means over the layers; `packed_bytes` is what the tensors take with codes for weights."""
    from temper.models.compressed import packed_bytes

    weights = sum(one["rows"] * one["columns"] for one in table)
    saved = 0
    for one in table:
        module = model.get_submodule(one["name"])
        dense, item = module.weight.numel() * module.weight.element_size(), module.weight.element_size()
        saved += dense - packed_bytes(grids[one["name"]], torch.Size((one["rows"], one["columns"])), item)
    found = {
        "bytes": Figure(sum(file.stat().st_size for file in folder.glob("*.safetensors")), unit="B", better="lower"),
        "packed_bytes": Figure(before - saved, unit="B", better="lower"),
        "bits_per_weight": Figure(sum(one["bits"] * one["rows"] * one["columns"] for one in table) / weights, n=weights, better="lower"),
        "quantised_share": Figure(weights / sum(parameter.numel() for parameter in model.parameters())),
    }
    for name in ("weight_error", "output_error"):
        if known := [one[name] for one in table if one[name] is not None]:
            found[name] = Figure(sum(known) / len(known), n=len(known), better="lower")
    return found
