"""The store: atomic, checksummed, safe between processes, never half-written."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from temper.parts import Problem
from temper.passport import Artefact, Passport
from temper.store import Damaged, Store, digest

KEY = digest("one")


def record(name: str = "tune") -> dict:
    return {"name": name, "figures": {}, "passport": Passport("model").dump()}


def fill(store: Store, key: str = KEY, text: str = "weights") -> Path:
    out = store.work(key) / "out"
    (out / "model").mkdir(parents=True)
    (out / "model" / "model.safetensors").write_text(text)
    (out / "record").mkdir()
    (out / "record" / "curve.jsonl").write_text(f"{time.time()}\n")
    return out


def test_sealed_artefacts_come_back_whole(tmp_path):
    store = Store(tmp_path)
    made = store.seal(KEY, fill(store), record())
    assert store.has(KEY)
    assert store.get(KEY) == made
    assert (made.model / "model.safetensors").read_text() == "weights"
    assert store.verify() == {KEY: "whole"}


def test_content_is_a_hash_of_the_files_without_the_record_of_their_making(tmp_path):
    one, two, three = Store(tmp_path / "1"), Store(tmp_path / "2"), Store(tmp_path / "3")
    contents = [store.seal(KEY, fill(store, text=text), record()).content for store, text in ((one, "a"), (two, "a"), (three, "b"))]
    assert contents[0] == contents[1] != contents[2]


def test_a_damaged_file_is_found_on_the_first_reading_and_by_verify(tmp_path):
    store = Store(tmp_path)
    made = store.seal(KEY, fill(store), record())
    file = made.model / "model.safetensors"
    store.get(KEY)  # its identity is known now
    file.write_text("wieghts")
    with pytest.raises(Damaged, match=r"model/model\.safetensors does not match its checksum"):
        Store(tmp_path).get(KEY)
    assert "does not match" in store.verify()[KEY]
    moved = store.set_aside(KEY)
    assert moved.is_dir()
    assert not store.has(KEY)


def test_verify_finds_damage_that_keeps_size_and_time(tmp_path):
    store = Store(tmp_path)
    file = store.seal(KEY, fill(store), record()).model / "model.safetensors"
    stat = file.stat()
    with file.open("r+b") as handle:
        handle.write(b"W")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    store.get(KEY)  # the identity is unchanged, so a quick look cannot see it
    assert "does not match" in store.verify()[KEY]


def test_a_missing_file_is_named(tmp_path):
    store = Store(tmp_path)
    made = store.seal(KEY, fill(store), record())
    (made.model / "model.safetensors").unlink()
    with pytest.raises(Damaged, match=r"model/model\.safetensors is missing"):
        store.get(KEY)


def test_an_adapter_brings_its_base(tmp_path):
    store = Store(tmp_path)
    base = store.seal(KEY, fill(store), record("base"))
    other = digest("two")
    made = store.seal(other, fill(store, other, "adapter"), record("tune"), base)
    assert made.base == base
    outside = Artefact("abc", tmp_path / "folder", Passport("model"), content="abc", name="mine")
    third = digest("three")
    assert store.seal(third, fill(store, third), record("tune"), outside).base == outside


def test_find_by_key_by_step_and_by_recipe(tmp_path):
    store = Store(tmp_path)
    store.seal(KEY, fill(store), record())
    store.save_run(store.run_id("first"), {"name": "first", "state": "done", "steps": [{"name": "tune", "key": KEY}]})
    assert store.find(KEY[:8]) == store.find("tune") == store.find("first/tune") == KEY
    with pytest.raises(Problem, match=r"no artefact `tun`.*did you mean `tune`"):
        store.find("tun")
    with pytest.raises(Problem, match="no artefact `second/tune`"):
        store.find("second/tune")


def test_gc_keeps_what_the_latest_runs_use_and_their_bases(tmp_path):
    store = Store(tmp_path)
    keys = [digest(name) for name in ("base", "adapter", "old")]
    base = store.seal(keys[0], fill(store, keys[0]), record("base"))
    store.seal(keys[1], fill(store, keys[1]), record("tune"), base)
    store.seal(keys[2], fill(store, keys[2]), record("old"))
    store.save_run("1", {"name": "r", "state": "done", "steps": [{"name": "tune", "key": keys[2]}]})
    store.save_run("2", {"name": "r", "state": "done", "steps": [{"name": "tune", "key": keys[1]}]})
    going, size = store.free(keep_runs=1, dry=True)
    assert going == [keys[2]]
    assert size > 0
    assert store.has(keys[2])
    store.free(keep_runs=1)
    assert store.keys() == sorted(keys[:2])


def _make(root: str, number: int, results) -> None:
    store = Store(Path(root))
    with store.lock(KEY):
        if store.has(KEY):
            results.put("found")
            return
        out = fill(store)
        time.sleep(0.2)
        store.seal(KEY, out, record())
        results.put("made")


def test_processes_that_want_one_artefact_make_it_once(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    results = spawn.Queue()
    workers = [spawn.Process(target=_make, args=(str(tmp_path), number, results)) for number in range(3)]
    for one in workers:
        one.start()
    for one in workers:
        one.join(60)
    assert sorted(results.get(timeout=10) for _ in workers) == ["found", "found", "made"]
    assert Store(tmp_path).verify() == {KEY: "whole"}


def _hang(root: str, ready) -> None:
    store = Store(Path(root))
    with store.lock(KEY):
        fill(store)
        ready.set()
        time.sleep(60)


def test_a_killed_process_lets_go_of_its_lock_and_leaves_no_half_artefact(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    ready = spawn.Event()
    worker = spawn.Process(target=_hang, args=(str(tmp_path), ready))
    worker.start()
    assert ready.wait(30)
    store = Store(tmp_path)
    assert store.busy(KEY)
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    assert not store.busy(KEY)
    assert not store.has(KEY)
    assert store.keys() == []
    with store.lock(KEY):
        pass


def test_a_torn_run_record_is_passed_over(tmp_path):
    store = Store(tmp_path)
    store.save_run("1", {"name": "r", "steps": []})
    (tmp_path / "runs" / "2.json").write_text('{"name": "r"')
    assert [run["run"] for run in store.runs()] == ["1"]
    assert json.loads((tmp_path / "runs" / "1.json").read_text())["name"] == "r"


def test_files_outside_are_hashed_once_per_identity(tmp_path, monkeypatch):
    from temper import store as module

    store, file = Store(tmp_path / "store"), tmp_path / "weights"
    file.write_text("one")
    first = store.remembered(file)
    monkeypatch.setattr(module, "digest_file", lambda path: pytest.fail("read again"))
    assert Store(tmp_path / "store").remembered(file) == first
    monkeypatch.undo()
    file.write_text("other")
    assert store.remembered(file) != first


def test_gc_keeps_what_a_run_under_way_has_made(tmp_path):
    store = Store(tmp_path)
    keys = [digest(name) for name in ("base", "tune")]
    store.seal(keys[0], fill(store, keys[0]), record("base"))
    store.save_run("1", {"name": "r", "state": "running", "steps": [{"name": "base", "key": keys[0]}, {"name": "tune", "key": keys[1]}]})
    with store.lock(keys[1]):
        assert Store(tmp_path).free(keep_runs=0) == ([], 0)
    assert Store(tmp_path).free(keep_runs=0)[0] == [keys[0]]
