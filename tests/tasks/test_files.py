"""Every format is read; what cannot be read is named with its file and line; splits stay put when rows are added."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub import constants

from temper.parts import Problem, shown
from temper.tasks import files
from temper.tasks.files import File
from temper.tasks.source import source

ROWS = [{"prompt": f"{i} + 1 ==", "completion": f" {i + 1}"} for i in range(40)]
CHATS = [{"messages": [{"role": "user", "content": f"{i} + 1?"}, {"role": "assistant", "content": str(i + 1)}]} for i in range(40)]


def both(file):
    """All rows of a source, in the order of the file."""
    rows = [row for split in ("train", "test") for row in file.load(split).rows]
    return sorted(rows, key=json.dumps)


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)


def write(folder, kind, rows):
    path = folder / f"data.{kind}"
    match kind:
        case "jsonl" | "ndjson":
            jsonl(path, rows)
        case "json":
            path.write_text(json.dumps(rows, indent=1))
        case "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        case "csv":
            cells = [[v if isinstance(v, str) else json.dumps(v) for v in row.values()] for row in [dict.fromkeys(rows[0], ""), *rows]]
            cells[0] = list(rows[0])
            path.write_text("\n".join(",".join('"' + cell.replace('"', '""') + '"' for cell in line) for line in cells) + "\n")
        case "saved":
            datasets.Dataset.from_list(rows).save_to_disk(str(path))
        case "dict":
            datasets.DatasetDict(train=datasets.Dataset.from_list(rows), other=datasets.Dataset.from_list(rows[:1])).save_to_disk(str(path))
    return str(path)


@pytest.mark.parametrize("rows", [ROWS, CHATS], ids=["completion", "chat"])
@pytest.mark.parametrize("kind", ["jsonl", "ndjson", "json", "csv", "parquet", "saved", "dict"])
def test_every_format(tmp_path, kind, rows):
    file = File(write(tmp_path, kind, rows), holdout=0.3)
    assert both(file) == sorted(rows, key=json.dumps)
    train = file.load("train")
    assert train.shape == ("completion" if rows is ROWS else "chat")
    assert train.name == f"data.{kind}"
    assert str(tmp_path) not in train.origin
    # the same rows in another format split the same way
    other = tmp_path / "other"
    other.mkdir()
    assert File(write(other, "jsonl", rows), holdout=0.3).load("test").rows == file.load("test").rows


def test_a_json_file_of_lines(tmp_path):
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, ROWS)))
    assert both(File(str(tmp_path / "lines.json"), holdout=0.3)) == sorted(ROWS, key=json.dumps)


def test_texts(tmp_path):
    for name, text in {
        "b.txt": "second\r\n",
        "a.md": "# first\n",
        "sub/c.txt": "\ufeffthird é",
        ".hidden.txt": "no",
        "pic.png": "no",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    rows = File(str(tmp_path), holdout=0.0).load("train")
    assert rows.rows == [{"text": "# first\n"}, {"text": "second\r\n"}, {"text": "third é"}]
    assert rows.origin == f"3 files of folder {tmp_path.name}, training rows"
    assert File(str(tmp_path / "a.md"), holdout=0.0).load("train").rows == [{"text": "# first\n"}]


def test_a_folder_of_tables_ignores_its_readme(tmp_path):
    jsonl(tmp_path / "b.jsonl", ROWS[20:])
    jsonl(tmp_path / "a.jsonl", ROWS[:20])
    (tmp_path / "README.md").write_text("What this is.")
    assert File(str(tmp_path), holdout=0.0).load("train").rows == ROWS


def test_large_cells_and_lines_within_cells(tmp_path):
    (tmp_path / "d.csv").write_text('text\n"' + "a" * 200_000 + '"\n"one\ntwo"\n')
    assert [len(row["text"]) for row in File(str(tmp_path / "d.csv"), holdout=0.0).load("train").rows] == [200_000, 7]


# ------------------------------------------------------------------------------------------------------- errors


BAD = {
    "a.jsonl": ('{"text": "a"}\n\n{"text": "b"\n', 'a.jsonl, line 3: not JSON (Expecting \',\' delimiter at column 13): "{"text": "b""'),
    "b.jsonl": ('{"text": "a"}\n["b"]\n', 'b.jsonl, line 2: ["b"] is no row; an object such as {"text": ...} is asked for'),
    "c.jsonl": (b'{"text": "a"}\n{"text": "\xe9"}\n', "c.jsonl, line 2: not UTF-8 (byte 11 is 0xe9); save the file as UTF-8"),
    "d.jsonl": ('\n{"text": "a"}\n\n{"text": 4}\n', "d.jsonl, line 4, column `text`: 4; a text is asked for"),
    "e.jsonl": (
        '{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completon": "b"}\n',
        "e.jsonl, line 2: no column `completion`, which completion rows need; it has the columns `prompt`, `completon`; "
        "did you mean `completon`?",
    ),
    "f.jsonl": ("", "f.jsonl has no rows; at least one is needed"),
    "g.json": ('[{"text": "a"},\n {"text": }]', 'g.json: not JSON (Expecting value at line 2, column 11): "[{"text": "a"},\n {"text": }]"'),
    "h.json": ('[{"text": "a"}, 3]', 'h.json, row 2: 3 is no row; an object such as {"text": ...} is asked for'),
    "i.csv": ("text,label\na,b\nc\n", "i.csv, line 3: cells: 1, columns in the header: 2; give every column a cell"),
    "j.csv": ("text,text\na,b\n", 'j.csv, line 1: ["text", "text"] is no header; name every column once'),
    "k.csv": ("", "k.csv, line 1: null is no header; name every column once"),
    "l.csv": ('text\n"a\n', "l.csv: not CSV (unexpected end of data)"),
    "m.csv": (b"text\n\xe9\n", "m.csv: not UTF-8 (invalid continuation byte); save the file as UTF-8"),
    "n.csv": ('messages\n"[{""role"": "\n', 'n.csv, line 2, column `messages`: not JSON (Expecting value at column 10): "[{"role":"'),
    "o.txt": (b"abc\xff", "o.txt: not UTF-8 (byte 4); save the file as UTF-8"),
    "p.pdf": ("x", 'p.pdf: files that end in ".pdf" are not read; there is .jsonl · .ndjson · .json · .parquet · .csv · .txt · .md'),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named(tmp_path, name):
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(Problem) as caught:
        File(str(tmp_path / name)).load("train")
    assert str(caught.value) == message


def test_a_file_that_is_no_parquet(tmp_path):
    (tmp_path / "d.parquet").write_text("no")
    with pytest.raises(Problem, match=r"^d\.parquet: not Parquet \("):
        File(str(tmp_path / "d.parquet")).load("train")


def test_a_missing_file_names_its_neighbour(tmp_path):
    jsonl(tmp_path / "train.jsonl", ROWS)
    missing = tmp_path / "trian.jsonl"
    with pytest.raises(Problem) as caught:
        File(str(missing)).load("train")
    assert str(caught.value) == f"no file or folder {shown(str(missing))}; did you mean `train.jsonl`?; give a path that exists"


def test_folders_that_cannot_be_read(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    with pytest.raises(Problem) as caught:
        File(str(data)).load("train")
    assert str(caught.value) == (
        "folder data holds no data; files are asked for that end in .jsonl · .ndjson · .json · .parquet · .csv · .txt · .md"
    )
    jsonl(data / "a.jsonl", ROWS)
    (data / "b.csv").write_text("text\na\n")
    with pytest.raises(Problem) as caught:
        File(str(data)).load("train")
    assert str(caught.value) == "folder data holds .csv and .jsonl; give the path of one file, or keep one kind in a folder"
    (data / "b.csv").unlink()
    jsonl(data / "b.jsonl", CHATS)
    with pytest.raises(Problem) as caught:
        File(str(data)).load("train")
    assert str(caught.value) == "data/b.jsonl holds chat rows and data/a.jsonl completion rows; give files of one shape"


# --------------------------------------------------------------------------------------------- splits and columns


def test_splits_are_apart_and_stay_when_rows_are_added(tmp_path):
    few, many = (
        File(jsonl(tmp_path / "few.jsonl", ROWS), holdout=0.3),
        File(jsonl(tmp_path / "many.jsonl", ROWS[::-1]), holdout=0.3),
    )
    more = [{"prompt": f"{i} + 2 ==", "completion": "?"} for i in range(200)]
    more = File(jsonl(tmp_path / "more.jsonl", more + ROWS), holdout=0.3)
    held = few.load("test").rows
    assert 0 < len(held) < len(ROWS) / 2
    assert not [row for row in few.load("train").rows if row in held]
    assert many.load("test").rows == held[::-1]
    assert [row for row in more.load("test").rows if row in ROWS] == held


def test_rows_that_share_a_prompt_stay_together(tmp_path):
    rows = [{"prompt": f"{i % 10}?", "completion": f" {i}"} for i in range(100)]
    file = File(jsonl(tmp_path / "d.jsonl", rows), holdout=0.5)
    prompts = [{row["prompt"] for row in file.load(split).rows} for split in ("train", "test")]
    assert all(prompts)
    assert not prompts[0] & prompts[1]


def test_a_split_that_would_be_empty(tmp_path):
    path = jsonl(tmp_path / "d.jsonl", ROWS)
    with pytest.raises(Problem) as caught:
        File(path, holdout=0.0).load("test")
    assert str(caught.value) == (
        "d.jsonl: holdout 0 of its 40 rows leaves none for `test`; change `holdout`, or give held-out data of its own as `test`"
    )
    with pytest.raises(Problem, match="leaves none for `train`"):
        File(path, holdout=1.0).load("train")


def test_held_out_data_of_its_own(tmp_path):
    file = File(jsonl(tmp_path / "a.jsonl", ROWS[:30]), test=jsonl(tmp_path / "b.jsonl", ROWS[30:]))
    assert file.load("train").rows == ROWS[:30]
    assert file.load("test").rows == ROWS[30:]
    assert file.load("test").name == "b.jsonl"


def test_splits_of_a_saved_data_set(tmp_path):
    path = write(tmp_path, "dict", ROWS)
    file = File(path, test="other")
    assert file.load("train").rows == ROWS
    assert file.load("test").rows == ROWS[:1]
    assert File(path, split="other", holdout=0.0).load("train").rows == ROWS[:1]
    with pytest.raises(Problem) as caught:
        File(path, test="othr").load("test")
    assert str(caught.value) == 'the data have no split "othr"; did you mean `other`?'
    with pytest.raises(Problem) as caught:
        File(write(tmp_path, "saved", ROWS), split="other").load("train")
    assert str(caught.value) == 'the data set has no splits, so none is called "other"; leave `split` out, or give a file as `test`'
    with pytest.raises(Problem) as caught:
        File(jsonl(tmp_path / "d.jsonl", ROWS), split="test").load("train")
    assert str(caught.value) == 'd.jsonl has no splits, so none is called "test"; leave `split` out, or give a file as `test`'


def test_columns_are_read_by_other_names(tmp_path):
    path = jsonl(tmp_path / "d.jsonl", [{"question": row["prompt"], "answer": row["completion"], "id": 3} for row in ROWS])
    file = File(path, columns={"prompt": "question", "completion": "answer"}, holdout=0.0)
    assert file.load("train").rows == [{"id": 3, **row} for row in ROWS]
    swapped = File(jsonl(tmp_path / "e.jsonl", ROWS), columns={"prompt": "completion", "completion": "prompt"}, holdout=0.0)
    assert swapped.load("train").rows[0] == {"prompt": " 1", "completion": "0 + 1 =="}
    with pytest.raises(Problem) as caught:
        File(path, columns={"prompt": "quetion", "completion": "answer"}).load("train")
    assert str(caught.value) == (
        "d.jsonl, line 1: no column `quetion` to read as `prompt`; it has the columns `question`, `answer`, `id`; did you mean `question`?"
    )


# -------------------------------------------------------------------------------------------------------- digest


@pytest.mark.parametrize("kind", ["jsonl", "saved"])
def test_digest_follows_bytes_and_not_paths(tmp_path, kind):
    for name in "ab":
        (tmp_path / name).mkdir()
    first = File(write(tmp_path / "a", kind, ROWS))
    before = first.digest()
    moved = Path(first.path).rename(tmp_path / "b" / Path(first.path).name)
    assert File(str(moved)).digest() == before
    assert File(str(moved), holdout=0.06).digest() != before
    assert File(str(moved), columns={"text": "prompt"}).digest() != before
    inside = moved if moved.is_file() else next(moved.glob("*.arrow"))
    raw = bytearray(inside.read_bytes())
    raw[-3] ^= 1
    inside.write_bytes(bytes(raw))
    assert File(str(moved)).digest() != before


def test_digest_of_a_folder_and_of_test_data(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for name in ("a.txt", "b.txt"):
        (data / name).write_text(name)
    before = File(str(data)).digest()
    (data / ".cache").write_text("hidden")
    assert File(str(data)).digest() == before
    (data / "b.txt").rename(data / "c.txt")
    assert File(str(data)).digest() != before
    one, two = jsonl(tmp_path / "1.jsonl", ROWS[:1]), jsonl(tmp_path / "2.jsonl", ROWS[:2])
    assert len({File(one).digest(), File(one, test=two).digest(), File(one, test=one).digest(), File(two, test=one).digest()}) == 4


# ------------------------------------------------------------------------------------------------------- the hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Stands for the hub: what was asked of it, and what it answers."""

    def __init__(self, error=None):
        self.asked, self.error = [], error

    def dataset_info(self, repository, revision):
        self.asked.append((repository, revision))
        return SimpleNamespace(sha=COMMIT)

    def load_dataset(self, repository, name, split, revision, streaming):
        self.asked.append((repository, name, split, revision))
        if self.error:
            raise self.error
        made = datasets.Dataset.from_list(ROWS if split == "train" else ROWS[:2])
        return made.to_iterable_dataset(num_shards=2) if streaming else made


@pytest.fixture
def hub(monkeypatch):
    made = Hub()
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
    monkeypatch.setattr(datasets, "load_dataset", made.load_dataset)
    return made


def test_a_hub_data_set_is_read_at_a_commit(hub):
    file = File("hub:org/sums", name="easy", test="validation")
    rows = file.load("train")
    assert rows.rows == ROWS
    assert rows.name == "hub:org/sums"
    assert rows.origin == "hub:org/sums at 0123456789ab, split train"
    assert file.load("test").rows == ROWS[:2]
    assert ("org/sums", "easy", "train", COMMIT) in hub.asked
    assert ("org/sums", "easy", "validation", COMMIT) in hub.asked


def test_a_hub_digest_is_its_commit(hub):
    before = File("hub:org/sums").digest()
    assert before == File("hub:org/sums", revision=COMMIT).digest()
    assert before != File("hub:org/sums", revision=COMMIT[::-1]).digest()
    assert before != File("hub:org/sums", name="easy").digest()
    assert before != File("hub:org/sum").digest()


def test_offline_the_last_commit_is_used(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(Problem) as caught:
        File("hub:org/sums").digest()
    assert str(caught.value) == ("hub:org/sums is not in the cache of the hub, and HF_HUB_OFFLINE is set; unset it once to fetch the data")
    kept = tmp_path / "datasets--org--sums" / "refs" / "main"
    kept.parent.mkdir(parents=True)
    kept.write_text(COMMIT)
    assert File("hub:org/sums").digest() == File("hub:org/sums", revision=COMMIT).digest()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            datasets.exceptions.DatasetNotFoundError("Dataset 'org/sums' is a gated dataset on the Hub."),
            "hub:org/sums is gated; accept its terms at https://huggingface.co/datasets/org/sums and run `hf auth login` (or set HF_TOKEN)",
        ),
        (
            datasets.exceptions.DatasetNotFoundError("Dataset 'org/sums' doesn't exist on the Hub or cannot be accessed."),
            "hub:org/sums is not on the hub, or private; check the name, or run `hf auth login` (or set HF_TOKEN)",
        ),
        (
            ValueError("Unknown split \"train\". Should be one of ['test'].\nmore"),
            "hub:org/sums cannot be read from the hub: ValueError: Unknown split \"train\". Should be one of ['test'].",
        ),
    ],
)
def test_what_the_hub_refuses(hub, error, message):
    hub.error = error
    with pytest.raises(Problem) as caught:
        File("hub:org/sums").load("train")
    assert str(caught.value) == message


# ------------------------------------------------------------------------------------------------------ streaming


def streamed(path, **settings):
    return File(**{"path": str(path), "streaming": True, "test_count": 5, **settings})


def test_the_first_rows_of_a_stream_are_held_out_and_none_that_shares_a_prompt_is_trained_on(tmp_path):
    path = jsonl(
        tmp_path / "data.jsonl", [*ROWS, {"prompt": ROWS[3]["prompt"], "completion": " another"}, {"prompt": "x", "completion": "y"}]
    )
    file = streamed(path)
    assert file.load("test").rows == ROWS[:5]
    rows = file.load("train")
    assert rows.rows[:1000] == [*ROWS[5:], {"prompt": "x", "completion": "y"}]
    assert (rows.shape, rows.name) == ("completion", "data.jsonl")
    assert rows.origin == "file data.jsonl, streamed, after the first 5 rows, which are held out"
    assert streamed(path, buffer=2).load("train").at_hand == ROWS[5:7]
    assert File(path).load("train").at_hand == File(path).load("train").rows


def test_held_out_data_of_its_own_leave_a_stream_whole(tmp_path):
    path, test = jsonl(tmp_path / "data.jsonl", ROWS), jsonl(tmp_path / "test.jsonl", CHATS)
    file = streamed(path, test=test)
    assert file.load("train").rows[:1000] == ROWS
    assert file.load("test").rows == CHATS[:5]


def test_a_stream_is_not_read_before_it_is_needed(tmp_path, monkeypatch):
    path, lines = jsonl(tmp_path / "data.jsonl", ROWS), []
    original = files._json
    monkeypatch.setattr(files, "_json", lambda raw, where: lines.append(where) or original(raw, where))
    streamed(path).load("train")
    assert len(lines) <= 10 + 5 + 6  # the shape, the rows held out, and whether any is left
    assert max(int(where.split()[-1]) for where in lines) == 10


def test_what_needs_all_rows_of_a_stream_is_refused(tmp_path):
    rows = streamed(jsonl(tmp_path / "data.jsonl", ROWS)).load("train")
    for ask in (len, list, rows.__class__.validate, lambda rows: rows.rows[3], lambda rows: rows.rows[:-1]):
        with pytest.raises(Problem, match=r"data.jsonl is a stream and not held in memory.*leave `streaming` out"):
            ask(rows.rows if ask is list else rows)


def test_a_stream_as_text(tmp_path):
    text = streamed(jsonl(tmp_path / "data.jsonl", ROWS)).load("train").as_text()
    assert text.shape == "text"
    assert text.rows[:2] == [{"text": "5 + 1 == 6"}, {"text": "6 + 1 == 7"}]


@pytest.mark.parametrize(
    ("rows", "settings", "match"),
    [
        (ROWS[:5], {}, "its first 5 rows are held out, which leaves none to train on; give a smaller `test_count`"),
        ([{"words": "a"}] * 9, {}, "no shape"),
        (ROWS, {"columns": {"text": "body"}}, "data.jsonl, line 1: no column `body`"),
    ],
)
def test_a_stream_that_cannot_be_trained_on_is_refused_at_once(rows, settings, match, tmp_path):
    with pytest.raises(Problem, match=match):
        streamed(jsonl(tmp_path / "data.jsonl", rows), **settings).load("train")


def test_one_json_array_is_no_stream(tmp_path):
    with pytest.raises(Problem, match="one JSON array, which is read whole"):
        streamed(write(tmp_path, "json", ROWS)).load("train")
    lines = tmp_path / "lines.json"
    jsonl(lines, ROWS)
    assert streamed(lines).load("train").rows[:2] == ROWS[5:7]


def test_a_stream_stands_alone(tmp_path):
    one = streamed(jsonl(tmp_path / "data.jsonl", ROWS))
    with pytest.raises(Problem, match=r"data.jsonl is a stream, which stands alone; put its files into one folder"):
        source([one, one]).load("train")
    assert source([one, one]).load("test").rows == [*ROWS[:5], *ROWS[:5]]


def test_the_digest_of_a_stream_reads_only_the_ends_of_a_file(tmp_path):
    path = tmp_path / "big.jsonl"
    path.write_bytes(b'{"text": "a"}\n' * 2**18)  # 3.5 MiB
    told = path.stat()
    digests = {streamed(path).digest(), streamed(path, buffer=7).digest(), streamed(path, test_count=7).digest()}
    assert len(digests) == 3
    whole = streamed(path).digest()
    assert whole == streamed(path).digest()
    with path.open("r+b") as file:  # in the middle: seen by the time of the change alone
        file.seek(2**21)
        file.write(b"z")
    os.utime(path, ns=(told.st_atime_ns, told.st_mtime_ns))
    assert streamed(path).digest() == whole
    os.utime(path, ns=(told.st_atime_ns, told.st_mtime_ns + 1))
    assert streamed(path).digest() != whole
    for place in (0, told.st_size - 3):  # at an end
        with path.open("r+b") as file:
            file.seek(place)
            file.write(b"z")
        os.utime(path, ns=(told.st_atime_ns, told.st_mtime_ns))
        assert streamed(path).digest() != whole


def test_settings_of_streams_leave_the_digest_of_other_data_as_it_was(tmp_path):
    path = jsonl(tmp_path / "data.jsonl", ROWS)
    assert File(path, buffer=7, test_count=9).digest() == File(path).digest() != streamed(path).digest()
