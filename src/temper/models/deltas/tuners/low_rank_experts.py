"""peft type `LOW_RANK_EXPERTS`: several low-rank adapters on a layer, of which a router picks some for every token."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from temper.models.deltas.route import Route
from temper.models.deltas.tuners.base import AdapterLayer, RankConfig, Tuner, register
from temper.parts import fill, nearest

KIND = "LOW_RANK_EXPERTS"


@dataclass
class LowRankExpertsConfig(RankConfig):
    """Settings of low-rank experts."""

    kind: ClassVar[str] = KIND

    experts: int = field(default=4, metadata={"help": "Experts of a layer."})
    dropout: float = field(default=0.0, metadata={"help": "Share of the experts' inputs dropped in training."})
    route: dict[str, Any] = field(
        default_factory=lambda: {"token-top1": {}}, metadata={"help": "How tokens are routed: a name and settings."}
    )


class LowRankExpertsLayer(AdapterLayer):
    """A linear layer whose adapters add scale sum_k w_k B_k A_k x, with weights w of the token's own from a linear router.

    A [K, r, in], B [K, out, r], router [K, in]. All A are one product and all B another, of rank K r, between which the weights stand:
    an expert of weight 0 adds nothing and learns nothing.
    """

    adapter_layer_names = ("low_rank_experts_A", "low_rank_experts_B", "low_rank_experts_router")
    other_param_names = ("low_rank_experts_scale", "low_rank_experts_route", "low_rank_experts_dropout")

    def containers(self) -> None:
        self.low_rank_experts_A, self.low_rank_experts_B, self.low_rank_experts_router = (nn.ParameterDict() for _ in range(3))
        self.low_rank_experts_dropout = nn.ModuleDict()
        self.low_rank_experts_scale: dict[str, float] = {}
        self.low_rank_experts_route: dict[str, Any] = {}
        self.recorded: dict[str, Tensor] | None = None
        """Adapter -> the router's logits [..., K] in the last forward pass; None: they are not recorded."""

    def fill(self, adapter: str, config: LowRankExpertsConfig, name: str) -> None:
        rank = config.rank_of(name)
        a = torch.empty(config.experts, rank, self.in_features, **self.like())
        router = torch.empty(config.experts, self.in_features, **self.like())
        for one in (*a, router):
            nn.init.kaiming_uniform_(one, a=math.sqrt(5))  # as peft starts A, and torch a linear layer
        self.low_rank_experts_A[adapter] = nn.Parameter(a)
        self.low_rank_experts_B[adapter] = nn.Parameter(torch.zeros(config.experts, self.out_features, rank, **self.like()))
        self.low_rank_experts_router[adapter] = nn.Parameter(router)
        self.low_rank_experts_dropout[adapter] = nn.Dropout(config.dropout)
        self.low_rank_experts_scale[adapter] = config.scale
        self.low_rank_experts_route[adapter] = _route(config.route)

    def change(self, x: Tensor, adapter: str) -> Tensor:
        a, b = self.low_rank_experts_A[adapter], self.low_rank_experts_B[adapter]
        logits = F.linear(x, self.low_rank_experts_router[adapter])
        if self.recorded is not None:
            self.recorded[adapter] = logits
        weights = self.low_rank_experts_route[adapter](logits)
        inner = F.linear(self.low_rank_experts_dropout[adapter](x), a.flatten(0, 1)).unflatten(-1, a.shape[:2])
        inner = (weights[..., None] * inner).flatten(-2)
        return self.low_rank_experts_scale[adapter] * F.linear(inner, b.transpose(0, 1).flatten(1))

    def delta_weight(self, adapter: str) -> Tensor:
        raise ValueError("low-rank experts change each token in a way of its own and are no change of a weight; keep them as an adapter")

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False


def _route(named: dict[str, Any]) -> Any:
    """The part that a configuration names. A folder brings no code: only parts that are there are looked up."""
    known = Route.__slot__.parts()  # type: ignore[attr-defined]
    for name in named:
        if name not in known:
            raise ValueError(f"no way `{name}` of routing tokens{nearest(name, known)}")
    return fill(Route.__slot__, named, field="route")  # type: ignore[attr-defined]


class LowRankExpertsModel(Tuner):
    """A model with low-rank experts."""

    prefix: str = "low_rank_experts_"
    tuner_layer_cls = LowRankExpertsLayer


def known() -> None:
    """Makes the type known to peft."""
    register(KIND, LowRankExpertsConfig, LowRankExpertsModel)


def layers(model: nn.Module) -> list[LowRankExpertsLayer]:
    """Every layer with low-rank experts."""
    return [module for module in model.modules() if isinstance(module, LowRankExpertsLayer)]
