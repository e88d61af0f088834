"""Live progress on a terminal, a line now and then elsewhere: the step, the loss, the speed, the time left."""

from __future__ import annotations

import time
from typing import Any, TextIO

from temper.context import Track

EVERY = 10.0
"""Seconds between lines where there is no terminal."""


def clock(seconds: float | None) -> str:
    """`75` -> `1:15`."""
    if seconds is None:
        return "-:--"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def words(track: Track) -> str:
    """What a reader wants beside the bar: loss and other figures, speed."""
    shown = [f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}" for name, value in track.shown.items()]
    speed = f"{track.tokens_per_second:,.0f} tokens/s" if track.tokens else f"{track.speed:.1f} {track.unit}s/s" if track.speed else ""
    return " · ".join([*shown, speed] if speed else shown)


class Display:
    """Bars of the work under way. `show` is a context's; `began`, `ended` and `say` are a run's."""

    def __init__(self, stream: TextIO):
        from rich.console import Console

        self.console = Console(file=stream, highlight=False)
        self.bars: Any = None
        self._tasks: dict[int, Any] = {}
        self._told: dict[int, float] = {}
        self._place = ""

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            from rich.progress import BarColumn, Progress, TextColumn

            columns = (
                TextColumn("{task.description}"),
                BarColumn(24),
                TextColumn("{task.fields[count]}"),
                TextColumn("{task.fields[words]}"),
            )
            self.bars = Progress(*columns, TextColumn("{task.fields[left]}"), console=self.console, transient=True, refresh_per_second=8)
            self.bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.bars is not None:
            self.bars.stop()

    def say(self, text: str) -> None:
        self.console.print(text, style="dim")

    def place(self, words: str) -> None:
        """What the bars that follow belong to."""
        self._place = words

    def line(self, what: str, took: str, figures: str) -> None:
        """A piece of work that is done."""
        self.console.print(f"{what:<24} {took:<16} {figures}", soft_wrap=True)

    def began(self, step: Any, index: int, count: int) -> None:
        self.place(f"{index + 1}/{count} {step.name}")

    def ended(self, made: Any) -> None:
        figures = " · ".join(f"{name} {figure.value:.4g}" for name, figure in list(made.artefact.figures.items())[:3])
        took = f"{made.record['seconds']:.1f} s" if made.status == "made" else "from the store"
        self.line(self._place, took, figures)

    def show(self, track: Track) -> None:
        number = id(track)
        label = self._place if self._place.endswith(track.what) else f"{self._place}: {track.what}"
        count = f"{track.done:,}/{track.total:,} {track.unit}s" if track.total is not None else f"{track.done:,} {track.unit}s"
        if self.bars is None:
            now = time.monotonic()
            if not track.finished and now - self._told.setdefault(number, now) >= EVERY:
                self._told[number] = now
                self.console.print(f"{label}  {count}  {words(track)}  {clock(track.left)} left")
            return
        if track.finished:
            if number in self._tasks:
                self.bars.remove_task(self._tasks.pop(number))
            return
        fields = {"words": words(track), "left": f"{clock(track.left)} left" if track.total else "", "count": count}
        if number not in self._tasks:
            self._tasks[number] = self.bars.add_task(label, total=track.total, completed=track.done, **fields)
        else:
            self.bars.update(self._tasks[number], total=track.total, completed=track.done, **fields)
