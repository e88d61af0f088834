"""What every engine that trains has in common: the settings of a run, the run itself, and what it keeps on its way."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from temper.lazy import torch
from temper.models.sample import virtual_tokens
from temper.parts import Count, Problem, Rate, Spec, spec
from temper.passport import Figure, Passport
from temper.tasks.rows import StreamedRows
from temper.train import compiling, distribution
from temper.train import precision as formats
from temper.train.batching import can_separate, planned
from temper.train.compiling import compiled
from temper.train.examples import encode
from temper.train.faster import faster
from temper.train.heldout import heldout
from temper.train.loop import Closure, History, how_long, train, trainable
from temper.train.measuring import seconds
from temper.train.operations import operations
from temper.train.range_test import range_test, set_rate

if TYPE_CHECKING:
    from temper.context import Context
    from temper.parts import Live
    from temper.tasks.rows import Rows
    from temper.train.anchors import Anchoring
    from temper.train.batching import Batch, Plan
    from temper.train.examples import Encoded
    from temper.train.objectives import Sum


TRAINING = ("batching", "feed", "optimizer", "schedule", "average")
"""Slots that every engine has that trains, besides its own."""


@spec
class Learning(Spec):
    """The settings of every engine that trains; its slots are in `TRAINING`."""

    epochs: Rate | None = None
    """Times that the training data are gone through; 1 where no other length is given."""
    updates: Count | None = None
    """Updates, in place of epochs."""
    tokens: Count | None = None
    """Tokens to train on, in place of epochs; they count up to whole updates."""
    flops: Rate | None = None
    """Floating-point operations of the passes that train, in place of epochs; they count up to whole updates by an estimate (see
    `operations`), whatever kernels and number format compute them."""
    seconds: Rate | None = None
    """Wall time of training, in place of epochs: the run ends with the update in which it is over. What comes before the first update
    does not count, held-out losses and checkpoints on the way do, and so does the time before an interruption. The schedule follows
    the share of the time that is used. How many updates it makes depends on the machine: such a run does not give the same bits again."""
    max_length: Count | None = 1024
    """Tokens of an example at most, and never more than the model takes. Longer text goes on in another example, anything else
    loses its end."""
    range_test: Count | None = None
    """Updates of a probe before the run, in which the rate rises from 1e-6 to 1 (Smith 2017); a tenth of the rate that still lowers the
    loss replaces the optimizer's own. none: no probe."""
    clip: Rate | None = 1.0
    """Greatest norm of an update's gradient; none: any."""
    precision: Literal["auto", "float32", "bf16"] = "auto"
    """Number format of the computation; weights stay in float32. auto: bf16 where this machine measures a gain."""
    evaluate_every: Count | None = 100
    """Updates between two measurements of the held-out loss, which is also measured at the end; none: never measured."""
    evaluate_rows: Count = 200
    """Held-out rows that it is measured on, evenly spread over them."""
    checkpoint_every: Count | None = None
    """Updates between two checkpoints to go on from after a crash, besides the one a minute."""
    keep: tuple[Count, ...] = ()
    """Updates after which the model is kept, for later steps to name: `tune@500`."""
    keep_best: bool = False
    """Whether the model of the lowest held-out loss is kept, for later steps to name: `tune@best`."""
    distribute: Literal["auto", "replicate", "shard"] = "auto"
    """How several processes share the model: each has all of it, or its part of every block (FSDP2). auto: parts where the whole
    would fill over half of a GPU."""
    compile: Literal["auto", "always", "never"] = "auto"
    """Whether `torch.compile` takes the model's blocks. auto: where fused kernels do not, the run is long enough, and a try pays back."""
    recompute: bool = False
    """Whether activations inside blocks are computed again in the backward pass, not kept: less memory, about a third more time."""

    def __post_init__(self) -> None:
        lengths = {name: getattr(self, name) for name in ("updates", "epochs", "tokens", "flops", "seconds")}
        given = [f"{name} {value:g}" for name, value in lengths.items() if value is not None]
        if len(given) > 1:
            raise Problem(f"{' and '.join(given)}: a run's length is given once; leave one out")
        if self.seconds is not None and self.keep:
            raise Problem(
                f"keep {self.keep[0]}: a run of {self.seconds:g} s may end before; leave `keep` out, or give the length in updates"
            )
        if self.updates is not None and (late := [one for one in self.keep if one > self.updates]):
            raise Problem(f"keep {late[0]}: the run ends after update {self.updates}; keep an earlier one, or train longer")
        if self.keep_best and self.evaluate_every is None:
            raise Problem("keep_best: the held-out loss is never measured; give `evaluate_every`")


def check_readable(model: Passport, data: Passport) -> None:
    """Raises `Problem` where the model's tokenizer cannot read the data. An adapter's may be its base's, which is not known here."""
    if model.tokenizer is None and model.kind == "model":
        raise Problem("the model has no tokenizer, which training needs; put `tokenizer.json` into its folder", ("model",))
    if data.kind == "chat" and model.template is None and model.tokenizer is not None:
        raise Problem(
            "chats need a chat template and the model's tokenizer has none; put a chat_template.jinja into the model's folder, "
            "or give rows with `prompt` and `completion`",
            ("data",),
        )


def held_examples(load: Callable[[], Rows], tokenizer: Any, model: Any, spec: Learning, context: Context) -> Encoded | None:
    """The examples of the held-out loss; None where none is asked for, or (with a note) where the data hold none out."""
    if spec.evaluate_every is None:
        return None
    try:
        rows = load()
        step = max(1, len(rows) // spec.evaluate_rows)
        some = dataclasses.replace(rows, rows=rows.rows[::step][: spec.evaluate_rows])
        return encode(some, tokenizer, max_length=room(spec, model) or 1024)
    except Problem as problem:
        context.note(f"no held-out loss: {problem}")
        return None


def room(spec: Learning, model: Any) -> int | None:
    """Tokens of an example at most: as many as are asked for and the model takes; None where neither says."""
    return min((most for most in (spec.max_length, _positions(model)) if most), default=None)


def _positions(model: Any) -> int | None:
    """Tokens that the model is said to take, besides the virtual ones of its adapter."""
    most = getattr(model.config, "max_position_embeddings", None)
    return most and most - virtual_tokens(model)


def precision_of(spec: Learning, model: Any, context: Context) -> formats.Precision:
    """In which number format a run computes: as asked, or as measured when first called; the same whenever asked again."""
    if spec.precision != "auto":
        return spec.precision
    subject = f"{formats.typical(model)} on {context.device}, torch {torch.version.__version__}"
    return context.decide("precision", lambda: formats.choose(model, context.device), subject)


def encoded(rows: Rows, tokenizer: Any, context: Context, *, max_length: int | None) -> Encoded:
    """The data as examples, with progress on the way and a line for the report."""
    if isinstance(rows.rows, StreamedRows):
        made = encode(rows, tokenizer, max_length=max_length)
    else:
        with context.track(len(rows), "tokenise", "row") as bar:
            made = encode(rows, tokenizer, max_length=max_length, track=bar)
    context.note(made.report)
    return made


def home(spec: Learning, model: Passport, context: Context) -> str:
    """The device that a model is loaded to: this process's, or the processor where it is to be sharded."""
    return "cpu" if _spreading(spec, model.parameters or 0, context) == "shard" else context.device


def _spreading(spec: Learning, parameters: int, context: Context) -> distribution.Kind:
    """How the run's processes share a model, as asked or chosen."""
    if spec.distribute != "auto":
        return spec.distribute
    return context.decide("distribute", lambda: distribution.choose(parameters, context.world, context.device))


def learn(
    model: Any,
    examples: Encoded,
    loss: Callable[[Any, Batch], Sum],
    *,
    spec: Learning,
    live: Live,
    context: Context,
    held: Sequence[Any] | None = None,
    anchor: Anchoring | None = None,
    save: Callable[[Path], None],
) -> dict[str, Figure]:
    """Trains `model` in place as `spec` says; see `loop.train`. Returns the figures of a training step.

    live: the started slots; those of training are `batching`, `feed`, `optimizer`, `schedule` and `average`, and a `budget` is told of
    every update. held: examples of the held-out loss. anchor: a term on the parameters beside the loss. save: writes the model as it
    is into a folder, for `spec.keep`.
    """
    plan = planned(live.batching, examples, context.stream("batching"), live.feed)
    if report := getattr(plan, "report", ""):
        context.note(report)
    _fits(model, plan.update(0))
    precision = precision_of(spec, model, context)
    kind = _spreading(spec, sum(one.numel() for one in model.parameters()), context)
    with contextlib.ExitStack() as ways:
        ways.enter_context(_advising(spec))
        spread = distribution.spread(model, context.world, kind, context.device)
        optimizer = live.optimizer.build(trainable(spread.model, live))
        flops, kept = _per_token(model, plan, loss, optimizer, spec, live, precision, bool(examples[0].side), context)
        trained = sum(one.numel() for group in optimizer.param_groups for one in group["params"])
        updates = _updates(spec, plan, flops, context)
        if spec.recompute:
            ways.enter_context(recomputing(spread.model))
        fused = ways.enter_context(faster(spread.model, device=context.device, note=context.note))
        about = updates or _expected(spec, plan, spread.model, loss, precision, fused, context)
        plan = _laid_out(plan, spread.model, loss, about, precision, fused, context)
        if _compiles(spec, plan, spread.model, loss, about, precision, fused, context):
            ways.enter_context(compiled(spread.model))
        if spec.range_test is not None:
            _find_rate(optimizer, plan, spread, loss, spec, live, precision, anchor, context)
        history = train(
            model,
            plan,
            loss,
            optimizer=optimizer,
            schedule=live.schedule,
            updates=updates,
            budget=spec.seconds,
            context=context,
            live=live,
            clip=spec.clip,
            precision=precision,
            evaluate=heldout(held, loss, device=context.device, precision=precision) if held else None,
            evaluate_every=spec.evaluate_every,
            checkpoint_every=spec.checkpoint_every,
            keep=spec.keep,
            keep_best=spec.keep_best,
            on_keep=lambda _, folder: save(folder / "model"),
            average=live.average,
            anchor=anchor,
            after=live.budget.after if "budget" in live else None,
            spread=spread,
        )
    live.close()
    if context.world.main:
        _bring_out(context)
    shared = live.budget.figures() if "budget" in live and hasattr(live.budget, "figures") else {}
    return _figures(history, len(held or ()), trained, flops, kept) | {name: Figure(value) for name, value in shared.items()}


def _per_token(
    model: Any, plan: Plan, loss: Any, optimizer: Any, spec: Learning, live: Live, precision: Any, paired: bool, context: Context
) -> tuple[float | None, float | None]:
    """Floating-point operations that a token takes in all passes of an update, and bytes that a pass keeps of it for the way back; None,
    with a note, where they are not counted.

    model: the caller's, whole and on one device.
    """
    asked, many = spec.flops is not None, getattr(optimizer, "passes", 1)
    sharded = any(distribution.is_sharded(one) for group in optimizer.param_groups for one in group["params"])

    def count() -> tuple[list[float] | None, str]:
        if sharded and not asked:
            return None, "a sharded model would have to be computed whole"
        before, device = copy.deepcopy(live.state_dict()), next(model.parameters()).device
        try:
            batches = [one.to(device) for one in plan.update(0)]
            found = operations(model, loss, batches, precision, paired=paired, forward_only=getattr(optimizer, "forward_only", False))
        except Exception as error:  # whatever a model that is not known here raises when it is looked at
            return None, f"{type(error).__name__}: {str(error)[:200]}"
        finally:
            live.load_state_dict(before)
        told = f"counted on {found.tokens} tokens, each document alone, {many} pass{'' if many == 1 else 'es'} an update"
        return [many * found.per_token, found.kept] if found.per_token else None, told

    found = context.decide("per_token", count)
    if found is None:
        why = context.decisions()["per_token"]["reason"]
        if asked:
            raise Problem(f"the operations of an update cannot be counted ({why}); give the length in updates or tokens", ("flops",))
        context.note(f"floating-point operations are not counted: {why}")
    return tuple(found) if found else (None, None)


def _updates(spec: Learning, plan: Plan, per_token: float | None, context: Context) -> int | None:
    """How many updates the run has; None where its time is given."""
    if spec.seconds is not None:
        return None
    count = spec.updates if spec.tokens is None else math.ceil(spec.tokens / plan.tokens_per_update - 1e-9)
    if spec.flops is not None:
        assert per_token is not None
        asked, each = spec.flops, per_token * plan.tokens_per_update
        told = f"{asked:.3g} operations at {each:.3g} an update of {plan.tokens_per_update:.0f} tokens"
        count = context.decide("updates", lambda: (math.ceil(asked / each - 1e-9), told))
    return how_long(plan, updates=count, epochs=spec.epochs or (None if count else 1.0))


def _expected(spec: Learning, plan: Plan, model: Any, loss: Any, precision: Any, fused: bool, context: Context) -> int:
    """About how many updates a run of given time has, for choices that pay back in a long run; 0 where none is to be made."""
    if fused or any(map(distribution.is_sharded, model.parameters())):
        return 0

    def measure() -> tuple[int, str]:
        assert spec.seconds is not None
        once = seconds(model, loss, _there(plan.update(0), context), precision, tries=1)
        return max(1, round(spec.seconds / once)), f"about: an update's passes take {1000 * once:.0f} ms and the run {spec.seconds:g} s"

    return context.decide("updates", measure)


_RATES = 1e-6, 1.0
"""Lowest and highest rate that a range test tries."""


def _find_rate(
    optimizer: Any,
    plan: Plan,
    spread: distribution.Spread,
    loss: Any,
    spec: Learning,
    live: Live,
    precision: Any,
    anchor: Any,
    context: Context,
) -> None:
    """Gives the optimizer the rate that a range test suggests: a probe before the run, of which nothing stays but the rate."""

    def build() -> Any:
        return live.optimizer.build(trainable(spread.model, live))

    def closure(optimizer: Any, update: int) -> Closure:
        pieces = distribution.deal(_there(plan.update(update), context), context.world.rank, context.world.size)
        stream, failed = context.stream("range test"), context.work / "failed"
        return Closure(spread, loss, optimizer, update, pieces, stream, spec.clip, precision, anchor, failed)

    found = None
    if context.world.tell("rate" not in context.decisions()):
        assert spec.range_test is not None
        low, high = _RATES
        found = range_test(spread.model, build, closure, low=low, high=high, updates=spec.range_test, live=live)
    set_rate(optimizer, context.decide("rate", lambda: (found.suggested, found.reason) if found else (0.0, "")))


_WORTH_MEASURING = 100  # updates of a run in which measuring a few more costs little


def _laid_out(plan: Plan, model: Any, loss: Any, updates: int, precision: formats.Precision, fused: bool, context: Context) -> Plan:
    """The plan with one layout: of several the one that this machine computes fastest."""
    layouts: dict[str, Plan] = getattr(plan, "layouts", {})
    if len(layouts) < 2:
        return plan

    def choose() -> tuple[str, str]:
        if fused:
            return "rows", "padding is left out of what is computed"
        if any(map(distribution.is_sharded, model.parameters())):
            return "rows", "a sharded model is not measured by one process alone"
        if updates < _WORTH_MEASURING:
            return "rows", f"{updates} updates are too few to pay for measuring"
        able = [name for name in layouts if name == "rows" or can_separate(model, 1 if name == "flat" else 2)]
        taken = {name: seconds(model, loss, _there(layouts[name].update(0), context), precision) for name in able}
        told = ", ".join(f"{name} {1000 * one:.0f} ms" for name, one in taken.items())
        return min(taken, key=taken.__getitem__), f"an update's passes take: {told}"

    subject = f"{formats.typical(model)}, {plan.tokens_per_update:.0f} tokens an update, {precision}, {context.device}"
    return plan.chosen(context.decide("layout", choose, f"{subject}, torch {torch.version.__version__}"))  # type: ignore[attr-defined]


def _compiles(
    spec: Learning, plan: Plan, model: Any, loss: Any, updates: int, precision: formats.Precision, fused: bool, context: Context
) -> bool:
    """Whether the model's blocks run compiled, as asked or chosen."""
    if spec.compile != "auto":
        return spec.compile == "always"

    def choose() -> tuple[bool, str]:
        if fused:
            return False, "layers are computed by fused nodes already"
        if context.world.size > 1:
            return False, "not tried on several processes; `compile: always` asks for it"
        return compiling.choose(model, loss, _there(plan.update(0), context), updates, precision)

    subject = f"{formats.typical(model)}, {updates} updates of {plan.tokens_per_update:.0f} tokens, {precision}, {context.device}"
    return context.decide("compile", choose, f"{subject}, torch {torch.version.__version__}")


def _there(batches: Sequence[Batch], context: Context) -> list[Batch]:
    return [one.to(context.device) for one in batches]


@contextlib.contextmanager
def recomputing(model: Any) -> Iterator[None]:
    """Within, the model's blocks compute their activations again in the backward pass."""
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise Problem(f"{type(model).__name__} cannot compute its activations again; use `recompute: false`", ("recompute",))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()


@contextlib.contextmanager
def _advising(spec: Learning) -> Iterator[None]:
    """Says which settings to change where memory runs out."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not (isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)):
            raise
        batching: Any = spec.batching  # type: ignore[attr-defined]
        sizes = [f"{name} {value}" for name in ("tokens", "size", "length") if (value := getattr(batching, name, None)) is not None]
        advice = [f"a smaller micro-batch (`batching` has {' and '.join(sizes)})"] if sizes else ["a smaller micro-batch"]
        advice += [f"a smaller max_length (now {spec.max_length})"] if spec.max_length else []
        advice += ["`recompute: true`"] if not spec.recompute else []
        advice += ["`precision: bf16`"] if spec.precision == "float32" else []
        raise MemoryError(f"out of memory; give {', or '.join(advice)}. The run goes on from its last checkpoint ({error})") from error


def _fits(model: Any, batches: Sequence[Batch]) -> None:
    most = _positions(model)
    longest = max(batch.positions for batch in batches)
    if most and longest > most:
        raise Problem(f"the model takes {most} tokens and a batch is {longest} long; give a smaller max_length, or shorter packed rows")
    if virtual_tokens(model) and any(one.position_ids is not None or len(one.rows) > len(one.input_ids) for one in batches):
        raise Problem(
            "virtual tokens stand before a row, and these rows hold several examples each; use `padded`, or `bucketed` with layout `rows`",
            ("batching",),
        )


def _bring_out(context: Context) -> None:
    """The models kept on the way: work/kept/500 -> out/checkpoints/500. Linked, not moved: a crash before the end loses none."""
    kept = context.work / "kept"
    if kept.is_dir():
        unfinished = shutil.ignore_patterns(".*")
        shutil.copytree(kept, context.out / "checkpoints", copy_function=_link, ignore=unfinished)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


def _figures(history: History, held: int, trained: int, per_token: float | None, kept: float | None) -> dict[str, Figure]:
    """Figures of a run: its last losses, how much it saw, how much it trained, and what that took. per_token: operations. kept: bytes."""
    losses = [row["loss"] for row in history.rows if "loss" in row]
    last = losses[-max(1, len(losses) // 20) :]
    found = {"train_loss": Figure(sum(last) / len(last), n=len(last), unit="nats", better="lower")}
    measured = [row["heldout_loss"] for row in history.rows if "heldout_loss" in row]
    if measured:
        found["heldout_loss"] = Figure(measured[-1], n=held, unit="nats", better="lower")
    found |= {"updates": Figure(history.updates, unit="updates"), "tokens": Figure(history.tokens, unit="tokens")}
    if per_token is not None:
        found["flops"] = Figure(per_token * history.tokens, unit="FLOP")
    found["trained_parameters"] = Figure(trained, unit="parameters")
    if kept is not None:
        found["kept_per_token"] = Figure(kept, unit="bytes", better="lower")
    return {**found, "training_seconds": Figure(history.seconds, unit="s")}
