"""How a model reads a pair: in two rows, or in one row in which the beginning that both responses share stands once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from temper.lazy import torch
from temper.models.sample import evaluating
from temper.train.batching import Batch, collate
from temper.train.logprobs import logprobs_at, supervised_logprobs
from temper.train.objectives.attention import full_mask

if TYPE_CHECKING:
    from temper.context import Context
    from temper.train.examples import Example

Layout = Literal["two rows", "one row"]

_GAIN = 1.1
"""Least work of two rows over that of one: the mask of one row costs a little too."""
_ROUNDING = 1e-3
"""Greatest difference between two ways to compute a log-probability in float32, nats."""
_PAIRS = 512
"""Pairs that the work is counted on, at most."""


def response_logprobs(model: Any, batch: Batch, layout: Layout = "two rows") -> torch.Tensor:
    """Log-probability of each supervised token of a batch of pairs, 0 elsewhere: [2P, T], float32, in one forward pass.

    With dropout the layouts draw other masks, and the beginning that a pair shares has one mask for both responses; without,
    log-probabilities and gradients of the two differ by rounding alone.
    """
    if layout == "two rows":
        each = supervised_logprobs(model, batch)
    else:
        row = one_row(batch)
        inputs = {"input_ids": row.tokens, "attention_mask": full_mask(model, row.seen), "position_ids": row.positions}
        each = logprobs_at(model, inputs, row.predicts, batch.input_ids[batch.supervised])
    return each.new_zeros(batch.supervised.shape).masked_scatter(batch.supervised, each)


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """Pairs as one row each. tokens, positions: int64 [P, S]. seen: bool [P, S, S], which places each one attends to: they lie side
    by side. predicts: int64 [n], the places in [P x S] that predict the n targets of the batch, row by row of its two a pair.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    seen: torch.Tensor
    predicts: torch.Tensor


def one_row(batch: Batch) -> Row:
    """The P pairs of a batch [2P, T] as P rows: [rest of the chosen row, backwards][common beginning][rest of the rejected row].

    In this order what a token sees is one stretch of its row: of the chosen rest itself and all up to the end of the beginning, else all
    from the start of the beginning to itself. Positions are those of the two rows. Padding stands on the right and sees nothing.
    """
    chosen, rejected = batch.input_ids[0::2], batch.input_ids[1::2]
    device, width = chosen.device, chosen.shape[1]
    lengths = torch.full((len(batch.input_ids),), width, device=device) if batch.attention_mask is None else batch.attention_mask.sum(-1)
    first, second = lengths[0::2, None], lengths[1::2, None]  # [P, 1]
    same = (chosen == rejected) & (torch.arange(width, device=device) < torch.minimum(first, second))
    common = same.long().cumprod(-1).sum(-1, keepdim=True)
    begin = first - common  # where the common beginning begins
    total = begin + second

    place = torch.arange(int(total.max()), device=device).expand(len(total), -1)  # [P, S]
    back = place < begin
    positions = torch.where(back, first - 1 - place, place - begin).clamp(max=width - 1)
    tokens = torch.where(back, chosen.gather(1, positions), rejected.gather(1, positions))
    low = torch.where(back, place, begin)[..., None]
    high = torch.where(back, first, place + 1).masked_fill(place >= total, 0)[..., None]
    seen = (place[:, None] >= low) & (place[:, None] < high)

    row, target = batch.supervised.nonzero(as_tuple=True)
    pair, before = row // 2, target - 1
    backwards = (row % 2 == 0) & (before >= common[pair, 0])
    predicts = torch.where(backwards, first[pair, 0] - 1 - before, begin[pair, 0] + before)
    return Row(tokens, positions, seen, pair * place.shape[1] + predicts)


# ------------------------------------------------------------------------------------------------------- the choice


def layout_of(model: Any, examples: Sequence[Example], context: Context) -> Layout:
    """In which layout a run's pairs are read: as chosen when first called; the same whenever asked again.

    model: the policy as it came in. examples: pairs, a chosen one followed by its rejected one.
    """
    return context.decide("pairs", lambda: choose(model, examples))


def choose(model: Any, examples: Sequence[Example]) -> tuple[Layout, str]:
    """One row a pair where that is less work and gives the same log-probabilities, else two; and why."""
    gain = _gain(model, examples)
    work = f"one row a pair takes {1 / gain:.2f} of the operations of two"
    if gain < _GAIN:
        return "two rows", f"{work}; {1 / _GAIN:.2f} is asked for"
    problem = _unfit(model, examples)
    return ("two rows", f"{work}, but {problem}") if problem else ("one row", f"{work}; the log-probabilities are the same")


def _gain(model: Any, examples: Sequence[Example]) -> float:
    """Operations of two rows a pair over those of one, padding not counted: by weight and token, in attention by token and token."""
    config = model.config.get_text_config()
    outside = {id(one) for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module for one in module.parameters()}
    linear = 2 * sum(one.numel() for one in model.parameters() if id(one) not in outside)
    attention = 4 * config.num_hidden_layers * config.hidden_size
    two = one = 0
    count = len(examples) // 2
    for index in range(0, count, -(-count // _PAIRS)):
        chosen, rejected = examples[2 * index], examples[2 * index + 1]
        joined = len(chosen) + len(rejected) - _common(chosen, rejected)
        two += sum(linear * len(row) + attention * len(row) ** 2 for row in (chosen, rejected))
        one += linear * joined + attention * joined**2
    return two / one


def _common(chosen: Example, rejected: Example) -> int:
    """Tokens at their beginning that both have."""
    length = min(len(chosen), len(rejected))
    differ = chosen.tokens[:length] != rejected.tokens[:length]
    return int(differ.argmax()) if differ.any() else length


def _unfit(model: Any, examples: Sequence[Example]) -> str | None:
    """Why a model cannot read a pair in one row; None where it can.

    Tried on the pair with the longest row and the one with the most tokens: a model that passes tokens on in order (state space),
    counts positions itself, or does not look back all the way gives other log-probabilities.
    """
    pairs = range(0, len(examples), 2)
    longest = max(pairs, key=lambda pair: max(len(examples[pair]), len(examples[pair + 1])))
    most = max(pairs, key=lambda pair: len(examples[pair]) + len(examples[pair + 1]))
    some = [examples[pair + side] for pair in sorted({longest, most}) for side in (0, 1)]
    batch = collate(some).to(next(model.parameters()).device)
    try:
        with torch.no_grad(), evaluating(model):
            two, one = (response_logprobs(model, batch, layout) for layout in ("two rows", "one row"))
    except Exception as error:  # a model refuses what it does not know in its own way
        return f"the model does not take it: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".rstrip(": ")
    apart = (two - one).abs().max().item()
    return None if apart <= _ROUNDING else f"the model gives other log-probabilities then, by up to {apart:.2g} nats"
