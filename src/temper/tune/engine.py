"""tune: a model and examples -> the model tuned, or an adapter for it.

Of the questions that tuning asks, these slots are answered: `where`, `delta`, `init`, `base` (what is trained, and on what),
`loss`. Asked by later methods and not yet slots: `budget` (ranks or layers that change during the run), `weight` (a factor for
each target, which the batch would carry to the loss), `penalty` (a term on the parameters beside the loss), `head`,
`route` and `surgery` (before the delta goes on), `aggregate` (several runs as one). An init that looks at data takes the
`examples` that the skeleton gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from temper.context import Context
from temper.models import io
from temper.models.deltas.agree import put_on
from temper.models.deltas.base import AsLoaded, Base
from temper.models.deltas.delta import Delta, Lora
from temper.models.deltas.init import Default, Init
from temper.models.deltas.leave import leave
from temper.models.deltas.lineage import adapted
from temper.models.deltas.where import Where
from temper.parts import Slot, spec
from temper.passport import FAMILIES, Input, Inputs, Output, Passport
from temper.train.anchors import Anchor
from temper.train.averages import Average
from temper.train.batching import Batching, Bucketed
from temper.train.feed import Feed, Shuffled
from temper.train.learning import TRAINING, Learning, check_readable, encoded, held_examples, home, learn, room
from temper.train.optimizers import AdamW, Optimizer
from temper.train.schedules import Cosine, Schedule
from temper.tune.loss import Causal, Loss, check

INPUTS = {
    "model": Input(
        ("model", "adapter"), default="last", about="the model to tune; an adapter goes on, or is merged first (`base`)", families=FAMILIES
    ),
    "data": Input(("text", "completion", "chat"), default="data", about="text, prompts with completions, or chats"),
}
SHARED = True
PROVIDES = ("model", "tokenizer", "examples")


@spec
class Tune(Learning):
    """Trains a small change of a model, or all of it, on examples: of text every token, else the answers."""

    where: Slot[Where] | None = None
    delta: Slot[Delta] = Lora()
    init: Slot[Init] = Default()
    base: Slot[Base] = AsLoaded()
    loss: Slot[Loss] = Causal()
    penalty: Slot[Anchor] | None = None
    batching: Slot[Batching] = Bucketed()
    feed: Slot[Feed] = Shuffled()
    optimizer: Slot[Optimizer] = AdamW(lr=1e-3, weight_decay=0.0)
    schedule: Slot[Schedule] = Cosine()
    average: Slot[Average] | None = None


def passport(spec: Tune, parents: Mapping[str, Any]) -> Passport:
    """What tuning leaves: the model, or an adapter on it (`deltas.lineage`); or a refusal."""
    model, data = parents["model"], parents["data"]
    check_readable(model, data)
    check(spec.loss, model.architecture, "loss")
    return adapted(model, spec.delta, spec.base)  # type: ignore[arg-type]


def run(spec: Tune, inputs: Inputs, context: Context) -> Output:
    """Tunes and writes out/model (and out/checkpoints/<update>/model for `keep`): Hugging Face or PEFT folders."""
    given, rows = inputs.model, inputs.data.load("train")
    kind = passport(spec, {"model": given.passport, "data": Passport(rows.shape)}).kind
    tokenizer = io.load_tokenizer(given)
    # An adapter on a grid stays beside it, on weights that stand still; all else trains under the model's constraints.
    model = io.load_model(given, device=home(spec, given.passport, context), constraints=kind == "model")
    examples = encoded(rows, tokenizer, context, max_length=room(spec, model))

    context.give("tokenizer", tokenizer)
    context.give("examples", examples)
    context.give("model", model)
    first = context.start(spec, only=("where", "delta", "init", "base"))
    model, under = put_on(model, given, kind, spec, first, context)

    held = held_examples(lambda: inputs.data.load("test"), tokenizer, model, spec, context)
    context.give("model", model)
    live = context.start(spec, only=("loss", "penalty", *TRAINING))

    def save(folder: Path, spare: bool = True) -> None:
        leave(model, tokenizer, folder, given=given, under=under, spare=spare)

    figures = learn(model, examples, live.loss, spec=spec, live=live, context=context, held=held, anchor=live.penalty, save=save)
    if context.world.main:
        save(context.out / "model", spare=False)
    return Output(figures, base=under)
