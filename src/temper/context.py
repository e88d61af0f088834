"""What a step may use besides its spec and its inputs: folders, random streams, progress, the curve, choices made once.

A context is passed, never global. Everything it keeps in `work` survives a crash and is read again on resume.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from temper.lazy import torch
from temper.parts import Live, Problem, nearest
from temper.world import World

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Stream:
    """A random stream of its own: draws depend on (seed, step, slot) and the keys given, never on call order."""

    root: str

    def seed(self, *keys: int | str) -> int:
        """63 bits, a function of the stream and `keys` alone."""
        text = "|".join((self.root, *map(str, keys)))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1

    def generator(self, *keys: int | str) -> torch.Generator:
        """A fresh CPU generator at the start of the stream for `keys`, such as (update, sample)."""
        return torch.Generator().manual_seed(self.seed(*keys))


class Track:
    """Progress on one long piece of work. `advance` takes what a reader wants to see: loss, tokens."""

    def __init__(self, total: int | None, what: str, unit: str, tell: Callable[[Track], None]):
        self.total, self.what, self.unit = total, what, unit
        self.done = 0
        self.tokens = 0
        self.shown: dict[str, float | str] = {}
        self.finished = False
        self.started = time.monotonic()
        self._first = 0
        self._tell = tell

    def resume(self, done: int) -> None:
        """Work that an earlier session did: it counts as done, not as speed."""
        self.done = self._first = done

    def advance(self, amount: int = 1, *, tokens: int = 0, **shown: float | str) -> None:
        self.done += amount
        self.tokens += tokens
        self.shown.update(shown)
        self._tell(self)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def speed(self) -> float:
        """Units a second in this session."""
        return (self.done - self._first) / max(1e-9, self.seconds)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(1e-9, self.seconds)

    @property
    def left(self) -> float | None:
        """Seconds to go, by the speed so far."""
        if self.total is None or self.speed <= 0:
            return None
        return (self.total - self.done) / self.speed


def silent(track: Track) -> None:
    """Shows nothing."""


@dataclasses.dataclass
class Context:
    """One step's surroundings.

    step: its name. seed: of all its streams. work: scratch that survives a crash. out: to be filled with the
    artefact's files. slot: whose stream `stream()` gives. machine: where choices by measurement are remembered for all runs.
    world: the processes that share the step; all but the main one have an `out` of their own, which is thrown away. follow: takes
    every row of the curve as it is logged, for trackers.
    """

    step: str
    seed: int
    work: Path
    out: Path
    device: str = "cpu"
    show: Callable[[Track], None] = silent
    slot: str = ""
    machine: Path | None = None
    world: World = dataclasses.field(default_factory=World)
    follow: Callable[[dict[str, Any]], None] | None = None
    gifts: dict[str, Any] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)

    @staticmethod
    def scratch(folder: Path, seed: int = 0, step: str = "scratch") -> Context:
        """A quiet context in a folder of one's own, for tests and for parts used alone."""
        work, out = Path(folder) / "work", Path(folder) / "out"
        work.mkdir(parents=True, exist_ok=True)
        out.mkdir(parents=True, exist_ok=True)
        return Context(step, seed, work, out)

    # ------------------------------------------------------------------------------------------------ slots

    def start(self, spec: Any, only: Sequence[str] | None = None) -> Live:
        """Starts every slot of a spec in the order of needs; `only` some of them."""
        return Live(spec, self, self.gifts, only)

    def at(self, slot: str) -> Context:
        """The same context as one slot sees it."""
        return dataclasses.replace(self, slot=slot)

    def give(self, name: str, value: Any) -> None:
        """Leaves something for parts that need it: `reference`, `fisher`, `teacher`."""
        self.gifts[name] = value

    def want(self, name: str) -> Any:
        """What was given under a name."""
        if name not in self.gifts:
            raise Problem(f"nothing gave `{name}`{nearest(name, self.gifts)}")
        return self.gifts[name]

    def stream(self, slot: str = "") -> Stream:
        """The random stream of a slot (default: the one this context was passed for)."""
        return Stream(f"{self.seed}|{self.step}|{slot or self.slot}")

    # --------------------------------------------------------------------------------------------- progress

    @contextmanager
    def track(self, total: int | None, what: str = "", unit: str = "step") -> Iterator[Track]:
        """Progress that the run shows: step, loss, speed, time left."""
        track = Track(total, what or self.step, unit, self.show)
        self.show(track)
        try:
            yield track
        finally:
            track.finished = True
            self.show(track)

    @property
    def curve_file(self) -> Path:
        return self.work / "curve.jsonl"

    def log(self, step: int, **figures: Any) -> None:
        """Adds a row to the step's curve. The main process's word counts."""
        if not self.world.main:
            return
        row = {"step": step, **figures}
        with self.curve_file.open("a", encoding="utf8") as file:
            file.write(json.dumps(row) + "\n")
        if self.follow is not None:
            self.follow(row)

    def curve(self) -> list[dict[str, Any]]:
        """The rows so far; a line torn by a crash is left out."""
        if not self.curve_file.exists():
            return []
        rows = []
        for line in self.curve_file.read_text(encoding="utf8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return rows

    def rewind(self, step: int) -> None:
        """Drops the curve's rows at and after `step`: they will be made again."""
        if not self.world.main:
            return
        kept = [row for row in self.curve() if row["step"] < step]
        write(self.curve_file, "".join(json.dumps(row) + "\n" for row in kept))

    def note(self, text: str) -> None:
        """A line for the report."""
        if text not in self.notes:
            self.notes.append(text)

    # ---------------------------------------------------------------------------------------------- choices

    def decide(self, name: str, choose: Callable[[], tuple[Any, str]], subject: str = "") -> Any:
        """An automatic choice: made once, recorded with its reason, reused on resume. The value must be JSON.

        subject: what a measurement was made of, such as a layer's size. A choice with a subject is remembered for this machine,
        so that two runs of one step do not differ by the noise of a measurement. The main process chooses for all.
        """
        return self.world.tell(self._decided(name, choose, subject) if self.world.main else None)

    def _decided(self, name: str, choose: Callable[[], tuple[Any, str]], subject: str) -> Any:
        made = self.decisions()
        if name not in made:
            known = json.loads(self.machine.read_text(encoding="utf8")) if subject and self.machine and self.machine.exists() else {}
            entry = known.get(f"{name}: {subject}")
            if entry is None:
                value, reason = choose()
                entry = {"value": value, "reason": reason}
                if subject and self.machine:
                    write(self.machine, json.dumps({**known, f"{name}: {subject}": entry}, indent=1))
            made[name] = entry
            write(self.work / "decisions.json", json.dumps(made, indent=1))
        return made[name]["value"]

    def decisions(self) -> dict[str, Any]:
        file = self.work / "decisions.json"
        return json.loads(file.read_text(encoding="utf8")) if file.exists() else {}


def write(path: Path, content: str | bytes) -> None:
    """Writes beside, then renames: a reader sees the old file or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with beside.open("wb") as file:
        file.write(content.encode("utf8") if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def sync(path: Path) -> None:
    """Asks the disk to hold what was written to a file, or renamed into a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
