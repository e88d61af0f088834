"""A run that was interrupted gives the weights of one that was not, bit for bit."""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import time
import types
from pathlib import Path

import forks
import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from temper.context import Context, Stream, write
from temper.tasks.files import File
from temper.train import distribution, loop
from temper.train.batching import Bucketed, Packed, Padded, planned
from temper.train.checkpoints import storage
from temper.train.examples import Example, encode
from temper.train.loop import train, trainable
from temper.train.objectives import Causal
from temper.train.optimizers import SGD, AdamW
from temper.train.schedules import Cosine
from temper.world import World

UPDATES = 9
PLANS = {
    "padded": Padded(size=2, accumulate=2),
    "bucketed": Bucketed(size=4, tokens=30),
    "packed": Packed(length=16, size=2, accumulate=2),
    "separate": Packed(length=16, size=2, accumulate=2, documents="separate"),
    "streaming": Bucketed(size=4, tokens=30),
}  # 4 updates an epoch each, on the data below; a stream's are its blocks


class Stop(Exception):
    pass


def data():
    draw = numpy.random.default_rng(0)
    lengths = draw.integers(3, 25, 16)
    return [Example(draw.integers(1, 64, n).astype(numpy.int32), numpy.ones(n, bool), i) for i, n in enumerate(lengths)]


def plan(name: str, folder: Path):
    """The batches of the data above; a stream's from a file of 40 rows, read 16 at a time."""
    if name != "streaming":
        return PLANS[name](data(), Stream("batching"))
    texts = [" ".join(map(str, one.tokens)) for one in [*data(), *data(), *data()[:8]]]
    write(folder / "rows.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in texts))
    words = Tokenizer(models.WordLevel({str(number): number for number in range(64)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    stream = File(path=str(folder / "rows.jsonl"), streaming=True, buffer=16, test_count=1).load("train")
    return planned(PLANS[name], encode(stream, PreTrainedTokenizerFast(tokenizer_object=words), max_length=None), Stream("batching"))


ADAMW = AdamW(lr=0.01)


def run(work: Path, name: str, optimizer=ADAMW, stop_at=None, updates=UPDATES, width=32, loss=None, world=None, kind="replicate", **more):
    """One session with a model and an optimizer of its own; `stop_at`: raises during the evaluation after that update."""
    torch.seed()  # whatever the process drew before must not matter
    context = Context.scratch(work, seed=3)
    context.world = world or World()
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=width, num_hidden_layers=2, num_attention_heads=2, attention_dropout=0.2
    )
    model = LlamaForCausalLM(config)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for one in model.parameters():
            one.copy_(torch.randn(one.shape, generator=draw) * 0.2 + (one.ndim == 1))

    def evaluate(_):
        step = context.curve()[-1]["step"] if context.world.main else 0
        if step == stop_at:
            raise Stop
        return {"held_out": float(step)}

    spread = distribution.spread(model, context.world, kind, "cpu")
    built = optimizer.build(trainable(spread.model))
    batches = plan(name, work)
    assert batches.updates_per_epoch == (None if name == "streaming" else 4)
    history = train(
        model,
        batches,
        loss or Causal(),
        optimizer=built,
        schedule=Cosine(warmup=0.2),
        updates=updates,
        context=context,
        evaluate=evaluate,
        evaluate_every=1,
        spread=spread,
        **{"checkpoint_every": 1, **more},
    )
    return model, built, history, context


def assert_same_run(one, two):
    (model, optimizer, history, _), (other, built, again, _) = one, two
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(optimizer.state.values(), built.state.values(), strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
    timeless = [[{key: value for key, value in row.items() if key != "seconds"} for row in each.rows] for each in (history, again)]
    assert timeless[0] == timeless[1]
    assert (history.updates, history.tokens) == (again.updates, again.tokens)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Runs that nothing interrupted, each made once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = run(tmp_path_factory.mktemp(name), name)
        return made[name]

    return get


@pytest.mark.parametrize("stop_at", [3, 5], ids=["inside an epoch", "on its edge"])
@pytest.mark.parametrize("name", PLANS)
def test_an_interrupted_run_ends_as_an_unbroken_one(tmp_path, unbroken, name, stop_at):
    with pytest.raises(Stop):
        run(tmp_path, name, stop_at=stop_at)
    resumed = run(tmp_path, name)
    assert resumed[2].resumed == stop_at - 1
    assert_same_run(resumed, unbroken(name))


def test_dropout_was_at_work(tmp_path, unbroken, monkeypatch):
    monkeypatch.setattr(loop, "_seed", lambda device, seed: None)
    model, *_ = run(tmp_path, "padded")
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), unbroken("padded")[0].parameters()))


def test_updates_since_the_last_checkpoint_are_made_again(tmp_path, unbroken):
    for stop_at in (2, 6, 7):
        with pytest.raises(Stop):
            run(tmp_path, "padded", stop_at=stop_at, checkpoint_every=3)
    resumed = run(tmp_path, "padded", checkpoint_every=3)
    assert resumed[2].resumed == 6
    assert_same_run(resumed, unbroken("padded"))


def test_checkpoints_by_the_clock(tmp_path):
    with pytest.raises(Stop):
        run(tmp_path, "padded", stop_at=4, checkpoint_every=None, checkpoint_seconds=0.0)
    assert sorted(path.name for path in (tmp_path / "work" / "checkpoints").iterdir()) == ["00000002", "00000003"]


def test_sgd_with_momentum_resumes(tmp_path):
    optimizer = SGD(lr=0.05, momentum=0.9)
    whole = run(tmp_path / "whole", "padded", optimizer=optimizer)
    with pytest.raises(Stop):
        run(tmp_path / "broken", "padded", optimizer=optimizer, stop_at=4)
    assert_same_run(run(tmp_path / "broken", "padded", optimizer=optimizer), whole)


@pytest.mark.parametrize("name", ["tensors-0.safetensors", "state.json"])
def test_a_torn_checkpoint_costs_one_checkpoint(tmp_path, unbroken, name):
    with pytest.raises(Stop):
        run(tmp_path, "packed", stop_at=6)
    torn = tmp_path / "work" / "checkpoints" / "00000005" / name
    torn.write_bytes(torn.read_bytes()[:-7])
    resumed = run(tmp_path, "packed")
    assert resumed[2].resumed == 4
    assert resumed[3].notes == [f"checkpoint 00000005 is damaged ({name} does not match its checksum) and was passed over"]
    assert_same_run(resumed, unbroken("packed"))


def test_a_finished_run_only_comes_back(tmp_path, unbroken):
    run(tmp_path, "bucketed")
    again = run(tmp_path, "bucketed")
    assert again[2].resumed == UPDATES
    assert_same_run(again, unbroken("bucketed"))


def test_kept_updates_stay_and_are_made_once(tmp_path):
    made = []

    def on_keep(name, folder):
        made.append(int(name))
        (folder / "note.txt").write_text(name)

    with pytest.raises(Stop):
        run(tmp_path, "padded", stop_at=6, keep=(2, 5), on_keep=on_keep, checkpoint_every=4)
    run(tmp_path, "padded", keep=(2, 5), on_keep=on_keep)
    assert made == [2, 5]
    assert [(tmp_path / "work" / "kept" / str(update) / "note.txt").read_text() for update in (2, 5)] == ["2", "5"]


def test_an_update_beyond_the_run_cannot_be_kept(tmp_path):
    with pytest.raises(ValueError, match="update 10 cannot be kept; the run has updates 1 to 9"):
        run(tmp_path, "padded", keep=(3, 10))


@pytest.mark.parametrize("other", [{"updates": 9}, {"updates": 3, "width": 24}])
def test_a_checkpoint_of_another_run_is_refused(tmp_path, other):
    run(tmp_path, "padded", updates=3)
    with pytest.raises(ValueError, match=r"checkpoint after update 3 is of another run \(3 updates of 21 tensors; here \d updates of 21"):
        run(tmp_path, "padded", **other)


# ---------------------------------------------------------------------------------------------------- a run of given time


@pytest.fixture
def within(monkeypatch):
    """Runs for 190 s by a clock that every micro-batch, of which an update has two, puts on by 10 s."""
    now = [1000.0]

    def loss(model, batch):
        now[0] += 10
        return Causal()(model, batch)

    monkeypatch.setattr(loop, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    return functools.partial(run, name="padded", updates=None, budget=190.0, loss=loss)


def test_a_run_of_given_time_ends_with_the_update_in_which_it_is_over(tmp_path, within):
    _, _, history, _ = within(tmp_path)
    assert (history.updates, history.seconds) == (10, 200.0)
    rows = [row for row in history.rows if "loss" in row]
    assert [row["seconds"] for row in rows] == [20.0 * done for done in range(1, 11)]
    assert history.rows[-1] == {"step": 10, "held_out": 10.0}, "it is measured at its end"
    progress = [0.0, *(20 * (done + 0.5) / 190 for done in range(1, 9)), 1.0]
    assert [row["lr"] for row in rows] == pytest.approx([0.01 * Cosine(warmup=0.2)(share) for share in progress])
    assert rows[-1]["lr"] == 0


def test_a_run_of_given_time_goes_on_with_what_is_left(tmp_path, within):
    with pytest.raises(Stop):
        within(tmp_path / "broken", stop_at=4)
    resumed = within(tmp_path / "broken")
    assert resumed[2].resumed == 3
    assert_same_run(resumed, within(tmp_path / "whole"))
    again = within(tmp_path / "broken")
    assert (again[2].resumed, again[2].seconds) == (10, 200.0), "nothing is left"


def test_a_checkpoint_of_a_run_of_another_length_is_refused(tmp_path):
    run(tmp_path, "padded", updates=None, budget=0.001)
    with pytest.raises(ValueError, match=r"of another run \(0.001 s of 21 tensors; here 3 updates of 21"):
        run(tmp_path, "padded", updates=3)


def test_a_run_has_one_length(tmp_path):
    for given in ({"updates": None}, {"updates": 3, "budget": 1.0}):
        with pytest.raises(ValueError, match="a run's length is given in updates or in seconds; give one of the two"):
            run(tmp_path, "padded", **given)


# ------------------------------------------------------------------------------------------------------------ SIGKILL


def session(work: Path, name: str, kind: str, rank: int, size: int, meet: str, death: list | None) -> None:
    """One of `size` processes that train; it may die."""
    world = World(rank, size)
    if size > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{work}/{meet}", rank=rank, world_size=size)
    model, _, history, _ = run(work, name, loss=deadly(death), world=world, kind=kind)
    if world.main:
        (work / "rows.json").write_text(json.dumps(timeless(history)))
        save_file({name: one.detach() for name, one in model.named_parameters()}, work / "weights.safetensors")
    if size > 1:
        torch.distributed.destroy_process_group()


def deadly(death: list | None):
    """A loss. death: ["pass", u, m] kills the process in the m-th pass of update u, ["write", u] when half of the checkpoint after u
    updates is on the disk."""
    seen, write = [], storage.save_file

    def half(tensors, path, about):
        write(tensors, path, about)
        if death[:1] == ["write"] and path.parent.name.endswith(f"{death[1]:08d}"):
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def loss(model, batch):
        seen.append(batch.update)
        if death == ["pass", batch.update, seen.count(batch.update) - 1]:
            os.kill(os.getpid(), signal.SIGKILL)
        return Causal()(model, batch)

    if death:
        storage.save_file = half
    return loss


def sessions(work: Path, name: str, kind: str, size: int, deaths: list) -> None:
    """Sessions one after another. Each but the last ends by one process's death (the last in `deaths` is its rank), after which the
    launcher kills the others; ["time", s]: from outside, s seconds after a checkpoint. Prints each one's last update on disk."""
    for number, death in enumerate([*deaths, None]):
        before, dies = newest(work), death[-1] if death else -1
        children = []
        for rank in range(size):
            mine = death[:-1] if rank == dies else None
            one = functools.partial(session, work, name, kind, rank, size, f"meet-{number}", mine)
            children.append(forks.start(one, work / f"told-{rank}"))
        if death and death[0] == "time":
            while newest(work) == before:
                time.sleep(0.001)
            time.sleep(death[1])
            os.kill(children[dies], signal.SIGKILL)
        if death:
            assert forks.wait(children.pop(dies)) == -signal.SIGKILL, (work / f"told-{dies}").read_text()
            for child in children:
                os.kill(child, signal.SIGKILL)
        ends = [forks.wait(child) for child in children]
        assert death or ends == [0] * size, [(work / f"told-{rank}").read_text() for rank in range(size)]
        print(newest(work))


def timed(work: Path) -> None:
    """Two processes, one slower than the other, train for a given time; each leaves its weights."""

    def one(rank: int) -> None:
        def loss(model, batch):
            time.sleep(0.03 * rank)
            return Causal()(model, batch)

        torch.distributed.init_process_group("gloo", init_method=f"file://{work}/meet", rank=rank, world_size=2)
        more = {"updates": None, "budget": 0.5, "checkpoint_every": None}
        model, *_ = run(work, "padded", loss=loss, world=World(rank, 2), **more)
        save_file({name: one.detach() for name, one in model.named_parameters()}, work / f"weights-{rank}.safetensors")
        torch.distributed.destroy_process_group()

    children = [forks.start(functools.partial(one, rank), work / f"told-{rank}") for rank in range(2)]
    ends = [forks.wait(child) for child in children]
    assert ends == [0, 0], [(work / f"told-{rank}").read_text() for rank in range(2)]


def newest(work: Path) -> int:
    return max((int(path.name) for path in (work / "work" / "checkpoints").glob("*") if path.name.isdigit()), default=0)


def timeless(history) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history.rows]


@pytest.fixture(scope="module")
def apart():
    """Runs a function of this module in a process of its own."""
    with forks.server("test_resume") as run:
        yield run


def assert_same_files(work: Path, weights: dict, rows: list) -> None:
    found = load_file(work / "weights.safetensors")
    assert found.keys() == weights.keys()
    for name, one in weights.items():
        assert torch.equal(found[name], one), name
    assert json.loads((work / "rows.json").read_text()) == json.loads(json.dumps(rows))


# An epoch has four updates: passes of update 4 and the checkpoint after update 4 or 8 are on its edge.
DEATHS = {
    "padded": [["pass", 2, 1, 0], ["write", 4, 0], ["pass", 8, 0, 0]],
    "bucketed": [["pass", 4, 0, 0], ["write", 7, 0]],
    "packed": [["write", 2, 0], ["pass", 5, 1, 0], ["write", 8, 0]],
    "streaming": [["pass", 4, 0, 0], ["write", 6, 0]],
}


@pytest.mark.parametrize("name", DEATHS)
def test_a_killed_run_ends_as_an_unbroken_one(tmp_path, apart, name):
    reached = [int(line) for line in apart("sessions", tmp_path, name, "replicate", 1, DEATHS[name]).splitlines()]
    for (what, update, *_), last in zip(DEATHS[name], reached):
        assert last == update - 1 if what == "write" else last in (update - 1, update)
    assert_as_unbroken(tmp_path, name, apart)


def assert_as_unbroken(work: Path, name: str, apart) -> None:
    """Both runs in fresh processes: what other tests did in this one may move the last bits of a product."""
    whole = work / "whole"
    whole.mkdir()
    apart("sessions", whole, name, "replicate", 1, [])
    assert_same_files(work, load_file(whole / "weights.safetensors"), json.loads((whole / "rows.json").read_text()))


def test_killed_at_random_moments(tmp_path, apart):
    draw = random.Random(7)
    deaths = [["time", draw.uniform(0, 0.02), 0] for _ in range(3)]
    reached = [int(line) for line in apart("sessions", tmp_path, "bucketed", "replicate", 1, deaths).splitlines()]
    assert 0 < reached[0] < reached[1] < UPDATES  # killed on the way
    assert_as_unbroken(tmp_path, "bucketed", apart)


@pytest.mark.parametrize(
    ("name", "kind", "deaths"),
    [
        ("packed", "replicate", [["pass", 4, 0, 1], ["write", 6, 0]]),
        ("streaming", "shard", [["write", 4, 1], ["pass", 6, 0, 0]]),
    ],
)
def test_two_processes_killed_end_as_two_unbroken(tmp_path, apart, name, kind, deaths):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    apart("sessions", whole, name, kind, 2, [])
    reached = [int(line) for line in apart("sessions", broken, name, kind, 2, deaths).splitlines()]
    for (what, update, *_), last in zip(deaths, reached):
        assert last == update - 1 if what == "write" else last in (update - 1, update)
    assert_same_files(broken, load_file(whole / "weights.safetensors"), json.loads((whole / "rows.json").read_text()))


def test_two_processes_end_a_run_of_given_time_together(tmp_path, apart):
    apart("timed", tmp_path)
    one, two = (load_file(tmp_path / f"weights-{rank}.safetensors") for rank in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
