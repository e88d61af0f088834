"""Span corruption in several strengths: spans are lifted out of a text and told one after the other."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from temper.lazy import torch
from temper.parts import Problem, Rate, part
from temper.train import corrupt
from temper.train.objectives.base import Corrupting, Sum, next_token, rebuild, translate

if TYPE_CHECKING:
    from temper.context import Context
    from temper.train.batching import Batch
    from temper.train.objectives.base import Piece

Strength = tuple[Annotated[float, Field(ge=1)], Annotated[float, Field(gt=0, lt=1)]]
"""Mean length of a span in tokens, and the share of tokens that is lifted out."""
_SEQUENTIAL = 1  # the place of S among the modes


@part
class SpanMixture:
    """Cross-entropy of spans that are lifted out of a text, in one of several strengths drawn for each document (UL2).

    Tay et al. 2023, "UL2: Unifying Language Learning Paradigms", section 3.1 and table 1. R: short spans and few, as T5; X: long spans
    or many; S: the end of the text, after all before it. A mode token opens the input and says which it is. In the input a sentinel
    stands for each span, and the targets are the sentinels, each with its span. Spans are lifted out of the supervised tokens alone. An
    encoder-decoder reads the input and writes the targets; a causal decoder reads both in one sequence and is taught the targets. What
    would not fit into the model with its targets is cut off the document first. Formula: - sum_t log p(target_t | input, target_<t).
    """

    r: tuple[Strength, ...] = ((3.0, 0.15), (8.0, 0.15))
    """Regular denoisers, each [mean span in tokens, share lifted out]."""
    s: Annotated[float, Field(gt=0, lt=1)] | None = 0.25
    """Share of a text that is its end, on average; 0.5 cuts anywhere, as T5's prefix language modelling. none: no such denoiser."""
    x: tuple[Strength, ...] = ((3.0, 0.5), (8.0, 0.5), (64.0, 0.15), (64.0, 0.5))
    """Extreme denoisers, each [mean span in tokens, share lifted out]."""
    weights: tuple[Rate, Rate, Rate] | None = None
    """How often R, S and X are drawn, relative to one another; none: every denoiser as often, 2 : 1 : 4 as it stands."""
    modes: tuple[str, str, str] | None = ("[R]", "[S]", "[X]")
    """What opens the input under R, S and X; none: nothing."""
    sentinel: str = "<extra_id_{}>"
    """The sentinels' name, {} for a number from 0 on. A document with more spans than there are sentinels gets fewer and longer ones."""

    families: ClassVar = ("encoder-decoder", "causal")
    reserves: ClassVar = ("spans",)

    def __post_init__(self) -> None:
        if not (self.r or self.s or self.x):
            raise Problem("no denoiser is left; give one in `r`, `s` or `x`")
        if "{}" not in self.sentinel:
            raise Problem(f"sentinel {self.sentinel}: has no place for its number; write {{}} there, such as <extra_id_{{}}>")

    def start(self, context: Context) -> Lifting:
        return Lifting(self, context)


class Lifting(Corrupting):
    """`span-mixture` at work."""

    def __init__(self, part: SpanMixture, context: Context):
        super().__init__(part, context)
        self.token(part.sentinel.format(0), "spans")
        names = itertools.takewhile(self.vocabulary.__contains__, map(part.sentinel.format, itertools.count()))
        self.sentinels = [self.token(name, "spans") for name in names]
        self.modes = [self.tokenizer(one, add_special_tokens=False)["input_ids"] for one in part.modes or ("", "", "")]
        self.begin, self.end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        denoisers: tuple[list[Any], ...] = (list(part.r), [part.s] if part.s else [], list(part.x))
        weights = part.weights or tuple(map(len, denoisers))
        self.denoisers = [(mode, one) for mode, some in enumerate(denoisers) for one in some]
        self.chances = torch.tensor([weights[mode] / len(denoisers[mode]) for mode, _ in self.denoisers])

    def __call__(self, model: Any, batch: Batch) -> Sum:
        rows = self.corrupt(batch)
        if self.family == "encoder-decoder":
            return translate(model, [one for row in rows for one in row], batch.input_ids.device)
        joined = [[([*inputs, *tokens], [*[False] * len(inputs), *flags]) for inputs, (tokens, flags) in row] for row in rows]
        return next_token(model, rebuild(batch, joined))

    def corrupt(self, batch: Batch) -> list[list[tuple[list[int], Piece]]]:
        """Row by row, the documents from which something can be lifted out, each as input and targets."""
        tokens, supervised = batch.input_ids.tolist(), batch.supervised.tolist()
        found: list[list[tuple[list[int], Piece]]] = [[] for _ in tokens]
        for row, places, generator in self.documents(batch):
            if (pair := self._pair(tokens[row][places], supervised[row][places], generator)) is not None:
                found[row].append(pair)
        return found

    def _pair(self, tokens: list[int], supervised: list[bool], generator: torch.Generator) -> tuple[list[int], Piece] | None:
        """A document's input and targets; None where nothing can be lifted out of it."""
        ends = tokens[-1] == self.end
        body, flags = (tokens[:-1], supervised[:-1]) if ends else (tokens, supervised)
        if not any(flags):
            return None
        mode, strength = self.denoisers[int(torch.multinomial(self.chances, 1, generator=generator))]
        if self.longest is not None and (room := self.longest - self._added(mode, strength, len(body))) < len(body):
            self.note(f"`span-mixture` cuts off the end of documents that with their targets exceed the model's {self.longest} tokens")
            body, flags, ends = body[: max(0, room)], flags[: max(0, room)], False
            if not any(flags):
                return None
        able = [place for place, flag in enumerate(flags) if flag]
        close = [self.end] if self.end is not None else []
        if mode == _SEQUENTIAL:
            count = corrupt.tail(len(able), strength, generator) if len(able) > 1 else 1
            split = able[-count]
            inputs, targets = body[:split], (body[split:] + close * ends, flags[split:] + [True] * (len(close) * ends))
        else:
            span, rate = strength
            lost = dict(zip(able, corrupt.noise(len(able), rate, span, len(self.sentinels), generator), strict=True))
            inputs, lifted = corrupt.lift(body, [lost.get(place, False) for place in range(len(body))], self.sentinels)
            targets = lifted + close, [True] * len(lifted + close)
        first = 1 if inputs[:1] == [self.begin] else 0
        opened = [*inputs[:first], *self.modes[mode], *inputs[first:]]
        return (opened + close if self.family == "encoder-decoder" else opened), targets

    def _added(self, mode: int, strength: Any, length: int) -> int:
        """Tokens at most that a document of so many gains: its mode, two sentinels a span, two end tokens."""
        spans = 0 if mode == _SEQUENTIAL else min(len(self.sentinels), round(round(length * strength[1]) / strength[0]) + 1)
        return len(self.modes[mode]) + 2 * spans + 2
