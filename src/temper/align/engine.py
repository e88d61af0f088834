"""align: a model and preferences, or rewards -> a model that prefers what it should.

Of the questions that alignment asks, these slots are answered: `source` (which responses), `reward` (how good), `loss` (what is
minimised of a pair), `likelihood` (how tokens become a response's number), `reference` (against which policy). Asked by
later methods and not yet slots: `advantage` (rewards against a baseline, before the loss), `pieces` (whole response, step or
segment: a finer mask for `likelihood`), `weight` (a factor for each of the [P] losses before they are summed), `anchor` (a term on
the parameters beside the loss), `curriculum` (the order of pairs, before `batching`). A source whose responses are drawn during
training would answer with a plan, whose `update(i)` samples, where it answers with examples now.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from temper.align.figures import mean, share
from temper.align.layout import layout_of, response_logprobs
from temper.align.likelihood import Likelihood, Whole
from temper.align.loss import DPO, Loss
from temper.align.reference import Reference, Start, passes
from temper.align.reward import Reward, Verifier
from temper.align.scores import Compared, compare
from temper.align.source import Given, Pairs, Source
from temper.lazy import torch
from temper.models import io
from temper.models.deltas.agree import put_on, underlying
from temper.models.deltas.base import AsLoaded, Base
from temper.models.deltas.budget import Budget
from temper.models.deltas.delta import Delta, Lora
from temper.models.deltas.init import Default, Init
from temper.models.deltas.leave import leave
from temper.models.deltas.lineage import adapted
from temper.models.deltas.where import Where
from temper.models.sample import evaluating, virtual_tokens
from temper.parts import Problem, Slot, spec
from temper.passport import DATA, UNKNOWN, Figure, Input, Inputs, Output, Passport
from temper.train.anchors import Anchor
from temper.train.averages import Average
from temper.train.batching import Batch, Batching, Bucketed, collate
from temper.train.examples import Encoded, Example
from temper.train.faster import faster
from temper.train.feed import Feed, Shuffled
from temper.train.learning import TRAINING, Learning, check_readable, home, learn, precision_of
from temper.train.objectives import Sum
from temper.train.optimizers import AdamW, Optimizer
from temper.train.precision import Precision, autocast
from temper.train.schedules import Linear, Schedule
from temper.train.statistics import statistics

if TYPE_CHECKING:
    from temper.context import Context

INPUTS = {
    "model": Input(("model", "adapter"), default="last", about="the policy to align; it is also the reference"),
    "data": Input(("preference", "completion", "chat"), default="data", about="pairs, or questions for source `attempts`"),
}
SHARED = True
PROVIDES = ("model", "tokenizer", "examples", "statistics")

_AT_START = {"float32": 1e-5, "bf16": 1e-2}
"""Greatest drift from the reference before the first update, nats per token. A batch of another shape rounds otherwise: in float32
by some 1e-7 of a logit, in bf16 by 2^-8 of it."""


@spec
class Align(Learning):
    """Trains a policy on pairs of responses, of which one is to become likelier than the other.

    An adapter that comes in goes on training, as it is, unless `base` says `merged`; a whole model gets a new adapter, or, under
    delta `full`, is trained itself.
    """

    source: Slot[Source] = Given()
    reward: Slot[Reward] = Verifier()
    loss: Slot[Loss] = DPO()
    likelihood: Slot[Likelihood] = Whole()
    anchor: Slot[Anchor] | None = None
    reference: Slot[Reference] = Start()
    where: Slot[Where] | None = None
    delta: Slot[Delta] = Lora()
    init: Slot[Init] = Default()
    budget: Slot[Budget] | None = None
    base: Slot[Base] = AsLoaded()
    batching: Slot[Batching] = Bucketed()
    feed: Slot[Feed] = Shuffled()
    optimizer: Slot[Optimizer] = AdamW(lr=1e-4, weight_decay=0.0)
    schedule: Slot[Schedule] = Linear(warmup=0.1)
    average: Slot[Average] | None = None


def passport(spec: Align, parents: Mapping[str, Any]) -> Passport:
    """What aligning leaves: the policy, or an adapter on it (`deltas.lineage`), with its reference; or a refusal."""
    model, data, source = parents["model"], parents["data"], spec.source
    shapes = getattr(source, "shapes", DATA)
    if data.kind not in shapes:
        able = [name for name, cls in Source.__slot__.parts().items() if data.kind in cls.shapes]  # type: ignore[attr-defined]
        remedy = f", or write `source: {able[0]}`" if able else ""
        raise Problem(
            f"takes {' or '.join(shapes)} rows; {data.origin or 'what is given'} holds {data.kind} rows: give such rows{remedy}",
            ("source",),
        )
    if spec.reward != Verifier() and not getattr(source, "asks_reward", True):
        raise Problem("the pairs that the data give are not rewarded; leave `reward` out, or write `source: attempts`", ("reward",))
    check_readable(model, data)
    return dataclasses.replace(adapted(model, spec.delta, spec.base), reference=UNKNOWN)  # type: ignore[arg-type]


def run(spec: Align, inputs: Inputs, context: Context) -> Output:
    """Aligns and writes out/model (and out/checkpoints/<update>/model for `keep`): a Hugging Face or PEFT folder."""
    given = inputs.model
    leaves = dataclasses.replace(adapted(given.passport, spec.delta, spec.base), reference=given.id)  # type: ignore[arg-type]
    tokenizer = io.load_tokenizer(given)
    # An adapter on a grid stays beside it, on weights that stand still; all else trains under the model's constraints.
    policy = io.load_model(given, device=home(spec, given.passport, context), constraints=leaves.kind == "model")
    policy = underlying(policy, spec, context.start(spec, only=("base",)).base, context)
    context.give("tokenizer", tokenizer)
    context.give("model", policy)
    first = context.start(spec, only=("source", "reward", "reference"))

    with context.world.main_first():  # what the source keeps on disk is made once
        pairs, held = _pairs(spec, inputs.data, first, policy, context)
    precision = precision_of(spec, policy, context)
    examples = [*pairs.examples, *held.examples]
    layout = layout_of(policy, examples, context)
    first.reference.prepare(policy, examples, precision, layout)

    context.give("examples", pairs.examples)
    context.give("statistics", statistics(spec, policy, pairs.examples, context))
    changed = context.start(spec, only=("where", "delta", "init", "budget"))
    model, under = put_on(policy, given, leaves.kind, spec, changed, context)
    if virtual_tokens(model):  # they stand before a row's first token, and of two responses in one row that is not where they begin
        layout = "two rows"
    context.give("model", model)
    live = context.start(spec, only=("loss", "likelihood", "anchor", *TRAINING))
    live.adopt(changed, "budget")

    def compared(model: Any, batch: Batch) -> Compared:
        """Both sides of every pair in one forward pass, beside the reference."""
        return compare(response_logprobs(model, batch, layout), first.reference(batch), batch.supervised, live.likelihood)

    def loss(model: Any, batch: Batch) -> Sum:
        one = compared(model, batch)
        losses = live.loss(one)
        return Sum(losses.sum(), len(losses), {"margin": one.margin.sum(), "rewarded": (one.margin > 0).sum(), "kl": one.drift.sum()})

    def save(folder: Path, spare: bool = True) -> None:
        leave(model, tokenizer, folder, given=given, under=under, spare=spare)

    _unmoved(model, pairs.examples, compared, precision)
    figures = learn(model, pairs.examples, loss, spec=spec, live=live, context=context, held=held.examples, anchor=live.anchor, save=save)
    figures |= {"pairs": Figure(len(pairs.examples) // 2, unit="pairs"), **pairs.figures}
    figures |= {f"heldout_{name}": one for name, one in held.figures.items()}
    if held.examples:
        figures |= _measure(model, held.examples, compared, precision, context)
    first.close()
    if context.world.main:
        save(context.out / "model", spare=False)
    return Output(figures, leaves, under)


def _pairs(spec: Align, data: Any, first: Any, policy: Any, context: Context) -> tuple[Pairs, Pairs]:
    """Pairs to train on and held-out ones, which are numbered on, so that the reference can tell all apart."""
    positions = getattr(policy.config.get_text_config(), "max_position_embeddings", None)
    length = min(one for one in (spec.max_length, positions, 2**31) if one is not None)
    pairs = first.source(data.load("train"), "train", first.reward, length)
    context.note(pairs.report)
    if not pairs.examples:
        raise Problem(f"no pair to learn from: {pairs.report}", ("source",))
    if spec.evaluate_every is None:
        return pairs, Pairs(Encoded(), "")
    try:
        rows = data.load("test")
        some = rows.rows[:: max(1, len(rows) // spec.evaluate_rows)][: spec.evaluate_rows]
        held = first.source(dataclasses.replace(rows, rows=some), "test", first.reward, length)
    except Problem as problem:
        context.note(f"no held-out pairs: {problem}")
        return pairs, Pairs(Encoded(), "")
    context.note(f"held out: {held.report}")
    begin = 1 + max(one.source for one in pairs.examples)
    numbered = Encoded(dataclasses.replace(one, source=begin + one.source) for one in held.examples)
    return pairs, dataclasses.replace(held, examples=numbered)


def _unmoved(model: Any, examples: Sequence[Example], compared: Callable[[Any, Batch], Compared], precision: Precision) -> None:
    """Refuses to train a policy that is not its own reference at step 0: what is learnt would be measured from elsewhere."""
    batch = collate(examples[:16]).to(next(model.parameters()).device)
    with torch.no_grad(), evaluating(model), autocast(batch.input_ids.device.type, precision):
        moved = compared(model, batch).drift.mean().item()
    if not moved <= _AT_START[precision]:
        raise Problem(
            f"before the first update the policy is {moved:.2g} nats per token from its reference, and at most {_AT_START[precision]:g} is "
            "rounding: `base`, `delta` or `init` changed what the model computes; use `init: default`, and a delta that starts as nothing, "
            "such as `lora`"
        )


def _measure(
    model: Any, examples: Sequence[Example], compared: Callable[[Any, Batch], Compared], precision: Precision, context: Context
) -> dict[str, Figure]:
    """What became of held-out pairs.

    preference_accuracy: share of pairs whose chosen response is the likelier one. reward_accuracy, margin: of the change since the
    reference (DPO's implicit reward without its beta). kl: `scores.drift`, an estimate.
    """
    before, after, margins, drifts = ([] for _ in range(4))
    with faster(model, device=next(model.parameters()).device.type), torch.no_grad(), evaluating(model):
        for batch in passes(model, examples, context):
            with autocast(batch.input_ids.device.type, precision):
                one = compared(model, batch)
            before += (one.reference_chosen > one.reference_rejected).tolist()
            after += (one.chosen > one.rejected).tolist()
            margins += one.margin.tolist()
            drifts += one.drift.tolist()
    return {
        "heldout_preference_accuracy_before": share(sum(before), len(before)),
        "heldout_preference_accuracy": share(sum(after), len(after)),
        "heldout_reward_accuracy": share(sum(value > 0 for value in margins), len(margins)),
        "heldout_margin": mean(margins, "nats", "higher"),
        "heldout_kl": mean(drifts, "nats/token", "lower"),
    }
