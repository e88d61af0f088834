"""peft type `TRI_FACTOR`: W + scale B R A, of which R alone is trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from temper.models.deltas.tuners.base import AdapterLayer, RankConfig, Tuner, register

KIND = "TRI_FACTOR"
SIGMA = 1e-5
"""Standard deviation of R where the adapter starts as next to nothing."""


@dataclass
class TriFactorConfig(RankConfig):
    """Settings of a tri-factor adapter."""

    kind: ClassVar[str] = KIND

    init_weights: bool = field(
        default=True,
        metadata={"help": "Whether B and A start as the principal directions of W; if not, as 0, to be given or loaded."},
    )


class TriFactorLayer(AdapterLayer):
    """A linear layer whose adapters add scale B R A x, with B [out, r] and A [r, in] fixed and R [r, r] trained."""

    adapter_layer_names = ("tri_factor_R",)
    other_param_names = ("tri_factor_A", "tri_factor_B", "tri_factor_scale")

    def containers(self) -> None:
        self.tri_factor_R = nn.ParameterDict()
        self.tri_factor_A: Any = BufferDict(persistent=True)
        self.tri_factor_B: Any = BufferDict(persistent=True)
        self.tri_factor_scale: dict[str, float] = {}

    def fill(self, adapter: str, config: TriFactorConfig, name: str) -> None:
        rank, most = config.rank_of(name), min(self.in_features, self.out_features)
        if rank > most:
            raise ValueError(f"`{name}` has {most} directions; rank {rank} is more")
        self.tri_factor_scale[adapter] = config.scale
        self.tri_factor_R[adapter] = nn.Parameter(torch.zeros(rank, rank, **self.like()))
        self.tri_factor_A[adapter] = torch.zeros(rank, self.in_features, **self.like())
        self.tri_factor_B[adapter] = torch.zeros(self.out_features, rank, **self.like())
        if config.init_weights and not config.inference_mode:
            weight = self.base_weight()
            if not weight.is_floating_point():
                raise ValueError(f"`{name}` holds its weight in {weight.dtype}, which has no principal part; start from an update")
            self.start(adapter, weight)

    @torch.no_grad()
    def start(self, adapter: str, matrix: Tensor, *, whole: bool = False) -> None:
        """Sets the factors from the principal directions of a matrix [out, in] = U S V'.

        B = U_r and A = S_r V_r', with R drawn next to 0. whole: B = U_r, A = V_r', R = S_r / scale, so that scale B R A is the
        matrix's best approximation of rank r.
        """
        middle = self.tri_factor_R[adapter]
        rank = len(middle)
        u, s, v = torch.linalg.svd(matrix.to(**self.like()), full_matrices=False)
        u, s, v = u[:, :rank], s[:rank], v[:rank]
        self.tri_factor_B[adapter].copy_(u)
        self.tri_factor_A[adapter].copy_(v if whole else s[:, None] * v)
        middle.copy_(torch.diag(s) / self.tri_factor_scale[adapter] if whole else SIGMA * torch.randn_like(middle))

    def change(self, x: Tensor, adapter: str) -> Tensor:
        inner = F.linear(F.linear(x, self.tri_factor_A[adapter]), self.tri_factor_R[adapter])
        return self.tri_factor_scale[adapter] * F.linear(inner, self.tri_factor_B[adapter])

    def low_rank(self, adapter: str) -> tuple[Tensor, Tensor, float]:
        return self.tri_factor_A[adapter], self.tri_factor_B[adapter] @ self.tri_factor_R[adapter], self.tri_factor_scale[adapter]

    def delta_weight(self, adapter: str) -> Tensor:
        a, b, scale = self.low_rank(adapter)
        return scale * (b @ a)


class TriFactorModel(Tuner):
    """A model with tri-factor adapters."""

    prefix: str = "tri_factor_"
    tuner_layer_cls = TriFactorLayer


def known() -> None:
    """Makes the type known to peft."""
    register(KIND, TriFactorConfig, TriFactorModel)


def layers(model: nn.Module) -> list[tuple[str, Any]]:
    """Name -> layer of every layer with tri-factor adapters."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, TriFactorLayer)]
