"""How far each verifiable task gets: `house:lm` tuned on it for a while, accuracy on held-out questions.

    python benchmarks/tasks.py [--updates 300] [--only sort-words] [--out benchmarks/tasks.json]

A task is fit for rewards and preferences where a tuned house model ends between 0.2 and 0.9: some attempts right, some wrong.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import temper
from temper.machine import machine
from temper.store import Store
from temper.tasks.verifiable import Verifiable

TASKS: dict[str, Any] = {name: name for name in Verifiable.__slot__.parts()}  # type: ignore[attr-defined]


def measure(name: str, task: Any, updates: int, store: Store) -> dict[str, Any]:
    data = {"task": {"task": task, "count": 8000, "test_count": 300}}
    steps = [
        {
            "tune": {
                "method": "full",
                "batching": {"bucketed": {"size": 64}},
                "optimizer": {"adamw": {"lr": 3e-3}},
                "updates": updates,
                "evaluate_every": "none",
            }
        },
        {"evaluate": {"method": "accuracy", "answer": 32}},
    ]
    result = temper.run(temper.recipe(steps, name=f"task-{name}", model="house:lm", data=data, export="none"), store)
    figure, record = result["evaluate"].figures["tune.accuracy"], result.made["tune"].record
    return {"accuracy": figure.value, "low": figure.low, "high": figure.high, "n": figure.n, "seconds": round(record["seconds"], 1)}


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--updates", type=int, default=300, help="of 64 rows each")
    ask.add_argument("--only", nargs="*", choices=list(TASKS), help="measure these, keep the other rows of the file")
    ask.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    given = ask.parse_args()
    store = Store()
    rows = json.loads(given.out.read_text())["tasks"] if given.only and given.out.exists() else {}
    for name, task in TASKS.items():
        if given.only and name not in given.only:
            continue
        rows[name] = one = measure(name, task, given.updates, store)
        print(f"{name:<16} {one['accuracy']:.3f} [{one['low']:.3f}, {one['high']:.3f}]  {one['seconds']:.0f} s", flush=True)
    given.out.write_text(json.dumps({"updates": given.updates, "machine": machine(), "tasks": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
