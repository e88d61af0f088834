"""The training loop: one function that every learning engine calls, read from top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from temper.lazy import torch
from temper.parts import Problem, Progress
from temper.train import checkpoints
from temper.train.precision import Precision, autocast

if TYPE_CHECKING:
    from temper.context import Context, Stream
    from temper.parts import Live
    from temper.train.batching import Batch, Plan
    from temper.train.objectives import Sum


@dataclasses.dataclass
class History:
    """What a run did. updates, tokens (padding not counted), seconds: of the whole run, earlier sessions included.

    resumed: the update after which this session went on; 0 for a fresh start. rows: the run's curve, a row an update (`step`
    counts from 1) and a row an evaluation.
    """

    updates: int = 0
    tokens: int = 0
    seconds: float = 0.0
    resumed: int = 0
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)


def train(
    model: Any,
    plan: Plan,
    loss: Callable[[Any, Batch], Sum],
    *,
    optimizer: torch.optim.Optimizer,
    schedule: Callable[[float], float],
    updates: int,
    context: Context,
    live: Live | None = None,
    clip: float | None = 1.0,
    precision: Precision = "float32",
    evaluate: Callable[[Any], Mapping[str, float]] | None = None,
    evaluate_every: int | None = None,
    checkpoint_every: int | None = None,
    checkpoint_seconds: float = 60.0,
    keep: Collection[int] = (),
    on_keep: Callable[[int, Path], None] | None = None,
) -> History:
    """Trains `model` in place for `updates` updates, going on from the newest whole checkpoint in `context.work`.

    plan: micro-batches by update. loss: `(model, batch) -> Sum`; an update descends the sum over its micro-batches divided by its
    count, so k micro-batches of b are one of kb. optimizer: over `trainable(model, live)`; called as `step(closure)`. schedule:
    progress 0..1 -> multiplier of the optimizer's rate. live: the started slots, told of the progress before each update and kept
    in checkpoints. clip: greatest global norm of the gradient of the mean loss, or None. evaluate: called every `evaluate_every`
    updates and after the last, in evaluation mode without gradients; its figures join the curve. A checkpoint is
    written every `checkpoint_every` updates, `checkpoint_seconds` after the last, and at the end; `keep` names updates whose state
    stays in `context.work/kept/<update>`, filled by `on_keep(update, folder)` where given, else with a checkpoint.

    The same seed gives the same weights, bit for bit on one machine, however often the run was interrupted: batches and dropout
    depend on the update alone. Raises FloatingPointError where a loss or gradient is not finite, before any weight changes.
    """
    if late := sorted(update for update in keep if not 0 < update <= updates):
        raise Problem(f"update {late[0]} cannot be kept; the run has updates 1 to {updates}")
    saved = checkpoints.Checkpoints(context.work / "checkpoints", context.note)
    history = History()
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    if found := saved.load():
        history = _restore(found, updates, model, optimizer, live)
    context.rewind(history.updates + 1)

    device, stream = optimizer.param_groups[0]["params"][0].device, context.stream("model")
    begun, checkpointed = time.monotonic() - history.seconds, time.monotonic()
    with _training(model, device), context.track(updates, unit="update") as bar:
        bar.resume(history.updates)
        for update in range(history.updates, updates):
            if live is not None:
                live.advance(Progress(update, updates, history.tokens))
            multiplier = schedule((update + 0.5) / updates)
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * multiplier

            batches = [batch.to(device) for batch in plan.update(update)]
            closure = Closure(model, loss, optimizer, update, batches, stream, clip, precision)
            optimizer.step(closure)

            done, tokens = update + 1, sum(batch.tokens for batch in batches)
            history.updates, history.tokens, history.seconds = done, history.tokens + tokens, time.monotonic() - begun
            lr, seconds = optimizer.param_groups[0]["lr"], round(history.seconds, 3)
            context.log(done, **closure.figures, lr=lr, tokens=history.tokens, seconds=seconds)
            bar.advance(1, tokens=tokens, loss=closure.figures["loss"])

            last = done == updates
            if evaluate is not None and (last or (evaluate_every and done % evaluate_every == 0)):
                model.eval()
                with torch.no_grad():
                    context.log(done, **evaluate(model))
                model.train()
            if done in keep and not (folder := context.work / "kept" / str(done)).exists():
                with checkpoints.whole(folder) as beside:
                    if on_keep is not None:
                        on_keep(done, beside)
                    else:
                        checkpoints.fill(beside, _state(history, updates, model, optimizer, live))
            due = checkpoint_every and done % checkpoint_every == 0
            if last or due or time.monotonic() - checkpointed >= checkpoint_seconds:
                saved.save(done, _state(history, updates, model, optimizer, live))
                checkpointed = time.monotonic()
    history.rows = context.curve()
    return history


@contextlib.contextmanager
def _training(model: Any, device: torch.device) -> Iterator[None]:
    """Training mode within; after it the model's mode and torch's random state are what they were."""
    before = model.training
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        model.train()
        try:
            yield
        finally:
            model.train(before)


# ----------------------------------------------------------------------------------------------------- one update


@dataclasses.dataclass
class Closure:
    """What an optimizer calls, once or more: a pass over an update's micro-batches that gives the mean loss.

    Where gradients are enabled it leaves the mean loss's gradient, clipped, in the parameters. Every pass of an update draws the same
    dropout masks, so an optimizer's passes see one function. figures: loss, extras and gradient norm of the first pass, for the curve.
    """

    model: Any
    loss: Callable[[Any, Batch], Sum]
    optimizer: torch.optim.Optimizer
    update: int
    batches: list[Batch]
    stream: Stream
    clip: float | None
    precision: Precision
    figures: dict[str, float] = dataclasses.field(default_factory=dict)

    def __call__(self) -> Any:
        learning = torch.is_grad_enabled()
        self.optimizer.zero_grad()
        totals, count, extras = [], 0, dict[str, Any]()
        for micro, batch in enumerate(self.batches):
            _seed(batch.input_ids.device, self.stream.seed(self.update, micro))
            with autocast(batch.input_ids.device.type, self.precision):
                result = self.loss(self.model, batch)
            if learning:
                result.total.backward()
            totals.append(result.total.detach())
            count += result.count
            for name, value in result.extras.items():
                extras[name] = extras.get(name, 0.0) + torch.as_tensor(value).detach()
        if count == 0:
            raise Problem(f"{self._where(self.batches)}: no supervised token; give larger updates, or leave out rows without any")
        figures = {name: value / count for name, value in extras.items()}
        if learning:
            figures["grad_norm"] = self._scale(count)
        # The update's one wait for the device.
        measured = torch.stack([one.to(totals[0].device, torch.float32) for one in (*totals, *figures.values())]).tolist()
        sums, rest = measured[: len(totals)], dict(zip(figures, measured[len(totals) :]))
        for batch, value in zip(self.batches, sums, strict=True):
            self._finite(value, "the loss", [batch])
        self._finite(rest.get("grad_norm", 0.0), "the gradient's norm", self.batches)
        self.figures = self.figures or {"loss": sum(sums) / count, **rest}
        return torch.stack(totals).sum() / count

    def _scale(self, count: int) -> torch.Tensor:
        """Turns the gradient of the sum into that of the mean and clips it, in one go; gives the mean's norm before clipping.

        So the count need not be known before the passes.
        """
        gradients = [one.grad for group in self.optimizer.param_groups for one in group["params"] if one.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients) / count
        factor = torch.ones_like(norm) if self.clip is None else (self.clip / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, factor / count)  # pyright: ignore[reportPrivateImportUsage]
        return norm

    def _finite(self, value: float, what: str, batches: Sequence[Batch]) -> None:
        if not math.isfinite(value):
            raise FloatingPointError(f"{self._where(batches)}: {what} is {value}; lower the rate, or look at these rows")

    def _where(self, batches: Sequence[Batch]) -> str:
        """The update and its rows of the data, both counted from 1; the first sixteen rows."""
        rows = list(dict.fromkeys(row + 1 for batch in batches for row in batch.rows))
        return f"update {self.update + 1}, rows {', '.join(map(str, rows[:16]))}{', ...' if len(rows) > 16 else ''}"


def _seed(device: torch.device, seed: int) -> None:
    """Seeds the generators that dropout on `device` draws from; `torch.manual_seed` would touch every device at a greater cost."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)


# ------------------------------------------------------------------------------------------------------ the state


def _tensors(model: Any) -> dict[str, torch.Tensor]:
    """What training may change in a model: its trainable parameters and the buffers that are saved with it."""
    saved = model.state_dict().keys()
    learnt = {name: one for name, one in model.named_parameters() if one.requires_grad}
    return {**learnt, **{name: one for name, one in model.named_buffers() if name in saved}}


def _state(history: History, updates: int, model: Any, optimizer: torch.optim.Optimizer, live: Live | None) -> dict[str, Any]:
    return {
        "run": {"of": updates, "tokens": history.tokens, "seconds": history.seconds},
        "model": _tensors(model),
        "optimizer": optimizer.state_dict(),
        "live": live.state_dict() if live is not None else {},
    }


def _restore(found: tuple[int, dict[str, Any]], updates: int, model: Any, optimizer: torch.optim.Optimizer, live: Live | None) -> History:
    """Puts a checkpoint's state back and gives the history up to it."""
    done, state = found
    own, run = _tensors(model), state["run"]
    shapes = [{name: tuple(one.shape) for name, one in tensors.items()} for tensors in (own, state["model"])]
    if shapes[0] != shapes[1] or run["of"] != updates:
        raise Problem(
            f"the checkpoint after update {done} is of another run ({run['of']} updates of {len(state['model'])} tensors; "
            f"here {updates} of {len(own)}, or of other shapes); give this run a work folder of its own"
        )
    with torch.no_grad():
        for name, one in own.items():
            one.copy_(state["model"][name])
    if live is not None:
        live.load_state_dict(state["live"])
    optimizer.load_state_dict(state["optimizer"])
    return History(done, run["tokens"], run["seconds"], resumed=done)


# -------------------------------------------------------------------------------------------------------- helpers


def trainable(model: Any, live: Live | None = None) -> list[torch.nn.Parameter]:
    """Every parameter that requires a gradient, of the model and of live parts, once each: what an optimizer is built over."""
    held = [*model.parameters(), *(live.parameters() if live is not None else ())]
    found = list({id(one): one for one in held if one.requires_grad}.values())
    if not found:
        raise Problem("no parameter requires a gradient, so there is nothing to train")
    return found


def how_long(plan: Plan, *, epochs: float | None = None, updates: int | None = None) -> int:
    """Updates of a run that is given in epochs (a part of one counts up to whole updates) or in updates."""
    if (epochs is None) == (updates is None):
        raise Problem("a run's length is given in epochs or in updates; give one of the two")
    if updates is None:
        assert epochs is not None
        updates = math.ceil(epochs * plan.updates_per_epoch - 1e-9)
    if updates < 1:
        raise Problem(f"a run of {updates} updates trains nothing; give more than 0 epochs or updates")
    return updates
