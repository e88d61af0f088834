"""The layer walk: a model's decoder blocks in order, each with the inputs that the blocks before it produce now."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from temper.lazy import nn, torch, transformers
from temper.models.sample import evaluating
from temper.parts import Problem

See = Callable[["torch.Tensor"], None]
"""Takes a linear layer's input, [tokens, features]."""


def blocks(model: Any) -> list[tuple[str, nn.Module]]:
    """The decoder blocks in order, each with its name in `model`.

    They are the `num_hidden_layers` members of the outermost `ModuleList` of that length. Raises `Problem` where
    there is none.
    """
    count = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return [(f"{name}.{index}", block) for index, block in enumerate(module)]
    raise Problem(f"{type(model).__name__} has no list of {count} blocks (its num_hidden_layers), so it cannot be walked block by block")


def is_linear(module: nn.Module) -> bool:
    """A linear layer: `nn.Linear`, or the `Conv1D` that GPT-2 has in its place (weight [in, out])."""
    return isinstance(module, (nn.Linear, transformers.pytorch_utils.Conv1D))


def linears(model: nn.Module, where: Any) -> dict[str, nn.Module]:
    """Name -> layer of the linear layers that a `Where` part names, in the model's order."""
    modules = dict(model.named_modules())
    return {name: modules[name] for name in where(model) if is_linear(modules[name])}


@contextmanager
def watching(module: nn.Module, see: Mapping[str, See], real: Callable[[], torch.Tensor | None] = lambda: None) -> Iterator[None]:
    """Within, every input of the linear layers named in `see` (names in `module`) goes to its function as it occurs.

    An input [B, T, features] arrives as [tokens, features]; `real()` [B, T] says which of them are not padding.
    """

    def hook(then: See) -> Callable[..., None]:
        def before(_module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach()
            keep = real()
            # layers inside a mixture of experts see tokens that the router has already laid flat
            padded = keep is not None and x.shape[:-1] == keep.shape
            then(x[keep] if padded else x.flatten(0, -2))

        return before

    handles = [module.get_submodule(name).register_forward_pre_hook(hook(then)) for name, then in see.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def capture_inputs(model: nn.Module, batches: Iterable[Mapping[str, Any]], see: Mapping[str, See]) -> None:
    """Runs the model over `batches`, handing the inputs of the layers named in `see` on as they occur; stores nothing.

    A batch has `input_ids` [B, T] and may have `attention_mask` [B, T] and `position_ids` [B, T]. The head runs only
    where `see` names it.
    """
    body = _body(model)
    inside = set(body.modules())
    runner = body if all(model.get_submodule(name) in inside for name in see) else model
    keep: torch.Tensor | None = None
    with torch.no_grad(), evaluating(model), watching(model, see, lambda: keep):
        for batch in batches:
            inputs, keep = _inputs(model, batch)
            runner(**inputs)


@dataclass
class Call:
    """One batch as a block receives it: hidden states [B, T, D], the other arguments, and which tokens are real."""

    hidden: torch.Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    real: torch.Tensor | None

    def run(self, block: nn.Module) -> torch.Tensor:
        out = block(self.hidden, *self.args, **self.kwargs)
        return out[0] if isinstance(out, tuple) else out


@dataclass
class Block:
    """A decoder block and the inputs that reach it when the blocks before it are as they are now."""

    name: str
    module: nn.Module
    calls: list[Call] = field(repr=False)

    def feed(self, see: Mapping[str, See]) -> None:
        """Runs the block over its calls, handing each named layer's inputs [tokens, features] on; names are the block's."""
        real: torch.Tensor | None = None
        with torch.no_grad(), watching(self.module, see, lambda: real):
            for call in self.calls:
                real = call.real
                call.run(self.module)


def walk(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> Iterator[Block]:
    """Yields the decoder blocks in order; what is done to a block shows in the inputs of those after it.

    A consumer may feed a block, change its weights and feed it again before it asks for the next: the next block's
    inputs are then computed by the block as left. The hidden states of one block are kept for all batches
    (tokens x D numbers). What else a block is called with (masks, rotary angles) is as in the untouched model.
    Batches as in `capture_inputs`; padding is on either side. The model is in evaluation mode during the walk.
    """
    chain = blocks(model)
    with evaluating(model):
        with torch.no_grad():
            calls = _first_calls(model, [block for _, block in chain], batches)
        for index, (name, module) in enumerate(chain):
            yield Block(name, module, [per_block[index] for per_block in calls])
            with torch.no_grad():
                for per_block in calls:
                    if index + 1 < len(chain):
                        per_block[index + 1].hidden = per_block[index].run(module)
                    per_block[index].hidden = per_block[index].hidden.new_empty(0)  # no longer needed


def _first_calls(model: nn.Module, chain: list[nn.Module], batches: Iterable[Mapping[str, Any]]) -> list[list[Call]]:
    """For every batch how each block is called; hidden states are kept for the first block alone."""
    calls: list[list[Call]] = []
    real: torch.Tensor | None = None

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if args:
            hidden, args = args[0], args[1:]
        else:
            kwargs = dict(kwargs)
            hidden = kwargs.pop("hidden_states")
        calls[-1].append(Call(hidden if not calls[-1] else hidden.new_empty(0), args, kwargs, real))

    handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in chain]
    try:
        for batch in batches:
            calls.append([])
            inputs, real = _inputs(model, batch)
            _body(model)(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _body(model: Any) -> nn.Module:
    """The model without its head: vocabulary logits are not needed to walk."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner.base_model


def _inputs(model: nn.Module, batch: Mapping[str, Any]) -> tuple[dict[str, Any], torch.Tensor | None]:
    device = next(model.parameters()).device
    given = {name: batch[name].to(device) for name in ("input_ids", "attention_mask", "position_ids") if batch.get(name) is not None}
    mask = given.get("attention_mask")
    return {**given, "use_cache": False}, None if mask is None else mask.bool()
