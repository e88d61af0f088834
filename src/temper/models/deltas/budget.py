"""Slot `budget`: how much of a delta each matrix has, settled before the run and changed during it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol

from pydantic import Field

from temper.lazy import torch
from temper.models.deltas.init import centred
from temper.parts import Count, Problem, Progress, Rate, Share, part, slot

if TYPE_CHECKING:
    from torch import nn

    from temper.context import Context

Keep = Annotated[float, Field(gt=0, lt=1)]
"""What is kept of a running mean per update."""


@slot(phased=False)
class Budget(Protocol):
    """How is the delta's size shared out among the matrices? `settle(model, config) -> config` before the delta is put on,
    `after(progress)` after each update, while the mean gradients are still there.

    settle: `model` is plain, `config` the delta's peft configuration; what comes back has its ranks, targets and the like settled.
    after: `progress` counts the update that was just made. A live part that changes the delta during the run finds it under
    `context.want("model")`, at its first `after` and not before. It may have `figures()`, name -> number, for the report.
    """

    def settle(self, model: nn.Module, config: Any) -> Any: ...

    def after(self, progress: Progress) -> None: ...


# ---------------------------------------------------------------------------------------------------------- parts


@part
class SensitivityCubic:
    """Ranks go where they matter: of delta `svd-triplet` the triplets that score lowest, over all matrices, fall away on a cubic schedule.
    Zhang et al. 2023, "AdaLoRA", sections 3.2 and 3.3, as the authors' code and peft have them.
    Formula: score = s(lambda_i) + mean_j s(P_ji) + mean_j s(Q_ij), s = I U, I <- b1 I + (1 - b1) |w g|, U <- b2 U + (1 - b2) ||w g| - I|;
    triplets left at update t: target + (start - target) (1 - (t - warmup) / (updates - final - warmup))^3, each a mean per matrix.

    A triplet that fell may come back, until the last share of the run, in which the ranks stand."""

    cuts: ClassVar[bool] = True

    target: Count = 8
    """Triplets left at the end, a mean over the matrices; the delta's `rank` is what each starts with."""
    warmup: Share = 0.1
    """Share of the run before the first triplet falls."""
    final: Share = 0.3
    """Share of the run, its last, in which the ranks stand."""
    interval: Count = 10
    """Updates between two choices."""
    betas: tuple[Keep, Keep] = (0.85, 0.85)
    """What the means of sensitivity and of its uncertainty keep per update."""

    def __post_init__(self) -> None:
        if self.warmup + self.final >= 1:
            raise Problem(
                f"warmup {self.warmup:g} and final {self.final:g} leave no run between them; give shares that add up to less than 1"
            )

    def start(self, context: Context) -> Allocation:
        return Allocation(self, context)


class Allocation:
    """See the part `sensitivity-cubic`. State: two means per number of the adapter, and at the end which triplets are left."""

    def __init__(self, part: SensitivityCubic, context: Context):
        self._part, self._context = part, context
        self._settled = False
        self._matrices: dict[str, list[torch.nn.Parameter]] = {}  # lambda [r, 1], Q [r, in], P [out, r]
        self._means: dict[str, list[torch.Tensor]] = {}  # sensitivity and uncertainty, of each of the three
        self._left: dict[str, torch.Tensor] = {}  # bool [r]; empty until the last share of the run

    def settle(self, model: nn.Module, config: Any) -> Any:
        if config.peft_type.value != "ADALORA":
            raise Problem(
                f"`sensitivity-cubic` takes triplets away, and a {config.peft_type.value} adapter has none; use delta `svd-triplet`"
            )
        if self._part.target > config.init_r:
            raise Problem(
                f"target {self._part.target} is above the delta's rank {config.init_r}; ranks only fall: give a lower one", ("target",)
            )
        config.target_r, config.deltaT = self._part.target, self._part.interval
        config.beta1, config.beta2 = self._part.betas
        self._settled, self._matrices = True, {}
        return config

    def after(self, progress: Progress) -> None:
        with torch.no_grad():
            self._after(progress)

    def _after(self, progress: Progress) -> None:
        if not self._matrices:
            self._find()
        warmup, last = self._ends(progress.steps)
        if self._left:
            for name, (values, *_) in self._matrices.items():
                values.masked_fill_(~self._left[name].to(values.device)[:, None], 0)
        elif progress.step >= last:
            if not self._means:  # a run too short to have watched
                self._watch()
            self._left, self._means = self._cut(self._part.target * len(self._matrices)), {}
            self._tell()
        else:
            self._watch()
            if progress.step > warmup and progress.step % self._part.interval == 0:
                self._cut(self._budget(progress.step, warmup, last))

    def figures(self) -> dict[str, float]:
        """The rank left of each matrix, and their mean; nothing before the ranks stand."""
        ranks = {f"rank.{name}": float(left.sum()) for name, left in self._left.items()}
        return {**ranks, "rank": sum(ranks.values()) / len(ranks)} if ranks else {}

    def state_dict(self) -> dict[str, Any]:
        return {"means": {name: list(held) for name, held in self._means.items()}, "left": dict(self._left)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._means = {name: [one.clone() for one in held] for name, held in state["means"].items()}
        self._left = dict(state["left"])
        if self._left and self._settled:
            self._tell()

    # ---------------------------------------------------------------------------------------------------- inside

    def _find(self) -> None:
        model = self._context.want("model")
        layers = triplets(model)
        if not self._settled or not layers:
            raise Problem(
                "a budget shares out the ranks of a new delta, and an adapter that came in goes on with its own; leave `budget` out, or "
                "write `base: merged`",
                ("budget",),
            )
        self._matrices = {name: list(held) for name, held in layers.items()}
        if any(hasattr(one, "placements") for held in self._matrices.values() for one in held):
            raise Problem("`sensitivity-cubic` needs whole tensors and the model is sharded; use `distribute: replicate`")

    def _ends(self, updates: float) -> tuple[float, float]:
        """After which update triplets fall, and with which the ranks stand. A run by time knows its updates by an estimate."""
        if not math.isfinite(updates):
            return math.inf, math.inf
        return round(self._part.warmup * updates), updates - round(self._part.final * updates)

    def _budget(self, step: int, warmup: float, last: float) -> int:
        """Triplets of all matrices together."""
        count = len(self._matrices)
        start, target = sum(held[0].shape[0] for held in self._matrices.values()), self._part.target * count
        return int((start - target) * (1 - (step - warmup) / (last - warmup)) ** 3 + target)

    def _watch(self) -> None:
        """Moves the means by this update's |w g|."""
        keep, guard = self._part.betas
        for name, held in self._matrices.items():
            if any(one.grad is None for one in held):
                raise Problem("`sensitivity-cubic` scores by gradients, which this optimizer does not leave; use one that does, as `adamw`")
            means = self._means.setdefault(name, [torch.zeros_like(one) for one in (*held, *held)])
            means[:] = [mean.to(one.device) for mean, one in zip(means, (*held, *held))]
            for one, mean, spread in zip(held, means[:3], means[3:]):
                assert one.grad is not None
                sensitivity = (one * one.grad).abs()
                mean.mul_(keep).add_(sensitivity, alpha=1 - keep)
                spread.mul_(guard).add_((sensitivity - mean).abs(), alpha=1 - guard)

    def _cut(self, budget: int) -> dict[str, torch.Tensor]:
        """Puts the lambdas of all but the `budget` triplets that score highest to 0. Matrix -> which are left."""
        scores = {}
        for name, means in self._means.items():
            values, right, left = (mean * spread for mean, spread in zip(means[:3], means[3:]))
            scores[name] = values.flatten() + right.mean(dim=1) + left.mean(dim=0)
        every = torch.cat(list(scores.values()))
        stay = torch.ones_like(every, dtype=torch.bool)
        stay[every.argsort(stable=True)[: max(0, len(every) - budget)]] = False
        found = dict(zip(scores, stay.split([len(one) for one in scores.values()])))
        for name, (values, *_) in self._matrices.items():
            values.masked_fill_(~found[name][:, None], 0)
        return found

    def _tell(self) -> None:
        """Lets peft know what is left: fallen triplets, which are 0, are not saved."""
        model = self._context.want("model")
        config = model.peft_config[model.active_adapter]
        config.rank_pattern = {f"{name}.lora_E": left.tolist() for name, left in self._left.items()}


def triplets(model: Any) -> dict[str, tuple[torch.nn.Parameter, torch.nn.Parameter, torch.nn.Parameter]]:
    """Of every module with an adapter of triplets, named as in the plain model: lambda [r, 1], Q [r, in], P [out, r]."""
    from peft.tuners.adalora.layer import AdaLoraLayer

    if not hasattr(model, "peft_config"):
        return {}
    layers: dict[str, Any] = {name: one for name, one in model.named_modules() if isinstance(one, AdaLoraLayer)}
    adapter = model.active_adapter
    return {
        name.removeprefix("base_model.model."): (layer.lora_E[adapter], layer.lora_A[adapter], layer.lora_B[adapter])
        for name, layer in layers.items()
        if adapter in layer.lora_E
    }


@part(needs=("statistics",))
class ExplainedVariance:
    """Ranks go where a component of a layer's inputs explains most of their variance; a layer that gets none is left as it is.
    Paischer et al. 2024, "One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation" (EVA), section 3.
    Formula: of the components (layer, i <= rho rank) with the largest shares l_i / sum_j l_j, l the eigenvalues of the covariance of the
    layer's inputs, as many are kept as all ranks add up to; a layer's rank is how many of its own are. alpha moves so that the scale stays.
    """

    rho: Annotated[float, Field(ge=1)] = 2.0
    """Greatest rank of a layer, as a multiple of the delta's; 1 leaves all ranks equal."""
    samples: Count = 256
    """Examples whose tokens are seen."""

    def start(self, context: Context) -> Explaining:
        statistics = context.want("statistics")
        asked = [statistics.ask(kind, samples=self.samples) for kind in ("covariance", "mean")]
        return Explaining(self.rho, *asked)


class Explaining:
    """Settles ranks by the variance that components explain. covariance, mean: requests for statistics of the layers' inputs."""

    def __init__(self, rho: float, covariance: Any, mean: Any):
        self._rho, self._covariance, self._mean = rho, covariance, mean

    def settle(self, model: nn.Module, config: Any) -> Any:
        if config.peft_type.value != "LORA":
            raise Problem(f"`explained-variance` shares out ranks of LoRA, and this is {config.peft_type.value}; use delta `lora`")
        layers = [name for name in self._covariance() if name in config.target_modules]
        if lacking := sorted(set(config.target_modules) - set(layers)):
            raise Problem(f"`explained-variance` looks at inputs of linear layers, and `{lacking[0]}` is none; leave it out of `where`")
        shares = self._shares(model, layers, round(config.r * self._rho))
        owners = [name for name in layers for _ in shares[name]]
        order = torch.cat([shares[name] for name in layers]).sort(descending=True, stable=True)[1][: config.r * len(layers)]
        ranks = Counter(owners[place] for place in order.tolist())
        power = 0.5 if config.use_rslora else 1.0
        config.target_modules = {name for name in layers if ranks[name]}
        config.rank_pattern = {name: rank for name, rank in ranks.items() if rank != config.r}
        config.alpha_pattern = {name: config.lora_alpha * (rank / config.r) ** power for name, rank in config.rank_pattern.items()}
        return config

    def after(self, progress: Progress) -> None:
        pass

    def _shares(self, model: nn.Module, layers: list[str], most: int) -> dict[str, torch.Tensor]:
        """Module -> shares of the variance that its first components explain, at most `most` of them, the largest first."""
        covariance, mean = self._covariance(), self._mean()
        known: dict[int, torch.Tensor] = {}  # layers with the same inputs have one covariance
        for name in layers:
            if id(covariance[name]) not in known:
                values = torch.linalg.eigvalsh(centred(covariance[name], mean[name])).flip(0)
                known[id(covariance[name])] = (values / values.sum()).cpu()
        modules: dict[str, Any] = dict(model.named_modules())
        return {name: known[id(covariance[name])][: min(most, *modules[name].weight.shape)] for name in layers}


@part
class StructuredIfDense:
    """Of delta `entries`, a matrix that holds many of them gets LoRA in their place.
    He et al. 2023, "Sensitivity-Aware Visual Parameter-Efficient Fine-Tuning" (SPT), eq. 6, and the authors' code.
    Formula: matrix m, which holds n_m of the tau most sensitive weights, has LoRA where n_m >= rank (in + out) / ratio, else those entries;
    tau is the greatest for which the trained numbers, rank (in + out) or n_m a matrix, are within what the delta asks for.

    The authors' code tries tau in steps of 20 000 and takes the sum nearest to the budget, which may be above it."""

    rank: Count = 8
    """Rank of the LoRA."""
    ratio: Rate = 5.0
    """How easily a matrix gets it: where its entries are at least the LoRA's numbers over this."""
    scale: Rate = 1.0
    """Multiplies B A."""

    def settle(self, model: nn.Module, config: Any) -> Any:
        if config.peft_type.value != "SPARSE":
            raise Problem(f"`structured-if-dense` counts entries, and a {config.peft_type.value} adapter has none; use delta `entries`")
        ranking, asked, most = config.ranking, config.ranking.asked, config.ranking.most
        modules: dict[str, Any] = dict(model.named_modules())
        sizes = {name: self.rank * sum(modules[name].weight.shape) for name in ranking.scores}
        tried = asked
        while (owners := self._within(ranking.owners(tried), list(sizes.values()), asked)).numel() == tried and tried < most:
            tried = min(2 * tried, most)  # LoRA stands in for more entries than it has numbers: there is room for further ones
        counts = ranking.counts(owners)
        if not counts:
            told = f"{asked} entries: the first matrix to get LoRA takes more than that; ask for more, or give a lower rank or ratio"
            raise Problem(told, ("rank",))
        config.rank_pattern = {name: self.rank for name, count in counts.items() if count >= sizes[name] / self.ratio}
        config.counts = {name: count for name, count in counts.items() if name not in config.rank_pattern}
        config.scale = self.scale
        return config

    def after(self, progress: Progress) -> None:
        pass

    def _within(self, owners: torch.Tensor, sizes: list[int], most: int) -> torch.Tensor:
        """The first of the weights that lie in `owners`, as many as cost at most `most` trained numbers."""
        costs = torch.ones_like(owners)
        for number, size in enumerate(sizes):
            own = (owners == number).nonzero().flatten()
            enough = math.ceil(size / self.ratio)  # with this one the matrix gets LoRA, and further ones cost nothing
            costs[own[enough - 1 : enough]] = size - (enough - 1)
            costs[own[enough:]] = 0
        return owners[: int(torch.searchsorted(costs.cumsum(0), most, right=True))]
