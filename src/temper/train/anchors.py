"""What holds the weights where they should be, beside the loss: the slot `Anchor`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from temper.lazy import torch
from temper.models.deltas import is_adapted
from temper.models.deltas.budget import triplets
from temper.parts import Count, Problem, Rate, part, slot
from temper.train.distribution import is_sharded, like, local

if TYPE_CHECKING:
    from temper.context import Context
    from temper.world import World


class Anchoring(Protocol):
    """A term on the parameters beside the loss. Parameters are the same ones, in the same order, whenever they are given."""

    def __call__(self, parameters: Iterable[torch.nn.Parameter], scale: float) -> torch.Tensor:
        """The term's value, a scalar. Where gradients are enabled its gradient, times `scale`, is added to the parameters' `grad`."""
        ...


@slot(phased=False)
class Anchor(Protocol):
    """What holds the weights where they should be? `start(context)` gives the term beside the loss, `(parameters, scale) -> value`,
    which adds `scale` times its gradient to the parameters' `grad`; asked once a pass, not once a micro-batch."""

    def start(self, context: Context) -> Anchoring: ...


@part(name="l2")
class L2:
    """Half the squared distance from the weights at the start.  Li et al. 2018 (L2-SP), eq. 2.  4 bytes a weight.
    Formula: strength / 2 sum (w - w0)^2, with gradient strength (w - w0), over all weights that are trained."""

    strength: Rate = 0.01
    """Multiplies the term."""

    def start(self, context: Context) -> Near:
        return Near(self.strength, context.world)


class Near:
    """A term that grows with the squared distance from the parameters as they were when it was first asked for.

    Under `shard` each process knows its shards' distance; `world` adds them up.
    """

    def __init__(self, strength: float, world: World):
        self._strength, self._world = strength, world
        self._start: list[Any] = []

    def __call__(self, parameters: Iterable[torch.nn.Parameter], scale: float) -> torch.Tensor:
        parameters = list(parameters)
        learning = torch.is_grad_enabled()
        with torch.no_grad():
            if not self._start:
                self._start = [one.detach().clone() for one in parameters]
            squares: dict[bool, list[torch.Tensor]] = {False: [], True: []}  # of whole parameters, of shards
            for one, start in zip(parameters, self._placed(parameters)):
                apart = torch.sub(*local([one, start]))
                squares[is_sharded(one)].append(torch.linalg.vector_norm(apart).square())
                if learning and one.grad is not None:  # what nothing gives a gradient stays at its start
                    local([one.grad])[0].add_(apart, alpha=self._strength * scale)
            sums = [torch.stack(some).sum() for some in squares.values() if some]
            if squares[True]:
                self._world.sum(sums[-1])
            return torch.stack(sums).sum() * (self._strength / 2)

    def _placed(self, parameters: list[torch.nn.Parameter]) -> list[Any]:
        """The start where the parameters are, and cut as they are: what a checkpoint gives back is whole and on the CPU."""
        pairs = list(zip(self._start, parameters, strict=True))
        self._start = [start if is_sharded(start) else like(start.to(one.device), one) for start, one in pairs]
        return self._start

    def state_dict(self) -> dict[str, Any]:
        return {"start": list(self._start)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._start = [one.clone() for one in state["start"]]


# ------------------------------------------------------------------------------------------------- of triplets' vectors


@part
class Orthogonal:
    """Keeps the vectors of delta `svd-triplet` orthonormal.  Zhang et al. 2023 (AdaLoRA), section 3.1. peft adds another term: the mean
    over P and Q of all matrices of the norms, not squared.
    Formula: strength sum ||P^T P - I||^2 + ||Q Q^T - I||^2 over matrices; its gradients are 4 strength P (P^T P - I) and
    4 strength (Q Q^T - I) Q."""

    strength: Rate = 0.1
    """Multiplies the term."""

    def start(self, context: Context) -> Orthonormal:
        if not (found := triplets(context.want("model"))):
            raise Problem("`orthogonal` is about the vectors of delta `svd-triplet`, and nothing has them; leave it out")
        return Orthonormal(self.strength, [(right, left) for _, right, left in found.values()])


class Orthonormal:
    """See the part `orthogonal`. matrices: of each Q [r, in] and P [out, r]."""

    def __init__(self, strength: float, matrices: list[tuple[torch.nn.Parameter, torch.nn.Parameter]]):
        self._strength, self._matrices = strength, matrices

    def __call__(self, parameters: Iterable[torch.nn.Parameter], scale: float) -> torch.Tensor:
        _whole(parameters, "orthogonal")
        learning, values = torch.is_grad_enabled(), []
        with torch.no_grad():
            for right, left in self._matrices:
                for one, rows in ((right, right), (left, left.T)):
                    apart = rows @ rows.T
                    apart.diagonal().sub_(1)
                    values.append(apart.square().sum())
                    if learning and one.grad is not None:
                        pull = apart @ rows
                        one.grad.add_(pull if one is right else pull.T, alpha=4 * self._strength * scale)
            return torch.stack(values).sum() * self._strength


# --------------------------------------------------------------------------------------------- of what weights matter


@part(name="fisher", needs=("general_statistics",))
class Fisher:
    """Holds the weights that matter to general text, whatever the delta: elastic weight consolidation of what the adapter merges to.
    Kirkpatrick et al. 2017, eq. 3; of W + scale B A, without the half, Xiang et al. 2023 (E2WM).
    Formula: strength sum F (W' - W)^2, W' - W = scale B A, of all linear layers that are trained; F the mean over examples of
    the squared gradient of an example's summed loss. The authors' code takes the loss's mean over tokens, so theirs is smaller.

    4 bytes a weight of those layers, with delta `full` 8. F and W are those before the first update."""

    asks_general: ClassVar[bool] = True

    strength: Rate = 0.01
    """Multiplies the term."""
    samples: Count = 256
    """Examples of the step's `general` text that F is a mean over; the authors take 20,000."""

    def start(self, context: Context) -> Consolidated:
        model = context.want("model")
        changes = _changes(model)
        found = context.want("general_statistics").ask("fisher", self.samples, modules=list(changes))()
        return Consolidated(self.strength, [(found[name], *one) for name, one in changes.items()])


class Consolidated:
    """See the part `fisher`. One weight's change is computed at a time, and nothing of its size is kept in a graph.

    terms: F [out, in], what gives the change W' - W [out, in], and the parameters that it depends on.
    """

    def __init__(self, strength: float, terms: list[tuple[torch.Tensor, Callable[[], torch.Tensor], list[torch.nn.Parameter]]]):
        self._strength, self._terms = strength, terms

    def __call__(self, parameters: Iterable[torch.nn.Parameter], scale: float) -> torch.Tensor:
        _whole(parameters, "fisher")
        values = []
        for fisher, change, held in self._terms:
            moved = change()
            pull = fisher.to(moved.device) * moved.detach()
            values.append((pull * moved.detach()).sum())
            if torch.is_grad_enabled():
                pulls = torch.autograd.grad(moved, held, pull.mul_(2 * self._strength * scale), allow_unused=True)
                for one, slope in zip(held, pulls):
                    if slope is not None and one.grad is not None:
                        one.grad.add_(slope)
        return torch.stack(values).sum() * self._strength


_ADDED = ("LORA", "ADALORA", "LOHA", "LOKR", "VERA", "FOURIERFT", "TRI_FACTOR", "SPARSE")
"""Types of adapters whose layers say what they add to the weight."""


def _changes(model: Any) -> dict[str, tuple[Callable[[], torch.Tensor], list[torch.nn.Parameter]]]:
    """Linear layer, named as in the plain model -> what gives the change of its weight [out, in] since now, and what that depends on."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    from temper.models.deltas.init import first_factors
    from temper.models.parametrizations import oriented
    from temper.models.walk import is_linear

    made: dict[str, tuple[Callable[[], torch.Tensor], list[torch.nn.Parameter]]] = {}
    if not is_adapted(model):
        for name, module in model.named_modules():
            if is_linear(module) and module.weight.requires_grad:
                before = module.weight.detach().clone()
                made[name] = (lambda module=module, before=before: oriented(module, module.weight - before)), [module.weight]
    else:
        adapter, kind = model.active_adapter, model.peft_config[model.active_adapter].peft_type.value
        layers: dict[str, Any] = {name: one for name, one in model.named_modules() if isinstance(one, BaseTunerLayer)}
        for name, layer in layers.items():
            if not is_linear(base := layer.get_base_layer()):
                continue
            if kind not in _ADDED or getattr(layer, "lora_variant", None):
                raise Problem(f"`fisher` weighs what an adapter adds to a weight, which one of type {kind} does not say; use delta `lora`")

            if first_factors(layer, adapter) is not None:
                raise Problem("`fisher` is measured on the base as it was, and this init took a share of its weights; use init `default`")
            change = lambda layer=layer, base=base: oriented(base, layer.get_delta_weight(adapter))  # noqa: E731
            made[name.removeprefix("base_model.model.")] = change, [one for one in layer.parameters() if one.requires_grad]
    if not made:
        raise Problem("`fisher` weighs the weights of linear layers, and none is trained; leave it out")
    return made


def _whole(parameters: Iterable[Any], name: str) -> None:
    if any(map(is_sharded, parameters)):
        raise Problem(f"`{name}` needs whole tensors and the model is sharded; use `distribute: replicate`")
