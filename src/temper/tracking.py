"""Curves for trackers: TensorBoard in the run's folder by default, the others of `accelerate` by name."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from temper.context import Context
from temper.parts import Problem, nearest, shown

NAMES = ("tensorboard", "wandb", "trackio", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab")
"""Trackers that `accelerate` knows."""


def chosen(value: Any) -> tuple[str, ...]:
    """What a recipe's `track` asks for: a name, a list of names, or none."""
    if value is not None and not isinstance(value, (str, list, tuple)):
        raise Problem(f"{shown(value)}: `track` is none or some of {', '.join(NAMES)}")
    names = () if value in (None, "none") else (value,) if isinstance(value, str) else tuple(value)
    for name in names:
        if name not in NAMES:
            raise Problem(f"no tracker `{name}`{nearest(str(name), NAMES)}; `track` is none or some of {', '.join(NAMES)}")
    return names


def check(names: Sequence[str]) -> None:
    """Raises `Problem` where a tracker's package is not there. TensorBoard comes with Temper."""
    if all(name == "tensorboard" for name in names):
        return
    from accelerate.tracking import get_available_trackers

    for name in names:
        if name not in map(str, get_available_trackers()):
            raise Problem(f"the tracker `{name}` needs its package; `pip install {name.replace('_', '-')}`, or leave it out", ("track",))


@contextlib.contextmanager
def following(context: Context, names: Sequence[str], folder: Path, project: str) -> Iterator[None]:
    """Within, the rows of a step's curve go to its trackers, from a thread: a tracker never holds up an update.

    A tracker that fails is noted and left alone; the run goes on.
    """
    rows: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    thread = threading.Thread(target=_pass_on, args=(rows, context, names, folder, project), name="trackers", daemon=True)

    def follow(row: dict[str, Any]) -> None:
        if thread.ident is None:
            thread.start()  # at the first row: many steps have no curve
        rows.put(row)

    context.follow = follow if names else None
    try:
        yield
    finally:
        if thread.ident is not None:
            rows.put(None)
            thread.join()


def _pass_on(rows: queue.SimpleQueue[Any], context: Context, names: Sequence[str], folder: Path, project: str) -> None:
    trackers: dict[str, Any] = {}
    first = rows.get()
    for name in names:
        with _noted(context, name):
            trackers[name] = _started(name, folder, project, context.step, first["step"])
    row = first
    while row is not None:
        figures = {key: value for key, value in row.items() if key != "step"}
        for name in list(trackers):
            with _noted(context, name, trackers):
                trackers[name].log(figures, step=row["step"])
        row = rows.get()
    for name, tracker in trackers.items():
        with _noted(context, name):
            tracker.finish()


def _started(name: str, folder: Path, project: str, step: str, first: int) -> Any:
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # which process this is, as its trackers ask
    made = LOGGER_TYPE_TO_CLASS[name]
    if not made.requires_logging_directory:
        tracker = made(project)
    elif name == "tensorboard":
        tracker = made(step, folder / name, purge_step=first)  # a resumed run's rows replace those that it makes again
    else:
        tracker = made(step, folder / name)
    tracker.start()
    return tracker


@contextlib.contextmanager
def _noted(context: Context, name: str, trackers: dict[str, Any] | None = None) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a tracker raises what it likes, over a network too
        context.note(f"the tracker `{name}` failed and was left out: {type(error).__name__}: {error}")
        if trackers is not None:
            trackers.pop(name, None)
