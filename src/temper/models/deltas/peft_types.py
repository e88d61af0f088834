"""peft's adapter types as parts of slot `delta`, made from the table beside this module; no code for any one of them.

`tools/peft_types.py` writes the table from peft's own configurations. A setting has peft's name, type and default. Left out are

- what the model, the recipe or this module says: task, mode, names of models, widths and layers, weights stored as (in, out), IA3's
  feed-forward layers, whether tied weights stay tied; settings of convolutions and of Megatron's layers
- which modules: slot `where` says it, with `target_modules`; so there are no patterns, layers or replications beside it, and nothing is
  trained in full beside the adapter
- where it starts from data, text or the weights' decomposition (`init_lora_weights`, `eva_config`, ..., `prompt_tuning_init`): slot `init`
- what would leave part of an adapter out of its folder (`save_projection` and its like): it is always whole
- what needs a call after each update (AdaMSS's allocation) or a term of its own in the loss (KaSA, MonteCLoRA)
- what is drawn when the model is evaluated (PVeRA); activated LoRA, which counts its tokens in peft's own `generate`; Arrow, which mixes
  trained adapters; QALoRA, which needs GPTQ's layers; BD-LoRA and VeLoRA, which change what a layout costs to serve or to train
- settings with one choice, and those that change nothing in peft (HiRA's `rank_pattern`, OFT's `module_dropout`, PSOFT's `psoft_alpha`)
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from pydantic import Field

from temper.lazy import nn, peft
from temper.models.deltas import where as places
from temper.parts import Count, Problem, Share, mark_of, part, settings
from temper.passport import Passport, family

if TYPE_CHECKING:
    from temper.models.deltas.init import Init

TABLE: dict[str, Any] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf8"))
"""The version of peft that the types are those of, and for each part what it is, or why it cannot be trained here."""

_KINDS: dict[str, Any] = {
    "bool": bool,
    "int": int,
    "float": float,
    "str": str,
    "none": None,
    "count": Count,
    "whole": Annotated[int, Field(ge=0)],
    "share": Share,
    "ints": Annotated[tuple[int, ...], Field(min_length=1)],
    "{int}": dict[str, Count],
    "{float}": dict[str, float],
}
_FILLED = {"progressbar": False, "save_indices": True}
"""Settings of some types that are not peft's defaults."""


def refused() -> dict[str, str]:
    """Name -> why it is no part, for the types that cannot be trained here."""
    return {name: row["refused"] for name, row in TABLE["types"].items() if "refused" in row}


def made() -> dict[str, type]:
    """Class name -> part, for every other type."""
    parts = [_part(name, row) for name, row in TABLE["types"].items() if "refused" not in row]
    return {one.__name__: one for one in parts}


def _part(name: str, row: dict[str, Any]) -> type:
    """A part with a type's settings."""
    body: dict[str, Any] = {
        "__doc__": f"{row['about']}  {row['source']}.",
        "__module__": f"{__package__}.delta",
        "__annotations__": {},
        "__call__": _put_on,
        "fits": _fits,
        "kind": "adapter",
        "usual": staticmethod(_USUAL.get(row["type"], _nowhere if row["prompt"] else places.AllLinear())),
    }
    for setting, told in row["settings"].items():
        default = {"default": told["default"]} if "default" in told else {}
        body[setting] = dataclasses.field(**default, metadata={"meaning": told["meaning"]})
        body["__annotations__"][setting] = _hint(told["type"])
    return part(type("".join(word.capitalize() for word in name.split("-")), (), body), name=name)


def _hint(kinds: list[Any]) -> Any:
    arms = [Literal[tuple(one["choices"])] if isinstance(one, dict) else _KINDS[one] for one in kinds]
    return Union[tuple(arms)]  # noqa: UP007


# ----------------------------------------------------------------------------------------------------- where they go


def _nowhere(model: nn.Module) -> list[str]:
    """No module: the type brings its own."""
    return []


def _norms(model: nn.Module) -> list[str]:
    found = [name for name in places.owners(model) if "norm" in type(model.get_submodule(name)).__name__.lower()]
    if not found:
        raise Problem(f"{type(model).__name__} has no module with `Norm` in its name; name modules with `names`")
    return found


def _embedding(model: Any) -> list[str]:
    inputs = model.get_input_embeddings()
    return [name for name, module in model.named_modules() if module is inputs][:1]


_USUAL: dict[str, Callable[[Any], list[str]]] = {"LN_TUNING": _norms, "TRAINABLE_TOKENS": _embedding, "ADAPTION_PROMPT": _nowhere}
"""Types that do not go to all linear layers."""


# ------------------------------------------------------------------------------------------------- what all parts do


def _fits(self: Any, model: Passport) -> None:
    """Raises `Problem` on a model that the type cannot be trained on, by its passport."""
    name, row = _row(self)
    if model.mask is not None:
        raise Problem(
            f"the model is pruned (density {model.mask:g}), and a {name} adapter would not keep its mask; use delta `lora`, `svd-triplet`, "
            "`tri-factor`, `entries` or `full`",
            ("delta",),
        )
    if row["prompt"] and model.architecture and family(model.architecture) != "causal":
        raise Problem(f"`{name}` stands before the tokens of a causal language model, and this is {model.architecture}", ("delta",))


def _put_on(self: Any, model: Any, modules: list[str], init: Init) -> nn.Module:
    """The delta's protocol."""
    from temper.models.deltas.delta import _TASKS, _adaptable

    name, row = _row(self)
    if type(self).usual is _nowhere and modules:
        raise Problem(f"`{name}` brings its own places; leave `where` out", ("where",))
    if row["type"] not in _USUAL:
        _adaptable(model, modules, name)
    config = _config(self, name, row)
    config.task_type = _TASKS[family(type(model).__name__)]
    if modules:
        config.target_modules = modules
    if hasattr(config, "feedforward_modules"):
        config.feedforward_modules = [one for one in modules if not places.in_attention(one)]
    if getattr(config, "adapter_layers", 0) is None:
        config.adapter_layers = model.config.num_hidden_layers
    if row["prompt"]:
        if config.task_type != "CAUSAL_LM":
            raise Problem(f"`{name}` stands before the tokens of a causal language model, and this is a {type(model).__name__}", ("delta",))
        peft.utils._prepare_prompt_learning_config(config, model.config)

    def wrap(plain: Any, settled: Any) -> Any:
        try:
            return peft.get_peft_model(plain, settled)
        except (ArithmeticError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            raise Problem(f"`{name}` does not go onto {type(plain).__name__}: {error}", ("delta",)) from error

    return init(model, config, wrap)


def _row(one: Any) -> tuple[str, dict[str, Any]]:
    """A part's name and what the table says of it."""
    return mark_of(one).name, TABLE["types"][mark_of(one).name]


def _config(one: Any, name: str, row: dict[str, Any]) -> Any:
    """peft's configuration with a part's settings. Raises `Problem` where the installed peft is older than the table, and has it not."""
    installed, newer = importlib.metadata.version("peft"), TABLE["peft"]
    kind = next((config for known, config in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items() if known == row["type"]), None)
    if kind is None:
        raise Problem(f"peft {installed} has no adapter type {row['type']}, and peft {newer} has; upgrade peft", ("delta",))
    known = {field.name for field in dataclasses.fields(kind)}
    given = {key: getattr(one, key) for key in settings(type(one))}
    for key, value in given.items():
        if key not in known and value != settings(type(one))[key].default:
            raise Problem(f"{row['type']} of peft {installed} has no setting `{key}`, and that of peft {newer} has; upgrade peft", (key,))
    filled = {**given, **_FILLED}
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in filled.items() if key in known}
    patterns = {key: value or {} for key, value in plain.items() if key.endswith("_pattern")}
    try:
        return kind(**{**plain, **patterns})
    except (TypeError, ValueError) as error:
        raise Problem(f"`{name}`: {error}", ("delta",)) from error
