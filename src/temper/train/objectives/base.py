"""What objectives share: a loss before it is averaged, several as one, which models they train, documents, and forward passes."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from temper.lazy import F, torch
from temper.parts import Problem, held, mark_of, part
from temper.passport import family
from temper.train import logprobs

if TYPE_CHECKING:
    from temper.context import Context
    from temper.train.batching import Batch


@dataclasses.dataclass(frozen=True)
class Sum:
    """A loss before it is averaged, so that micro-batches add up to exactly what one large batch gives.

    total: scalar, the sum over `count` tokens (or pairs, or samples). extras: further figures for the curve, each a sum over the
    same `count` (scalar tensors, detached by the loop, or numbers). The loop adds up and divides by the update's count.
    """

    total: torch.Tensor
    count: int
    extras: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def mean(self) -> torch.Tensor:
        return self.total / self.count


def added(objectives: Sequence[Callable[[Any, Batch], Sum]]) -> Callable[[Any, Batch], Sum]:
    """How a list of objectives acts as one: their totals add up, and the first one's count divides them.

    Each one's own total is a figure of the curve, under its name; the second of a name is `<name>-2`.
    """
    names: list[str] = []
    for one in objectives:
        name, turn = _name(one), 1
        while (full := name if turn == 1 else f"{name}-{turn}") in names:
            turn += 1
        names.append(full)

    def together(model: Any, batch: Batch) -> Sum:
        sums = [objective(model, batch) for objective in objectives]
        extras = {name: value for one in sums for name, value in one.extras.items()}
        own = {name: one.total.detach() for name, one in zip(names, sums, strict=True)}
        return Sum(torch.stack([one.total for one in sums]).sum(), sums[0].count, {**extras, **own})

    return together


def _name(objective: Any) -> str:
    """Of a part, of what a part started, or of a user's function."""
    one = getattr(objective, "part", objective)
    name = mark_of(one).name
    return one.source.rpartition(":")[2] if name == "function" else name


@part
class Causal:
    """Next-token cross-entropy over the supervised tokens, in nats.  Formula: - sum_t log p(x_t | x_<t)."""

    families: ClassVar = ("causal",)

    def __call__(self, model: Any, batch: Batch) -> Sum:
        return next_token(model, batch)


# ------------------------------------------------------------------------------------------------------------ models

_TRAINED_BY = {"causal": "`causal`", "masked": "`masked`", "encoder-decoder": "`prefix` or `span-mixture`", "classifier": "`label`"}


def check(objective: Any, architecture: str | None, slot: str, tokenizer: Any = None) -> None:
    """Refuses what stands in a slot where it does not train models of this class, or needs a token that a new tokenizer would lack.

    A user's function may train any. tokenizer: the part that makes the new one.
    """
    reserved = getattr(tokenizer, "reserve", None)
    for one in held(objective):
        _suits(one, family(architecture), architecture, slot)
        lacking = [word for word in getattr(one, "reserves", ()) if reserved is not None and word not in reserved]
        if lacking:
            name = mark_of(tokenizer).name
            asked = ", ".join([*reserved, *lacking])  # type: ignore[misc]
            raise Problem(f"`{mark_of(one).name}` needs tokens of its own; write `tokenizer: {{{name}: {{reserve: [{asked}]}}}}`", (slot,))


def _suits(objective: Any, kind: str, architecture: str | None, slot: str) -> None:
    if kind not in getattr(objective, "families", (kind,)):
        name = mark_of(objective).name
        raise Problem(f"`{name}` does not train {kind} models such as {architecture}; use {_TRAINED_BY[kind]}", (slot,))


def plain(model: Any) -> Any:
    """The model under an adapter."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def family_of(model: Any) -> str:
    """`passport.family` of a model, under an adapter too."""
    inner = plain(model)
    return "encoder-decoder" if getattr(inner.config, "is_encoder_decoder", False) else family(type(inner).__name__)


class Corrupting:
    """A part at work that changes batches: the step's model and tokenizer, and draws of its own for every row."""

    def __init__(self, part: Any, context: Context):
        self.part, self.name = part, mark_of(part).name
        self.model, self.tokenizer = context.want("model"), context.want("tokenizer")
        self.family, self.note, self.stream = family_of(self.model), context.note, context.stream()
        self.vocabulary: dict[str, int] = self.tokenizer.get_vocab()
        self.longest = getattr(self.model.config, "max_position_embeddings", None)
        _suits(part, self.family, type(plain(self.model)).__name__, context.slot)

    def documents(self, batch: Batch) -> Iterator[tuple[int, slice, torch.Generator]]:
        """Row, places and generator of every document of a batch, in order. What an example draws is its own, whatever stands beside it."""
        for row, found in enumerate(ranges(batch)):
            keys = batch.keys[row]
            if isinstance(keys, int):
                keys = itertools.repeat(self.stream.generator(self.name, batch.update, keys))
            else:
                keys = (self.stream.generator(self.name, batch.update, key) for key in keys)
            for (start, end), generator in zip(found, keys):
                yield row, slice(start, end), generator

    def token(self, text: str, reserve: str) -> int:
        """The id of a token that tokenizer and model must have. reserve: what a new tokenizer reserves it with."""
        found = self.vocabulary.get(text)
        if found is None:
            raise Problem(
                f"`{self.name}` needs the token {text}, which the tokenizer lacks; name other tokens of it in the settings of "
                f"`{self.name}`, or train a new tokenizer with `reserve: [{reserve}]`"
            )
        if found >= (most := self.model.get_input_embeddings().weight.shape[0]):
            raise Problem(f"the tokenizer's {text} has the id {found} and the model has {most} embeddings; name another token")
        return found


# ----------------------------------------------------------------------------------------------------- forward passes


def next_token(model: Any, batch: Batch) -> Sum:
    """Cross-entropy of the supervised tokens, each from those before it."""
    return Sum(logprobs.causal_loss(model, batch), batch.targets)


def in_place(model: Any, inputs: Mapping[str, torch.Tensor], places: torch.Tensor, targets: torch.Tensor) -> Sum:
    """Cross-entropy of targets [N] at their own places, N of bool [B, T], row by row: nothing is shifted."""
    return Sum(logprobs.cross_entropy(model, inputs, places, targets), len(targets))


def translate(model: Any, pairs: Sequence[tuple[list[int], Piece]], device: Any) -> Sum:
    """Cross-entropy of each pair's supervised targets, from its inputs by an encoder-decoder and from the targets before."""
    pairs = pairs or [([0], ([0], [False]))]  # a pass over nothing, so that there is a loss to take a gradient of
    inputs, read = _filled([one for one, _ in pairs]), _filled([[1] * len(one) for one, _ in pairs])
    targets, places = _filled([tokens for _, (tokens, _) in pairs]), _filled([flags for _, (_, flags) in pairs]).bool()
    first = torch.full_like(targets[:, :1], _beginning(model))
    given = {"input_ids": inputs, "attention_mask": read, "decoder_input_ids": torch.cat([first, targets[:, :-1]], 1)}
    return in_place(model, {name: one.to(device) for name, one in given.items()}, places.to(device), targets[places].to(device))


def _beginning(model: Any) -> int:
    """The token with which a decoder begins."""
    found = [getattr(one, "decoder_start_token_id", None) for one in (model.config, getattr(model, "generation_config", None))]
    if (token := next((one for one in found if one is not None), None)) is None:
        raise Problem("the model's config.json does not say with which token its decoder begins; add decoder_start_token_id")
    return token


def _filled(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Rows filled up with 0 on the right, int64 [B, T]."""
    width = max(map(len, rows))
    return torch.tensor([[*map(int, one), *[0] * (width - len(one))] for one in rows])


# ---------------------------------------------------------------------------------------------------------- documents

Piece = tuple[list[int], list[bool]]
"""The tokens of a document, and which of them are supervised."""


def ranges(batch: Batch) -> list[list[tuple[int, int]]]:
    """Row by row, where its documents begin and end: at the positions' new starts; without positions a row is one document.

    Padding is left out, or, where positions alone say that something else begins, is a document without a supervised token.
    """
    rows, width = batch.input_ids.shape
    lengths = [width] * rows if batch.attention_mask is None else batch.attention_mask.sum(1).tolist()
    if batch.position_ids is None:
        return [[(0, length)] for length in lengths]
    starts = [one.nonzero().flatten().tolist() for one in _anew(batch.position_ids)]
    return [list(itertools.pairwise([*(at for at in some if at < end), end])) for some, end in zip(starts, lengths, strict=True)]


def segments(batch: Batch) -> torch.Tensor:
    """A number for each token's document, int64 [B, T]; padding has one of its own, so that it sees itself and nobody sees it."""
    real = torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
    return real if batch.position_ids is None else real * _anew(batch.position_ids).cumsum(1)


def _anew(positions: torch.Tensor) -> torch.Tensor:
    """Where positions do not go on from the place before, bool [B, T]."""
    return F.pad(positions.diff(dim=1) != 1, (1, 0), value=True)


def rebuild(batch: Batch, rows: Sequence[Sequence[Piece]]) -> Batch:
    """The batch with other documents in its rows, separate where they were separate. What nothing is seen before is no target."""
    separate = batch.position_ids is not None
    lengths = [sum(len(tokens) for tokens, _ in row) for row in rows]
    width = max(1, *lengths)
    tokens, supervised, real, positions = [], [], [], []
    for row, length in zip(rows, lengths, strict=True):
        rest = width - length
        tokens.append([*(token for some, _ in row for token in some), *[0] * rest])
        supervised.append([*(flag and place > 0 for _, some in row for place, flag in enumerate(some)), *[False] * rest])
        real.append([1] * length + [0] * rest)
        positions.append([*(place for some, _ in row for place in range(len(some))), *range(rest)])
    made = dataclasses.replace(
        batch,
        input_ids=torch.tensor(tokens),
        supervised=torch.tensor(supervised),
        attention_mask=None if separate else torch.tensor(real),
        position_ids=torch.tensor(positions) if separate else None,
        targets=sum(map(sum, supervised)),
        tokens=sum(map(sum, real)),
    )
    return made.to(batch.input_ids.device)
