"""tune: a model and examples -> the model tuned, or an adapter for it.

In order: the model as loaded becomes what slot `base` makes of it; `head` and `surgery` change what it answers and what it sees; `where`,
`delta`, `init` and `budget` put on what is trained; `loss` and `penalty` say what is minimised, while the budget is told of every update.
Parts that look at data (a sensitivity, a covariance, a first gradient) ask the statistics, which read the data once for all of them.
Asked by later methods and not yet slots: `weight` (a factor for each target, which the batch would carry to the loss), `aggregate` (several
runs as one). How tokens are routed is a question of deltas that have experts (`low-rank-experts: {route: ...}`), so aligning has it too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from temper.context import Context
from temper.models import io
from temper.models.deltas import is_adapted
from temper.models.deltas.agree import put_on, underlying
from temper.models.deltas.base import AsLoaded, Base
from temper.models.deltas.budget import Budget
from temper.models.deltas.delta import Delta, Lora
from temper.models.deltas.init import Default, Init
from temper.models.deltas.leave import leave, stored
from temper.models.deltas.lineage import adapted
from temper.models.deltas.where import Where
from temper.parts import Problem, Slot, held, mark_of, spec
from temper.passport import FAMILIES, Figure, Input, Inputs, Output, Passport
from temper.train.anchors import Anchor
from temper.train.averages import Average
from temper.train.batching import Batching, Bucketed
from temper.train.feed import Feed, Shuffled
from temper.train.learning import TRAINING, Learning, check_readable, encoded, held_examples, home, learn, room
from temper.train.merging import merge_costs
from temper.train.optimizers import AdamW, Optimizer
from temper.train.schedules import Cosine, Schedule
from temper.train.statistics import statistics
from temper.tune.head import Head, headed, let_head_learn
from temper.tune.loss import Causal, Loss, check
from temper.tune.surgery import Surgery

INPUTS = {
    "model": Input(
        ("model", "adapter"), default="last", about="the model to tune; an adapter goes on, or is merged first (`base`)", families=FAMILIES
    ),
    "data": Input(("text", "completion", "chat"), default="data", about="text, prompts with completions, or chats"),
    "general": Input(("text", "completion", "chat"), optional=True, about="what the model is not to forget, for penalties that ask for it"),
}
SHARED = True
PROVIDES = ("model", "tokenizer", "examples", "statistics", "general_statistics")


@spec
class Tune(Learning):
    """Trains a small change of a model, or all of it, on examples: of text every token, else the answers."""

    head: Slot[Head] | None = None
    surgery: Slot[Surgery] | None = None
    where: Slot[Where] | None = None
    delta: Slot[Delta] = Lora()
    init: Slot[Init] = Default()
    budget: Slot[Budget] | None = None
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
    made = headed(spec, adapted(model, spec.delta, spec.base), model, data)  # type: ignore[arg-type]
    check(spec.loss, made.architecture or model.architecture, "loss")
    asks = [mark_of(one).name for slot in (spec.init, spec.penalty) for one in held(slot) if getattr(one, "asks_general", False)]
    if asks and parents.get("general") is None:
        raise Problem(f"`{asks[0]}` asks what is not to be forgotten; name it, such as `general: house:library`", ("general",))
    if parents.get("general") is not None and not asks:
        raise Problem("nothing here asks for it; leave it out, or write `penalty: fisher`", ("general",))
    if spec.average is not None and (cuts := [mark_of(one).name for one in held(spec.budget) if getattr(one, "cuts", False)]):
        raise Problem(f"an average would bring back what `{cuts[0]}` cuts away during the run; leave one of the two out", ("average",))
    return made


def run(spec: Tune, inputs: Inputs, context: Context) -> Output:
    """Tunes and writes out/model (and out/checkpoints/<update>/model for `keep`): Hugging Face or PEFT folders."""
    given, rows = inputs.model, inputs.data.load("train")
    parents = {"model": given.passport, "data": Passport(rows.shape), "general": inputs.general and Passport("text")}
    kind = passport(spec, parents).kind
    tokenizer = io.load_tokenizer(given)
    # An adapter on a grid stays beside it, on weights that stand still; all else trains under the model's constraints.
    model = io.load_model(given, device=home(spec, given.passport, context), constraints=kind == "model")
    examples = encoded(rows, tokenizer, context, max_length=room(spec, model))

    context.give("tokenizer", tokenizer)
    context.give("examples", examples)
    model = underlying(model, spec, context.start(spec, only=("base",)).base, context)
    changes = context.start(spec, only=("head", "surgery"))
    model = changes.head(model, examples, tokenizer) if changes.head else model
    model = changes.surgery(model) if changes.surgery else model
    context.give("model", model)
    context.give("statistics", statistics(spec, model, examples, context, lambda: _first_loss(spec, context)))
    if inputs.general is not None:
        general = encoded(inputs.general.load("train"), tokenizer, context, max_length=room(spec, model))
        context.give("general_statistics", statistics(spec, model, general, context))
    first = context.start(spec, only=("where", "delta", "init", "budget"))
    model, under = put_on(model, given, kind, spec, first, context)
    if changes.head:
        let_head_learn(model)

    kept_out = held_examples(lambda: inputs.data.load("test"), tokenizer, model, spec, context)
    context.give("model", model)
    live = context.start(spec, only=("loss", "penalty", *TRAINING))
    live.adopt(first, "budget")

    def save(folder: Path, spare: bool = True) -> None:
        leave(model, tokenizer, folder, given=given, under=under, spare=spare)

    figures = learn(model, examples, live.loss, spec=spec, live=live, context=context, held=kept_out, anchor=live.penalty, save=save)
    if is_adapted(model):
        from temper.models.nf4 import frozen_bytes

        figures["frozen_bytes"] = Figure(frozen_bytes(model), unit="bytes", better="lower")
    if context.world.main:
        if spec.base.compared is not None:  # type: ignore[union-attr]
            figures |= merge_costs(model, given, kept_out or examples, spec.base.compared, stored(given), context)  # type: ignore[union-attr]
        save(context.out / "model", spare=False)
    return Output(figures, base=under)


def _first_loss(spec: Tune, context: Context) -> Any:
    """What gradients are of before a delta is on: of a list of losses the first, since others may be about the delta."""
    first = spec.loss[0] if isinstance(spec.loss, (tuple, list)) else spec.loss
    return context.start(dataclasses.replace(spec, loss=first), only=("loss",)).loss
