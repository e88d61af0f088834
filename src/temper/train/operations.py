"""How many floating-point operations training takes, and what it keeps for the backward pass, counted once a run."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from temper.lazy import torch
from temper.train.logprobs import output_layer
from temper.train.measuring import passes
from temper.train.objectives.base import ranges
from temper.train.precision import Precision

if TYPE_CHECKING:
    from temper.train.batching import Batch
    from temper.train.objectives import Sum

_TOKENS, _DOCUMENTS = 512, 8  # counted on at most, about: half an update as a rule, and no more passes than a short run bears
_LOGITS = 2**27  # held at a time, at most


@dataclasses.dataclass(frozen=True)
class Operations:
    """What a pass takes a token, on the average of `documents` with so many `tokens`. kept: bytes that wait for the backward pass, by the
    model's own code, weights and buffers left out."""

    per_token: float
    kept: float
    documents: int
    tokens: int


def operations(
    model: Any,
    loss: Callable[[Any, Batch], Sum],
    batches: Sequence[Batch],
    precision: Precision,
    *,
    paired: bool,
    forward_only: bool = False,
) -> Operations:
    """Floating-point operations of a pass over an update, forward and, unless `forward_only`, backward.

    Counted on some of its documents, each alone: padding, and how an update is cut into micro-batches, do not count. A product of
    matrices [m, n] [n, k] counts 2 m n k, attention as if every token saw the whole of its document, all else nothing. paired: whether
    rows 2i and 2i + 1 belong together. Weights, gradients and torch's random state are as before.
    """
    from torch.utils.flop_counter import FlopCounterMode

    some = _some([one for batch in batches for one in _alone(batch, paired)])
    kept = 0
    for one in some:  # by themselves: the counter's hooks hold on to what the passes let go
        with _whole_logits(model, one.targets), _keeping(model) as held:
            passes(model, loss, [one], precision, forward_only=forward_only)
        kept += held.most
    with FlopCounterMode(display=False, custom_mapping=_attention()) as counter:
        for one in some:
            with _whole_logits(model, one.targets):
                passes(model, loss, [one], precision, forward_only=forward_only)
    tokens = sum(one.tokens for one in some)
    return Operations(counter.get_total_flops() / tokens, kept / tokens, len(some), tokens)


def _alone(batch: Batch, paired: bool) -> Iterator[Batch]:
    """The documents of a batch that something is learnt of, as batches of their own without padding; two rows where they are `paired`."""
    found = ranges(batch)
    if paired:
        for row in range(0, len(found), 2):
            longest = max(end for ((_, end),) in found[row : row + 2])
            yield _cut(batch, slice(row, row + 2), slice(0, longest), batch.keys[row : row + 2], batch.rows[row : row + 2])
        return
    for row, documents in enumerate(found):
        keys = batch.keys[row]
        named = batch.rows[row : row + 1] if len(batch.rows) == len(found) else batch.rows
        for (begin, end), key in zip(documents, itertools.repeat(keys) if isinstance(keys, int) else keys):
            made = _cut(batch, slice(row, row + 1), slice(begin, end), [key], named)
            if made.targets:
                yield made


def _cut(batch: Batch, rows: slice, places: slice, keys: Sequence[Any], named: list[int]) -> Batch:
    supervised = batch.supervised[rows, places]
    mask = None if batch.attention_mask is None else batch.attention_mask[rows, places]
    return dataclasses.replace(
        batch,
        input_ids=batch.input_ids[rows, places],
        supervised=supervised,
        attention_mask=mask,
        position_ids=None,
        rows=named,
        keys=keys,
        targets=int(supervised.sum()),
        tokens=supervised.numel() if mask is None else int(mask.sum()),
    )


def _some(documents: Sequence[Batch]) -> list[Batch]:
    """About `_TOKENS` tokens of them, `_DOCUMENTS` at most, evenly spaced in the order of their keys; one at least."""
    count = max(1, min(_DOCUMENTS, _TOKENS * len(documents) // sum(one.tokens for one in documents)))
    return sorted(documents, key=lambda one: one.keys[0])[:: -(-len(documents) // count)]


@contextmanager
def _keeping(model: Any) -> Iterator[_Held]:
    """Counts what autograd keeps within; the model's own is left out."""
    held = _Held({one.untyped_storage().data_ptr() for one in itertools.chain(model.parameters(), model.buffers())})
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: _Kept(tensor, held), lambda kept: kept.tensor):
        yield held


class _Held:
    """Bytes of storages that are kept, each counted once. most: at one time; what is let go of on the way forward does not wait."""

    def __init__(self, own: set[int]):
        self._own, self._users, self._now, self.most = own, collections.Counter[int](), 0, 0

    def take(self, storage: torch.UntypedStorage) -> None:
        if storage.data_ptr() not in self._own:
            self._now += 0 if self._users[storage.data_ptr()] else storage.nbytes()
            self._users[storage.data_ptr()] += 1
            self.most = max(self.most, self._now)

    def drop(self, storage: torch.UntypedStorage) -> None:
        if storage.data_ptr() not in self._own:
            self._users[storage.data_ptr()] -= 1
            self._now -= 0 if self._users[storage.data_ptr()] else storage.nbytes()


class _Kept:
    """A tensor that autograd keeps, counted for as long as it does."""

    def __init__(self, tensor: torch.Tensor, held: _Held):
        self.tensor, self._held = tensor, held
        held.take(tensor.untyped_storage())

    def __del__(self) -> None:
        self._held.drop(self.tensor.untyped_storage())


@contextmanager
def _whole_logits(model: Any, targets: int) -> Iterator[None]:
    """Within, `logprobs` takes what a model's output layer gives, as it does when somebody listens to that: without filling rows up and
    without computing logits again. Nothing changes where they are many."""
    head, handle = output_layer(model), None
    if head is not None and targets * head.weight.shape[0] <= _LOGITS:
        handle = head.register_forward_hook(lambda *_: None)
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def _attention() -> dict[Any, Callable[..., int]]:
    """Operations of torch's attention kernels, by the shapes of their arguments: two products forward, four backward, as when each is
    a step of its own. torch's own table leaves out the CPU's, and counts what others compute again."""
    kernels, kinds = torch.ops.aten, ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")

    def forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        *many, length, size = query
        return 2 * torch.Size(many).numel() * length * key[-2] * (size + value[-1])

    def backward(_: Any, query: Any, key: Any, value: Any, *__: Any, **___: Any) -> int:
        return 2 * forward(query, key, value)

    made: dict[Any, Callable[..., int]] = {}
    for kind in kinds:
        made[getattr(kernels, f"_scaled_dot_product_{kind}")] = forward
        made[getattr(kernels, f"_scaled_dot_product_{kind}_backward")] = backward
    return made
