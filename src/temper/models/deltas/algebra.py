"""What adapters do to weights, as low-rank factors: converted, scaled, added, taken away, cut to a rank, put on, and written as plain LoRA.

Laws: `factors` of an adapter put on its base compute what the adapter computes; 1.0 times a change is that change; a change less itself
is nothing; (a + b) on a base is a and b on it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from temper.lazy import nn, peft, safetensors_torch, torch
from temper.models.deltas.attach import is_adapted
from temper.models.deltas.init import first_factors
from temper.parts import Problem

_EXACT = 1e-5
"""Relative error (Frobenius) below which factors of a dense change count as exact in float32."""


@dataclasses.dataclass(frozen=True)
class Factors:
    """The change of one weight: B A, with A [rank, in] and B [out, rank], whatever the module keeps its weight as."""

    a: torch.Tensor
    b: torch.Tensor

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def dense(self) -> torch.Tensor:
        """[out, in]."""
        return self.b @ self.a


@dataclasses.dataclass(frozen=True)
class Change:
    """What an adapter adds to the weights of modules, named as in the plain model.

    errors: module -> |what was lost| / |the whole change| in the Frobenius norm, where factors are not exact.
    """

    modules: Mapping[str, Factors]
    errors: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __mul__(self, weight: float) -> Change:
        return Change({name: Factors(one.a, weight * one.b) for name, one in self.modules.items()}, self.errors)

    __rmul__ = __mul__

    def __neg__(self) -> Change:
        return -1.0 * self

    def __add__(self, other: Change) -> Change:
        """Both at once: factors are stacked, so ranks add up and nothing is lost."""
        found = dict(self.modules)
        for name, one in other.modules.items():
            if name in found:
                mine = found[name]
                if (mine.a.shape[1], mine.b.shape[0]) != (one.a.shape[1], one.b.shape[0]):
                    raise Problem(f"`{name}` is {_shape(mine)} in one change and {_shape(one)} in the other; they are of two models")
                found[name] = Factors(torch.cat([mine.a, one.a.to(mine.a)]), torch.cat([mine.b, one.b.to(mine.b)], dim=1))
            else:
                found[name] = one
        return Change(found, {**self.errors, **other.errors})

    def __sub__(self, other: Change) -> Change:
        return self + -other

    def cut(self, rank: int) -> Change:
        """The nearest change of at most this rank (Eckart and Young 1936), with what it loses; a change of lower rank stays as it is."""
        found, errors = dict(self.modules), dict(self.errors)
        for name, one in self.modules.items():
            if one.rank > rank:
                found[name], errors[name] = _cut(one, rank)
        return Change(found, {name: error for name, error in errors.items() if error > _EXACT})

    @property
    def parameters(self) -> int:
        """Numbers in all factors."""
        return sum(one.a.numel() + one.b.numel() for one in self.modules.values())


def factors(model: nn.Module, adapter: str | None = None, *, rank: int | None = None) -> Change:
    """What an adapter of a `PeftModel` does to the weights of its base, as it was before the adapter came.

    LoRA's factors are taken as they are. Of any other type that can be merged the change W' - W is decomposed: exactly where its rank
    allows, else to the `rank` directions that hold most of it (None: all), and `errors` says what was lost. The model is left as it was.

    Raises `Problem` where the adapter is no change of the weights of linear layers and embeddings: soft prompts, networks beside the
    model, trained norms or biases, adapters whose effect depends on the input.
    """
    inner: Any = model
    if not is_adapted(model):
        raise Problem("the model carries no adapter, so there is no change to speak of")
    adapter = str(adapter or inner.active_adapter)
    if adapter not in inner.peft_config:
        raise Problem(f"the model has no adapter `{adapter}`; it has {', '.join(inner.peft_config)}")
    config = inner.peft_config[adapter]
    kind = config.peft_type.value
    if config.is_prompt_learning or not hasattr(inner.base_model, "merge_and_unload"):
        raise Problem(f"a {kind} adapter is no change of weights; keep it as it is")
    found: dict[str, Factors] = {}
    errors: dict[str, float] = {}
    with torch.no_grad():
        for name, layer in _layers(model, adapter):
            own = _own(layer, adapter)
            if own is not None:
                found[name] = own
                continue
            dense = _dense(name, layer, adapter)
            found[name], error = _cut(dense, min(rank or max(dense.shape), *dense.shape))
            if error > _EXACT:
                errors[name] = error
    if others := _others(inner, adapter, list(found)):
        raise Problem(
            f"a {kind} adapter holds more than changes of weights: {', '.join(f'`{one}`' for one in others[:3])}; merge it instead"
        )
    made = Change(found, errors)
    return made if rank is None else made.cut(rank)


def put(model: nn.Module, change: Change) -> nn.Module:
    """A plain model with a change on it, as a `PeftModel` with one LoRA. Nothing in it trains."""
    state = _tensors(change, dict(model.named_modules()))
    made: Any = peft.get_peft_model(model, _config(change))  # type: ignore[arg-type]
    result = peft.set_peft_model_state_dict(made, state)
    if result.unexpected_keys:
        raise Problem(f"the change does not fit {type(model).__name__}: it has no {result.unexpected_keys[0]}")
    made.requires_grad_(False)
    return made.eval()


def save(change: Change, model: nn.Module, folder: Path, base_name: str) -> None:
    """Writes a change as a PEFT folder of plain LoRA, which `peft` loads alone.

    model: the plain model that it is for, which says what is an embedding. base_name: what the folder says it sits on.
    """
    config = _config(change)
    config.base_model_name_or_path, config.inference_mode = base_name, True
    settings = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf8")
    tensors = {name: one.detach().cpu().contiguous() for name, one in sorted(_tensors(change, dict(model.named_modules())).items())}
    safetensors_torch.save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


# ------------------------------------------------------------------------------------------------------------ inside


def _shape(one: Factors) -> str:
    return f"{one.b.shape[0]} x {one.a.shape[1]}"


def _layers(model: nn.Module, adapter: str) -> list[tuple[str, Any]]:
    """The layers that an adapter sits on, named as in the plain model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    named = [(name, one) for name, one in model.named_modules() if isinstance(one, BaseTunerLayer)]
    return [(name.removeprefix("base_model.model."), one) for name, one in named if adapter in one._all_available_adapter_names()]


def _own(layer: Any, adapter: str) -> Factors | None:
    """The factors that a layer has: plain LoRA's, or those of a type that says so itself; None where it has none."""
    from peft.tuners.adalora.layer import AdaLoraLayer
    from peft.tuners.lora.layer import Embedding, LoraLayer

    if hasattr(layer, "low_rank") and (own := layer.low_rank(adapter)) is not None:
        a, b, scale = own
        return Factors(a.detach().float(), scale * b.detach().float())
    if isinstance(layer, AdaLoraLayer):
        held: Any = layer
        scale = held.scaling[adapter] / (float(held.ranknum[adapter]) + 1e-5)
        a, b = held.lora_A[adapter] * held.lora_E[adapter], held.lora_B[adapter]
        return Factors(a.detach().float(), scale * b.detach().float())
    if not isinstance(layer, LoraLayer) or layer.lora_variant.get(adapter):
        return None
    scale = layer.scaling[adapter]
    held = layer
    if type(layer) is Embedding:  # its weight is [entries, width]: the change of it is transposed, (B A)^T
        a, b = held.lora_embedding_B[adapter].T, held.lora_embedding_A[adapter].T
    else:
        if getattr(held.lora_B[adapter], "bias", None) is not None:
            raise Problem("LoRA with a bias is more than a change of weights; set lora_bias to false")
        a, b = held.lora_A[adapter].weight, held.lora_B[adapter].weight
    a, b = a.detach().float(), scale * b.detach().float()
    if (first := first_factors(layer, adapter)) is not None:
        a, b = torch.cat([a, first[0].float()]), torch.cat([b, -scale * first[1].float()], dim=1)
    return Factors(a, b)


def _dense(name: str, layer: Any, adapter: str) -> torch.Tensor:
    """W' - W [out, in], by merging and putting the weight back."""
    from temper.models.parametrizations import oriented

    base: Any = layer.get_base_layer()
    before: dict[str, torch.Tensor] = {key: one.detach().clone() for key, one in base.named_parameters(recurse=False)}
    if "weight" not in before or before["weight"].ndim != 2:
        raise Problem(f"the adapter on `{name}`, a {type(base).__name__}, changes no matrix")
    try:
        layer.merge(safe_merge=True, adapter_names=[adapter])
        after = {key: one.detach().clone() for key, one in base.named_parameters(recurse=False)}
    except (ValueError, NotImplementedError, AttributeError, RuntimeError) as error:
        raise Problem(f"the adapter on `{name}` cannot be merged, so it is no change of weights: {error}") from error
    finally:
        layer.merged_adapters.clear()
        for key, one in base.named_parameters(recurse=False):
            if key in before:
                one.data = before[key]
    if moved := [key for key in before if key != "weight" and not torch.equal(before[key], after[key])]:
        raise Problem(f"the adapter on `{name}` changes its {moved[0]} too, which low-rank factors cannot hold; merge it instead")
    change = after["weight"].double() - before["weight"].double()
    return oriented(base, change)


def _others(model: Any, adapter: str, layers: list[str]) -> list[str]:
    """What an adapter's folder holds besides what belongs to its layers or is shared by all of them: whole modules, biases."""
    held = peft.get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    inside = tuple(f"base_model.model.{name}." for name in layers)
    names = [name for name in held if name.startswith("base_model.model.") and not name.startswith(inside)]
    biases = [name for name in held if name.endswith(".bias") and "lora" not in name]
    return [name.removeprefix("base_model.model.") for name in dict.fromkeys(names + biases)]


def _cut(one: Factors | torch.Tensor, rank: int) -> tuple[Factors, float]:
    """The best factors of a rank, less where the change has a lower one, and the relative error."""
    dense = one if isinstance(one, torch.Tensor) else None
    if isinstance(one, Factors):  # through two thin QRs: nothing of the weight's size is decomposed
        (qb, rb), (qa, ra) = torch.linalg.qr(one.b.double()), torch.linalg.qr(one.a.double().T)
        u, s, v = torch.linalg.svd(rb @ ra.T, full_matrices=False)
        u, v = qb @ u, v @ qa.T
    else:
        assert dense is not None
        u, s, v = torch.linalg.svd(dense.double(), full_matrices=False)
    whole = s.square().sum().sqrt()
    some = int((s > 1e-7 * s[0]).sum()) if whole > 0 else 1
    rank = max(1, min(rank, some))
    root = s[:rank].sqrt()
    lost = float(s[rank:].square().sum().sqrt() / whole) if whole > 0 else 0.0
    return Factors((root[:, None] * v[:rank]).float(), (u[:, :rank] * root).float()), lost


def _config(change: Change) -> Any:
    """LoRA at scale 1 whose ranks are those of the factors."""
    if not change.modules:
        raise Problem("the change is empty; there is nothing to put on a model")
    most = max(one.rank for one in change.modules.values())
    ranks = {name: one.rank for name, one in change.modules.items() if one.rank != most}
    # A pattern is matched against a name's end, so a whole name stands for itself alone.
    anchored = {f"^{name.replace('.', chr(92) + '.')}": rank for name, rank in ranks.items()}
    return peft.LoraConfig(
        target_modules=sorted(change.modules),
        r=most,
        lora_alpha=most,
        rank_pattern=anchored,
        alpha_pattern=dict(anchored),
        inference_mode=True,
    )


def _tensors(change: Change, modules: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """As a PEFT folder names them."""
    made: dict[str, torch.Tensor] = {}
    for name, one in change.modules.items():
        if name not in modules:
            raise Problem(f"the model has no module `{name}`, which the change is for; it is of another model")
        if isinstance(modules[name], nn.Embedding):
            made[f"base_model.model.{name}.lora_embedding_A"] = one.b.T.contiguous()
            made[f"base_model.model.{name}.lora_embedding_B"] = one.a.T.contiguous()
        else:
            made[f"base_model.model.{name}.lora_A.weight"] = one.a
            made[f"base_model.model.{name}.lora_B.weight"] = one.b
    return made
