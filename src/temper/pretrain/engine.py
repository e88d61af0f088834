"""pretrain: a corpus -> a language model, trained from nothing or further."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from temper.context import Context
from temper.models import io
from temper.models.deltas.base import AsLoaded
from temper.models.deltas.delta import Full
from temper.models.deltas.leave import leave
from temper.models.deltas.lineage import adapted
from temper.parts import Count, Slot, spec
from temper.passport import LANGUAGE, UNKNOWN, Input, Inputs, Output, Passport
from temper.pretrain.shape import Llama, Shape
from temper.pretrain.tokenizer import ByteBPE, Tokenizer
from temper.train.averages import Average
from temper.train.batching import Batching, Packed
from temper.train.feed import Feed, Shuffled
from temper.train.learning import TRAINING, Learning, check_readable, encoded, held_examples, home, learn
from temper.train.objectives import Causal, Objective, check
from temper.train.optimizers import AdamW, Optimizer
from temper.train.schedules import Cosine, Schedule

INPUTS = {
    "model": Input(("model",), optional=True, default="model", about="a model to train further; none: a new one", families=LANGUAGE),
    "data": Input(("text", "completion", "chat"), default="data", about="text; completions and chats are read as text"),
}
SHARED = True
PROVIDES = ("model", "tokenizer")


@spec
class Pretrain(Learning):
    """Trains a causal language model on text: a new one, or the given one further, with its own tokenizer and shape."""

    tokenizer: Slot[Tokenizer] = ByteBPE()
    shape: Slot[Shape] = Llama()
    objective: Slot[Objective] = Causal()
    batching: Slot[Batching] = Packed()
    feed: Slot[Feed] = Shuffled()
    optimizer: Slot[Optimizer] = AdamW(lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule: Slot[Schedule] = Cosine()
    average: Slot[Average] | None = None
    max_length: Count | None = None
    """Tokens of an example at most; longer text goes on in another example. none: as they are, which packing wants."""
    evaluate_rows: Count = 40
    """Held-out rows that the held-out loss is measured on, evenly spread over them."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format in which a new model is saved; a given model keeps its own."""


def passport(spec: Pretrain, parents: Mapping[str, Any]) -> Passport:
    """A new model by its shape; a given one with new weights, or a refusal."""
    given = parents.get("model")
    if given is None:
        shape: Any = spec.shape
        check(spec.objective, shape.architecture, "objective", spec.tokenizer)
        return Passport(
            "model",
            base=UNKNOWN,
            tokenizer=UNKNOWN,
            template=UNKNOWN,
            numbers=spec.dtype,
            architecture=shape.architecture,
            parameters=shape.count(spec.tokenizer.most()),  # type: ignore[union-attr]
        )
    check_readable(given, Passport("text"))
    check(spec.objective, given.architecture, "objective")
    return adapted(given, Full(), AsLoaded())


def run(spec: Pretrain, inputs: Inputs, context: Context) -> Output:
    """Trains and writes out/model (and out/checkpoints/<update>/model for `keep`): Hugging Face folders."""
    rows = inputs.data.load("train").as_text()
    if inputs.model is None:
        first = context.start(spec, only=("tokenizer", "shape"))
        tokenizer = first.tokenizer(row["text"] for row in rows.at_hand)
        model = first.shape(tokenizer, context.stream("shape").seed()).to(home(spec, passport(spec, {}), context))
        if len(tokenizer) < first.tokenizer.most():
            context.note(f"the text gave a vocabulary of {len(tokenizer)} tokens, fewer than the {first.tokenizer.most()} asked for")
    else:
        tokenizer = io.load_tokenizer(inputs.model)
        model = io.load_model(inputs.model, device=home(spec, inputs.model.passport, context)).requires_grad_(True)
        context.note(f"goes on from `{inputs.model.name}`, with its tokenizer and shape; the slots `tokenizer` and `shape` stand aside")

    examples = encoded(rows, tokenizer, context, max_length=spec.max_length)
    held = held_examples(lambda: inputs.data.load("test").as_text(), tokenizer, model, spec, context)
    context.give("tokenizer", tokenizer)
    context.give("model", model)
    live = context.start(spec, only=("objective", *TRAINING))

    def save(folder: Path, spare: bool = True) -> None:
        if inputs.model is None:
            io.save_model(model, tokenizer, folder, dtype=spec.dtype)
        else:
            leave(model, tokenizer, folder, given=inputs.model, under=None, spare=spare)

    figures = learn(model, examples, live.objective, spec=spec, live=live, context=context, held=held, save=save)
    if context.world.main:
        save(context.out / "model", spare=False)
    return Output(figures)
