"""Deltas on a model: put on, trained on, merged, and as plain LoRA. Laws: `merge` changes no output; a delta starts as nothing."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

from temper.lazy import nn, peft, torch
from temper.models.deltas.base import Base
from temper.models.deltas.delta import Delta
from temper.models.deltas.init import Init, first_factors, low_rank_layers
from temper.models.deltas.where import Where
from temper.parts import Problem

if TYPE_CHECKING:
    from temper.models.deltas.budget import Budget


def is_adapted(model: nn.Module) -> bool:
    """Whether the model carries a peft adapter."""
    return isinstance(model, peft.PeftModel)


def prepare(
    model: nn.Module, where: Where | None, delta: Delta, init: Init, base: Base, *, seed: int, budget: Budget | None = None
) -> nn.Module:
    """The model to train: `base` first, then the delta; or, where an adapter goes on, the model with that adapter.

    Raises `Problem` where an adapter would go on under delta `full`.
    """
    model = base(model)
    if not is_adapted(model):
        return attach(model, where, delta, init, seed=seed, budget=budget)
    if delta.kind != "adapter":
        raise Problem("the model carries an adapter, which cannot go on under a delta that trains the weights; use base `merged`")
    return continue_adapter(model)


def attach(model: nn.Module, where: Where | None, delta: Delta, init: Init, *, seed: int, budget: Budget | None = None) -> nn.Module:
    """Puts a delta on a plain model. Returns the model to train: a `PeftModel`, or `model` itself under `full`.

    where: None for the delta's usual places. seed: of the delta's random start; torch's global generator is left
    alone. budget: settles the delta's configuration before it is put on. Constraints on the base (masks, grids) hold over the
    adapter: it computes with P(W + delta).
    """
    from temper.models.parametrizations import cover_adapters

    if is_adapted(model):
        raise Problem("the model carries an adapter already; merge it first (base `merged`), or let it go on (base `as-loaded`)")
    modules = (where or delta.usual)(model)
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model = delta(model, modules, init if budget is None else _within(budget, init))
    return cover_adapters(model)


def _within(budget: Budget, init: Init) -> Init:
    """An init whose delta is what a budget leaves of it."""

    def start(model: nn.Module, config: Any, wrap: Any) -> nn.Module:
        if config is None:
            raise Problem("a budget shares out what an adapter trains, and this delta trains the weights; leave `budget` out", ("budget",))
        return init(model, budget.settle(model, config), wrap)

    return start


def continue_adapter(model: nn.Module) -> nn.Module:
    """Lets the active adapter of a loaded `PeftModel` train, and nothing else.

    Raises `Problem` on virtual tokens that a network wrote: a folder keeps what it wrote, and not the network.
    """
    inner: Any = model
    config = inner.active_peft_config
    kind: Any = config.peft_type
    if kind == "P_TUNING" or getattr(config, "prefix_projection", False):
        name = getattr(kind, "value", kind)
        raise Problem(f"a saved {name} adapter has lost the network that wrote it and cannot go on training; start anew")
    inner.requires_grad_(False)
    inner.set_adapter(inner.active_adapter)
    for name, parameter in inner.named_parameters():  # those that peft does not switch on; a cartridge keeps some tokens frozen
        if ("prompt_encoder." in name and "frozen" not in name) or ".adaption_" in name:
            parameter.requires_grad_(True)
    for config in inner.peft_config.values():
        config.inference_mode = False
    return model


def merge(model: nn.Module) -> nn.Module:
    """The plain model that computes what the adapted one does; a plain model as it is. In place.

    Constraints on the base stay and hold: a constrained weight becomes P(W + delta). Raises `Problem` on adapters that
    are no change of weights (soft prompts), that bypass a constraint, or whose numbers are not finite.
    """
    from temper.models.nf4 import dequantise
    from temper.models.parametrizations import check_covered

    if not is_adapted(model):
        return model
    check_covered(model)
    inner: Any = model
    kinds = [config.peft_type.value for config in inner.peft_config.values() if config.is_prompt_learning]
    if kinds:
        raise Problem(f"a {kinds[0]} adapter is no change of weights and cannot be merged; keep it as an adapter")
    if not hasattr(inner, "merge_and_unload"):
        kind = inner.active_peft_config.peft_type.value
        raise Problem(f"peft has no way to merge a {kind} adapter into the weights; keep it as an adapter")
    dequantise(model)  # a base held in NF4: merged into the values that it computed with
    try:
        merged = inner.merge_and_unload(safe_merge=True)
    except (NotImplementedError, ValueError) as error:
        raise Problem(f"the adapter cannot be merged: {error}") from error
    for parameter in merged.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return merged


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of all that is trained."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def to_plain_lora(model: nn.Module, adapter: str = "default") -> tuple[Any, dict[str, torch.Tensor]]:
    """An adapter's configuration and tensors as they go into a PEFT folder, on the base as it was before the adapter.

    An init that moved B0 A0 out of the base (PiSSA, OLoRA) is undone: with W' = W - scale B0 A0 the model computes
    with W' + scale B A = W + scale (B A - B0 A0), which is the LoRA of A'' = [A; A0], B'' = [B, -B0] and twice the rank on
    W. Exact up to the rounding of W' (none to speak of in float32). Other adapters come out as they are.
    """
    inner: Any = model
    config = copy.deepcopy(inner.peft_config[adapter])
    found = peft.get_peft_model_state_dict(inner, adapter_name=adapter, save_embedding_layers=False)
    tensors = {name: tensor.detach() for name, tensor in found.items()}
    moved = False
    for name, layer in low_rank_layers(model):
        if (first := first_factors(layer, adapter)) is not None:
            moved = True
            a, b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
            tensors[a] = torch.cat([tensors[a], first[0].to(tensors[a])])
            tensors[b] = torch.cat([tensors[b], -first[1].to(tensors[b])], dim=1)
    if moved:
        config.init_lora_weights = True
        factor = math.sqrt(2) if config.use_rslora else 2  # the scale is as before
        config.r, config.lora_alpha = 2 * config.r, factor * config.lora_alpha
        config.rank_pattern = {name: 2 * rank for name, rank in config.rank_pattern.items()}
        config.alpha_pattern = {name: factor * alpha for name, alpha in config.alpha_pattern.items()}
    return config, tensors
