"""Slot `source`: where rows come from. Files and the hub, this Python's library, tasks, and what is made of another source's rows."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field

from temper.parts import Count, Problem, Scope, Share, Slot, build, dump, fill, mark_of, nearest, part, shown, slot
from temper.tasks import verifiable  # not its names: every part named here would answer this slot
from temper.tasks.cloze import cloze
from temper.tasks.files import HUB, SUFFIXES, File, similar
from temper.tasks.labels import docstrings, paragraphs, tagged
from temper.tasks.library import Library
from temper.tasks.rationales import rationales
from temper.tasks.rows import Rows, StreamedRows, group_of, held_out, key_of, near

HOUSE = {"library": Library}
"""What `house:NAME` stands for."""


@dataclasses.dataclass(frozen=True)
class Joined:
    """Several sources as one, their rows one after another."""

    sources: tuple[Source, ...]

    def load(self, split: Literal["train", "test"]) -> Rows:
        """The rows of every source. Raises a `Problem` where their shapes differ."""
        parts = [one.load(split) for one in self.sources]
        first = parts[0]
        for one in parts:
            if isinstance(one.rows, StreamedRows):
                raise Problem(f"{one.name} is a stream, which stands alone; put its files into one folder, or leave `streaming` out")
            if one.shape != first.shape:
                raise Problem(f"{one.name} holds {one.shape} rows and {first.name} {first.shape} rows; give data of one shape")
        names, origins = (" + ".join(dict.fromkeys(texts)) for texts in zip(*((one.name, one.origin) for one in parts)))
        return Rows(first.shape, [row for one in parts for row in one.rows], names, origins)

    def digest(self) -> str:
        return _digest(*(one.digest() for one in self.sources))


def joined(sources: Sequence[Source]) -> Joined:
    """How a list of sources acts as one."""
    return Joined(tuple(sources))


@slot(combine=joined, phased=False)
class Source(Protocol):
    """Where do rows come from?

    `load("train" | "test") -> Rows`, no row of one split in the other; `digest() -> str`, a hash of the settings and of
    every byte that `load` reads, known without torch.
    """

    def load(self, split: Literal["train", "test"]) -> Rows: ...

    def digest(self) -> str: ...


@part
class Task:
    """Questions of a task with one right answer.  Completion rows, no prompt twice, none in both splits under any seed."""

    task: Slot[verifiable.Verifiable] = verifiable.SortWords()
    """What is asked."""
    count: Count = 5000
    """Rows to train on."""
    test_count: Count = 500
    """Rows held out."""
    seed: int = 0
    """Which questions are drawn."""
    holdout: Share = 0.1
    """Share of all possible prompts that belong to the held-out rows."""

    def load(self, split: Literal["train", "test"]) -> Rows:
        """Rows `{prompt, completion, task}`. Raises a `Problem` where the task has too few different prompts."""
        rows = draw(self.task, split, self.count if split == "train" else self.test_count, self.seed, self.holdout)
        return Rows("completion", rows, f"task:{mark_of(self.task).name}", f"task {mark_of(self.task).name}, seed {self.seed}")

    def digest(self) -> str:
        return _digest(dump(self))


@part
class Derive:
    """Questions of a task about the words of another source's text: checkable examples out of any corpus.

    Training rows ask about the most frequent words of its training rows. Held-out rows ask about those of its held-out rows,
    half as many, so that training has met most of them; no prompt is in both. Rows that already ask something (completion,
    chat, preference) pass as they are.
    """

    task: Slot[verifiable.Verifiable] = verifiable.SortWords()
    """What is asked: a task with a setting `words`."""
    source: Slot[Source] = Library()
    """Where the text comes from."""
    count: Count = 5000
    """Rows to train on."""
    test_count: Count = 500
    """Rows held out."""
    vocabulary: Count = 100
    """Words that training rows ask about."""
    seed: int = 0
    """Which questions are drawn."""
    holdout: Share = 0.1
    """Share of all possible prompts that belong to the held-out rows."""

    def __post_init__(self) -> None:
        if not hasattr(self.task, "words"):
            able = [name for name, cls in verifiable.Verifiable.__slot__.parts().items() if hasattr(cls, "words")]
            raise Problem(f"task `{mark_of(self.task).name}` asks nothing about words{nearest('', able)}")

    def load(self, split: Literal["train", "test"]) -> Rows:
        """Rows `{prompt, completion, task}`, or the source's own. Raises a `Problem` where its text has too few words."""
        rows = _one(self.source).load(split)
        if rows.shape != "text":
            return dataclasses.replace(rows, origin=f"{rows.origin}; {rows.shape} rows as they are, nothing derived")
        name = mark_of(self.task).name
        found = words(rows, self.vocabulary if split == "train" else -(-self.vocabulary // 2))
        try:
            if not found:
                raise Problem("it has nothing to ask about")
            task = build(type(self.task), {"words": found}, base=self.task)
        except Problem as problem:
            told = f"{rows.name} has {len(found)} lower-case words of 2 to 10 letters that stand alone"
            raise Problem(f"{told}, too few for task `{name}`: {problem.text}") from problem
        count = self.count if split == "train" else self.test_count
        made = draw(task, split, count, self.seed, self.holdout)
        return Rows("completion", made, f"task:{name} of {rows.name}", f"task {name} about {len(found)} words of {rows.origin}")

    def digest(self) -> str:
        return _derived_digest(self)


@part
class Cloze:
    """Multiple choice out of another source's text: which word stands next?  Completion rows with `choices` and `answer`.

    The choices are the word that stands there and words of other places, of the same kind and as frequent as in the text. Questions
    about one text are no independent evidence: rows keep their `module` or `group`, or have a `group` for each text.
    """

    source: Slot[Source] = Library()
    """Where the text comes from; rows of another shape are read as text."""
    count: Count = 1000
    """Rows to train on, at most."""
    test_count: Count = 500
    """Rows held out, at most."""
    choices: Annotated[int, Field(ge=2)] = 4
    """Choices of a question, the true one among them."""
    context: Count = 256
    """Characters before the word, about; words with less text before them are not asked about."""
    seed: int = 0
    """Which words are asked about, and beside which."""

    def load(self, split: Literal["train", "test"]) -> Rows:
        """Rows `{prompt, completion, choices, answer}`. Raises a `Problem` where the text is too short."""
        rows = _one(self.source).load(split).as_text()
        rng = random.Random(f"cloze {split} {self.seed}")
        made = cloze(rows, self.count if split == "train" else self.test_count, self.choices, self.context, rng)
        return Rows("completion", made, f"cloze of {rows.name}", f"questions about the next word in {rows.origin}")

    def digest(self) -> str:
        return _derived_digest(self)


@part
class Docstrings:
    """Docstrings of this Python's own library, each with the package that it is from.  Completion rows, as many of each package.

    A prompt is a docstring's first paragraph in its quotation marks, and a line `from`; the completion is one of `classes` names. Rows
    keep their `module`.
    """

    classes: Annotated[int, Field(ge=2)] = 8
    """Packages: those with the most docstrings."""
    count: Count = 2000
    """Rows to train on, at most."""
    test_count: Count = 400
    """Rows held out, at most."""
    shortest: Count = 20
    """Characters of a paragraph, at least."""
    longest: Count = 200
    """Characters of a paragraph, at most."""
    holdout: Share = 0.2
    """Share of all paragraphs that belong to the held-out rows."""
    seed: int = 0
    """Which docstrings are drawn."""

    def load(self, split: Literal["train", "test"]) -> Rows:
        """Rows `{prompt, completion, module}`. Raises a `Problem` where the library has too few docstrings."""
        rng, count = random.Random(f"docstrings {split} {self.seed}"), self.count if split == "train" else self.test_count
        made = docstrings(paragraphs(), split, count, self.classes, self.shortest, self.longest, self.holdout, rng)
        return Rows("completion", made, "docstrings", f"docstrings of {self.classes} packages of Python's own library")

    def digest(self) -> str:
        return _digest(dump(self), Library().digest())


@part
class Tags:
    """Lines of code out of another source's text, each word with what it is: keyword, name, called, argument, ...  Completion rows.

    A prompt is a line's tokens between spaces, and a line feed; the completion has a tag for each word. What a called name or an argument
    is shows in the word after it. Rows keep their `module` or `group`, or have a `group` for each text.
    """

    source: Slot[Source] = Library()
    """Where the text comes from: sources of Python."""
    count: Count = 2000
    """Rows to train on, at most."""
    test_count: Count = 400
    """Rows held out, at most."""
    shortest: Count = 4
    """Words of a line, at least."""
    longest: Count = 16
    """Words of a line, at most."""
    holdout: Share = 0.2
    """Share of all lines that belong to the held-out rows."""
    seed: int = 0
    """Which lines are drawn."""

    def __post_init__(self) -> None:
        if self.shortest > self.longest:
            raise Problem(f"`shortest` is {self.shortest} and `longest` is {self.longest}; the first must not be above the second")

    def load(self, split: Literal["train", "test"]) -> Rows:
        """Rows `{prompt, completion}`. Raises a `Problem` where the text has no such line."""
        rows = _one(self.source).load(split).as_text()
        rng, count = random.Random(f"tags {split} {self.seed}"), self.count if split == "train" else self.test_count
        made = tagged(rows, split, count, self.shortest, self.longest, self.holdout, rng)
        return Rows("completion", made, f"tags of {rows.name}", f"lines of {rows.origin}, each word with its tag")

    def digest(self) -> str:
        return _derived_digest(self)


@part
class Rationales:
    """Questions of another source that have a working, in two rows each: `[label] x` -> answer and `[rationale] x` -> working. Held-out
    rows ask for the answer alone.  Hsieh et al. 2023, "Distilling Step-by-Step", section 3.2

    The working is a row's column `rationale`, else the steps of its task (`arithmetic`, `brackets`). The loss `rationale` weighs the two.
    """

    source: Slot[Source] = Task(task=verifiable.Arithmetic())
    """Where the questions come from."""
    label: Annotated[str, Field(min_length=1)] = "[label]"
    """Stands before a prompt that asks for the answer."""
    rationale: Annotated[str, Field(min_length=1)] = "[rationale]"
    """Stands before a prompt that asks for the working."""

    def load(self, split: Literal["train", "test"]) -> Rows:
        """Rows `{prompt, completion, asked}`. Raises a `Problem` where a row is no question, or has no working."""
        rows = _one(self.source).load(split)
        made = rationales(rows, split, self.label, self.rationale)
        return Rows("completion", made, f"rationales of {rows.name}", f"{rows.origin}, the answer and the working apart")

    def digest(self) -> str:
        return _derived_digest(self)


@part
class Halves:
    """All rows of another source, of both its splits, in two halves: one to train on, one held out.  Dietterich 1998

    Rows of one `group` or `module`, else of one prompt or text, stay together. Five splits, each as it is and swapped, are the
    5x2 design.
    """

    source: Slot[Source] = Library()
    """Where the rows come from."""
    split: Annotated[int, Field(ge=0)] = 0
    """Which way of halving them."""
    swapped: bool = False
    """Whether the two halves change places."""

    def load(self, split: Literal["train", "test"]) -> Rows:
        """One half of the rows. Raises a `Problem` where all of them belong together."""
        both = joined([_At(_one(self.source), name) for name in ("train", "test")]).load("train")
        groups: dict[str, list[Any]] = {}
        for row in both.rows:
            groups.setdefault(group_of(row) or key_of(row, both.shape), []).append(row)
        order = random.Random(f"halves {self.split}").sample(list(groups), len(groups))
        halves: tuple[list[Any], list[Any]] = [], []
        done = 0
        for group in (groups[key] for key in order):
            halves[2 * done + len(group) >= len(both)].extend(group)  # by where the group's middle lies
            done += len(group)
        if not all(halves):
            raise Problem(f"{both.name}: its {len(both)} rows are of {len(groups)} groups, which make no two halves; give more data")
        kept = halves[(split == "test") != self.swapped]
        return dataclasses.replace(both, rows=kept, origin=f"{both.origin}, half of the rows ({self.split}, {split})")

    def digest(self) -> str:
        return _derived_digest(self)


@dataclasses.dataclass(frozen=True)
class _At(Source):
    """One split of a source, whichever is asked for."""

    source: Source
    split: Literal["train", "test"]

    def load(self, split: Literal["train", "test"]) -> Rows:
        return self.source.load(self.split)

    def digest(self) -> str:
        return self.source.digest()


def draw(task: verifiable.Verifiable, split: Literal["train", "test"], count: int, seed: int, holdout: float) -> list[dict[str, str]]:
    """`count` rows with different prompts, of which none can come up in the other split under any seed.

    A prompt's split is decided by its hash (`holdout`: the share of prompts that belong to the test split). Asking for more
    keeps the first ones.
    """
    name = mark_of(task).name
    rng = random.Random(f"{name} {split} {seed}")
    rows: dict[str, dict[str, str]] = {}
    drawn = last = 0
    patience = int(100 / max(min(holdout, 1 - holdout), 1e-2))
    while len(rows) < count:
        row = task.example(rng)
        drawn += 1
        if row["prompt"] not in rows and held_out(row["prompt"], holdout) == (split == "test"):
            rows[row["prompt"]] = row
            last = drawn
        elif drawn - last > patience:
            raise Problem(
                f"task `{name}` has too few different prompts: {len(rows)} for `{split}` after {drawn} draws, where {count} are asked for; "
                "lower the count, or widen the task's settings"
            )
    return list(rows.values())


def words(rows: Rows, limit: int, shortest: int = 2, longest: int = 10) -> tuple[str, ...]:
    """The `limit` lower-case words that stand in the most rows, the most frequent first, ties in the order of letters.

    Words of `shortest` to `longest` letters a to z that stand alone (parts of longer names do not count). Rows are
    counted, not occurrences: a word that one text repeats says little about the next.
    """
    pattern = re.compile(rf"(?<![A-Za-z0-9_])[a-z]{{{shortest},{longest}}}(?![A-Za-z0-9_])")
    counts: Counter[str] = Counter()
    for row in rows.as_text().rows:
        counts.update(set(pattern.findall(row["text"])))
    return tuple(sorted(counts, key=lambda word: (-counts[word], word))[:limit])


def source(ref: Any, base: Path = Path(), scope: Scope | None = None) -> Source:
    """The source that a recipe or a command names.

    ref: `house:library`, `task:NAME`, `hub:owner/name`, a path (relative to `base`), a hub name where no such path
    exists, `{part: {setting: value}}`, a part, or a list of these. scope: where a recipe's own parts come from. Raises a
    `Problem` with the nearest right word.
    """
    if isinstance(ref, str):
        return _named(ref, base)
    if isinstance(ref, (list, tuple)):
        if not ref:
            raise Problem("an empty list names no data; name a source")
        return joined([_within(one, base, scope, index) for index, one in enumerate(ref)])
    if isinstance(ref, Joined):
        return joined([source(one, base, scope) for one in ref.sources])
    if isinstance(ref, Mapping):
        for name, settings in ref.items():
            if isinstance(settings, Mapping) and "source" in settings:
                inner = _within(settings["source"], base, scope, str(name), "source")
                ref = {**ref, name: {**settings, "source": inner.sources if isinstance(inner, Joined) else inner}}
    return _placed(fill(Source.__slot__, ref, scope=scope or Scope(base), field="data"), base)


def _within(ref: Any, base: Path, scope: Scope | None, *keys: str | int) -> Source:
    try:
        return source(ref, base, scope)
    except Problem as problem:
        raise problem.under(*keys) from problem


def _named(ref: str, base: Path) -> Source:
    kind, _, name = ref.partition(":")
    if kind == "task":
        return Task(task=verifiable.verifiable(name))
    if kind == "house":
        if name not in HOUSE:
            raise Problem(f"no house data `{name}`{nearest(name, HOUSE)}")
        return HOUSE[name]()
    path = base / ref
    if not ref.startswith(HUB) and not path.exists():
        if _HUB_NAME.fullmatch(ref) and path.suffix not in SUFFIXES and not path.parent.is_dir():
            return File(path=HUB + ref)
        hint = similar(path) or near(ref, [f"house:{one}" for one in HOUSE])
        raise Problem(
            f"no file or folder {shown(ref)}{hint}; data are a path (relative to the recipe), `hub:owner/name`, `house:NAME` or `task:NAME`"
        )
    return _placed(File(path=ref), base)


_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def _placed(made: Any, base: Path) -> Any:
    """The same source with its paths, which are relative to `base`, made absolute and looked up."""
    if isinstance(made, (Derive, Cloze, Tags, Rationales, Halves)):
        inner = made.source if isinstance(made.source, tuple) else (made.source,)
        placed = tuple(_placed(one, base) for one in inner)
        return dataclasses.replace(made, source=placed if isinstance(made.source, tuple) else placed[0])
    if not isinstance(made, File):
        return made
    if not made.path.startswith(HUB):
        made = dataclasses.replace(made, path=_found(made.path, base, "path"))
    if made.test is not None and not made.names_split(made.test):
        made = dataclasses.replace(made, test=_found(made.test, base, "test"))
    return made


def _found(where: str, base: Path, setting: str) -> str:
    path = base / where
    if not path.exists():
        raise Problem(f"no file or folder {shown(where)}{similar(path)}; give a path relative to the recipe", ("file", setting))
    return str(path.absolute())


def _one(value: Any) -> Source:
    """What stands in a slot `source`, a list of sources as one."""
    return joined(value) if isinstance(value, tuple) else value


def _derived_digest(made: Derive | Cloze | Tags | Rationales | Halves) -> str:
    """Of what is made of another source's rows: the settings, and that source's own digest."""
    name = mark_of(made).name
    settings = {key: value for key, value in dump(made)[name].items() if key != "source"}
    return _digest(name, settings, _one(made.source).digest())


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
