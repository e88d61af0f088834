"""The training loop: one function that every learning engine calls, read from top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from temper.context import write
from temper.lazy import safetensors_torch, torch
from temper.parts import Problem, Progress
from temper.train import checkpoints
from temper.train.distribution import Piece, Spread, deal, is_sharded, local
from temper.train.precision import Precision, autocast
from temper.train.schedules import set_rates
from temper.train.threads import beside

if TYPE_CHECKING:
    from temper.context import Context, Stream
    from temper.parts import Live
    from temper.train.anchors import Anchoring
    from temper.train.averages import Averaging
    from temper.train.batching import Batch, Plan
    from temper.train.objectives import Sum


@dataclasses.dataclass
class History:
    """What a run did. updates, tokens (padding not counted), seconds: of the whole run, earlier sessions included.

    resumed: the update after which this session went on; 0 for a fresh start. best: the lowest held-out loss so far. rows: the run's
    curve, a row an update (`step` counts from 1) and a row an evaluation.
    """

    updates: int = 0
    tokens: int = 0
    seconds: float = 0.0
    resumed: int = 0
    best: float = math.inf
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)


def train(
    model: Any,
    plan: Plan,
    loss: Callable[[Any, Batch], Sum],
    *,
    optimizer: torch.optim.Optimizer,
    schedule: Callable[[float], float],
    updates: int | None = None,
    budget: float | None = None,
    context: Context,
    live: Live | None = None,
    clip: float | None = 1.0,
    precision: Precision = "float32",
    evaluate: Callable[[Any], Mapping[str, float]] | None = None,
    evaluate_every: int | None = None,
    checkpoint_every: int | None = None,
    checkpoint_seconds: float = 60.0,
    keep: Collection[int] = (),
    keep_best: bool = False,
    on_keep: Callable[[str, Path], None] | None = None,
    average: Averaging | None = None,
    anchor: Anchoring | None = None,
    after: Callable[[Progress], None] | None = None,
    spread: Spread | None = None,
) -> History:
    """Trains `model` in place for `updates` updates, or for `budget` seconds, going on from the newest whole checkpoint in `context.work`.

    plan: micro-batches by update. loss: `(model, batch) -> Sum`; an update descends the sum over its micro-batches divided by its
    count, so k micro-batches of b are one of kb, on one process or on several. optimizer: over `trainable(spread.model, live)`;
    called as `step(closure)`. schedule: progress 0..1 -> multiplier of the optimizer's rate. live: the started slots, told of the
    progress before each update and kept in checkpoints. clip: greatest global norm of the gradient of the mean loss, or None.
    evaluate: called every `evaluate_every` updates and after the last, in evaluation mode without gradients; its figures join the
    curve. average: of the weights after every update; evaluated, kept, and left in the model at the end. anchor: a term on the
    parameters beside the loss. after: called after every update with the progress so far, while the parameters hold the gradients of the
    update's last pass. spread: the model over the processes of `context.world`; None: this process alone.

    A checkpoint is written every `checkpoint_every` updates, `checkpoint_seconds` after the last, and at the end. `keep` names
    updates whose model stays in `context.work/kept/<name>`, filled by `on_keep(name, folder)` where given, else with what was
    learnt; under `keep_best` that of the lowest `heldout_loss` stays as `best`.

    Under a budget the run ends with the update in which the time is over, that of earlier sessions counted; the main process's clock
    counts, and progress is the share of the time that is used.

    The same seed gives the same weights, bit for bit on one machine, however often the run of so many updates was interrupted: batches
    and dropout depend on the update alone. Raises FloatingPointError where a loss or gradient is not finite, before any weight changes; the
    batch is in `context.work/failed`. On SIGINT or SIGTERM the update is finished, a checkpoint written, and KeyboardInterrupt raised.
    """
    if (updates is None) == (budget is None):
        raise Problem("a run's length is given in updates or in seconds; give one of the two")
    if beyond := sorted(update for update in keep if not 0 < update <= (updates or math.inf)):
        raise Problem(f"update {beyond[0]} cannot be kept; the run has updates 1 to {updates}")
    spread, world = spread or Spread(model), context.world
    run = Run(spread.model, optimizer, live, plan, f"{updates} updates" if budget is None else f"{budget:g} s")
    saved = checkpoints.Checkpoints(context.work / "checkpoints", context.note, group=world.group)
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    history = run.restore(found) if (found := saved.load(run.place)) else History()
    context.rewind(history.updates + 1)
    if world.main:
        checkpoints.mend(context.work / "kept")

    parameters = [one for group in optimizer.param_groups for one in group["params"]]

    def averaged() -> contextlib.AbstractContextManager[None]:
        return average.swap(parameters) if average is not None else contextlib.nullcontext()

    def kept(name: str) -> None:
        with averaged():
            spread.collect(model)
            if world.main:
                with checkpoints.whole(context.work / "kept" / name) as beside:
                    on_keep(name, beside) if on_keep else checkpoints.fill(beside, {"model": learnt(model)})
            world.wait()

    def over() -> bool:
        return history.updates == updates if budget is None else history.seconds >= budget

    def expected() -> float:
        """Updates that the run will have: under a budget by the time that they took so far, at first any number."""
        if budget is None:
            return updates or 0
        return budget * history.updates / history.seconds if history.updates else math.inf

    device, stream = parameters[0].device, context.stream("model")
    begun, checkpointed = time.monotonic() - history.seconds, time.monotonic()
    with (
        _training(spread.model, device),
        _Interrupts() as interrupts,
        contextlib.closing(saved),
        contextlib.closing(_Ahead(plan, world, device, history.updates, updates or math.inf)) as ahead,
        context.track(updates, unit="update") as bar,
    ):
        bar.resume(history.updates)
        while not over():
            update, whole = history.updates, expected()
            bar.total = math.ceil(whole) if whole < math.inf else None
            if live is not None:
                live.advance(Progress(update, whole, history.tokens))
            set_rates(optimizer, schedule, min(1.0, (update + 0.5) / whole))

            pieces, tokens = ahead.take(update)
            closure = Closure(spread, loss, optimizer, update, pieces, stream, clip, precision, anchor, context.work / "failed")
            saved.staged()  # the last checkpoint's copy is whole before a weight changes
            optimizer.step(closure)
            if after is not None:
                after(Progress(update + 1, whole, history.tokens + tokens))
            if average is not None:
                average.update(parameters, min(1.0, (update + 1) / whole))
            if update == history.resumed:
                saved.prepare(run.state(history))  # now that the optimizer has its state

            done = update + 1
            taken = time.monotonic() - begun
            history.updates, history.tokens = done, history.tokens + tokens
            history.seconds = taken if budget is None else world.tell(taken)
            lr, seconds = optimizer.param_groups[0]["lr"], round(history.seconds, 3)
            context.log(done, **closure.figures, lr=lr, tokens=history.tokens, seconds=seconds)
            bar.advance(1, tokens=tokens, loss=closure.figures["loss"])

            last = over()
            if evaluate is not None and (last or (evaluate_every and done % evaluate_every == 0)):
                spread.model.eval()
                with torch.no_grad(), averaged():
                    measured = world.tell(dict(evaluate(spread.model)))
                spread.model.train()
                context.log(done, **measured)
                if keep_best and measured["heldout_loss"] < history.best:
                    history.best = measured["heldout_loss"]
                    kept("best")
            if done in keep and world.tell(not (context.work / "kept" / str(done)).exists()):
                kept(str(done))
            stop, late = world.agree(interrupts.asked, time.monotonic() - checkpointed >= checkpoint_seconds)
            if last or stop or late or (checkpoint_every and done % checkpoint_every == 0):
                saved.save(done, run.state(history), lazy=("model", "optimizer"))
                checkpointed = time.monotonic()
            if stop and not last:
                saved.wait()
                of = f" of {updates}" if updates else f", {history.seconds:.0f} of {budget:g} s"
                raise KeyboardInterrupt(f"stopped after update {done}{of}, which is checkpointed")
        saved.wait()
    if average is not None:
        average.put(parameters)
    spread.collect(model)
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


class _Interrupts:
    """Within, the first SIGINT or SIGTERM is only noted, so that an update is never half done; the second one interrupts."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


class _Ahead:
    """An update's pieces on the device, made by a thread while the update before is computed."""

    def __init__(self, plan: Plan, world: Any, device: torch.device, first: int, last: float):
        self._plan, self._world, self._device, self._last = plan, world, device, last
        self._pool = beside("batches")
        self._next = self._pool.submit(self._make, first)

    def take(self, update: int) -> tuple[list[Piece], int]:
        """The pieces of an update and how many tokens it has on all processes; updates are taken in turn."""
        made = self._next.result()
        if update + 1 < self._last:
            self._next = self._pool.submit(self._make, update + 1)
        return made

    def _make(self, update: int) -> tuple[list[Piece], int]:
        batches = self._plan.update(update)
        pieces = deal(batches, self._world.rank, self._world.size)
        return [dataclasses.replace(one, batch=one.batch.to(self._device)) for one in pieces], sum(one.tokens for one in batches)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


# ----------------------------------------------------------------------------------------------------- one update


@dataclasses.dataclass
class Closure:
    """What an optimizer calls, once or more: a pass over an update's micro-batches that gives the mean loss.

    Where gradients are enabled it leaves the mean loss's gradient, clipped, in the parameters. Every pass of an update draws the same
    dropout masks, so an optimizer's passes see one function. figures: loss, extras and gradient norm of the first pass, for the curve.
    """

    spread: Spread
    loss: Callable[[Any, Batch], Sum]
    optimizer: torch.optim.Optimizer
    update: int
    pieces: list[Piece]
    stream: Stream
    clip: float | None
    precision: Precision
    anchor: Anchoring | None
    failed: Path
    figures: dict[str, float] = dataclasses.field(default_factory=dict)

    def __call__(self) -> Any:
        learning, device = torch.is_grad_enabled(), self.pieces[0].batch.input_ids.device
        self.optimizer.zero_grad()
        totals, count, extras = [], 0, dict[str, Any]()
        for place, piece in enumerate(self.pieces):
            _seed(device, self.stream.seed(self.update, piece.number))
            with autocast(device.type, self.precision):
                result = self.loss(self.spread.model, piece.batch)
            total = result.total if piece.counts else result.total * 0
            if learning:
                self.spread.syncs(place + 1 == len(self.pieces))
                total.backward()
            totals.append(total.detach())
            count += result.count * piece.counts
            for name, value in result.extras.items():
                extras[name] = extras.get(name, 0.0) + torch.as_tensor(value, device=device).detach() * piece.counts

        # Over all processes.
        sums = torch.stack([one.to(device, torch.float64) for one in (torch.stack(totals).sum(), torch.tensor(count), *extras.values())])
        if self.spread.world.size > 1:
            sums = self.spread.world.sum(sums)
            count = int(sums[1].item())
        if count == 0:
            raise Problem(f"{self._where(self.pieces)}: no supervised token; give larger updates, or leave out rows without any")
        parameters = [one for group in self.optimizer.param_groups for one in group["params"]]
        if learning:
            self.spread.reduce(parameters)
        term = self.anchor(parameters, count) if self.anchor is not None else None
        norm = self._scale(parameters, count) if learning else None
        # The update's one wait for the device.
        found = torch.cat([sums, torch.stack([*totals, norm] if norm is not None else totals).to(sums)]).tolist()
        mean, figures = found[0] / count, {name: value / count for name, value in zip(extras, found[2:])}
        each = found[len(sums) : len(sums) + len(totals)]
        for piece, value in zip(self.pieces, each, strict=True):
            self._finite(value, "the loss", [piece])
        self._finite(mean, "the loss of another process", [])
        if norm is not None:
            figures["grad_norm"] = found[-1]
            self._finite(found[-1], "the gradient's norm", self.pieces)
        if term is not None:
            figures["anchor"] = float(term)
        self.figures = self.figures or {"loss": mean, **figures}
        return sums[0] / count + (term.to(sums) if term is not None else 0.0)

    def _scale(self, parameters: Sequence[torch.nn.Parameter], count: int) -> torch.Tensor:
        """Turns the gradient of the sum into that of the mean and clips it, in one go; gives the mean's norm before clipping.

        So the count need not be known before the passes.
        """
        gradients = [one.grad for one in parameters if one.grad is not None]
        norm = self.spread.norm(gradients) / count
        factor = torch.ones_like(norm) if self.clip is None else (self.clip / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(local(gradients), factor / count)  # pyright: ignore[reportPrivateImportUsage]
        return norm

    def _finite(self, value: float, what: str, pieces: Sequence[Piece]) -> None:
        if math.isfinite(value):
            return
        for piece in pieces:
            tensors = {name: one for name, one in vars(piece.batch).items() if isinstance(one, torch.Tensor)}
            about = {"rows": json.dumps([row + 1 for row in piece.batch.rows])}
            name = f"update-{self.update + 1}-batch-{piece.number + 1}.safetensors"
            write(self.failed / name, safetensors_torch.save({key: one.cpu().contiguous() for key, one in tensors.items()}, about))
        kept = f"; what the model was given is in {self.failed}" if pieces else ""
        raise FloatingPointError(f"{self._where(pieces)}: {what} is {value}; lower the rate, or look at these rows{kept}")

    def _where(self, pieces: Sequence[Piece]) -> str:
        """The update and its rows of the data, both counted from 1; the first sixteen rows."""
        rows = list(dict.fromkeys(row + 1 for piece in pieces for row in piece.batch.rows))
        named = f", rows {', '.join(map(str, rows[:16]))}{', ...' if len(rows) > 16 else ''}" if rows else ""
        return f"update {self.update + 1}{named}"


def _seed(device: torch.device, seed: int) -> None:
    """Seeds the generators that dropout on `device` draws from; `torch.manual_seed` would touch every device at a greater cost."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)


# ------------------------------------------------------------------------------------------------------ the state


@dataclasses.dataclass(frozen=True)
class Run:
    """All of a run that a checkpoint holds."""

    model: Any
    optimizer: torch.optim.Optimizer
    live: Live | None
    plan: Plan
    length: str

    def state(self, history: History) -> dict[str, Any]:
        state = {
            "run": {"of": self.length, "tokens": history.tokens, "seconds": history.seconds, "best": history.best},
            "model": learnt(self.model),
            "optimizer": self.optimizer.state_dict(),
            "live": self.live.state_dict() if self.live is not None else {},
        }
        if hasattr(self.plan, "state_dict"):
            state["plan"] = self.plan.state_dict(history.updates)  # type: ignore[attr-defined]
        return state

    def place(self, path: tuple[str | int, ...], tensor: torch.Tensor) -> torch.Tensor:
        """Where a checkpoint's tensor is read into: of a sharded parameter and of its state only this process's shard."""
        own: torch.Tensor | None = None
        match path:
            case ("model", name):
                own = learnt(self.model).get(str(name))
            case ("optimizer", "state", int(index), _):
                own = [one for group in self.optimizer.param_groups for one in group["params"]][index]
        if own is not None and is_sharded(own) and own.shape == tensor.shape:
            return torch.empty_like(own, dtype=tensor.dtype)
        return torch.empty_like(tensor, device="cpu")

    def restore(self, found: tuple[int, dict[str, Any]]) -> History:
        """Puts a checkpoint's state back, whatever the number of processes that wrote it, and gives the history up to it."""
        done, state = found
        own, run = learnt(self.model), state["run"]
        shapes = [{name: tuple(one.shape) for name, one in tensors.items()} for tensors in (own, state["model"])]
        if shapes[0] != shapes[1] or run["of"] != self.length:
            raise Problem(
                f"the checkpoint after update {done} is of another run ({run['of']} of {len(state['model'])} tensors; "
                f"here {self.length} of {len(own)}, or of other shapes); give this run a work folder of its own"
            )
        with torch.no_grad():
            for name, one in own.items():
                one.copy_(state["model"][name])
        if self.live is not None:
            self.live.load_state_dict(state["live"])
        self.optimizer.load_state_dict(state["optimizer"])
        if "plan" in state:
            self.plan.load_state_dict(state["plan"])  # type: ignore[attr-defined]
        return History(done, run["tokens"], run["seconds"], resumed=done, best=run["best"])


def learnt(model: Any) -> dict[str, torch.Tensor]:
    """What training may change in a model: its trainable parameters and the buffers that are saved with it."""
    saved = model.state_dict().keys()
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    return {**trained, **{name: one for name, one in model.named_buffers() if name in saved}}


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
        if plan.updates_per_epoch is None:
            raise Problem("a stream has no known end, so its run is measured in updates or tokens; give one of them")
        updates = math.ceil(epochs * plan.updates_per_epoch - 1e-9)
    if updates < 1:
        raise Problem(f"a run of {updates} updates trains nothing; give more than 0 epochs or updates")
    return updates
