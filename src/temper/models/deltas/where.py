"""Slot `where`: which modules of a model a delta goes to."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Protocol

from temper.models.walk import blocks, is_linear
from temper.parts import Problem, nearest, part, slot

if TYPE_CHECKING:
    from torch import nn


@slot(phased=False)
class Where(Protocol):
    """Which modules are trained? `(model) -> names`, as in `model.named_modules()`, in the model's order.

    The model is plain: no adapter on it. Never empty: a part that finds nothing raises `Problem`.
    """

    def __call__(self, model: nn.Module) -> list[str]: ...


# ------------------------------------------------------------------------------------------------- pure functions


def owners(model: nn.Module) -> list[str]:
    """Modules that hold parameters of their own."""
    return [name for name, module in model.named_modules() if any(one is not None for one in module._parameters.values())]


def shared(model: nn.Module) -> dict[str, str]:
    """Module -> another that holds the same parameter, such as a head tied to the embedding, and the other way round."""
    first: dict[int, str] = {}
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None and (other := first.setdefault(id(parameter), name)) != name:
                found[name] = other
                found.setdefault(other, name)
    return found


def free_linears(model: nn.Module) -> list[str]:
    """Linear layers but for the head and those whose weight another module shares."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    tied = shared(model)
    return [name for name, module in model.named_modules() if is_linear(module) and module is not head and name not in tied]


def in_attention(name: str) -> bool:
    """Whether a module's name lies under something called attention (`self_attn`, `attention`, `attn`)."""
    return any(re.search("attn|attention", word, re.IGNORECASE) for word in name.split(".")[:-1])


def _in_blocks(model: nn.Module, attention: bool) -> list[str]:
    roots = tuple(f"{name}." for name, _ in blocks(model))
    found = [name for name in free_linears(model) if name.startswith(roots) and in_attention(name) == attention]
    if not found:
        kind = "attention" if attention else "MLP"
        raise Problem(f"no linear layer of {type(model).__name__} is known as {kind} by its name; name the layers with `names`")
    return found


# ---------------------------------------------------------------------------------------------------------- parts


@part
class AllLinear:
    """Every linear layer but the head, and but those whose weight another module shares."""

    def __call__(self, model: nn.Module) -> list[str]:
        found = free_linears(model)
        if not found:
            raise Problem(f"{type(model).__name__} has no linear layer besides its head; name modules with `names`")
        return found


@part
class Attention:
    """The linear layers inside the attention of every block."""

    def __call__(self, model: nn.Module) -> list[str]:
        return _in_blocks(model, attention=True)


@part
class Mlp:
    """The linear layers of every block outside its attention, experts among them."""

    def __call__(self, model: nn.Module) -> list[str]:
        return _in_blocks(model, attention=False)


@part
class Names:
    """The modules that hold parameters and whose name, or its end, matches one of the patterns."""

    patterns: tuple[str, ...]
    """Names such as `q_proj`, `model.layers.0.mlp.up_proj`, or with wildcards `layers.1?.*.v_proj`; each must match something."""

    def __call__(self, model: nn.Module) -> list[str]:
        known = owners(model)
        found: set[str] = set()
        for pattern in self.patterns:
            matched = [name for name in known if fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")]
            if not matched:
                raise Problem(f"no module of {type(model).__name__} matches `{pattern}`{_hint(pattern, known)}", ("patterns",))
            found.update(matched)
        if not found:
            raise Problem("`names` has no patterns; write at least one, such as `q_proj`", ("patterns",))
        return [name for name in known if name in found]


@part
class Everything:
    """Every module that holds parameters: embeddings, norms and head too. For full tuning."""

    def __call__(self, model: nn.Module) -> list[str]:
        return owners(model)


def _hint(pattern: str, known: list[str]) -> str:
    """The nearest whole name for a dotted pattern, else the nearest last word; all last words where none is near."""
    last = sorted({name.rpartition(".")[2] for name in known})
    near = nearest(pattern, known) if "." in pattern else ""
    return near if "did you mean" in near else nearest(pattern.rpartition(".")[2], last)
