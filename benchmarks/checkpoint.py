"""How long a checkpoint keeps the loop waiting, and what it costs the loop in all.

    python benchmarks/checkpoint.py [--pairs 5] [--quick] [--only ours]

blocked: seconds from asking for a checkpoint until the weights may change. lost: seconds that one checkpoint adds to a loop of matrix
products on all cores, what its background write takes from them included. The state is that of AdamW in float32. Arms: `copy` is
the limit, the same bytes copied into memory that is already there; `torch.save`, `dcp.save` and `dcp.async_save` as they come;
`dcp.hf` is `async_save` with torch's own safetensors writer. `torch.save` does not wait for the disk, all others do.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
from harness import Arm

MIB = 2**20


def state_of(size: int) -> dict[str, Any]:
    """Weights and both of Adam's means, `size` bytes in all: 32 blocks of a large and a small tensor."""
    import torch

    each = size // 3 // 32 // 4
    shapes = [(each * 9 // 10,), (each - each * 9 // 10,)] * 32
    made = {name: [torch.randn(shape) for shape in shapes] for name in ("weights", "mean", "square")}
    steps = [torch.tensor(1.0) for _ in shapes]
    return {
        "model": {f"block.{index}": one for index, one in enumerate(made["weights"])},
        "optimizer": {
            "state": {
                index: {"exp_avg": one, "exp_avg_sq": two, "step": step}
                for index, (one, two, step) in enumerate(zip(made["mean"], made["square"], steps, strict=True))
            }
        },
    }


def flat(state: dict[str, Any]) -> list[Any]:
    return [*state["model"].values(), *(one for held in state["optimizer"]["state"].values() for one in held.values())]


# ------------------------------------------------------------------------------------------------------------ the arms


def measure(settings: dict[str, Any], save: Callable[[Path, int], Callable[[], Any]]) -> dict[str, float]:
    """save: `(folder, number)` -> what waits until the checkpoint is written. Medians; `first` is the first one's."""
    import torch

    blocked, total, lost = [], [], []
    with tempfile.TemporaryDirectory() as folder:

        def one() -> Callable[[], Any]:
            begun = time.perf_counter()
            wait = save(Path(folder), len(blocked))
            blocked.append(time.perf_counter() - begun)
            return wait

        for _ in range(settings["saves"]):
            begun = time.perf_counter()
            one()()
            total.append(time.perf_counter() - begun)
            time.sleep(0.2)
        side = 256 if settings["size"] < 8 * MIB else 1024
        left, right = torch.randn(side, side), torch.randn(side, side)

        def steps(count: int) -> float:
            begun = time.perf_counter()
            for _ in range(count):
                left @ right
            return time.perf_counter() - begun

        steps(5)
        for _ in range(2):
            without, begun = steps(settings["steps"]), time.perf_counter()
            wait = one()
            steps(settings["steps"])
            lost.append(time.perf_counter() - begun - without)
            wait()
    first, *rest = blocked
    return {
        "blocked": statistics.median(rest),
        "first": first,
        "written": statistics.median(total),
        "lost": statistics.median(lost),
    }


def ours(settings: dict[str, Any]) -> dict[str, float]:
    from temper.train.checkpoints import Checkpoints

    state, made = state_of(settings["size"]), None

    def save(folder: Path, number: int) -> Callable[[], Any]:
        made.save(number, state)
        made.staged()
        return made.wait

    with tempfile.TemporaryDirectory() as folder:
        made = Checkpoints(Path(folder), harness.say)
        made.prepare(state)
        made.wait()
        found = measure(settings, save)
        made.close()
    return found


def copy(settings: dict[str, Any]) -> dict[str, float]:
    import torch

    state = flat(state_of(settings["size"]))
    there = [torch.zeros_like(one) for one in state]

    def save(folder: Path, number: int) -> Callable[[], Any]:
        torch._foreach_copy_(there, state)
        return lambda: None

    return measure(settings, save)


def torch_save(settings: dict[str, Any]) -> dict[str, float]:
    import torch

    state = state_of(settings["size"])

    def save(folder: Path, number: int) -> Callable[[], Any]:
        torch.save(state, folder / "state.pt")
        return lambda: None

    return measure(settings, save)


def dcp_save(settings: dict[str, Any]) -> dict[str, float]:
    from torch.distributed.checkpoint import state_dict_saver

    state = state_of(settings["size"])

    def save(folder: Path, number: int) -> Callable[[], Any]:
        state_dict_saver.save(state, checkpoint_id=folder / "dcp", no_dist=True)
        return lambda: None

    return measure(settings, save)


def dcp_async(settings: dict[str, Any]) -> dict[str, float]:
    from torch.distributed.checkpoint import state_dict_saver
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    state = state_of(settings["size"])

    def save(folder: Path, number: int) -> Callable[[], Any]:
        if settings.get("hf"):
            to = {"storage_writer": HuggingFaceStorageWriter(str(folder / "dcp"), save_distributed=True)}
        else:
            to = {"checkpoint_id": folder / "dcp"}
        return state_dict_saver.async_save(state, no_dist=True, **to).result  # type: ignore[union-attr]

    return measure(settings, save)


ARMS = {one.__name__: one for one in (ours, copy, torch_save, dcp_save, dcp_async)}


def main() -> None:
    given = harness.begin(harness.options(__doc__, __file__), ARMS)
    bench = harness.Bench(given)
    for size in (4,) if given.quick else (64, 1024):
        settings = {"size": size * MIB, "saves": 3, "steps": 20 if given.quick else 60 + size // 8}
        arms = {
            "ours": Arm("ours", settings),
            "copy": Arm("copy", settings, says="the limit"),
            "torch.save": Arm("torch_save", settings),
            "dcp.save": Arm("dcp_save", settings),
            "dcp.async": Arm("dcp_async", settings),
            "dcp.hf": Arm("dcp_async", {**settings, "hf": True}),
        }
        bench.compare(
            f"a checkpoint of {size} MiB", arms, "blocked", unit="s blocked", higher=False, goals={"copy": 0.8, "torch.save": 1.0}
        )
    bench.close()


if __name__ == "__main__":
    main()
