"""Slot `where`: which modules of a model a delta goes to."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any, Protocol

from pydantic import Field

from temper.models.deltas.ranking import Ranking
from temper.models.walk import blocks, is_linear
from temper.parts import Count, Problem, Slot, mark_of, nearest, part, slot
from temper.passport import family

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from temper.context import Context


Portion = Annotated[float, Field(gt=0, le=1)]
"""A share above 0."""


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
    within = f"{model.base_model_prefix}." if family(type(model).__name__) == "classifier" else ""
    tied = shared(model)
    found = [name for name, module in model.named_modules() if is_linear(module) and module is not head and name not in tied]
    return [name for name in found if name.startswith(within)]


def in_attention(name: str) -> bool:
    """Whether a module's name lies under something called attention (`self_attn`, `attention`, `attn`)."""
    return any(re.search("attn|attention", word, re.IGNORECASE) for word in name.split(".")[:-1])


def depths(model: nn.Module) -> dict[int, int]:
    """Id of every parameter -> its layer: 0 below the blocks (embeddings), 1 to L in them, L + 1 after them (final norm, head).

    A parameter that several modules share has the lowest of their layers. Raises `Problem` on models with two stacks of blocks.
    """
    if model.config.is_encoder_decoder:  # type: ignore[union-attr]
        raise Problem(f"{type(model).__name__} has an encoder and a decoder; layers are told apart in models of one stack")
    roots = {f"{name}.": place for place, (name, _) in enumerate(blocks(model), start=1)}
    stack = next(iter(roots))[: -len("0.")]
    found: dict[int, int] = {}
    reached, top = 0, len(roots) + 1
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name.startswith(stack):
            place = reached = roots[f"{stack}{name.removeprefix(stack).partition('.')[0]}."]
        else:
            place = top if reached else 0
        found[id(parameter)] = min(place, found.get(id(parameter), top))
    return found


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


@part
class Layers:
    """Of the modules that another part names, those in the last blocks and in what comes after them (final norm, head).
    Tinn et al. 2023, "Fine-Tuning Large Neural Language Models for Biomedical NLP": lower layers frozen.

    What a layer below shares stands still, too: a head tied to the embedding."""

    last: Count
    """Blocks from the end; of a model with 12, `last: 8` leaves the lower 4 as they are."""
    of: Slot[Where] = AllLinear()
    """Which modules; with delta `full` usually `everything`."""

    def __call__(self, model: nn.Module) -> list[str]:
        chain = [name for name, _ in blocks(model)]
        if self.last > len(chain):
            raise Problem(f"last {self.last}: {type(model).__name__} has {len(chain)} blocks", ("last",))
        depth, lowest = depths(model), len(chain) - self.last + 1
        parameters = {name: [one for one in module._parameters.values() if one is not None] for name, module in model.named_modules()}
        of: Any = self.of
        found = [name for name in of(model) if all(depth[id(one)] >= lowest for one in parameters[name])]
        if not found:
            raise Problem(f"the last {self.last} blocks hold none of the modules that `{mark_of(self.of).name}` names", ("of",))
        return found


@part(needs=("statistics",))
class SensitiveWeights:
    """Of the modules that another part names, those that hold at least one of the most sensitive weights of all.
    He et al. 2023, "Sensitivity-Aware Visual Parameter-Efficient Fine-Tuning" (SPT), section 3.1, and the authors' code.
    Formula: sensitivity = sum over batches of (mean gradient of the batch)^2.

    That is the square of a batch's gradient; a Fisher information would sum the squares of single examples' gradients."""

    share: Portion = 0.005
    """Of all weights of these modules, those that count as sensitive."""
    samples: Count = 256
    """Training examples that the sensitivity is measured on."""
    of: Slot[Where] = AllLinear()
    """Which modules; linear layers."""

    def candidates(self, model: nn.Module) -> list[str]:
        """What the sensitivity is asked of."""
        return self.of(model)  # type: ignore[operator]

    def start(self, context: Context) -> Sensitive:
        return Sensitive(self, context.want("statistics").ask("squared-gradient", self.samples))


class Sensitive:
    """See the part `sensitive-weights`."""

    def __init__(self, part: SensitiveWeights, asked: Callable[[], dict[str, Tensor]]):
        self._part, self._asked = part, asked
        self._names: list[str] | None = None

    def __call__(self, model: nn.Module) -> list[str]:
        if self._names is None:
            asked = self._asked()
            ranking = Ranking(
                lambda: {name: asked[name] for name in self._part.candidates(model)}, lambda most: round(self._part.share * most)
            )
            self._names = list(ranking.counts(ranking.owners(ranking.asked)))
            del self._asked  # numbers as many as the weights
        return self._names


def _hint(pattern: str, known: list[str]) -> str:
    """The nearest whole name for a dotted pattern, else the nearest last word; all last words where none is near."""
    last = sorted({name.rpartition(".")[2] for name in known})
    near = nearest(pattern, known) if "." in pattern else ""
    return near if "did you mean" in near else nearest(pattern.rpartition(".")[2], last)
