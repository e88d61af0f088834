"""Writes RESULTS.md from what the benchmarks left beside it, and the README's line about GPUs.

    python benchmarks/results.py [--check]

Every figure is derived here from the raw runs in benchmarks/*.json; none is written by hand. --check writes nothing and ends with 1
where a file is not what it would be.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import harness

HERE = Path(__file__).resolve().parent
GPU = re.compile(r"(?<=<!-- gpu -->).*?(?=<!-- /gpu -->)", re.DOTALL)
"""The place in the README."""
HEAD = """# Results

Written by `make bench` from the raw runs in `benchmarks/*.json`. Every arm ran in processes of its own, in turn with the others; a ratio is
the median over pairs of runs, with the least and the greatest. *Of peak* is the share of the matrix peak measured on the same machine that
the model's own operations take, padding and recomputation not counted.

| Workload | Arm | Setting | Speed | Ours is better by | Peak memory | Of peak | Goal |
|---|---|---|---|---|---|---|---|
"""


def read(folder: Path) -> list[dict[str, Any]]:
    """The files of benchmarks, by name, their summaries made anew from their runs."""
    found = []
    for file in sorted(folder.glob("*.json")):
        record = json.loads(file.read_text(encoding="utf8"))
        if "rows" in record:
            rows = [{**row, "summary": harness.summary(row)} for row in record["rows"]]
            found.append({**record, "file": file.name, "rows": rows})
    return found


def render(records: Sequence[Mapping[str, Any]]) -> str:
    """RESULTS.md."""
    lines, places = [], []
    for record in records:
        for row in record["rows"]:
            place = where(row["at"])
            if place not in places:
                places.append(place)
            lines += comparison(row, places.index(place) + 1)
    notes = [f"{number}. {place}" for number, place in enumerate(places, 1)]
    swept = [sweep(name, one) for record in records for name, one in record["sweeps"].items()]
    parts = [HEAD + "\n".join(lines), "## Where and how", "\n".join(notes)]
    if swept:
        parts += ["## Settings that were tried for the peers", "Each once; all are in the files, with what failed.\n\n" + "\n".join(swept)]
    if gpu := verified(records):
        parts += ["## GPUs", gpu]
    return "\n\n".join(parts) + "\n"


def comparison(row: Mapping[str, Any], place: int) -> list[str]:
    """The lines of one comparison: ours first."""
    found, lines = row["summary"], []
    title = f"{row['workload']} [{place}]"
    for name in sorted(row["arms"], key=lambda name: name != "ours"):
        cells = [columns(found, name, row["unit"])]
        cells += [[f"{cell} ({also})" if cell else "" for cell in columns(one, name, row["unit"])] for also, one in found["also"].items()]
        speed, ratio, share = (", ".join(filter(None, some)) for some in zip(*cells, strict=True))
        memory = f"{found['memory'][name] / 2**30:.2f} GiB"
        goals = "; ".join(verdict(goal) for goal in found["goals"] if goal["of"] == name)
        lines.append(f"| {title} | {name} | {row['arms'][name]['says']} | {speed} | {ratio} | {memory} | {share} | {goals} |")
        title = ""
    return lines


def columns(found: Mapping[str, Any], name: str, unit: str) -> list[str]:
    """An arm's speed, the ratio to it, its share of the peak; empty where there is none."""
    ratio, share, sheet = (found[kind].get(name) for kind in ("ratios", "share_of_peak", "share_of_datasheet"))
    return [
        f"{number(found['medians'][name])} {unit}",
        "{median:.2f} ({min:.2f} to {max:.2f})".format(**ratio) if ratio else "",
        (f"{share:.0%}" if share is not None else "") + (f" ({sheet:.0%} of the datasheet's)" if sheet is not None else ""),
    ]


def verdict(goal: Mapping[str, Any]) -> str:
    """A goal in words."""
    word = "met" if goal["met"] else "**missed**"
    match goal["kind"]:
        case "ratio":
            return f"{goal['wanted']:g}x: {word}"
        case "memory":
            return f"no more memory: {word} ({goal['reached']:.2f}x)"
        case _:
            return f"equal {goal['kind'].replace('_', ' ')}: {word} ({goal['reached']:.1%} apart, {goal['wanted']:.0%} allowed)"


def where(at: Mapping[str, Any]) -> str:
    """Date, machine, versions and command of a measurement."""
    machine, versions = at["machine"], at["versions"]
    vectors = [flag for flag in machine["flags"] if flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")]
    card = f", {machine['gpu']['name']} (driver {machine['gpu']['driver']})" if "gpu" in machine else ""
    peaks = ", ".join(f"{name} {at['peak'][name] / 1e9:,.0f}" for name in ("bf16", "float32"))
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"{at['date']}, {machine['model']} ({' '.join(vectors)}), {machine['cores']} cores, {machine['memory'] / 2**30:.0f} GiB{card}; "
        f"matrix peak, GFLOP/s: {peaks}; {packages}. Again: `{at['command']}`"
        + (" (**a quick run: it shows that the benchmark works and measures nothing**)" if at["quick"] else "")
    )


def sweep(name: str, one: Mapping[str, Any]) -> str:
    """A sweep on one line, the best first."""
    tried = []
    for row in one["runs"]:
        value = next((run["figures"][one["figure"]] for run in row.get("runs", ()) if run["counts"]), None)
        tried.append((value, f"{row['says']}{'' if row['admitted'] else ' (another objective)'}"))
    best_first = -1 if one["higher"] else 1
    tried.sort(key=lambda pair: (pair[0] is None, best_first * (pair[0] or 0)))
    listed = "; ".join(f"{says}: {'failed' if value is None else number(value)}" for value, says in tried)
    return f"- {name}, {one['figure'].replace('_', ' ')}: {listed}"


def verified(records: Sequence[Mapping[str, Any]]) -> str:
    """When and on which card a GPU was last checked; nothing where none was."""
    checks = [record["verified"] for record in records if "verified" in record]
    if not checks:
        return ""
    one = max(checks, key=lambda check: check["date"])
    tests = f"{one['passed']} conformance tests passed" + (f", {one['failed']} failed" if one["failed"] else "")
    broken = f"; not measured: {', '.join(one['broken'])}" if one["broken"] else ""
    return (
        f"Last verified on a GPU on {one['date']}: {one['card']}, driver {one['driver']}, torch {one['torch']}; {tests}{broken} "
        "(`make gpu-check`)."
    )


def number(value: float) -> str:
    """Three or four significant digits."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def main() -> int:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--check", action="store_true", help="write nothing; 1 where a file is not what it would be")
    given = ask.parse_args()
    records, readme = read(HERE), HERE.parent / "README.md"
    wanted = {HERE / "RESULTS.md": render(records)}
    if verified(records):
        wanted[readme] = GPU.sub(lambda _: verified(records), readme.read_text(encoding="utf8"))
    stale = [file for file, text in wanted.items() if not file.exists() or file.read_text(encoding="utf8") != text]
    for file in stale:
        if given.check:
            sys.stderr.write(f"{file.name} is not what the measurements say; run python benchmarks/results.py\n")
        else:
            file.write_text(wanted[file], encoding="utf8")
    return 1 if given.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
