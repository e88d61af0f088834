"""Data that the user has: JSONL, JSON, Parquet, CSV, text, `datasets` folders, and data sets of the Hugging Face hub."""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from temper.lazy import datasets
from temper.parts import Count, Problem, Share, dump, nearest, part, shown
from temper.tasks.rows import COLUMNS, Rows, StreamedRows, check_row, detect_shape, held_out, key_of, listed, near

HUB = "hub:"
"""How the path of a hub data set begins: `hub:owner/name`."""

Placed = Iterator[tuple[str, dict[str, Any], Callable[[], Any]]]
"""Rows as read, each with where it stands ("line 3") and what gives the state after it until the next one is read: JSON."""


@part
class File:
    """A file, a folder of files, a `datasets` folder or a hub data set.  Its rows are checked when read, all of them.

    Without `test`, a row is held out by the hash of its prompt (or text): more rows move none of the old ones, and rows
    that share a prompt stay together. Of a stream the first `test_count` rows are held out, and no row that shares a prompt with one
    of them is trained on.
    """

    path: str
    """.jsonl, .json, .parquet, .csv (with a header), .txt or .md (a document each), a folder of one of these, a folder
    that `datasets` saved, or `hub:owner/name`."""
    test: str | None = None
    """Held-out data of its own: a second file or folder, or, where `path` has splits, the name of one."""
    holdout: Share = 0.05
    """Share of rows held out where `test` is not given, except of a stream."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Names to read columns by: wanted name -> name in the data, such as `{text: content}`."""
    split: str = "train"
    """The split to read, where `path` has splits."""
    name: str | None = None
    """The configuration of a hub data set."""
    revision: str | None = None
    """The branch, tag or commit of a hub data set; without it, its newest."""
    streaming: bool = False
    """Whether rows are read, tokenised and packed while training goes on, and never held in memory all at once. Such a run is measured in
    updates or tokens; what has been read before a checkpoint is not read again."""
    buffer: Count = 2000
    """Rows of a stream that are held at once, shuffled and packed together."""
    test_count: Count = 1000
    """Held-out rows of a stream: its first ones, or those of `test`."""

    def __post_init__(self) -> None:
        known = {column for columns in COLUMNS.values() for column in columns}
        for wanted in self.columns.keys() - known:
            raise Problem(f"`columns` gives a name to `{wanted}`, which no shape of data reads{nearest(wanted, known)}")

    def load(self, split: Literal["train", "test"]) -> Rows:
        """The rows of a split. Raises a `Problem` for what cannot be read or makes no shape, with its file and line."""
        if self.streaming:
            return self._stream_test() if split == "test" else self._stream_train()
        if self.test is not None and split == "test":
            return self._read(self.path, self.test) if self.names_split(self.test) else self._read(self.test, None)
        rows = self._read(self.path, self.split)
        if self.test is not None:
            return rows
        kept = [row for row in rows.rows if held_out(key_of(row, rows.shape), self.holdout) == (split == "test")]
        if not kept:
            rule = f"holdout {self.holdout:g} of its {len(rows)} rows leaves none for `{split}`"
            raise Problem(f"{rows.name}: {rule}; change `holdout`, or give held-out data of its own as `test`")
        return Rows(rows.shape, kept, rows.name, f"{rows.origin}, {'held-out' if split == 'test' else 'training'} rows")

    def digest(self) -> str:
        """sha256 of what the settings say and of every byte read (of a hub data set, its commit); folders above do not count.

        Of a stream not all is read: a file counts by its name, its size, the time of its last change, and its first and last MiB.
        """
        beside = {"path", "test", "revision"} | (set() if self.streaming else {"streaming", "buffer", "test_count"})
        settings = {key: value for key, value in dump(self)["file"].items() if key not in beside}
        made = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        update = _update_quickly if self.streaming else _update
        if self.path.startswith(HUB):
            made.update(f"{self.path}@{self._commit()}".encode())
        else:
            update(made, Path(self.path))
        if self.test is not None:
            made.update(b"\0test\0")
            if self.names_split(self.test):
                made.update(self.test.encode())
            else:
                update(made, Path(self.test))
        return made.hexdigest()

    def names_split(self, test: str) -> bool:
        """Whether `test` names a split of `path` and not a file."""
        has = self.path.startswith(HUB) or (Path(self.path) / "dataset_dict.json").exists()
        return has and re.fullmatch(r"[\w-]+", test) is not None

    def _read(self, where: str, split: str | None) -> Rows:
        if where == self.path and where.startswith(HUB):
            commit = self._commit()
            return self._checked(_rows(self._download(split, commit)), where, f"{where} at {commit[:12]}, split {split}")
        path = Path(where)
        if not path.exists():
            raise Problem(f"no file or folder {shown(where)}{similar(path)}; give a path that exists")
        if path.is_dir() and ((path / "dataset_dict.json").exists() or (path / "state.json").exists()):
            return self._checked(_rows(_split(datasets.load_from_disk(str(path)), split)), path.name, f"`datasets` folder {path.name}")
        _unsplit(split, path.name)
        if path.is_file():
            return self._checked(_reader(path)(path, START), path.name, f"file {path.name}")
        files = _folder(path)
        parts = [self._checked(_reader(file)(file, START), f"{path.name}/{file.relative_to(path).as_posix()}", "") for file in files]
        rows = [row for one in parts for row in one.rows]
        for one in parts:
            if one.shape != parts[0].shape:
                raise Problem(f"{one.name} holds {one.shape} rows and {parts[0].name} {parts[0].shape} rows; give files of one shape")
        return Rows(parts[0].shape, rows, path.name, f"{len(files)} files of folder {path.name}")

    def _checked(self, placed: Placed, name: str, origin: str) -> Rows:
        """Rows with their columns renamed, shape detected and every one validated."""
        places, rows = [], []
        for place, row, _ in placed:
            rows.append(self._renamed(row, f"{name}, {place}"))
            places.append(place)
        return Rows(detect_shape(rows, name), rows, name, origin).validate(places)

    def _renamed(self, row: dict[str, Any], where: str) -> dict[str, Any]:
        for wanted, present in self.columns.items():
            if present not in row:
                raise Problem(f"{where}: no column `{present}` to read as `{wanted}`; it has {listed(row)}{near(present, row)}")
        if not self.columns:
            return row
        rest = {key: value for key, value in row.items() if key not in self.columns.values()}
        return {**rest, **{wanted: row[present] for wanted, present in self.columns.items()}}

    # --------------------------------------------------------------------------------------------- streams

    def _stream_train(self) -> Rows:
        """All rows but those held out, as a stream."""
        rows = self._streamed(self.path, self.split)
        if self.test is not None:
            return rows
        assert isinstance(rows.rows, StreamedRows)
        every, shape = rows.rows.read, rows.shape
        held = {key_of(row, shape) for row in rows.rows[: self.test_count]}

        def read(state: Any) -> Iterator[tuple[dict[str, Any], Callable[[], Any]]]:
            return ((row, after) for row, after in every(state) if key_of(row, shape) not in held)

        made = StreamedRows(read, rows.name, self.buffer)
        if not made[:1]:
            rule = f"its first {self.test_count} rows are held out, which leaves none to train on"
            raise Problem(f"{rows.name}: {rule}; give a smaller `test_count`, or held-out data of its own as `test`")
        return Rows(shape, made, rows.name, f"{rows.origin}, after the first {self.test_count} rows, which are held out")

    def _stream_test(self) -> Rows:
        """The held-out rows, in memory."""
        if self.test is None:
            rows = self._streamed(self.path, self.split)
        else:
            rows = self._streamed(self.path, self.test) if self.names_split(self.test) else self._streamed(self.test, None)
        return Rows(rows.shape, rows.rows[: self.test_count], rows.name, f"{rows.origin}, its first {self.test_count} rows, held out")

    def _streamed(self, where: str, split: str | None) -> Rows:
        """All rows of a file, a folder or a split as a stream. Only its first rows are read here, for their shape."""
        name, origin, placed = self._opened(where, split)

        def renamed(state: Any) -> Iterator[tuple[str, dict[str, Any], Callable[[], Any]]]:
            return ((f"{name}, {place}", self._renamed(row, f"{name}, {place}"), after) for place, row, after in placed(state))

        shape = detect_shape([row for _, row, _ in itertools.islice(renamed(None), 10)], name)

        def read(state: Any) -> Iterator[tuple[dict[str, Any], Callable[[], Any]]]:
            for place, row, after in renamed(state):
                check_row(shape, row, place)
                yield row, after

        return Rows(shape, StreamedRows(read, name, self.buffer), name, f"{origin}, streamed")

    def _opened(self, where: str, split: str | None) -> tuple[str, str, Callable[[Any], Placed]]:
        """Name and origin of a stream, and how it is read from a state on."""
        if where == self.path and where.startswith(HUB):
            commit = self._commit()
            return where, f"{where} at {commit[:12]}, split {split}", lambda state: _resumed(self._download(split, commit, True), state)
        path = Path(where)
        if not path.exists():
            raise Problem(f"no file or folder {shown(where)}{similar(path)}; give a path that exists")
        if path.is_dir() and ((path / "dataset_dict.json").exists() or (path / "state.json").exists()):
            made = _split(datasets.load_from_disk(str(path)), split)
            return path.name, f"`datasets` folder {path.name}", lambda state: _rows(made, state or 0)
        _unsplit(split, path.name)
        files = _folder(path) if path.is_dir() else [path]
        for file in files:
            if _reader(file) is _json_file and _is_array(file):
                raise Problem(f"{file.name} is one JSON array, which is read whole; write a row a line (.jsonl), or leave `streaming` out")
        origin = f"{len(files)} files of folder {path.name}" if path.is_dir() else f"file {path.name}"
        return path.name, origin, lambda state: _one_by_one(files, state)

    # ---------------------------------------------------------------------------------------------- the hub

    def _download(self, split: str | None, commit: str, streaming: bool = False) -> Any:
        try:
            return datasets.load_dataset(self._repository, self.name, split=split, revision=commit, streaming=streaming)
        except Exception as error:
            raise self._refused(error) from error

    def _commit(self) -> str:
        """The commit that the revision stands for: asked of the hub, or, offline, what was asked last."""
        wanted = self.revision or "main"
        if re.fullmatch(r"[0-9a-f]{40}", wanted):
            return wanted
        import huggingface_hub
        from huggingface_hub import constants

        if huggingface_hub.is_offline_mode():
            kept = Path(constants.HF_HUB_CACHE, f"datasets--{self._repository.replace('/', '--')}", "refs", *wanted.split("/"))
            if not kept.is_file():
                raise Problem(f"{self.path} is not in the cache of the hub, and HF_HUB_OFFLINE is set; unset it once to fetch the data")
            return kept.read_text().strip()
        try:
            commit = huggingface_hub.HfApi().dataset_info(self._repository, revision=wanted).sha
        except Exception as error:
            raise self._refused(error) from error
        assert commit
        return commit

    @property
    def _repository(self) -> str:
        return self.path.removeprefix(HUB)

    def _refused(self, error: Exception) -> Problem:
        """What the hub's refusal asks of the user. Its own words are kept: they tell missing splits and configurations."""
        what = f"{type(error).__name__}: {error}"
        if "gated" in what.lower():
            page = f"https://huggingface.co/datasets/{self._repository}"
            return Problem(f"{self.path} is gated; accept its terms at {page} and run `hf auth login` (or set HF_TOKEN)")
        if type(error).__name__ in ("RepositoryNotFoundError", "DatasetNotFoundError"):
            return Problem(f"{self.path} is not on the hub, or private; check the name, or run `hf auth login` (or set HF_TOKEN)")
        if type(error).__name__ == "RevisionNotFoundError":
            return Problem(f"{self.path} has no revision {shown(self.revision)}; name a branch, a tag or a commit")
        return Problem(f"{self.path} cannot be read from the hub: {what.splitlines()[0]}")


def similar(path: Path) -> str:
    """`"; did you mean `data.jsonl`?"`, of what lies in the folder where `path` should be."""
    return near(path.name, [one.name for one in path.parent.iterdir()] if path.parent.is_dir() else [])


# ------------------------------------------------------------------------------------------------------ formats


Position = Sequence[int]
"""Where reading goes on in a file, and how many lines or rows lie before it."""
START, END = (0, 0), (1, 1)


def _jsonl(path: Path, start: Position = START) -> Placed:
    with path.open("rb") as file:
        number = start[1]

        def after() -> Position:
            return file.tell(), number

        file.seek(start[0])
        for line in iter(file.readline, b""):
            number += 1
            if line.strip():
                where = f"{path.name}, line {number}"
                yield f"line {number}", _object(_json(line, where), where), after


def _json_file(path: Path, start: Position = START) -> Placed:
    if not _is_array(path):  # many a .json holds an object per line
        yield from _jsonl(path, start)
        return
    for number, one in enumerate(_json(path.read_bytes(), path.name), start=1):
        yield f"row {number}", _object(one, f"{path.name}, row {number}"), _whole


def _is_array(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2**16).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _json(raw: bytes, where: str) -> Any:
    try:
        return json.loads(raw.decode("utf-8-sig").rstrip())
    except UnicodeDecodeError as error:
        raise Problem(f"{where}: not UTF-8 (byte {error.start + 1} is 0x{raw[error.start]:02x}); save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, column {error.colno}" if "\n" in error.doc else f"column {error.colno}"
        raise Problem(f"{where}: not JSON ({error.msg} at {at}): {shown(error.doc)}") from error


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Problem(f'{where}: {shown(value)} is no row; an object such as {{"text": ...}} is asked for')
    return value


def _csv(path: Path, start: Position = START) -> Placed:
    limit = csv.field_size_limit(sys.maxsize)  # csv refuses cells above 128 KiB unless told otherwise, for the whole process
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:

            def after() -> Position:
                return file.tell(), before + reader.line_num

            reader, before = csv.reader(iter(file.readline, ""), strict=True), 0
            header = next(reader, None)
            if not header or not all(header) or len(set(header)) < len(header):
                raise Problem(f"{path.name}, line 1: {shown(header)} is no header; name every column once")
            if start[0]:
                file.seek(start[0])
                reader, before = csv.reader(iter(file.readline, ""), strict=True), start[1]
            for cells in reader:
                place = f"line {before + reader.line_num}"
                if len(cells) != len(header):
                    raise Problem(
                        f"{path.name}, {place}: cells: {len(cells)}, columns in the header: {len(header)}; give every column a cell"
                    )
                row: dict[str, Any] = dict(zip(header, cells))
                if "messages" in row:
                    row["messages"] = _json(row["messages"].encode(), f"{path.name}, {place}, column `messages`")
                yield place, row, after
    except UnicodeDecodeError as error:
        raise Problem(f"{path.name}: not UTF-8 ({error.reason}); save the file as UTF-8") from error
    except csv.Error as error:
        raise Problem(f"{path.name}: not CSV ({error})") from error
    finally:
        csv.field_size_limit(limit)


def _parquet(path: Path, start: Position = START) -> Placed:
    import pyarrow
    import pyarrow.parquet

    number = group = 0

    def after() -> Position:
        return number, number

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            counts = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            while group < len(counts) and number + counts[group] <= start[0]:  # whole groups are passed over unread
                number, group = number + counts[group], group + 1
            for batch in file.iter_batches(batch_size=1024, row_groups=range(group, len(counts))):
                passed = min(max(0, start[0] - number), len(batch))
                number += passed
                for row in batch.slice(passed).to_pylist():
                    number += 1
                    yield f"row {number}", row, after
    except pyarrow.ArrowException as error:
        raise Problem(f"{path.name}: not Parquet ({str(error).splitlines()[0]})") from error


def _text(path: Path, start: Position = START) -> Placed:
    if start[0]:
        return
    try:
        yield "line 1", {"text": path.read_bytes().decode("utf-8-sig")}, lambda: END
    except UnicodeDecodeError as error:
        raise Problem(f"{path.name}: not UTF-8 (byte {error.start + 1}); save the file as UTF-8") from error


def _whole() -> Any:
    """In place of a state of what is only read whole."""
    raise ValueError("this format is not streamed")


def _one_by_one(files: Sequence[Path], state: Any) -> Placed:
    """Rows of several files, one after another, from a state on: the file's number and the position in it."""
    first, position = state or (0, START)

    def after() -> Any:
        return number, found[2]()

    for number in range(first, len(files)):
        for found in _reader(files[number])(files[number], position if number == first else START):
            yield found[0] if len(files) == 1 else f"{files[number].name}, {found[0]}", found[1], after


def _resumed(made: Any, state: Any) -> Placed:
    """Rows of a `datasets.IterableDataset` from its own state on."""
    if state is not None:
        made.load_state_dict(state["rows"])
    before = state["before"] if state is not None else 0

    def after() -> Any:
        return {"rows": made.state_dict(), "before": number}

    for number, row in enumerate(made, start=before + 1):
        yield f"row {number}", row, after


def _rows(made: Any, start: int = 0) -> Placed:
    """Rows of a `datasets` data set."""

    def after() -> int:
        return number

    for number, row in enumerate(made.skip(start) if start else made, start=start + 1):
        yield f"row {number}", row, after


def _split(made: Any, split: str | None) -> Any:
    """A data set, or the split of several that is asked for."""
    if not isinstance(made, Mapping):
        _unsplit(split, "the data set")
        return made
    if split not in made:
        raise Problem(f"the data have no split {shown(split)}{nearest(str(split), made)}")
    return made[split]


def _unsplit(split: str | None, name: str) -> None:
    if split not in (None, "train"):
        raise Problem(f"{name} has no splits, so none is called {shown(split)}; leave `split` out, or give a file as `test`")


_TABLES: dict[str, Callable[[Path, Position], Placed]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json_file,
    ".parquet": _parquet,
    ".csv": _csv,
}
_TEXTS: dict[str, Callable[[Path, Position], Placed]] = {".txt": _text, ".md": _text}
SUFFIXES = (*_TABLES, *_TEXTS)


def _reader(path: Path) -> Callable[[Path, Position], Placed]:
    reader = {**_TABLES, **_TEXTS}.get(path.suffix.lower())
    if reader is None:
        raise Problem(f"{path.name}: files that end in {shown(path.suffix)} are not read; there is {' · '.join(SUFFIXES)}")
    return reader


def _folder(path: Path) -> list[Path]:
    """The data files of a folder, by name. Where there are tables, texts beside them (a README) are no data."""
    tables = [one for one in _files(path) if one.suffix.lower() in _TABLES]
    files = tables or [one for one in _files(path) if one.suffix.lower() in _TEXTS]
    if not files:
        raise Problem(f"folder {path.name} holds no data; files are asked for that end in {' · '.join(SUFFIXES)}")
    kinds = {_reader(file) for file in files}
    if len(kinds) > 1:
        first = {file.suffix.lower() for file in files}
        raise Problem(f"folder {path.name} holds {' and '.join(sorted(first))}; give the path of one file, or keep one kind in a folder")
    return files


def _files(path: Path) -> list[Path]:
    """Every file below a folder in the order of names, without what is hidden."""
    found = []
    for folder, folders, files in os.walk(path):
        folders[:] = [one for one in folders if not one.startswith(".")]
        found += [Path(folder, one) for one in files if not one.startswith(".")]
    return sorted(found, key=lambda one: one.relative_to(path).as_posix())


def _update(made: Any, path: Path) -> None:
    """Adds a file, or every file of a folder, to a hash."""
    for file, inside in _inside(path):
        with file.open("rb") as opened:
            made.update(f"\0{inside}\0".encode() + hashlib.file_digest(opened, "sha256").digest())


def _update_quickly(made: Any, path: Path) -> None:
    """The same without reading all of it."""
    for file, inside in _inside(path):
        told = file.stat()
        with file.open("rb") as opened:
            first = opened.read(2**20)
            opened.seek(max(0, told.st_size - 2**20))
            ends = hashlib.sha256(first + opened.read(2**20)).digest()
        made.update(f"\0{inside}\0{told.st_size}\0{told.st_mtime_ns}\0".encode() + ends)


def _inside(path: Path) -> list[tuple[Path, str]]:
    """The files of a path, each with its name inside the folder, or else what its format follows from."""
    if path.is_dir():
        return [(file, file.relative_to(path).as_posix()) for file in _files(path)]
    return [(path, path.suffix.lower())]
