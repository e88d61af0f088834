"""The library corpus: whole modules held out, deterministic, nothing of this machine in it."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from temper.parts import Problem
from temper.tasks import library
from temper.tasks.library import Library


def modules(rows):
    return {row["module"] for row in rows.rows}


def test_held_out_modules_are_whole_and_apart():
    small = Library(limit=600_000, holdout=0.2)
    train, test = small.load("train"), small.load("test")
    assert modules(train)
    assert modules(test)
    assert not modules(train) & modules(test)
    assert not {row["text"] for row in train.rows} & {row["text"] for row in test.rows}
    assert 500_000 < sum(len(row["text"].encode()) for row in train.rows) <= 600_000
    assert sum(len(row["text"].encode()) for row in test.rows) <= 120_000
    # which module is held out depends on its name alone
    assert not modules(Library(limit=3_000_000, holdout=0.2).load("train")) & modules(test)


def test_deterministic():
    small = Library(limit=300_000)
    assert small.load("train") == small.load("train")
    assert small.digest() == small.digest() != Library(limit=300_001).digest()


def test_rows_hold_text_and_no_paths():
    rows = Library(limit=2_000_000).load("train")
    assert rows.shape == "text"
    assert rows.name == "house:library"
    root = sysconfig.get_path("stdlib")
    assert not any(root in row["text"] for row in rows.rows)
    assert all(row["text"].strip() and row["text"].endswith("\n") for row in rows.rows)
    assert not any(part in library._SKIPPED for row in rows.rows for part in row["module"].split("."))


SOURCE = '''"""Module."""

import os


# about f
@wraps
def f():
    return 1


class A:
    """Text."""

    def g(self):
        pass

    # about h
    @property
    def h(self):
        return """
def not_cut(): a string, after no empty line
"""
'''


def test_pieces_begin_at_definitions_and_lose_nothing():
    pieces = list(library._pieces(SOURCE, 60))
    assert [piece.splitlines()[0] for piece in pieces] == ['"""Module."""', "# about f", "class A:", "    # about h"]
    assert "".join(pieces).replace("\n", "") == SOURCE.replace("\n", "")
    assert list(library._pieces(SOURCE, 10_000)) == [SOURCE.strip("\n") + "\n"]
    assert list(library._pieces("", 10)) == []
    table = "\n\n".join(f"a{i} = {i}" for i in range(100)) + "\n"
    assert max(map(len, library._pieces(table, 50))) <= 50


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A library of our own making."""
    monkeypatch.setattr(library.sysconfig, "get_path", lambda name: str(tmp_path))
    for name in ["a.py", "b/__init__.py", "b/c.py", "test/t.py", "site-packages/p.py", "_sysconfigdata_x.py", "not-a-name.py", "d.txt"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"name = {name!r}\n")
    return tmp_path


def test_what_is_read(tree):
    assert [name for name, _ in library._found()] == ["a", "b.__init__", "b.c"]
    whole = Library(holdout=0.0).load("train")
    assert modules(whole) == {"a", "b.__init__", "b.c"}


def test_digest_follows_contents_and_not_the_folder(tree, tmp_path_factory, monkeypatch):
    before = Library().digest()
    moved = tmp_path_factory.mktemp("moved") / "lib"
    Path(tree).rename(moved)
    monkeypatch.setattr(library.sysconfig, "get_path", lambda name: str(moved))
    assert Library().digest() == before
    (moved / "test" / "t.py").write_text("changed = 1\n")
    assert Library().digest() == before
    (moved / "a.py").write_text("name = 'a.pz'\n")
    assert Library().digest() != before


def test_a_python_without_sources_is_refused(tree):
    with pytest.raises(Problem) as caught:
        Library(limit=1).load("train")
    assert str(caught.value) == (
        "no library module is left for `train` with limit 1 and holdout 0.1; raise them, "
        "or check that this Python's library has its sources"
    )
