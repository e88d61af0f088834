"""Training under constraints that fold away exactly.

`attach` makes modules compute with the constrained weight while their parameter stays the plain `weight`, so state
dicts, optimizers, checkpoints and device moves see an ordinary model. `cover_adapters` extends this to adapters that are a
change of the weight, which then compute with P(W + change). `fold` writes the constrained weights and gives the plain model back.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.adalora.layer import SVDLinear
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from temper.models.constraints import Constraint, wide
from temper.parts import Problem, nearest


class _Constrained:
    """Mixed into a module's class: its forward uses P(weight). `weight` itself stays the plain parameter."""

    constraint: Constraint
    weight: Tensor


class ConstrainedLinear(_Constrained, nn.Linear):
    """A linear layer that computes with what its constraint makes of the weight."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.constraint.effective(self.weight), self.bias)


class ConstrainedEmbedding(_Constrained, nn.Embedding):
    """An embedding that looks up what its constraint makes of the weight."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.constraint.effective(self.weight)
        return F.embedding(input, weight, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse)


class ConstrainedConv1D(_Constrained, Conv1D):
    """GPT-2's layer keeps its weight [inputs, outputs]; P sees it transposed."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.constraint.effective(self.weight.T), self.bias)


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: ConstrainedLinear,
    nn.Embedding: ConstrainedEmbedding,
    Conv1D: ConstrainedConv1D,
}
_PLAIN = {constrained: plain for plain, constrained in _CLASSES.items()}


def oriented(module: nn.Module, weight: Tensor) -> Tensor:
    """A weight as [outputs, inputs], and back: a transpose for `Conv1D`, itself for the others."""
    return weight.T if isinstance(module, Conv1D) else weight


def attach(model: nn.Module, parts: Mapping[str, Constraint]) -> nn.Module:
    """Puts modules under constraints, in place; the inverse of `fold`. Weights are left as they are.

    parts: names of `Linear`, `Embedding` or `Conv1D` modules, as in the plain model. Refused: unknown names, other
    modules, shapes that do not fit, a module that is constrained already, a weight that another module shares.
    """
    modules, owners = _modules(model), _owners(model)
    for name, constraint in parts.items():
        if name not in modules:
            raise Problem(f"the model has no module `{name}`{nearest(name, [one for one in modules if one])}")
        module: Any = modules[name]
        if isinstance(module, _Constrained):
            raise Problem(f"`{name}` is constrained already; fold the model first, or attach one `Stack`")
        if type(module) not in _CLASSES:
            raise Problem(f"`{name}` is a {type(module).__name__}; only Linear, Embedding and Conv1D weights can be constrained")
        if len(shared := owners[id(module.weight)]) > 1:
            raise Problem(f"the weight of `{name}` is shared by {', '.join(f'`{one}`' for one in shared)}; untie them first")
        if not constraint.fits(shape := oriented(module, module.weight).shape):
            raise Problem(f"`{name}` has a weight of shape {list(shape)}, for which {constraint} was not made")
    for name, constraint in parts.items():
        module = modules[name]
        module.constraint = constraint.to(module.weight.device)
        module.__class__ = _CLASSES[type(module)]
    return model


def fold(model: nn.Module) -> dict[str, Constraint]:
    """Writes P(weight) into every constrained module and makes it plain again, in place; gives the constraints back.

    Refused while adapters sit on constrained modules: folding would leave W obeying and W + B A not.
    """
    found, modules = constraints(model), _modules(model)
    for name, _ in _adapters(model):
        raise Problem(f"an adapter sits on the constrained module `{name}`; merge it first (`merge_and_unload`) or take it off")
    for name in found:
        module: Any = modules[name]
        module.weight.data.copy_(_folded(module, module.weight))
        del module.constraint
        module.__class__ = _PLAIN[type(module)]
    return found


def constraints(model: nn.Module) -> dict[str, Constraint]:
    """Module name, as in the plain model -> its constraint."""
    return {_plain_name(name): module.constraint for name, module in model.named_modules() if isinstance(module, _Constrained)}


def folded(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with P(weight) for every constrained weight: what may leave while training goes on."""
    state = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, _Constrained):
            state[f"{name}.weight"] = _folded(module, module.weight).contiguous()
    return state


def _folded(module: Any, weight: Tensor) -> Tensor:
    return oriented(module, module.constraint.fold(oriented(module, weight)))


def _owners(model: nn.Module) -> dict[int, list[str]]:
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(_plain_name(name))
    return owners


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """By plain name; of an adapter's layer the base layer, which comes last, has won."""
    return {_plain_name(name): module for name, module in model.named_modules()}


def _plain_name(name: str) -> str:
    """A module's name without what peft wraps around it."""
    return name.removeprefix("base_model.model.").removesuffix(".base_layer")


# --------------------------------------------------------------------------------------------- adapters on top of P


class ConstrainedAdapter(nn.Module, BaseTunerLayer):
    """Mixed into an adapter layer's class over a constrained base: computes with P(W + sum of changes), and merges to the same weight."""

    _before: Tensor | None = None

    def names(self, adapters: list[str] | None = None) -> list[str]:
        """Of these adapters (None: the active ones), those that the layer carries."""
        return [name for name in (self.active_adapters if adapters is None else adapters) if name in self._get_available_adapters()]

    def delta(self, adapters: list[str] | None = None) -> Tensor:
        """Sum of the adapters' changes, in the base weight's orientation and the adapters' dtype."""
        layer: Any = self
        with torch.autocast(self.weight.device.type, enabled=False):  # merging happens outside of it and must give the same
            zero = torch.zeros((), device=self.weight.device)
            return sum((layer.get_delta_weight(name) for name in self.names(adapters)), zero)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("adapter_names") is not None:
            raise Problem("a batch that mixes adapters cannot run on a constrained base; run each adapter's rows alone")
        base: Any = self.get_base_layer()
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return base(x, *args, **kwargs)
        drops = {name: drop for name in self.names() if self.training and (drop := _dropout(self, name)) is not None}
        if not drops:
            return self._through(x, self._constrained(self.delta()), base.bias)
        result = base(x)  # only linear constraints come here: `cover_adapters` refuses dropout over the others
        for name in self.names():
            delta = oriented(base, base.constraint.effective(oriented(base, self.delta([name])))).to(base.weight.dtype)
            result = result + self._through(drops[name](x) if name in drops else x, delta, None)
        return result

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        names = self.names(check_adapters_to_merge(self, adapter_names))
        if not names:
            return
        base: Any = self.get_base_layer()
        if self._before is None:
            self._before = base.weight.data.clone()  # P does not let B A be subtracted again
        with torch.no_grad():
            merged = self._constrained(self.delta([*self.merged_adapters, *names]))
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(f"adapter {names}: the merged weight is not finite")
        base.weight.data = merged.contiguous()
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        if self._before is not None:
            base: Any = self.get_base_layer()
            base.weight.data, self._before = self._before, None
            self.merged_adapters.clear()

    def _constrained(self, delta: Tensor) -> Tensor:
        """P(W + delta) in the base's dtype and orientation; the sum is taken in float32."""
        base: Any = self.get_base_layer()
        total = wide(base.weight if self._before is None else self._before) + wide(delta)
        return oriented(base, base.constraint.effective(oriented(base, total))).to(base.weight.dtype)

    def _through(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, oriented(self.get_base_layer(), weight), bias)


class ConstrainedLora(ConstrainedAdapter, LoraLinear):
    """A LoRA layer over a constrained base."""


def cover_adapters(model: nn.Module) -> nn.Module:
    """Makes every adapter layer over a constrained module compute with P(W + change), in place.

    So the constraint holds in training, merging gives exactly the unmerged model, and what is merged obeys. Call it
    after peft has added or loaded adapters. Refused: adapter types that are not known to be a change of the weight and no more, LoRA
    variants such as DoRA, a bias in LoRA, dropout over constraints that are not linear (the adapter has no output of its own to drop),
    merged adapters.
    """
    found = list(_adapters(model))
    for name, layer in found:
        _check(name, layer)
    for _, layer in found:
        if not isinstance(layer, ConstrainedAdapter):
            layer.__class__ = _covered(type(layer))
    return model


def check_covered(model: nn.Module) -> None:
    """Raises where an adapter sits on a constrained module without `cover_adapters`: trained so, merging would change the model."""
    for name, layer in _adapters(model):
        if not isinstance(layer, ConstrainedAdapter):
            raise Problem(f"the adapter on `{name}` would bypass its constraint; call `cover_adapters(model)` after adding adapters")
        _check(name, layer)


@functools.cache
def _covered(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of a layer of this class over a constrained base."""
    return ConstrainedLora if kind is LoraLinear else type(f"Constrained{kind.__name__}", (ConstrainedAdapter, kind), {})


def _keeps(layer: Any) -> bool:
    """Whether an adapter layer is a change of its base's weight and no more: LoRA, AdaLoRA's triplets, and types of ours that say so."""
    from temper.models.deltas.tuners.base import AdapterLayer  # which has adapters on weights as its subject, not constraints

    if isinstance(layer, ConstrainedAdapter) or type(layer) in (LoraLinear, SVDLinear):
        return True
    return isinstance(layer, AdapterLayer) and layer.supports_lora_conversion()


def _check(name: str, layer: Any) -> None:
    if not _keeps(layer):
        kind = f"{type(layer).__module__.rpartition('.')[0].rpartition('.')[2]}.{type(layer).__name__}"
        raise Problem(f"`{name}` carries {kind} on a constrained weight, which does not keep its constraint; use LoRA, or tune in full")
    if getattr(layer, "lora_variant", None):
        kind = type(next(iter(layer.lora_variant.values()))).__name__
        raise Problem(f"`{name}` carries the LoRA variant {kind} on a constrained weight; use plain LoRA")
    if any(getattr(layer, "lora_bias", {}).values()):
        raise Problem(f"`{name}` carries LoRA with a bias on a constrained weight; set lora_bias to false")
    rates = [drop.p for adapter in layer._get_available_adapters() if (drop := _dropout(layer, adapter)) is not None]
    if rates and not layer.get_base_layer().constraint.linear:
        raise Problem(f"`{name}` has adapter dropout {rates[0]} on a quantised weight, so the adapter has no output to drop; set it to 0")
    if not isinstance(layer, ConstrainedAdapter) and layer.merged:
        raise Problem(f"the adapter on `{name}` is merged, past its constraint; unmerge it first")


def _dropout(layer: Any, adapter: str) -> nn.Dropout | None:
    """What drops the inputs of an adapter in training; None where nothing is dropped."""
    found = layer.lora_dropout[adapter] if adapter in getattr(layer, "lora_dropout", {}) else None
    return found if isinstance(found, nn.Dropout) and found.p > 0 else None


def _adapters(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The adapter layers that sit on constrained modules."""
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and isinstance(module.get_base_layer(), _Constrained):
            yield _plain_name(name), module
