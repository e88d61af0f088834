"""What every engine that trains has in common: the settings of a run, the run itself, and what it keeps on its way."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from temper.lazy import torch
from temper.parts import Count, Problem, Rate, Spec, spec
from temper.passport import Figure, Passport
from temper.train import precision as formats
from temper.train.examples import encode
from temper.train.heldout import heldout
from temper.train.loop import History, how_long, train, trainable

if TYPE_CHECKING:
    from temper.context import Context
    from temper.parts import Live
    from temper.tasks.rows import Rows
    from temper.train.batching import Batch
    from temper.train.examples import Encoded
    from temper.train.objectives import Sum


@spec
class Learning(Spec):
    """The settings of every engine that trains. Each has the slots `batching`, `optimizer` and `schedule` besides its own."""

    epochs: Rate | None = None
    """Times that the training data are gone through; 1 where neither updates nor tokens are given."""
    updates: Count | None = None
    """Updates, in place of epochs."""
    tokens: Count | None = None
    """Tokens to train on, in place of epochs; they count up to whole updates."""
    max_length: Count | None = 1024
    """Tokens of an example at most, and never more than the model takes. Longer text goes on in another example, anything else
    loses its end."""
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

    def __post_init__(self) -> None:
        lengths = {"updates": self.updates, "epochs": self.epochs, "tokens": self.tokens}
        given = [f"{name} {value:g}" for name, value in lengths.items() if value is not None]
        if len(given) > 1:
            raise Problem(f"{' and '.join(given)}: a run's length is given once; leave one out")
        if self.updates is not None and (late := [one for one in self.keep if one > self.updates]):
            raise Problem(f"keep {late[0]}: the run ends after update {self.updates}; keep an earlier one, or train longer")


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
    """Tokens that the model is said to take."""
    return getattr(model.config, "max_position_embeddings", None)


def precision_of(spec: Learning, model: Any, context: Context) -> formats.Precision:
    """In which number format a run computes: as asked, or as measured when first called; the same whenever asked again."""
    if spec.precision != "auto":
        return spec.precision
    subject = f"{formats.typical(model)} on {context.device}, torch {torch.version.__version__}"
    return context.decide("precision", lambda: formats.choose(model, context.device), subject)


def learn(
    model: Any,
    examples: Encoded,
    loss: Callable[[Any, Batch], Sum],
    *,
    spec: Learning,
    live: Live,
    context: Context,
    held: Sequence[Any] | None = None,
    save: Callable[[Path], None],
) -> dict[str, Figure]:
    """Trains `model` in place as `spec` says; see `loop.train`. Returns the figures of a training step.

    live: the started slots, `optimizer`, `schedule` and `batching` among them. held: examples of the held-out loss.
    save: writes the model as it is into a folder, for `spec.keep`.
    """
    plan = live.batching(examples, context.stream("batching"))
    epochs = spec.tokens / examples.tokens if spec.tokens is not None else spec.epochs
    updates = how_long(plan, updates=spec.updates, epochs=epochs or (None if spec.updates else 1.0))
    _fits(model, plan.update(0))
    precision = precision_of(spec, model, context)
    history = train(
        model,
        plan,
        loss,
        optimizer=live.optimizer.build(trainable(model, live)),
        schedule=live.schedule,
        updates=updates,
        context=context,
        live=live,
        clip=spec.clip,
        precision=precision,
        evaluate=heldout(held, loss, device=context.device, precision=precision) if held else None,
        evaluate_every=spec.evaluate_every,
        checkpoint_every=spec.checkpoint_every,
        keep=spec.keep,
        on_keep=lambda _, folder: save(folder / "model"),
    )
    live.close()
    _bring_out(context)
    return _figures(history, len(held or ()))


def _fits(model: Any, batches: Sequence[Batch]) -> None:
    most = _positions(model)
    longest = max(batch.input_ids.shape[1] for batch in batches)
    if most and longest > most:
        raise Problem(f"the model takes {most} tokens and a batch is {longest} long; give a smaller max_length, or shorter packed rows")


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


def _figures(history: History, held: int) -> dict[str, Figure]:
    """Figures of a run: its last losses, and how much it saw."""
    losses = [row["loss"] for row in history.rows if "loss" in row]
    last = losses[-max(1, len(losses) // 20) :]
    found = {"train_loss": Figure(sum(last) / len(last), n=len(last), unit="nats", better="lower")}
    measured = [row["heldout_loss"] for row in history.rows if "heldout_loss" in row]
    if measured:
        found["heldout_loss"] = Figure(measured[-1], n=held, unit="nats", better="lower")
    return {**found, "updates": Figure(history.updates, unit="updates"), "tokens": Figure(history.tokens, unit="tokens")}
