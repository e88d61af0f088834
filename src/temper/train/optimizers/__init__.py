"""How gradients become changes of weights: the slot `Optimizer`.

The loop calls `optimizer.step(closure)` and nothing else. The closure runs an update's micro-batches, leaves clipped gradients and
returns the mean loss; it goes backward only where gradients are enabled. So an optimizer may call it once (Adam), twice
(sharpness-aware minimisation), or under `torch.no_grad` (zeroth order).

Parts stand here; the mathematics of those that torch has not is in the other modules. Bytes of state are for weights of 4 bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from pydantic import Field

from temper.lazy import torch
from temper.parts import Count, Problem, Rate, Slot, part, slot
from temper.train.distribution import is_sharded

if TYPE_CHECKING:
    from temper.context import Context

Keep = Annotated[float, Field(ge=0, lt=1)]
"""What is kept of a running mean per update."""
Pull = Annotated[float, Field(ge=0)]
"""Strength of weight decay."""


@slot(phased=False)
class Optimizer(Protocol):
    """How do gradients become changes? `build(parameters) -> torch.optim.Optimizer` whose `step(closure)` calls the closure: once, or
    `passes` times where it has such an attribute; with `forward_only` without gradients."""

    def build(self, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer: ...


@dataclasses.dataclass(frozen=True)
class _Knowing:
    """A started part that treats embeddings and the output layer of the context's model apart, by their ids."""

    part: Any
    apart: Collection[int]

    def build(self, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return self.part.build(parameters, self.apart)


def _knowing(part: Any, context: Context) -> _Knowing:
    from temper.train.optimizers.common import embeddings

    return _Knowing(part, embeddings(context))


# --------------------------------------------------------------------------------------------- one gradient, torch's


@part(name="adamw")
class AdamW:
    """Adam with decoupled weight decay.  Loshchilov and Hutter 2019, algorithm 2.  8 bytes a weight.
    Formula: w <- w - lr (m / (sqrt(v) + eps) + weight_decay w), m and v bias-corrected; no decay on vectors."""

    lr: Rate = 1e-3
    """Rate that the schedule multiplies."""
    betas: tuple[Keep, Keep] = (0.9, 0.999)
    """Decay of the mean of gradients and of the mean of their squares, per update."""
    eps: Rate = 1e-8
    """Added to the square root."""
    weight_decay: Pull = 0.01
    """Share of a weight taken off per update, times the rate."""
    bias_correction: bool = True
    """Whether m and v are divided by 1 - b^t. Without it, as in BERT's own code, early updates are larger: at the usual betas
    up to 6.6 times, at the twelfth update.  Zhang et al. 2021, "Revisiting Few-sample BERT Fine-tuning"."""

    def build(self, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        from temper.train.optimizers.common import fused, grouped

        parameters = list(parameters)
        groups = grouped(parameters, self.weight_decay)
        if not self.bias_correction:
            from temper.train.optimizers.uncorrected import UncorrectedAdamW

            return UncorrectedAdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps)
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=fused(parameters))


@part(name="sgd")
class SGD:
    """Stochastic gradient descent with momentum.  Sutskever et al. 2013.  4 bytes a weight, none without momentum.
    Formula: b <- momentum b + g + weight_decay w, w <- w - lr b; no decay on vectors."""

    lr: Rate = 1e-2
    """Rate that the schedule multiplies."""
    momentum: Keep = 0.9
    """Share of the last change that goes on."""
    nesterov: bool = False
    """Whether the gradient counts once more beyond the momentum: w <- w - lr (g + momentum b)."""
    weight_decay: Pull = 0.0
    """Pull of a weight towards 0, added to its gradient."""

    def __post_init__(self) -> None:
        if self.nesterov and not self.momentum:
            raise Problem("nesterov looks ahead along the momentum, which is 0; give a momentum, or nesterov: false")

    def build(self, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        from temper.train.optimizers.common import fused, grouped

        parameters = list(parameters)
        kernel = fused(parameters) and not any(map(is_sharded, parameters))  # torch has none for shards
        groups = grouped(parameters, self.weight_decay)
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov, fused=kernel)


@part(name="adafactor")
class Adafactor:
    """Adam without momentum, its squares kept as a sum per row and per column.  Shazeer and Stern 2018, algorithm 5, as torch has it.
    4 bytes a row and a column.
    Formula: w <- w - max(eps, rms(w)) min(lr, 1 / sqrt(t)) u / max(1, rms(u) / clip), u = g / sqrt(v), v = rows columns / sum."""

    lr: Rate = 1e-2
    """Greatest step relative to a tensor's root mean square; the schedule multiplies it. Later ones are at most 1 / sqrt(update)."""
    decay: Annotated[float, Field(le=0)] = -0.8
    """How fast the mean of squares lengthens: it keeps 1 - update^decay."""
    eps: Rate = 1e-3
    """Least root mean square that a tensor is taken to have."""
    clip: Annotated[float, Field(ge=1)] = 1.0
    """Greatest root mean square of a tensor's change, before it is scaled."""
    weight_decay: Pull = 0.0
    """Share of a weight taken off per update, times the rate."""

    def build(self, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        from temper.train.optimizers.common import grouped, whole

        groups = grouped(whole(parameters, "adafactor"), self.weight_decay)
        # The paper's 1e-30 for squares. torch's own, what float32 can tell from 1, is above the mean square of many a gradient.
        return torch.optim.Adafactor(groups, lr=self.lr, beta2_decay=self.decay, eps=(1e-15, self.eps), d=self.clip)


@part(name="muon")
class Muon:
    """Momentum of hidden matrices made orthogonal by five Newton-Schulz steps; AdamW for vectors, embeddings and the output layer.
    Jordan et al. 2024; rates matched to AdamW's, Liu et al. 2025, eq. 4.  4 bytes a weight of a matrix, 8 of others.
    Formula: b <- momentum b + (1 - momentum) g, w <- w - lr (0.2 sqrt(max(m, n)) orth((1 - momentum) g + momentum b) + weight_decay w)."""

    lr: Rate = 1e-3
    """Rate that the schedule multiplies, of matrices and others."""
    momentum: Keep = 0.95
    """Share of the last change that goes on, of matrices."""
    betas: tuple[Keep, Keep] = (0.9, 0.95)
    """Decay of AdamW's two means."""
    weight_decay: Pull = 0.1
    """Share of a weight taken off per update, times the rate."""

    def start(self, context: Context) -> _Knowing:
        return _knowing(self, context)

    def build(self, parameters: Iterable[torch.nn.Parameter], apart: Collection[int] = ()) -> torch.optim.Optimizer:
        """apart: ids of matrices that AdamW takes."""
        from temper.train.optimizers.common import Joined, whole

        parameters = whole(parameters, "muon")
        hidden = [one for one in parameters if one.ndim == 2 and id(one) not in apart]
        rest = [one for one in parameters if one.ndim != 2 or id(one) in apart]
        inner: list[torch.optim.Optimizer] = []
        if hidden:
            inner.append(torch.optim.Muon(hidden, self.lr, self.weight_decay, self.momentum, adjust_lr_fn="match_rms_adamw"))
        if rest:
            inner.append(AdamW(lr=self.lr, betas=self.betas, weight_decay=self.weight_decay).build(rest))
        return Joined(*inner)


# ------------------------------------------------------------------------------------------------- one gradient, ours


@part
class Lion:
    """The sign of an interpolated momentum: every weight moves by the rate.  Chen et al. 2023, algorithm 2.  4 bytes a weight.
    Formula: w <- w - lr (sign(b1 m + (1 - b1) g) + weight_decay w), then m <- b2 m + (1 - b2) g; no decay on vectors.

    A rate 3 to 10 times smaller than AdamW's and a decay as much larger keep the two comparable."""

    lr: Rate = 1e-4
    """Rate that the schedule multiplies."""
    betas: tuple[Keep, Keep] = (0.9, 0.99)
    """Share of the momentum in the change, and share of it that is kept."""
    weight_decay: Pull = 0.1
    """Share of a weight taken off per update, times the rate."""

    def build(self, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        from temper.train.optimizers import lion
        from temper.train.optimizers.common import grouped

        return lion.Lion(grouped(parameters, self.weight_decay), self.lr, self.betas)


@part(name="sgd-sai")
class SGDSaI:
    """Momentum with a constant rate per tensor, by the signal-to-noise ratio of its first gradient.  Xu et al. 2024, algorithm 1.
    4 bytes a weight.
    Formula: s = ||g|| / (std(g) + eps) at first, over the largest; m <- momentum m + (1 - momentum) g, w <- w - lr (s m + weight_decay w).

    A tensor stands still until it has a gradient other than zero."""

    lr: Rate = 1.0
    """Rate that the schedule multiplies: of the tensor with the largest ratio, which is about the one with the most weights."""
    momentum: Keep = 0.9
    """Share of the mean of gradients that is kept; it begins as the first gradient."""
    eps: Rate = 1e-8
    """Added to the deviation."""
    normalised: bool = True
    """Whether ratios are divided by the largest, as in the paper; the authors' code does not, and takes rates smaller by that much."""
    weight_decay: Pull = 0.0
    """Share of a weight taken off per update, times the rate."""

    def build(self, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        from temper.train.optimizers import sgd_sai
        from temper.train.optimizers.common import grouped

        groups = grouped(parameters, self.weight_decay)
        return sgd_sai.SGDSaI(groups, lr=self.lr, momentum=self.momentum, eps=self.eps, normalised=self.normalised)


@part(name="adamw-8bit")
class AdamW8Bit:
    """AdamW with both means in 8 bits.  Dettmers et al. 2022, section 2: dynamic tree code books, a scale per block.
    2 bytes a weight and 8 a block.
    Formula: w <- w - lr (m / (sqrt(v) + eps) + weight_decay w); what is kept of m and v is the nearest code of m / max |m| in each block.

    Small tensors keep float32 means, and so do embeddings, whose gradients are uneven (section 2.3)."""

    lr: Rate = 1e-3
    """Rate that the schedule multiplies."""
    betas: tuple[Keep, Keep] = (0.9, 0.999)
    """Decay of the mean of gradients and of the mean of their squares, per update."""
    eps: Rate = 1e-8
    """Added to the square root."""
    weight_decay: Pull = 0.01
    """Share of a weight taken off per update, times the rate."""
    block: Count = 256
    """Weights that share a scale: 2048 in the paper, 256 in its library today."""
    smallest: Count = 4096
    """Weights of the smallest tensor that is kept in 8 bits."""

    def start(self, context: Context) -> _Knowing:
        return _knowing(self, context)

    def build(self, parameters: Iterable[torch.nn.Parameter], apart: Collection[int] = ()) -> torch.optim.Optimizer:
        """apart: ids of parameters whose means stay in float32."""
        from temper.train.optimizers import eight_bit
        from temper.train.optimizers.common import grouped, whole

        parameters = whole(parameters, "adamw-8bit")
        small = [one for one in parameters if one.numel() < self.smallest or id(one) in apart]
        large = [one for one in parameters if one.numel() >= self.smallest and id(one) not in apart]
        groups = [*grouped(large, self.weight_decay, bits=8), *grouped(small, self.weight_decay, bits=32)]
        return eight_bit.AdamW8Bit(groups, lr=self.lr, betas=self.betas, eps=self.eps, block=self.block)


@part(name="galore")
class GaLore:
    """AdamW in the leading singular directions of each matrix's gradient.  Zhao et al. 2024, algorithm 2.
    Of an m x n matrix, m <= n: 4 (m + 2 n) rank bytes; 8 a weight of others.
    Formula: w <- w - lr (scale P adam(P^T g) + weight_decay w), P the first `rank` left singular vectors of g; right ones where m > n.

    Matrices no larger than the rank, vectors, embeddings and the output layer have plain AdamW."""

    lr: Rate = 1e-2
    """Rate that the schedule multiplies."""
    rank: Count = 128
    """Directions."""
    gap: Count = 200
    """Updates after which directions are chosen anew."""
    scale: Rate = 0.25
    """Multiplies the change of projected matrices."""
    betas: tuple[Keep, Keep] = (0.9, 0.999)
    """Decay of the mean of gradients and of the mean of their squares, per update."""
    eps: Rate = 1e-8
    """Added to the square root."""
    weight_decay: Pull = 0.0
    """Share of a weight taken off per update, times the rate."""

    def start(self, context: Context) -> _Knowing:
        return _knowing(self, context)

    def build(self, parameters: Iterable[torch.nn.Parameter], apart: Collection[int] = ()) -> torch.optim.Optimizer:
        """apart: ids of matrices that have plain AdamW."""
        from temper.train.optimizers import galore
        from temper.train.optimizers.common import grouped, whole

        parameters = whole(parameters, "galore")
        low = [one for one in parameters if one.ndim == 2 and min(one.shape) > self.rank and id(one) not in apart]
        known = {id(one) for one in low}
        rest = [one for one in parameters if id(one) not in known]
        settings = {"rank": self.rank, "gap": self.gap, "scale": self.scale}
        groups = [*grouped(low, self.weight_decay, project=True, **settings), *grouped(rest, self.weight_decay, project=False)]
        return galore.GaLore(groups, lr=self.lr, betas=self.betas, eps=self.eps)


# ------------------------------------------------------------------------------------------------- around another one


@part(name="sam")
class SAM:
    """Sharpness-aware minimisation: the gradient is taken where the loss is about highest near the weights.  Foret et al. 2021,
    algorithm 1; of vision transformers Chen et al. 2022. Two passes an update; the base's state, and during an update 4 bytes a weight.
    Formula: base(w, grad L(w + rho g / ||g||)), g = grad L(w)."""

    base: Slot[Optimizer] = AdamW()
    """What takes the gradient."""
    rho: Rate = 0.05
    """How far from the weights."""
    adaptive: bool = False
    """Whether distance is measured relative to each weight: w + rho w^2 g / || |w| g ||.  Kwon et al. 2021."""

    def __post_init__(self) -> None:
        if isinstance(self.base, (SAM, MeZO)):
            raise Problem("`sam` gives its base one gradient; take a base that asks for one, such as `adamw` or `sgd`", ("base",))

    def start(self, context: Context) -> _Around:
        return _Around(self, _started(self.base, context))

    def build(self, parameters: Iterable[torch.nn.Parameter], base: Any = None) -> torch.optim.Optimizer:
        """base: the base, started, where it is to know the model."""
        from temper.train.optimizers.sam import SharpnessAware

        base = self.base if base is None else base
        return SharpnessAware(base.build(parameters), self.rho, self.adaptive)


@dataclasses.dataclass(frozen=True)
class _Around:
    """A started part with its base, started."""

    part: Any
    base: Any

    def build(self, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return self.part.build(parameters, self.base)


def _started(base: Any, context: Context) -> Any:
    return base.start(context) if hasattr(base, "start") else base


@part(name="layerwise-decay")
class LayerwiseDecay:
    """Lower layers take smaller steps: the base's rate falls by a factor a layer.  Howard and Ruder 2018 (ULMFiT), section 3.2; with one
    rate for embeddings and one for what comes after the blocks, as in BEiT and timm. The base's state.
    Formula: lr_l = lr rate^(L + 1 - l), l = 0 below the blocks (embeddings), 1 to L in them, L + 1 after them (final norm, head)."""

    base: Slot[Optimizer] = AdamW()
    """What takes the gradient. Its rate is that of the top."""
    rate: Annotated[float, Field(gt=0, le=1)] = 0.9
    """What is left of the rate a layer further down."""

    def __post_init__(self) -> None:
        if isinstance(self.base, (SAM, MeZO, SGDSaI, LayerwiseDecay)):
            raise Problem(
                "`layerwise-decay` moves a layer at a time by one gradient; take a base that can, such as `adamw` or `sgd`, and put "
                "`sam` around the two",
                ("base",),
            )

    def start(self, context: Context) -> _Layered:
        return _Layered(self, _started(self.base, context), context)


@dataclasses.dataclass(frozen=True)
class _Layered:
    """`layerwise-decay` with its base, started, and the model whose layers it tells apart."""

    part: LayerwiseDecay
    base: Any
    context: Context

    def build(self, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        from temper.models.deltas.where import depths
        from temper.train.optimizers.common import Joined

        depth = depths(self.context.want("model"))
        top, layers = max(depth.values()), dict[int, list[torch.nn.Parameter]]()
        for one in parameters:
            layers.setdefault(depth.get(id(one), top), []).append(one)
        inner = []
        for place in sorted(layers, reverse=True):  # the first group's rate is the one that is told
            inner.append(self.base.build(layers[place]))
            for group in inner[-1].param_groups:
                group["lr"] *= self.part.rate ** (top - place)
        return Joined(*inner)


@part(name="mezo")
class MeZO:
    """Descends along noise by the slope between two losses, without a backward pass.  Malladi et al. 2023, algorithm 1. The noise is
    drawn again from its seed, so that memory is an inference's, one parameter's gradient and the base's state. Clipping has no say.
    Rounding moves every weight by about sqrt(updates) / 3 units in its last place: nothing in float32, more than the noise in bf16.
    Formula: base(w, s z), s = (L(w + epsilon z) - L(w - epsilon z)) / (2 epsilon), z ~ N(0, 1).

    With a base of SGD without momentum it is ZO-SGD, with momentum ZO-SGD-MMT, with AdamW ZO-Adam (Zhang et al. 2024). With a `sparsity`
    it is Sparse MeZO (Liu et al. 2024, algorithm 1): only small weights move, those at most a threshold set at the start per tensor."""

    base: Slot[Optimizer] = SGD(lr=1e-6, momentum=0.0)
    """What takes the estimated gradient. Its rate is the one that the schedule multiplies."""
    epsilon: Rate = 1e-3
    """How far from the weights the two losses are taken."""
    estimator: Literal["difference", "sign", "conservative"] = "difference"
    """difference: s z. sign: sign(s) z. conservative: of w, w - lr s z and w + lr s z the one with the lowest loss; five passes."""
    sparsity: Keep = 0.0
    """Share of each tensor's weights, the largest, that stand still."""

    def __post_init__(self) -> None:
        if isinstance(self.base, (SAM, MeZO, SGDSaI)):
            raise Problem("`mezo` moves one tensor at a time by one gradient; take a base that can, such as `sgd` or `adamw`", ("base",))
        if self.estimator == "conservative" and self.base != SGD(lr=getattr(self.base, "lr", 1.0), momentum=0.0):
            raise Problem("estimator `conservative` is made for the base `sgd` with momentum 0 and without weight decay")

    def start(self, context: Context) -> _Replayed:
        return _Replayed(self, _started(self.base, context), context)


@dataclasses.dataclass(frozen=True)
class _Replayed:
    """`mezo` with its base, started, and its random stream."""

    part: MeZO
    base: Any
    context: Context

    def build(self, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        from temper.train.optimizers.common import whole
        from temper.train.optimizers.mezo import ZerothOrder

        bases = [self.base.build([one]) for one in whole(parameters, "mezo")]
        settings = {"epsilon": self.part.epsilon, "estimator": self.part.estimator, "sparsity": self.part.sparsity}
        return ZerothOrder(bases, self.context.stream(), **settings)
