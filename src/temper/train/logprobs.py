"""Log-probabilities that a model gives to tokens: pure tensor functions, and the forward pass that feeds them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from temper.lazy import F, nn, torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from temper.train.batching import Batch


def token_logprobs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log softmax(logits)[target], natural logarithm.

    logits: [..., V]; targets: int64 [...], not shifted: logits at a place speak of the target at that place. Returns [...] in
    float32 (float64 where the logits are).
    """
    full = logits if logits.dtype == torch.float64 else logits.float()
    return -F.cross_entropy(full.flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)


# ----------------------------------------------------------------------------------------------- of a linear layer


def linear_logprobs(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor, *, most: int = 2**25
) -> torch.Tensor:
    """log softmax(hidden weight^T + bias)[target], natural logarithm, [N], without ever holding all logits.

    hidden: [N, H]; weight: [V, H]; targets: int64 [N]. Products are taken in autocast's format where it is on, softmax and sums in
    float32 (float64). most: logits at a time; where the layer learns they are computed again in the backward pass.
    """
    from temper.train.faster import heads

    return heads.Each.apply(*_given(hidden, weight, bias, targets, most))  # type: ignore[return-value]


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor, *, most: int = 2**25
) -> torch.Tensor:
    """- sum of `linear_logprobs`, a scalar. Gradients are taken in the forward pass, so that logits are computed once."""
    from temper.train.faster import heads

    return heads.Summed.apply(*_given(hidden, weight, bias, targets, most))  # type: ignore[return-value]


def _given(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor, most: int) -> tuple[Any, ...]:
    """What the nodes of `heads` take."""
    from temper.train.faster import ops

    return hidden, weight, bias, targets, ops.computing(hidden), max(32, most // weight.shape[0]), torch.is_grad_enabled()


# -------------------------------------------------------------------------------------------------- of a model


def supervised_logits(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [N, V] at the places that predict a batch's N targets, and the targets [N], row by row.

    The hidden states of all other places are left out before the model's output layer, which is where a small model with a large
    vocabulary spends most of its time. Whatever the model does after that layer (scaling, soft caps) it does to what is left, so
    the logits are those of a full pass. Works through `peft`. A model without an output layer that is a module of its own is
    asked for all logits.
    """
    return _logits(model, batch.inputs, _predicts(batch)), batch.input_ids[batch.supervised]


def causal_loss(model: Any, batch: Batch) -> torch.Tensor:
    """- sum of the log-probabilities of a batch's targets, each from the tokens before it, as `supervised_logits` would give it."""
    return cross_entropy(model, batch.inputs, _predicts(batch), batch.input_ids[batch.supervised])


def supervised_logprobs(model: Any, batch: Batch) -> torch.Tensor:
    """Log-probabilities [N] of a batch's targets, each from the tokens before it, row by row."""
    return logprobs_at(model, batch.inputs, _predicts(batch), batch.input_ids[batch.supervised])


def cross_entropy(model: Any, inputs: Mapping[str, torch.Tensor], places: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """- sum of the log-probabilities that a model gives to targets [N] at places of its input; a scalar in float32 (float64).

    inputs: what its forward takes, `input_ids` [B, S] among it. places: bool [B, T], of which N are True, row by row, T being the places
    that it writes: S, or as many as a decoder of its own is given; or int64 [N], each within B x S. Logits are never whole in memory where
    the model's output layer is its last: see `linear_cross_entropy`.
    """
    return _scored(model, inputs, places, targets, summed=True)


def logprobs_at(model: Any, inputs: Mapping[str, torch.Tensor], places: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [N] of targets [N] at places of a model's input; see `cross_entropy`."""
    return _scored(model, inputs, places, targets, summed=False)


def _predicts(batch: Batch) -> torch.Tensor:
    """The places whose next token is a target: bool [B, T]."""
    return F.pad(batch.supervised[:, 1:], (0, 1))


def output_layer(model: Any) -> Any:
    """What gives a model's logits, where it is a module of its own; else None."""
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def _logits(model: Any, inputs: Mapping[str, torch.Tensor], places: torch.Tensor) -> torch.Tensor:
    """Logits [N, V] at `places`."""
    head, length = output_layer(model), _length(inputs, places)

    def leave_out(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *rest = args
        return _at(hidden, places, length).unsqueeze(0), *rest

    handle = head.register_forward_pre_hook(leave_out) if head is not None else None
    try:
        logits = model(**inputs, use_cache=False).logits
    finally:
        if handle is not None:
            handle.remove()
    count = int(places.sum()) if places.dtype == torch.bool else len(places)
    return logits.flatten(0, -2) if logits.shape[:-1] == (1, count) else _at(logits, places, length)


def _length(inputs: Mapping[str, torch.Tensor], places: torch.Tensor) -> int:
    """Places of a row."""
    return (places if places.dtype == torch.bool else inputs["input_ids"]).shape[1]


def _at(states: torch.Tensor, places: torch.Tensor, length: int) -> torch.Tensor:
    """[B, T, H] -> [N, H]. Soft prompts stand before a row's own `length` places."""
    states = states[:, -length:]
    return states[places] if places.dtype == torch.bool else states.flatten(0, 1)[places]


def _scored(model: Any, inputs: Mapping[str, torch.Tensor], places: torch.Tensor, targets: torch.Tensor, *, summed: bool) -> torch.Tensor:
    """The log-probabilities or - their sum, taken in place of logits by the output layer where it is the model's last word."""
    head, length, made = output_layer(model), _length(inputs, places), list[torch.Tensor]()
    if not _last(model, head, inputs):
        each = token_logprobs(_logits(model, inputs, places), targets)
        return -each.sum() if summed else each

    def score(hidden: torch.Tensor) -> torch.Tensor:
        of = linear_cross_entropy if summed else linear_logprobs
        made.append(of(_at(hidden, places, length), head.weight, head.bias, targets))
        return made[0].view(1, -1, 1)

    with _instead(head, score):
        model(**inputs, use_cache=False)
    return made[0]


_ENDS: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()
"""Output layer -> whether its model hands on what it gives, once that has been tried."""


def _last(model: Any, head: Any, inputs: Mapping[str, torch.Tensor]) -> bool:
    """Whether a model's logits are what its output layer, a plain linear layer, gives: tried once, on a row of `inputs`."""
    hooked = head is None or head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks
    if type(head) is not nn.Linear or hooked or "forward" in vars(head):
        return False
    if head not in _ENDS:
        made = list[torch.Tensor]()

        def tell(hidden: torch.Tensor) -> torch.Tensor:
            made.append(hidden[..., :1].clone())
            return made[-1]

        device = inputs["input_ids"].device
        forked = torch.random.fork_rng([device] if device.type == "cuda" else [])  # trying must not move the run's draws
        with torch.no_grad(), forked, _instead(head, tell):
            logits = model(**{name: one[:1] for name, one in inputs.items()}, use_cache=False).logits
        _ENDS[head] = len(made) == 1 and logits is made[0]
    return _ENDS[head]


@contextmanager
def _instead(module: Any, forward: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Within, `module` computes by `forward`."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
