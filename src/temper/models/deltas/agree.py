"""A delta put on the model that came in, or the adapter on it that goes on: whether it is the one that the recipe asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from temper.lazy import nn, torch
from temper.models.deltas.attach import is_adapted, prepare
from temper.models.deltas.base import AsLoaded, Base
from temper.models.deltas.delta import Delta
from temper.models.deltas.where import Where
from temper.parts import Live, Problem, mark_of, settings
from temper.passport import Artefact

if TYPE_CHECKING:
    from temper.context import Context

# What peft's configurations say besides what an adapter is: where it was made, how it was started, when it trains.
_ASIDE = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "beta1",
    "beta2",
    "corda_config",
    "counts",
    "deltaT",
    "eva_config",
    "inference_mode",
    "init_lora_weights",
    "loftq_config",
    "lora_ga_config",
    "orth_reg_weight",
    "peft_version",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "target_r",
    "task_type",
    "tfinal",
    "tinit",
    "total_step",
}


def underlying(model: nn.Module, spec: Any, base: Base, context: Context) -> nn.Module:
    """The model that a delta is put on, or whose adapter goes on, by slot `base`.

    model: as loaded. spec: with `where` and `delta`, which an adapter that goes on must agree with.
    """
    if is_adapted(model) and base.continues:
        context.note(agree(model, spec.where, spec.delta, settings(type(spec))["delta"].default))
    return base(model)


def put_on(model: nn.Module, given: Artefact, kind: str, spec: Any, slots: Live, context: Context) -> tuple[nn.Module, Artefact | None]:
    """The model to train, and what the adapter that leaves will sit on (None where a whole model leaves).

    model: `underlying`. given: what it was loaded from. kind: of what leaves (`lineage.adapted`). spec, slots: with `where`, `delta`,
    `init` and `budget`, as asked for and started.
    """
    budget = slots.budget if "budget" in slots else None
    seed = context.stream("init").seed()
    model = prepare(model, slots.where, slots.delta, slots.init, AsLoaded(), seed=seed, budget=budget)
    if kind == "adapter":
        if (given.passport.numbers or "").startswith("int"):
            context.note(
                f"the adapter stays beside {given.passport.numbers} weights; peft alone loads it on them with run_compressed=False"
            )
        return model, given.base if spec.base.continues and given.base else given
    if is_adapted(model) and given.passport.mask is not None:
        context.note("the adapter lives inside the model's mask; what leaves is the whole model, merged, since a PEFT folder holds no mask")
    elif is_adapted(model) and spec.base.whole:
        context.note("what leaves is the whole model, the adapter merged into the values of its base")
    return model, None


def agree(model: nn.Module, where: Where | None, delta: Delta, usual: Delta) -> str:
    """What goes on, in a line for the report.

    model: a `PeftModel` as loaded. where, delta: what the recipe asks for; usual: what it asks for when it is silent, which
    any adapter meets. Raises `Problem` where the adapter has another type, rank, scale or other places than are asked for.
    """
    loaded: Any = model
    if len(loaded.peft_config) > 1:
        raise Problem(f"the model carries {len(loaded.peft_config)} adapters ({', '.join(loaded.peft_config)}); one can go on")
    (name, has), *_ = loaded.peft_config.items()
    if hasattr(where, "start"):
        raise Problem(
            f"`{mark_of(where).name}` finds places for a new adapter, and one comes in; leave `where` out to go on with it as it is, or "
            "write `base: merged` for a new one on top",
            ("where",),
        )
    differ: list[str] = []
    if delta != usual or where is not None:
        plain = _plain(loaded.get_base_model())
        wanted = (where or delta.usual)(plain)
    if delta != usual:
        asked: Any = delta(plain, wanted, lambda _model, config, _wrap: config)
        if asked.peft_type != has.peft_type:
            differ = [f"it is {has.peft_type.value}, not {asked.peft_type.value}"]
        else:
            one, two = asked.to_dict(), has.to_dict()
            differ = [f"its {key} is {two[key]}, not {one[key]}" for key in one if key not in _ASIDE and one[key] != two[key]]
    if where is not None and (places := _places(loaded, name)) != set(wanted):
        differ.append(f"it sits on {len(places)} modules, not on the {len(wanted)} that `{mark_of(where).name}` names")
    if differ:
        raise Problem(
            f"the adapter that comes in is not the one asked for: {'; '.join(differ)}. Leave `where` and `delta` out to go on "
            "with it as it is, or write `base: merged` for a new adapter on top",
            ("delta",),
        )
    rank = f" of rank {has.r}" if getattr(has, "r", None) else ""
    return f"the adapter that came in ({has.peft_type.value}{rank}) goes on training"


def _plain(model: Any) -> nn.Module:
    """The same architecture without adapters and without weights, for parts that name modules."""
    with torch.device("meta"):
        return type(model)(model.config)


def _places(model: nn.Module, adapter: str) -> set[str]:
    """Modules on which an adapter sits, named as in the plain model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: dict[str, Any] = {name: layer for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}
    return {name.removeprefix("base_model.model.") for name, layer in layers.items() if adapter in layer._all_available_adapter_names()}
