"""Log-probabilities that a model gives to tokens: pure tensor functions, and the forward pass that feeds them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from temper.lazy import F, torch

if TYPE_CHECKING:
    from temper.train.batching import Batch


def token_logprobs(logits: torch.Tensor, targets: torch.Tensor, *, chunk: int | None = None) -> torch.Tensor:
    """log softmax(logits)[target], natural logarithm.

    logits: [..., V]; targets: int64 [...], not shifted: logits at a place speak of the target at that place. Returns [...] in
    float32 (float64 where the logits are). chunk: so many places are turned to float32 and normalised at a time, and again in the
    backward pass, which keeps memory at chunk x V numbers beyond the logits.
    """
    flat, wanted = logits.flatten(0, -2), targets.flatten()
    if chunk is None or chunk >= len(wanted):
        return _logprobs(flat, wanted).view(targets.shape)
    from torch.utils.checkpoint import checkpoint

    pairs = zip(flat.split(chunk), wanted.split(chunk), strict=True)
    return torch.cat([checkpoint(_logprobs, *pair, use_reentrant=False) for pair in pairs]).view(targets.shape)


def _logprobs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """[N, V], [N] -> [N]."""
    full = logits if logits.dtype == torch.float64 else logits.float()
    return -F.cross_entropy(full, targets, reduction="none")


def supervised_logits(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [N, V] at the places that predict a batch's N targets, and the targets [N], row by row.

    The hidden states of all other places are left out before the model's output layer, which is where a small model with a large
    vocabulary spends most of its time. Whatever the model does after that layer (scaling, soft caps) it does to what is left, so
    the logits are those of a full pass. Works through `peft`. A model without an output layer that is a module of its own is
    asked for all logits.
    """
    predicts = F.pad(batch.supervised[:, 1:], (0, 1))  # place t predicts token t + 1
    length = predicts.shape[1]
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None

    def leave_out(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *rest = args
        return hidden[:, -length:][predicts].unsqueeze(0), *rest  # soft prompts stand before the batch's own places

    handle = head.register_forward_pre_hook(leave_out) if head is not None else None
    try:
        logits = model(**batch.inputs, use_cache=False).logits
    finally:
        if handle is not None:
            handle.remove()
    targets = batch.input_ids[batch.supervised]
    if logits.shape[:-1] != (1, len(targets)):
        logits = logits[:, -length:][predicts]
    return logits.flatten(0, -2), targets


def sequence_logprobs(model: Any, batch: Batch, *, chunk: int | None = None) -> torch.Tensor:
    """Sum over each row's targets of their log-probabilities: [B], natural logarithm."""
    logits, targets = supervised_logits(model, batch)
    each = token_logprobs(logits, targets, chunk=chunk)
    row = batch.supervised.nonzero()[:, 0]
    return each.new_zeros(len(batch.supervised)).index_add(0, row, each)
