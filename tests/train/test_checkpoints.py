"""Checkpoints: what goes in comes out, and what is damaged does not."""

from __future__ import annotations

import pytest
import torch

from temper.train.checkpoints import Checkpoints, fill, read, whole

STATE = {
    "tensors": {"a.b": torch.arange(3.0), "a": {"b": torch.tensor([True, False])}, "half": torch.ones(2, dtype=torch.bfloat16)},
    "optimizer": {"state": {0: {"step": torch.tensor(2.0)}, 1: {}}, "param_groups": [{"betas": (0.9, 0.999), "lr": 0.1, "fused": None}]},
    "n": 3,
    "text": "né",
    "infinite": float("inf"),
}


def equal(one, two):
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return isinstance(two, dict) and list(one) == list(two) and all(equal(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(two) and len(one) == len(two) and all(map(equal, one, two))
    return one == two and type(one) is type(two)


@pytest.fixture
def saved(tmp_path):
    """Checkpoints after updates 4, 8 and 12, and the notes made on the way."""
    notes = []
    made = Checkpoints(tmp_path / "checkpoints", notes.append)
    for update in (4, 8, 12):
        made.save(update, {**STATE, "n": update})
    return made, tmp_path / "checkpoints", notes


def test_a_state_comes_back_as_it_was(tmp_path):
    fill(tmp_path, STATE)
    assert equal(read(tmp_path), STATE)


def test_shared_storage_comes_back_as_copies(tmp_path):
    base = torch.arange(6.0)
    fill(tmp_path, {"all": base, "half": base[:3], "again": base, "turned": base.view(2, 3).T})
    back = read(tmp_path)
    assert torch.equal(back["half"], base[:3])
    assert torch.equal(back["again"], base)
    assert torch.equal(back["turned"], base.view(2, 3).T)


def test_what_json_cannot_hold_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"optimizer\.history: a set cannot be kept"):
        fill(tmp_path, {"optimizer": {"history": {1, 2}}})


def test_the_newest_two_stay(saved):
    made, folder, notes = saved
    assert sorted(path.name for path in folder.iterdir()) == ["00000008", "00000012"]
    update, state = made.load()
    assert (update, state["n"], notes) == (12, 12, [])


def test_no_checkpoint_is_none(tmp_path):
    assert Checkpoints(tmp_path / "none", print).load() is None


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip, lambda path: path.unlink(), lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_passed_over_with_a_note(saved, damage, name):
    made, folder, notes = saved
    damage(folder / "00000012" / name)
    update, state = made.load()
    assert (update, state["n"]) == (8, 8)
    assert len(notes) == 1
    assert notes[0].startswith("checkpoint 00000012 is damaged (")
    assert made.load()[0] == 8
    assert len(notes) == 1  # it is gone


def test_an_unfinished_write_is_cleared_away(saved):
    made, folder, notes = saved
    (folder / ".unfinished-00000016").mkdir()
    (folder / ".unfinished-00000016" / "tensors.safetensors").write_bytes(b"torn")
    assert made.load()[0] == 12
    assert sorted(path.name for path in folder.iterdir()) == ["00000008", "00000012"]
    assert notes == []


def test_a_folder_that_fails_while_it_is_filled_leaves_the_old_one(tmp_path):
    with whole(tmp_path / "kept") as beside:
        (beside / "file").write_text("old")

    def fails():
        with whole(tmp_path / "kept") as beside:
            (beside / "file").write_text("new")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fails()
    assert (tmp_path / "kept" / "file").read_text() == "old"
