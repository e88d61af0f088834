"""What the optimizers of this package share: groups, exact state, first-order steps, several as one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from temper.lazy import nn, torch
from temper.parts import Problem
from temper.train.distribution import is_sharded

if TYPE_CHECKING:
    from temper.context import Context


# ----------------------------------------------------------------------------------------------------- parameters


def grouped(parameters: Iterable[torch.nn.Parameter], weight_decay: float, **settings: Any) -> list[dict[str, Any]]:
    """Matrices decay; biases and the gains of norms (one dimension or none) do not. settings: of both groups."""
    parameters = list(parameters)
    groups = [
        {"params": [one for one in parameters if one.ndim > 1], "weight_decay": weight_decay, **settings},
        {"params": [one for one in parameters if one.ndim <= 1], "weight_decay": 0.0, **settings},
    ]
    return [group for group in groups if group["params"]]


def fused(parameters: Iterable[torch.Tensor]) -> bool:
    """Whether torch's one-kernel updates take these parameters."""
    return all(one.is_floating_point() and one.device.type in ("cpu", "cuda") for one in parameters)


def whole(parameters: Iterable[torch.nn.Parameter], name: str) -> list[torch.nn.Parameter]:
    """The parameters, as a list. Raises `Problem` where a process holds only a part of them."""
    parameters = list(parameters)
    if any(map(is_sharded, parameters)):
        raise Problem(f"`{name}` needs whole tensors and the model is sharded; use `distribute: replicate`, or `adamw`")
    return parameters


def embeddings(context: Context) -> frozenset[int]:
    """The ids of the parameters that belong to single tokens: of the context's model the embeddings and the output layer."""
    model = context.gifts.get("model")
    if not isinstance(model, nn.Module):
        return frozenset()
    found = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    return frozenset(id(one) for module in (*found, head) if module is not None for one in module.parameters())


# ---------------------------------------------------------------------------------------------------------- steps


class Kept(torch.optim.Optimizer):
    """An optimizer whose state comes back as it was saved. torch's own loader would cast it to the parameters' number format."""

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict({**state_dict, "state": {}})
        held = [one for group in self.param_groups for one in group["params"]]
        for index, saved in state_dict["state"].items():
            device = held[index].device
            self.state[held[index]] = {
                name: one.to(device).clone() if isinstance(one, torch.Tensor) else one for name, one in saved.items()
            }


class FirstOrder(Kept):
    """One gradient, one change: what derives from it says how a group's parameters move."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Calls the closure, if there is one, and moves all parameters that have a gradient. Gives the closure's loss."""
        loss = evaluate(closure)
        for group in self.param_groups:
            if moving := [one for one in group["params"] if one.grad is not None]:
                self.move(group, moving)
        return loss

    def move(self, group: dict[str, Any], moving: list[torch.nn.Parameter]) -> None:
        """Changes parameters of a group by their gradients."""
        raise NotImplementedError


def evaluate(closure: Callable[[], Any] | None) -> Any:
    """The closure's loss, its gradients left; None where there is no closure and gradients are there already."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


class Joined(torch.optim.Optimizer):
    """Several optimizers, each with parameters of its own, as one with all their groups."""

    def __init__(self, *inner: torch.optim.Optimizer):
        self.inner = inner
        super().__init__([group for one in inner for group in one.param_groups], {})  # the same dicts: a rate set here is set there

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Calls the closure once, if there is one; then every optimizer moves its parameters. Gives the closure's loss."""
        loss = evaluate(closure)
        for one in self.inner:
            one.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        state: dict[int, Any] = {}
        groups, first = [], 0
        for one in self.inner:
            own = one.state_dict()
            state.update({first + index: held for index, held in own["state"].items()})
            groups += [{**group, "params": [first + index for index in group["params"]]} for group in own["param_groups"]]
            first += sum(len(group["params"]) for group in own["param_groups"])
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        groups, first = iter(state_dict["param_groups"]), 0
        for one in self.inner:
            some = itertools.islice(groups, len(one.param_groups))
            own = [{**group, "params": [index - first for index in group["params"]]} for group in some]
            count = sum(len(group["params"]) for group in own)
            held = {index - first: kept for index, kept in state_dict["state"].items() if first <= index < first + count}
            one.load_state_dict({"state": held, "param_groups": own})
            first += count
        self.param_groups = [group for one in self.inner for group in one.param_groups]
