"""How benchmarks are run: each arm in processes of its own, interleaved, on a machine that does nothing else; one JSON, one table.

A benchmark is a script of this shape (`sft.py` is the longest):

    import harness
    from harness import Arm

    def ours(settings: dict) -> dict:            # runs in a fresh process; the heavy imports go here
        ...                                      # work that is not timed, then work that is
        return {"tokens_per_second": 8123.0}     # what was measured, as JSON; `flops` (a second) adds the share of the matrix peak

    ARMS = {"ours": ours, "peer": peer}

    def main() -> None:
        ask = harness.options(__doc__, __file__)           # --quick, --pairs, --only, --out, --others; add your own to it
        given = harness.begin(ask, ARMS)                   # in an arm's process: runs the arm and ends there
        bench = harness.Bench(given)
        best = bench.sweep("peer", [Arm("peer", {"size": size}, says=f"size {size}") for size in (1, 8)], "tokens_per_second")
        bench.compare(
            "what is done, on what",
            {"ours": Arm("ours"), "default": Arm("peer"), "best": best},   # an arm `ours`, and those that it is compared with
            "tokens_per_second",                           # the figure compared; its unit and direction follow
            unit="tokens/s",
            goals={"default": 4.0, "best": 2.5},           # ratios to reach: how many times better than that arm
            memory="best",                                 # at no more peak memory than that arm
            equal={"loss": 0.02},                          # figures that may differ by so much at most from theirs that have goals
        )
        bench.close()                                      # writes benchmarks/<name>.json (also written after every comparison)

`compare` runs ours, default, best, ours, default, best, ...: one of each is a pair. A run during which other processes used more
than `--others` of the processors is made again. Peak memory is the process's, as the system counts it, or `peak_memory` among what the
arm returns. Each run compiles anew what `torch.compile` compiles. This file, and a benchmark's before its arms, import neither torch nor
anything else that is large: a child begins with its parent's peak memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from temper.context import write
from temper.machine import machine as flags

PACKAGES = ("temper-ml", "torch", "transformers", "peft", "trl", "datasets", "accelerate", "tokenizers", "flash-attn")
TRIES = 4
TUNED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "17179869184", "MALLOC_TOP_PAD_": "67108864"}
"""Environment of a C allocator that keeps freed pages: large tensors are then not cleared anew by the system at every step."""


@dataclasses.dataclass(frozen=True, eq=False)
class Arm:
    """One side of a comparison: a function of the script, by name, the settings it is called with, and its environment's additions.

    says: how the table names the setting.
    """

    function: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    says: str = ""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Arm) and dataclasses.asdict(self) == dataclasses.asdict(other)

    def __hash__(self) -> int:
        return hash(json.dumps(dataclasses.asdict(self), sort_keys=True))


# ------------------------------------------------------------------------------------------------ command line


def options(doc: str | None, file: str) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    ask = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--quick", action="store_true", help="tiny and once: shows that it works; writes no file without --out")
    ask.add_argument("--pairs", type=int, default=5, help="runs of each arm (default: 5)")
    ask.add_argument("--only", metavar="ARM", help="run this arm alone and print its figures; writes no file")
    ask.add_argument("--others", type=float, default=0.05, help="share of the processors that others may use in a run (default: 0.05)")
    ask.add_argument("--out", type=Path, help=f"the file to write (default: {Path(file).with_suffix('.json').name}, beside the script)")
    ask.set_defaults(file=Path(file).resolve())
    return ask


def begin(ask: argparse.ArgumentParser, arms: Mapping[str, Callable[[dict[str, Any]], Mapping[str, Any]]]) -> argparse.Namespace:
    """The options given. In a process started for an arm this runs the arm, writes what it returns, and ends the process."""
    if sys.argv[1:2] == ["--arm"]:
        name, settings, result = sys.argv[2:5]
        Path(result).write_text(json.dumps(dict(arms[name](json.loads(settings)))))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # what was measured is written; whatever a library does on leaving is not part of it
    given = ask.parse_args()
    if given.pairs < 1:
        ask.error(f"--pairs {given.pairs}: at least 1")
    return given


def say(text: str) -> None:
    """A line on stderr."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


# ---------------------------------------------------------------------------------------------------- one run


def busy() -> float | None:
    """Seconds that this machine's processors have worked since it began, all together; None where the system does not say."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, _, _, irq, softirq, steal = (int(one) for one in stat.read_text().split("\n", 1)[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def own() -> float:
    """Processor seconds of this process and of the children that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def once(script: Path, arm: Arm) -> dict[str, Any]:
    """Runs an arm in a fresh process of this process group.

    Gives its figures, wall and processor seconds, peak memory (bytes, of the largest of its processes), and `others`: which share of
    the processors other processes used meanwhile. A failure ends the benchmark with the last lines that the arm wrote.
    """
    with tempfile.TemporaryDirectory() as folder:
        result, log = Path(folder) / "result.json", Path(folder) / "log"
        command = [sys.executable, str(script), "--arm", arm.function, json.dumps(dict(arm.settings)), str(result)]
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": f"{folder}/compiled", **arm.environment}
        before, mine, begun = busy(), own(), time.perf_counter()
        with log.open("wb") as file:
            child = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
            try:
                _, status, used = os.wait4(child.pid, 0)
            except KeyboardInterrupt:
                child.kill()
                raise
        child.returncode = os.waitstatus_to_exitcode(status)
        seconds, after = time.perf_counter() - begun, busy()
        if child.returncode or not result.exists():
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
            raise RuntimeError(f"{arm.function} {json.dumps(dict(arm.settings))} ended with {child.returncode}:\n{tail}")
        others = None
        if before is not None and after is not None:
            others = max(0.0, (after - before) - (own() - mine)) / (seconds * (os.cpu_count() or 1))
        return {
            "figures": json.loads(result.read_text()),
            "seconds": round(seconds, 3),
            "processor_seconds": round(used.ru_utime + used.ru_stime, 3),
            "peak_memory": used.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
            "others": None if others is None else round(others, 4),
        }


# ------------------------------------------------------------------------------------------------- statistics


def ratios(runs: Sequence[Mapping[str, Any]], arm: str, figure: str, higher: bool = True) -> list[float]:
    """How many times better `ours` is than an arm, pair by pair, in the runs that count."""
    values = {(run["arm"], run["pair"]): run["figures"][figure] for run in runs if run["counts"]}
    pairs = sorted(pair for name, pair in values if name == "ours" and (arm, pair) in values)
    found = [values["ours", pair] / values[arm, pair] for pair in pairs]
    return found if higher else [1 / one for one in found]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def medians(runs: Sequence[Mapping[str, Any]], read: Callable[[Mapping[str, Any]], float | None]) -> dict[str, float]:
    """The median of what `read` finds in each arm's runs that count; arms in which it finds nothing are left out."""
    found: dict[str, list[float]] = {}
    for run in runs:
        if run["counts"] and (value := read(run)) is not None:
            found.setdefault(run["arm"], []).append(value)
    return {arm: statistics.median(some) for arm, some in found.items()}


def summary(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a comparison's raw runs say: all that the table shows is derived here.

    medians of the figure, ratios by pair, medians of peak memory; shares of the measured matrix peak (`figures.flops` over the peak of
    `figures.precision`, bf16 if unsaid) and of the datasheet's where `at.peak` has it; `goals`: each of an arm, of a kind (`ratio`,
    `memory`, or a figure that must be equal), with what was reached and whether it was met; `also`: the further figures.
    """
    runs, peak, others = row["runs"], row["at"]["peak"], [name for name in row["arms"] if name != "ours"]
    memory = medians(runs, lambda run: run["figures"].get("peak_memory", run["peak_memory"]))

    def of(prefix: str) -> dict[str, Any]:
        """Medians, ratios and shares of the peak of the figure whose name begins so."""
        figure = prefix + row["figure"]

        def share(run: Mapping[str, Any], top: float | None) -> float | None:
            done = run["figures"].get(f"{prefix}flops")
            return done / top if top and done else None

        return {
            "medians": medians(runs, lambda run: run["figures"][figure]),
            "ratios": {name: spread(ratios(runs, name, figure, row["higher"])) for name in others if row["complete"]},
            "share_of_peak": medians(runs, lambda run: share(run, peak.get(run["figures"].get("precision", "bf16")))),
            "share_of_datasheet": medians(runs, lambda run: share(run, peak.get("datasheet"))),
        }

    found = of("")
    goals: list[dict[str, Any]] = []

    def goal(kind: str, of: str, wanted: float, reached: float, met: bool) -> None:
        goals.append({"kind": kind, "of": of, "wanted": wanted, "reached": reached, "met": met})

    for name, times in row["goals"].items():
        if name in found["ratios"]:
            reached = found["ratios"][name]["median"]
            goal("ratio", name, times, reached, reached >= times)
    if row["memory"] in memory and "ours" in memory:
        share_of = memory["ours"] / memory[row["memory"]]
        goal("memory", row["memory"], 1.0, share_of, share_of <= 1)
    for figure, within in row["equal"].items():
        values = medians(runs, lambda run, figure=figure: run["figures"].get(figure))
        for name in row["goals"]:
            if "ours" in values and name in values:
                apart = abs(values["ours"] / values[name] - 1)
                goal(figure, name, within, apart, apart <= within)
    return {**found, "memory": memory, "goals": goals, "also": {title: of(prefix) for title, prefix in row["also"].items()}}


# -------------------------------------------------------------------------------------------------- a benchmark


class Bench:
    """A benchmark's runs, comparisons and file. Of comparisons that are not made this time, the file keeps what it has.

    device: whose matrix peak is measured. at: where and with what was measured; it stands beside every comparison and sweep.
    """

    def __init__(self, given: argparse.Namespace, device: str = "cpu"):
        self.given = given
        self.pairs = 1 if given.quick else given.pairs
        self.out = given.out or (None if given.quick or given.only else given.file.with_suffix(".json"))
        say(f"{given.file.name}: the matrix peak")
        peak = self.run("peak", Arm("peak", {"quick": given.quick, "device": device}), Path(__file__))
        self.at: dict[str, Any] = {
            "command": " ".join(["python", f"benchmarks/{given.file.name}", *sys.argv[1:]]),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "quick": given.quick,
            "others": given.others,
            "machine": machine(),
            "versions": versions(),
            "peak": next(run for run in peak if run["counts"])["figures"],
        }
        kept = json.loads(self.out.read_text()) if self.out is not None and self.out.exists() else {}
        self.record: dict[str, Any] = {"benchmark": given.file.stem, "rows": kept.get("rows", []), "sweeps": kept.get("sweeps", {})}
        self._swept: dict[str, dict[Arm, float]] = {}

    def run(self, name: str, arm: Arm, script: Path | None = None) -> list[dict[str, Any]]:
        """Runs an arm (of this benchmark's script) until others leave the machine alone, `TRIES` times at most; one `counts`.

        That is the clean run, or where none was clean the one with the least of others.
        """
        runs: list[dict[str, Any]] = []
        for attempt in range(1 if self.given.quick else TRIES):
            runs.append({"arm": name, "counts": False, **once(script or self.given.file, arm)})
            share = runs[-1]["others"]
            clean = share is None or share <= self.given.others
            again = "" if clean or self.given.quick or attempt == TRIES - 1 else "; again"
            used = "" if clean else f"  others used {share:.0%} of the processors{again}"
            say(f"  {name:<10} {runs[-1]['seconds']:7.1f} s  {short(runs[-1]['figures'])}{used}")
            if clean:
                break
        min(runs, key=lambda run: run["others"] or 0.0)["counts"] = True
        return runs

    def sweep(self, name: str, arms: Sequence[Arm], figure: str, higher: bool = True, among: Callable[[Arm], bool] | None = None) -> Arm:
        """Runs each arm once and gives the best of them (of those that `among` admits); all stand in the file.

        A sweep may be gone on with under its name: an arm that it has run is not run again. A setting that fails is noted.
        """
        if self.given.only:
            return arms[0]
        if name not in self._swept:
            self._swept[name], self.record["sweeps"][name] = {}, {"at": self.at, "figure": figure, "higher": higher, "runs": []}
        values = self._swept[name]
        for arm in arms:
            if arm in values:
                continue
            row: dict[str, Any] = {**dataclasses.asdict(arm), "admitted": among is None or among(arm)}
            try:
                runs = self.run(arm.says or arm.function, arm)
                row["runs"] = runs
                value = next(run for run in runs if run["counts"])["figures"][figure]
                values[arm] = value if higher else -value
            except RuntimeError as error:
                row["failed"] = str(error).splitlines()[-1]
                values[arm] = float("-inf")
                say(f"  {arm.says}: failed: {row['failed']}")
            self.record["sweeps"][name]["runs"].append(row)
        admitted = [arm for arm in arms if values[arm] > float("-inf") and (among is None or among(arm))]
        if not admitted:
            raise RuntimeError(f"no setting of {name} ran; see above")
        return max(admitted, key=lambda arm: values[arm])

    def compare(
        self,
        workload: str,
        arms: Mapping[str, Arm],
        figure: str,
        *,
        unit: str,
        higher: bool = True,
        goals: Mapping[str, float] | None = None,
        memory: str | None = None,
        equal: Mapping[str, float] | None = None,
        also: Mapping[str, str] | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Runs the arms in turn, `--pairs` times, and adds the comparison to the file. See this file's head.

        also: what the table says beside: a title, and what the names of the figure and of its `flops` begin with. about: for the file.
        """
        if self.given.only:
            arms = {name: arm for name, arm in arms.items() if name == self.given.only}
        row: dict[str, Any] = {
            "at": self.at,
            "workload": workload,
            "figure": figure,
            "unit": unit,
            "higher": higher,
            "goals": dict(goals or {}),
            "memory": memory,
            "equal": dict(equal or {}),
            "also": dict(also or {}),
            "about": dict(about or {}),
            "arms": {name: dataclasses.asdict(arm) for name, arm in arms.items()},
            "complete": "ours" in arms and len(arms) > 1,
            "runs": [],
        }
        say(workload)
        for pair in range(self.pairs):
            for name, arm in arms.items():
                row["runs"] += [{"pair": pair, **run} for run in self.run(name, arm)]
        row["summary"] = summary(row)
        self.record["rows"] = [one for one in self.record["rows"] if one["workload"] != workload] + [row]
        sys.stdout.write(table(row) + "\n\n")
        sys.stdout.flush()
        self.close()
        return row

    def close(self) -> None:
        """Writes the file, whole or not at all."""
        if self.out is not None:
            write(self.out, json.dumps(self.record, indent=1) + "\n")


def short(figures: Mapping[str, Any]) -> str:
    """A run's figures on one line."""
    numbers = {name: value for name, value in figures.items() if isinstance(value, int | float)}
    return "  ".join(f"{name} {value:.4g}" for name, value in list(numbers.items())[:5])


def table(row: Mapping[str, Any]) -> str:
    """A comparison in plain text."""
    found = row["summary"]
    lines = [row["workload"], f"  {'arm':<10}{row['unit']:>14}{'memory':>10}{'of peak':>9}   ratio (median, min to max)"]
    for name, value in found["medians"].items():
        share = f"{found['share_of_peak'][name]:.0%}" if name in found["share_of_peak"] else ""
        ratio = "   {median:.2f} ({min:.2f} to {max:.2f})".format(**found["ratios"][name]) if name in found["ratios"] else ""
        says = f"   {row['arms'][name]['says']}" if row["arms"][name]["says"] else ""
        lines.append(f"  {name:<10}{value:>14,.4g}{found['memory'][name] / 2**30:>6.2f} GiB{share:>9}{ratio}{says}")
    for title, one in found["also"].items():
        values = ", ".join(f"{name} {value:,.4g}" for name, value in one["medians"].items())
        against = ", ".join(f"{name} {ratio['median']:.2f}" for name, ratio in one["ratios"].items())
        shares = ", ".join(f"{name} {share:.0%}" for name, share in one["share_of_peak"].items())
        lines.append(f"  {title}: {values}; ratios {against}; of peak {shares}")
    for goal in found["goals"]:
        verdict = "met" if goal["met"] else "MISSED"
        lines.append(f"  {verdict:<7} {goal['kind']} of {goal['of']}: {goal['reached']:.3g}, wanted {goal['wanted']:.3g}")
    most = max((run["others"] or 0.0 for run in row["runs"] if run["counts"]), default=0.0)
    lines.append(f"  others used at most {most:.0%} of the processors in the runs that count")
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------- the machine


def machine() -> dict[str, Any]:
    """The processor's model and flags, cores, memory; no host name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {"model": model, **flags()}


def versions() -> dict[str, str]:
    """Of Python and of the packages that a benchmark may use."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def peak(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Operations a second of a square matrix product (2048 x 2048 on a processor) in bf16 and float32, best of many."""
    import torch

    device = settings["device"]
    side = 256 if settings["quick"] else {"cpu": 2048}.get(device, 8192)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    found: dict[str, Any] = {"threads": torch.get_num_threads(), "side": side}
    for name, form in (("bf16", torch.bfloat16), ("float32", torch.float32)):
        one, other = (torch.randn(side, side, device=device).to(form) for _ in range(2))
        best = float("inf")
        for _ in range(3 if settings["quick"] else 30):
            wait()
            begun = time.perf_counter()
            one @ other
            wait()
            best = min(best, time.perf_counter() - begun)
        found[name] = 2 * side**3 / best
    return found


def training_flops(config: Any, lengths: Sequence[int], *, trained: float = 1.0) -> float:
    """Operations of training on sequences of these lengths, as a model needs them: no padding, no recomputation.

    config: of a Llama. 6 a matrix weight and token (2 forward, 2 for the inputs' gradient, 2 for the weights', the last by the share
    `trained` of the weights), and causal attention, 6 T^2 x hidden a layer. The embedding is looked up, the head is a matrix.
    """
    kv = config.hidden_size * config.num_key_value_heads // config.num_attention_heads
    layer = 2 * config.hidden_size * (config.hidden_size + kv) + 3 * config.hidden_size * config.intermediate_size
    weights = config.num_hidden_layers * layer + config.vocab_size * config.hidden_size
    attention = 6 * config.num_hidden_layers * config.hidden_size * sum(length**2 for length in lengths)
    return (4 + 2 * trained) * weights * sum(lengths) + attention


if __name__ == "__main__":
    begin(argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter), {"peak": peak})
