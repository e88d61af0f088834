"""Checkpoints: what goes in comes out, whoever wrote it; the loop waits for a copy alone; what is damaged or half there does not count."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import random
import resource
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import forks
import pytest
import torch
from safetensors import safe_open
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from temper.train.checkpoints import Checkpoints, Torn, fill, mend, read, storage, whole

STATE = {
    "tensors": {"a.b": torch.arange(3.0), "a": {"b": torch.tensor([True, False])}, "half": torch.ones(2, dtype=torch.bfloat16)},
    "optimizer": {"state": {0: {"step": torch.tensor(2.0)}, 1: {}}, "param_groups": [{"betas": (0.9, 0.999), "lr": 0.1, "fused": None}]},
    "n": 3,
    "text": "né",
    "infinite": float("inf"),
}


def equal(one, two):
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and bits(one) == bits(two)
    if isinstance(one, dict):
        return isinstance(two, dict) and list(one) == list(two) and all(equal(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(two) and len(one) == len(two) and all(map(equal, one, two))
    return one == two and type(one) is type(two)


def bits(tensor):
    return tensor.dtype, tensor.shape, bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def made(tmp_path):
    """Checkpoints in `tmp_path`, and the notes made on the way."""
    notes = []
    made = Checkpoints(tmp_path, notes.append)
    yield made, notes
    made.close()


@pytest.fixture
def saved(tmp_path):
    """Checkpoints after updates 4, 8 and 12, and the notes made on the way."""
    notes = []
    made = Checkpoints(tmp_path / "checkpoints", notes.append)
    for update in (4, 8, 12):
        made.save(update, {**STATE, "n": update})
    made.wait()
    return made, tmp_path / "checkpoints", notes


@pytest.fixture
def gate(monkeypatch):
    """Writing waits until this event is set."""
    event, write = threading.Event(), storage.write

    def waits(*given):
        assert event.wait(20)
        return write(*given)

    monkeypatch.setattr(storage, "write", waits)
    yield event
    event.set()


# -------------------------------------------------------------------------------------------------------------- content


def test_a_state_comes_back_as_it_was(tmp_path):
    fill(tmp_path, STATE)
    assert equal(read(tmp_path), STATE)


@pytest.mark.parametrize("numbers", [0.1 + 0.2, 5e-324, -0.0, 1.7976931348623157e308, float("-inf"), 2**70, True, None, "", "\x00\n"])
def test_values_come_back_exactly(tmp_path, numbers):
    fill(tmp_path, {"value": numbers, 7: (numbers, [numbers]), "7": {}})
    back = read(tmp_path)
    assert equal(back, {"value": numbers, 7: (numbers, [numbers]), "7": {}})
    assert repr(back["value"]) == repr(numbers)


DTYPES = "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 complex64 int64 int32 int16 int8 uint8 uint16 uint32 uint64 bool"


@pytest.mark.parametrize("dtype", DTYPES.split())
def test_every_bit_of_every_number_format(tmp_path, dtype):
    kind = getattr(torch, dtype)
    draw = torch.randint(
        0, 2 if dtype == "bool" else 256, (7 * kind.itemsize,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    long = draw.view(kind)
    state = {"long": long, "scalar": long[3], "empty": long[:0], "none": long[:0].view(3, 0), "grid": long[:6].view(2, 3).T}
    fill(tmp_path, state)
    assert equal(read(tmp_path), state)


def test_nan_keeps_its_bits(tmp_path):
    nan = torch.tensor([0x7FC00001, -1, 0x7F800001], dtype=torch.int32).view(torch.float32)
    fill(tmp_path, {"nan": nan})
    assert bits(read(tmp_path)["nan"]) == bits(nan)


def test_shared_storage_comes_back_as_copies(tmp_path):
    base = torch.arange(6.0)
    fill(tmp_path, {"all": base, "half": base[:3], "again": base, "turned": base.view(2, 3).T})
    back = read(tmp_path)
    assert torch.equal(back["half"], base[:3])
    assert torch.equal(back["again"], base)
    assert torch.equal(back["turned"], base.view(2, 3).T)
    assert len({one.untyped_storage().data_ptr() for one in back.values()}) == 4


def test_what_json_cannot_hold_is_refused(tmp_path, made):
    with pytest.raises(TypeError, match=r"optimizer\.history: a set cannot be kept"):
        fill(tmp_path, {"optimizer": {"history": {1, 2}}})
    with pytest.raises(TypeError, match=r"history: a set cannot be kept"):
        made[0].save(1, {"history": {1, 2}})


def test_a_checkpoint_holds_safetensors_and_json_alone(saved):
    _, folder, _ = saved
    assert sorted(path.name for path in (folder / "00000012").iterdir()) == ["state.json", "tensors-0.safetensors"]
    with safe_open(folder / "00000012" / "tensors-0.safetensors", "pt") as file:
        assert len(file.keys()) == 4
    digest, text = (folder / "00000012" / "state.json").read_text(encoding="utf8").split("\n")
    assert digest == hashlib.sha256(text.encode()).hexdigest()
    assert json.loads(text)["files"].keys() == {"tensors-0.safetensors"}


def test_what_is_written_behind_is_what_would_be_written_at_once(tmp_path, made):
    made[0].save(5, STATE)
    made[0].wait()
    (tmp_path / "now").mkdir()
    fill(tmp_path / "now", STATE)
    assert files(tmp_path / "00000005") == files(tmp_path / "now")


def test_a_reader_says_where_a_tensor_goes(tmp_path):
    fill(tmp_path, STATE)
    asked, mine = [], torch.zeros(3)

    def place(path, tensor):
        asked.append((path, tensor.device.type, tensor.shape, tensor.dtype))
        return mine if path == ("tensors", "a.b") else torch.empty_like(tensor, device="cpu")

    assert read(tmp_path, place)["tensors"]["a.b"] is mine
    assert torch.equal(mine, torch.arange(3.0))
    assert asked[0] == (("tensors", "a.b"), "meta", (3,), torch.float32)
    assert asked[3][0] == ("optimizer", "state", 0, "step")


# --------------------------------------------------------------------------------------------------- behind the loop


def test_the_loop_waits_for_the_copy_and_not_for_the_disk(gate, made):
    weights = torch.arange(8.0)
    made[0].save(3, {"weights": weights, "n": 3})  # while the gate is shut
    made[0].staged()
    weights.zero_()
    gate.set()
    update, state = made[0].load()
    assert (update, state["n"]) == (3, 3)
    assert torch.equal(state["weights"], torch.arange(8.0))


def test_one_write_at_a_time(gate, made):
    made[0].save(1, STATE)
    opened = threading.Timer(0.2, gate.set)
    opened.start()
    begun = time.monotonic()
    made[0].save(2, STATE)
    assert gate.is_set()
    assert time.monotonic() - begun > 0.1
    made[0].wait()
    assert made[0].newest == 2


def test_the_loop_is_blocked_for_about_a_copy(made):
    state = {"tensors": [torch.randn(2**20) for _ in range(8)]}  # 32 MiB
    copies, blocked = [torch.empty_like(one) for one in state["tensors"]], []
    made[0].prepare(state)
    made[0].wait()
    for update in range(6):
        begun = time.perf_counter()
        made[0].save(update, state)
        blocked.append(time.perf_counter() - begun)
        made[0].wait()
    limit = []
    for _ in range(6):
        begun = time.perf_counter()
        torch._foreach_copy_(copies, state["tensors"])
        limit.append(time.perf_counter() - begun)
    assert min(blocked) < 4 * min(limit) + 0.005


def test_memory_is_made_once(made):
    made[0].prepare(STATE)
    made[0].wait()
    first = {name: one.data_ptr() for name, one in made[0]._staging._held.items()}
    for update in (1, 2):
        made[0].save(update, STATE)
        made[0].wait()
        assert {name: one.data_ptr() for name, one in made[0]._staging._held.items()} == first
    assert equal(made[0].load()[1], STATE)


def test_a_state_may_change_its_shape(made):
    for update, size in enumerate((3, 5, 0, 3)):
        state = {"a": torch.arange(size), **({"b": torch.ones(size)} if update % 2 else {})}
        made[0].save(update, state)
        assert equal(made[0].load()[1], state)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="asks for a GPU")
def test_a_gpu_copies_while_it_computes(made):
    device = {"weights": torch.randn(2**24, device="cuda"), "buffer": torch.randn(2**20, device="cuda")}
    before = {name: one.cpu() for name, one in device.items()}
    for update in range(3):
        for name, one in before.items():
            device[name].copy_(one)
        made[0].save(update, device, lazy=["weights"])
        device["buffer"].zero_()
        made[0].staged()
        device["weights"].zero_()
        assert equal(made[0].load()[1], before)


# --------------------------------------------------------------------------------------------------- which ones stand


def test_the_newest_two_stay(saved):
    made, folder, notes = saved
    assert sorted(path.name for path in folder.iterdir()) == ["00000008", "00000012"]
    update, state = made.load()
    assert (update, state["n"], notes) == (12, 12, [])


def test_no_checkpoint_is_none(tmp_path):
    assert Checkpoints(tmp_path / "none", print).load() is None
    assert Checkpoints(tmp_path / "none", print).newest is None


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip, lambda path: path.unlink(), lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("name", ["tensors-0.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_passed_over_with_a_note(saved, damage, name):
    made, folder, notes = saved
    damage(folder / "00000012" / name)
    with pytest.raises(Torn):
        read(folder / "00000012")
    update, state = made.load()
    assert (update, state["n"]) == (8, 8)
    assert len(notes) == 1
    assert notes[0].startswith("checkpoint 00000012 is damaged (")
    assert made.load()[0] == 8
    assert len(notes) == 1  # it is gone


def test_an_unfinished_write_is_cleared_away(saved):
    made, folder, notes = saved
    (folder / ".unfinished-00000016").mkdir()
    (folder / ".unfinished-00000016" / "tensors-0.safetensors").write_bytes(b"torn")
    assert made.load()[0] == 12
    assert sorted(path.name for path in folder.iterdir()) == ["00000008", "00000012"]
    assert notes == []


@pytest.fixture(scope="module")
def apart():
    """Runs a function of this module in a process of its own."""
    with forks.server("test_checkpoints") as run:
        yield run


# ------------------------------------------------------------------------------------------------------- a full disk


def test_a_full_disk_keeps_the_last_good_checkpoint_and_the_run_goes_on(saved, monkeypatch):
    made, folder, notes = saved
    write = storage.write

    def full(beside, *given):
        write(beside, *given)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(storage, "write", full)
    made.save(16, STATE)
    made.wait()
    made.wait()
    assert notes == ["checkpoint after update 16 could not be written: no space left on device; the one after update 12 stands"]
    assert sorted(path.name for path in folder.iterdir()) == ["00000008", "00000012"]  # what was half there gives its room back
    monkeypatch.undo()
    made.save(20, {**STATE, "n": 20})
    assert made.load()[1]["n"] == 20
    assert len(notes) == 1


def test_the_first_one_may_fail(made, monkeypatch):
    monkeypatch.setattr(storage, "save_file", lambda *given: (_ for _ in ()).throw(storage.SafetensorError("no reason")))
    made[0].save(1, STATE)
    made[0].wait()
    assert made[1] == ["checkpoint after update 1 could not be written: no reason; there is none before it"]


def test_an_error_that_is_not_the_disk_s_is_raised(made, monkeypatch):
    monkeypatch.setattr(storage, "write", lambda *given: 1 / 0)
    made[0].save(1, STATE)
    with pytest.raises(ZeroDivisionError):
        made[0].wait()
    made[0].wait()


def limited(folder: Path) -> None:
    """In a process of its own: no file may grow over 1 MiB, as on a disk that is full there."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
    made = Checkpoints(folder / "run", print)
    made.save(1, {"weights": torch.ones(2**17)})
    made.save(2, {"weights": torch.ones(2**19)})
    print(made.load()[0], sorted(path.name for path in (folder / "run").iterdir()))


def test_a_file_that_cannot_grow(tmp_path, apart):
    told = apart("limited", tmp_path).splitlines()
    assert told == ["checkpoint after update 2 could not be written: file too large; the one after update 1 stands", "1 ['00000001']"]


# ---------------------------------------------------------------------------------------------------- a folder or none


def test_a_folder_that_fails_while_it_is_filled_leaves_the_old_one(tmp_path):
    with whole(tmp_path / "kept") as beside:
        (beside / "file").write_text("old")

    def fails():
        with whole(tmp_path / "kept") as beside:
            (beside / "file").write_text("new")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fails()
    assert files(tmp_path) == {Path("kept/file"): b"old"}


def test_a_folder_that_cannot_take_its_place_leaves_the_old_one(tmp_path, monkeypatch):
    with whole(tmp_path / "kept") as beside:
        (beside / "file").write_text("old")
    rename = Path.rename

    def full(path, target):
        if path.name == ".unfinished-kept":
            raise OSError(errno.ENOSPC, "no room for a name")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError, match="no room"), whole(tmp_path / "kept") as beside:
        (beside / "file").write_text("new")
    assert files(tmp_path) == {Path("kept/file"): b"old"}


def test_what_a_kill_left_is_safe_until_the_next_one_is_whole(tmp_path):
    (tmp_path / ".replaced-best").mkdir()
    (tmp_path / ".replaced-best" / "file").write_text("old")
    with pytest.raises(OSError, match="disk full"), whole(tmp_path / "best"):
        raise OSError("disk full")
    assert files(tmp_path) == {Path(".replaced-best/file"): b"old"}
    with whole(tmp_path / "best") as beside:
        (beside / "file").write_text("new")
    assert files(tmp_path) == {Path("best/file"): b"new"}


@pytest.mark.parametrize("died", range(4))
def test_a_kill_at_any_step_of_a_replacement_leaves_the_old_or_the_new(tmp_path, monkeypatch, died):
    def replace(text):
        with whole(tmp_path / "best") as beside:
            (beside / "file").write_text(text)

    replace("old")
    steps = []

    class Killed(BaseException):
        pass

    def counted(does):
        def step(*given, **more):
            if len(steps) == died:
                raise Killed
            steps.append(given)
            return does(*given, **more)

        return step

    monkeypatch.setattr(Path, "rename", counted(Path.rename))
    monkeypatch.setattr("temper.train.checkpoints.sync", counted(lambda path: None))
    monkeypatch.setattr("shutil.rmtree", lambda *given, **more: None)  # a killed process clears nothing away
    with pytest.raises(Killed):
        replace("new")
    monkeypatch.undo()
    mend(tmp_path)
    assert list(files(tmp_path).items()) in ([(Path("best/file"), b"old")], [(Path("best/file"), b"new")])


# --------------------------------------------------------------------------------------------------------- kill -9


def written(update: int) -> dict:
    """A state that says which update it is of in every number."""
    return {"update": update, "tensors": [torch.full((2**18,), float(update)), torch.full((7,), update)]}


def writes(folder: Path) -> None:
    """Goes on from the last checkpoint; saves as fast as it can, and replaces a best one now and then."""
    made = Checkpoints(folder / "run", print)
    update = found[0] if (found := made.load()) else 0
    while True:
        update += 1
        made.save(update, written(update))
        if update % 2 == 0:
            made.wait()
            with whole(folder / "kept" / "best") as beside:
                fill(beside, written(update))


def killed(folder: Path, kills: int = 12) -> None:
    """Writers one after another, killed in turn: while they write a checkpoint, while they replace the best one, and at any moment."""
    draw, made, update = random.Random(3), Checkpoints(folder / "run", print), 0
    for kill in range(kills):
        known, child = best_of(folder), forks.start(functools.partial(writes, folder), folder / "said")
        while not begun(folder, kill % 3, known):
            assert os.waitpid(child, os.WNOHANG) == (0, 0), (folder / "said").read_text()
        time.sleep(draw.uniform(0.0, 0.03 if kill % 3 == 0 else 0.004))
        os.kill(child, signal.SIGKILL)
        assert forks.wait(child) == -signal.SIGKILL
        half = any(folder.glob("run/.unfinished-0*")), any(folder.glob("kept/.*"))
        stood, before = made.newest, update
        update, state = made.load()
        mend(folder / "kept")
        best = read(folder / "kept" / "best")
        assert before <= update == stood
        assert equal(state, written(update))
        assert equal(best, written(best["update"]))
        print(*map(int, half), update, best["update"])


def begun(folder: Path, what: int, known: int | None) -> bool:
    """Whether there is a new best one (0), a checkpoint is being written (1), or a best one is (2)."""
    if what == 0:
        return best_of(folder) not in (known, None)
    return any(folder.glob("run/.unfinished-0*" if what == 1 else "kept/.*"))


def best_of(folder: Path) -> int | None:
    """Which folder the best one is."""
    with suppress(FileNotFoundError):
        return (folder / "kept" / "best").stat().st_ino
    return None


def test_killed_at_any_moment_the_last_checkpoint_loads(tmp_path, apart):
    told = [tuple(map(int, line.split())) for line in apart("killed", tmp_path).splitlines()]
    half, replaced, update, best = zip(*told, strict=True)
    assert sum(half) >= 2  # kills that met a write
    assert sum(replaced) >= 2
    assert update[0] < update[-1]
    assert best[0] < best[-1]


# ----------------------------------------------------------------------------------------------- several processes


def tensors() -> dict[str, torch.Tensor]:
    """Whole tensors; the first axes do not divide by the number of processes, or there are fewer rows than processes."""
    draw = torch.Generator().manual_seed(1)
    shapes = {"odd": (5, 3), "one": (1, 4), "none": (0, 4), "wide": (4, 7), "flat": (9,)}
    made = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    return {**made, "wide": made["wide"].bfloat16()}


def whole_state() -> dict:
    return {"sharded": tensors(), "copies": {"weights": torch.arange(6.0), "step": torch.tensor(3)}, "seen": (1, 2.5), "text": "né"}


def cut_state(mesh) -> dict:
    """The state as one of several processes has it."""
    ways = {"odd": Shard(0), "one": Shard(0), "none": Shard(0), "wide": Shard(1), "flat": Replicate()}
    cut = {name: distribute_tensor(one, mesh, [ways[name]], src_data_rank=None) for name, one in tensors().items()}
    return {**whole_state(), "sharded": cut}


def one_of_several(folder: Path, rank: int, size: int) -> None:
    notes = []
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    mesh = init_device_mesh("cpu", (size,))
    state = cut_state(mesh)
    made = Checkpoints(folder / "run", notes.append, group=torch.distributed.group.WORLD)

    # What one process wrote, read into this one's shards.
    def place(path, tensor):
        if path[0] == "sharded":
            return torch.zeros_like(state["sharded"][path[1]])
        return torch.empty_like(tensor, device="cpu")

    update, found = made.load(place)
    assert update == 1
    assert isinstance(found["sharded"]["odd"], DTensor)
    assert equal({name: one.full_tensor() for name, one in found["sharded"].items()}, tensors())
    assert equal({**found, "sharded": {}}, {**whole_state(), "sharded": {}})

    # What these wrote, read whole by each; the loop's messages meet a write under way.
    made.prepare(state)
    for update in (2, 3):
        made.save(update, state)
        for turn in range(20):
            told = torch.tensor(float(turn))
            torch.distributed.all_reduce(told)
            assert told == turn * size
    update, found = made.load()
    assert (update, notes) == (3, [])
    assert equal(found, whole_state())

    # Each with a folder of its own.
    (folder / f"own-{rank}" / f"0000000{rank}").mkdir(parents=True)
    with pytest.raises(ValueError, match="the processes see different checkpoints there; give them a folder that they share"):
        Checkpoints(folder / f"own-{rank}", notes.append, group=torch.distributed.group.WORLD).load()

    # Kept, together.
    with whole(folder / "kept", torch.distributed.group.WORLD) as beside:
        fill(beside, state, torch.distributed.group.WORLD)
    with pytest.raises(ValueError, match=r"sharded\.odd is sharded over 2 processes; give their group"):
        fill(folder / "half", state)

    # One cannot write; nobody's checkpoint counts, and everyone goes on.
    if rank == 1:
        write, storage.save_file = storage.save_file, lambda *given: (_ for _ in ()).throw(storage.SafetensorError("gone (os error 28)"))
    made.save(4, state)
    made.wait()
    assert notes.pop() == "checkpoint after update 4 could not be written: no space left on device; the one after update 3 stands"
    if rank == 1:
        storage.save_file = write
    made.save(5, state)
    made.wait()

    # One's file is damaged; all see it.
    if rank == 0:
        flip(folder / "run" / "00000005" / "tensors-1.safetensors")
    torch.distributed.barrier()
    assert made.load()[0] == 3
    assert notes == ["checkpoint 00000005 is damaged (tensors-1.safetensors does not match its checksum) and was passed over"]
    made.close()
    torch.distributed.barrier()
    assert sorted(path.name for path in (folder / "run").iterdir()) == ["00000003"]
    torch.distributed.destroy_process_group()


def several(folder: Path, size: int = 2) -> None:
    """In a process of its own: starts the others."""
    told = [folder / f"told-{rank}" for rank in range(size)]
    children = [forks.start(functools.partial(one_of_several, folder, rank, size), told[rank]) for rank in range(size)]
    ends = [forks.wait(child) for child in children]
    assert ends == [0] * size, "\n".join(one.read_text() for one in told)


def test_any_number_of_processes_reads_what_any_other_wrote(tmp_path, apart):
    alone = Checkpoints(tmp_path / "run", print)
    alone.save(1, whole_state())
    alone.close()
    apart("several", tmp_path)
    for folder in (tmp_path / "run" / "00000003", tmp_path / "kept"):
        assert equal(read(folder), whole_state())
        held = {}
        for rank in range(2):
            with safe_open(folder / f"tensors-{rank}.safetensors", "pt") as file:
                held[rank] = {key.split(".")[-1]: file.get_tensor(key).shape for key in file.keys()}  # noqa: SIM118 -- no dict
        assert held[0].keys() == {*tensors(), "weights", "step"}
        assert {name: held[1][name] for name in ("odd", "wide")} == {"odd": (2, 3), "wide": (4, 3)}
        assert not {"flat", "weights", "step"} & held[1].keys()  # what every process has is written once
        known = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata  # torch's own reader
        assert {tuple(one.size) for one in known.values()} >= {(5, 3), (1, 4), (0, 4), (4, 7), (9,)}
