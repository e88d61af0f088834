"""Rows of data in the four shapes that TRL documents: text, completion, chat, preference."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Never

from temper.parts import Problem, nearest, shown

Shape = Literal["text", "completion", "chat", "preference"]

COLUMNS: dict[Shape, tuple[str, ...]] = {
    "preference": ("prompt", "chosen", "rejected"),
    "chat": ("messages",),
    "completion": ("prompt", "completion"),
    "text": ("text",),
}
"""Shape -> the columns that it needs. Where a data set has the columns of several shapes, the first one here counts."""

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Rows:
    """Rows of one shape.

    rows: plain dicts with at least the columns of `shape`; further columns (`module`, `task`, ...) are kept; of data too large for
    memory a `StreamedRows`. name: what errors and reports call the data. origin: where they came from, in a few words, without
    folders of this machine.
    """

    shape: Shape
    rows: Sequence[dict[str, Any]]
    name: str
    origin: str

    def __len__(self) -> int:
        return len(self.rows)

    def validate(self, places: Sequence[str] = ()) -> Rows:
        """These rows, once every one has been checked.

        Raises a `Problem` that names the first bad row, its column, its value, the rule and the nearest column name.
        places: where each row stands ("line 3"); without it, rows are counted from 1.
        """
        for index, row in enumerate(self.rows):
            check_row(self.shape, row, f"{self.name}, {places[index] if places else f'row {index + 1}'}")
        return self

    @property
    def at_hand(self) -> Sequence[dict[str, Any]]:
        """The rows, or of a stream those of its first block: enough to learn a tokenizer from."""
        return self.rows[: self.rows.buffer] if isinstance(self.rows, StreamedRows) else self.rows

    def as_text(self) -> Rows:
        """The same rows as plain text, for what learns from text alone. Further columns are kept.

        completion: prompt, then completion. preference: prompt, then the chosen answer. chat, and messages in place of
        texts: a line `role: content` per message (a model's chat template is the tokenizer's business, not the data's).
        """
        if self.shape == "text":
            return self

        def text(row: Mapping[str, Any]) -> dict[str, Any]:
            rest = {key: value for key, value in row.items() if key not in COLUMNS[self.shape]}
            return {"text": "".join(_flat(row[column]) for column in COLUMNS[self.shape] if column != "rejected"), **rest}

        made = self.rows.map(text) if isinstance(self.rows, StreamedRows) else [text(row) for row in self.rows]
        return Rows("text", made, self.name, f"{self.origin}, {self.shape} rows written as text")


def detect_shape(rows: Sequence[Mapping[str, Any]], name: str = "the data") -> Shape:
    """The shape that the columns of the first rows show; prompts and completions may be strings or lists of messages."""
    if not rows:
        raise Problem(f"{name} has no rows; at least one is needed")
    columns = {column: None for row in rows[:10] for column in row}
    for shape, needed in COLUMNS.items():
        if columns.keys() >= set(needed):
            return shape
    known = {column for needed in COLUMNS.values() for column in needed}
    hint = next((found for column in columns if column not in known and (found := near(column, known))), "")
    shapes = " · ".join(f"{shape}: {', '.join(needed)}" for shape, needed in reversed(COLUMNS.items()))
    raise Problem(f"{name} has {listed(columns)}, which make no shape ({shapes}){hint}; rename with `columns: {{wanted: present}}`")


class StreamedRows(Sequence[dict[str, Any]]):
    """Rows that are read as they are needed and never held all at once.

    read: state -> rows in turn (None: from the first one), each with a function that gives the state after it as long as no further row
    is read. A state is JSON, and reading goes on from it without what lies before. buffer: how many rows are to be held, shuffled and
    packed at once. As a sequence it has only slices from its start, each read anew; whatever needs all rows raises a `Problem`.
    """

    def __init__(self, read: Callable[[Any], Iterator[tuple[dict[str, Any], Callable[[], Any]]]], name: str, buffer: int):
        self.read, self.name, self.buffer = read, name, buffer

    def map(self, change: Callable[[Mapping[str, Any]], dict[str, Any]]) -> StreamedRows:
        """The same rows, each changed when it is read."""
        return StreamedRows(lambda state: ((change(row), after) for row, after in self.read(state)), self.name, self.buffer)

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, slice) or index.stop is None or index.stop < 0:
            self._refuse()
        return [row for row, _ in itertools.islice(self.read(None), index.start or 0, index.stop, index.step or 1)]

    def __len__(self) -> int:
        self._refuse()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._refuse()

    def _refuse(self) -> Never:
        raise Problem(
            f"{self.name} is a stream and not held in memory; what needs all its rows at once cannot have them: leave `streaming` out, "
            "or give a smaller file"
        )


def check_row(shape: Shape, row: Mapping[str, Any], where: str) -> None:
    """Raises a `Problem` that begins with `where` if a row is not of a shape."""
    for column in COLUMNS[shape]:
        if wrong := _wrong(shape, column, row):
            raise Problem(f"{where}{wrong}")


def _wrong(shape: Shape, column: str, row: Mapping[str, Any]) -> str:
    """What is wrong with one column of one row, or nothing."""
    if column not in row:
        return f": no column `{column}`, which {shape} rows need; it has {listed(row)}{near(column, row)}"
    value = row[column]
    if isinstance(value, str) and shape != "chat":
        return ""
    if shape == "text":
        return f", column `text`: {shown(value)}; a text is asked for"
    rule = "a list of messages" if shape == "chat" else "a text or a list of messages"
    if not isinstance(value, (list, tuple)) or not value:
        return f", column `{column}`: {shown(value)}; {rule} is asked for"
    for number, message in enumerate(value, start=1):
        where = f", column `{column}`, message {number}: "
        if not isinstance(message, Mapping) or "role" not in message:
            return f"{where}{shown(message)}; a mapping with `role` and `content` is asked for"
        if message["role"] not in ROLES:
            return f"{where}{shown(message['role'])} is no role{nearest(str(message['role']), ROLES)}"
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            return f"{where}`content` is {shown(message.get('content'))}; a text is asked for"
    if plain := [other for other in COLUMNS[shape] if isinstance(row.get(other), str)]:
        return f": `{column}` is a list of messages and `{plain[0]}` a text; give both the same way"
    return ""


def listed(columns: Iterable[str]) -> str:
    """Columns in words, for messages."""
    listed = ", ".join(f"`{column}`" for column in columns)
    return f"the columns {listed}" if listed else "no columns"


def near(word: str, known: Iterable[str]) -> str:
    """`"; did you mean `text`?"`, or nothing where no known word is near."""
    hint = nearest(word, known)
    return hint if hint.startswith("; did you mean") else ""


def _flat(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "".join(f"{message['role']}: {message.get('content') or ''}\n" for message in value)


def key_of(row: Mapping[str, Any], shape: Shape) -> str:
    """What decides a row's split: its prompt (a chat's turns before the first answer), or else its text.

    Rows that share a prompt thereby fall on the same side.
    """
    value = row[COLUMNS[shape][0]]
    if shape == "chat":
        asked = next((index for index, message in enumerate(value) if message["role"] == "assistant"), len(value))
        value = value[: max(asked, 1)]
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def group_of(row: Mapping[str, Any]) -> str | None:
    """What a row shares with others that are no evidence of their own beside it: its `group`, else its `module`; None: it stands alone."""
    return next((f"{name} {row[name]}" for name in ("group", "module") if row.get(name) is not None), None)


def held_out(key: str, share: float) -> bool:
    """Whether what `key` names belongs to the held-out share: decided by its hash alone, so other rows cannot move it."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:8]) < share * 2**64
