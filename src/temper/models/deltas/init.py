"""Slot `init`: where a delta starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from temper.lazy import peft, torch
from temper.parts import Count, Problem, part, slot

if TYPE_CHECKING:
    from torch import nn


@slot(phased=False)
class Init(Protocol):
    """Where does the delta start? `(model, config, wrap) -> model`.

    model: the plain model; config: the delta's peft configuration, or None where the delta adds nothing; wrap:
    `(model, config) -> PeftModel` adds the delta. A part settles the configuration before it wraps, sets the delta's
    numbers after it, or both: it sees the model untouched, and it holds the wrapped one. Random numbers come from
    torch's global generator, which the caller has seeded. A part that moves a share of the base weight into the
    adapter calls `remember` on what it returns.
    """

    def __call__(self, model: nn.Module, config: Any, wrap: Callable[[nn.Module, Any], nn.Module]) -> nn.Module: ...


# ------------------------------------------------------------------------------------------------- pure functions


def low_rank_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """Name -> layer of every layer with LoRA factors."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)]


def remember(model: nn.Module) -> nn.Module:
    """Keeps the factors that the base weight gave up, so that saving can convert the adapter to the original base.

    They are buffers of the layers that no state dict holds: attaching again with the same seed gives them again.
    """
    for _, layer in low_rank_layers(model):
        for adapter in layer.active_adapters:
            layer.register_buffer(f"start_A_{adapter}", layer.lora_A[adapter].weight.detach().clone(), persistent=False)
            layer.register_buffer(f"start_B_{adapter}", layer.lora_B[adapter].weight.detach().clone(), persistent=False)
    return model


def first_factors(layer: Any, adapter: str) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The factors A0 [r, in] and B0 [out, r] that `remember` kept, or None."""
    a, b = getattr(layer, f"start_A_{adapter}", None), getattr(layer, f"start_B_{adapter}", None)
    return None if a is None or b is None else (a, b)


def _low_rank(config: Any, name: str) -> Any:
    if not isinstance(config, peft.LoraConfig):
        raise Problem(f"init `{name}` starts low-rank factors, and the delta has none; use delta `lora`, or init `default`")
    return config


def _fits(model: nn.Module, config: Any, name: str, kinds: str) -> Any:
    """The configuration; refuses what peft's decomposition of a weight cannot start: other modules, too high a rank."""
    modules = dict(model.named_modules())
    for target in sorted(_low_rank(config, name).target_modules):
        module: Any = modules[target]
        if type(module).__name__.removeprefix("Constrained") not in kinds.split():
            raise Problem(f"init `{name}` does not start an adapter on `{target}`, a {type(module).__name__}; use init `default`")
        if config.r > (most := min(module.weight.shape)):
            raise Problem(f"init `{name}` finds {most} directions in `{target}` {list(module.weight.shape)}; rank {config.r} is more")
    return config


# ---------------------------------------------------------------------------------------------------------- parts


@part
class Default:
    """The delta's own start. LoRA: A uniform (Kaiming), B = 0, so the model starts unchanged.  Hu et al. 2021."""

    def __call__(self, model: nn.Module, config: Any, wrap: Callable[[nn.Module, Any], nn.Module]) -> nn.Module:
        return wrap(model, config)


@part
class Gaussian:
    """A normal with standard deviation 1 / rank, B = 0.  Hu et al. 2021, section 4.1."""

    def __call__(self, model: nn.Module, config: Any, wrap: Callable[[nn.Module, Any], nn.Module]) -> nn.Module:
        _low_rank(config, "gaussian").init_lora_weights = "gaussian"
        return wrap(model, config)


@part
class Pissa:
    """The adapter takes the principal part of W = U S V': B A = U_r S_r V_r' / scale, and the base keeps the rest.

    Meng et al. 2024, "PiSSA: Principal Singular Values and Singular Vectors Adaptation", eqs. 2-4. What is saved is
    the exact plain LoRA on the untouched base: B A - B0 A0, of twice the rank.
    """

    iterations: Count | None = None
    """Subspace iterations of a randomised SVD (fast: 16 are near exact); none: the exact SVD."""

    def __call__(self, model: nn.Module, config: Any, wrap: Callable[[nn.Module, Any], nn.Module]) -> nn.Module:
        _fits(model, config, "pissa", "Linear Conv1D")
        config.init_lora_weights = "pissa" if self.iterations is None else f"pissa_niter_{self.iterations}"
        return remember(wrap(model, config))


@part
class Olora:
    """B A = Q_r R_r of W = Q R, and the base keeps W - scale B A.  Büyükakyüz 2024, "OLoRA", algorithm 1.

    Saved as PiSSA is: the exact plain LoRA on the untouched base, of twice the rank.
    """

    def __call__(self, model: nn.Module, config: Any, wrap: Callable[[nn.Module, Any], nn.Module]) -> nn.Module:
        _fits(model, config, "olora", "Linear")
        config.init_lora_weights = "olora"
        return remember(wrap(model, config))
