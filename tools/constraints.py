"""Writes constraints.txt: the exact set of packages that this environment has for Temper with its `dev`, `docs` and `bench` extras.

    .venv/bin/python tools/constraints.py

Only what Temper's requirements reach is written, so other tools in the environment leave no trace; local version labels
(`2.13.0+cpu`) are cut, so that the same file serves machines with and without an accelerator.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

FILE = Path(__file__).parents[1] / "constraints.txt"


def reached(name: str, extras: frozenset[str], found: dict[str, str], seen: set[tuple[str, str]]) -> None:
    """Adds to `found` what an installed package and everything that it requires here are called and versioned."""
    try:
        package = distribution(name)
    except PackageNotFoundError:  # for another platform or an extra that is not installed
        return
    found[canonicalize_name(name)] = package.version.partition("+")[0]
    for extra in {"", *extras}:
        if (canonicalize_name(name), extra) in seen:
            continue
        seen.add((canonicalize_name(name), extra))
        for line in package.requires or ():
            wanted = Requirement(line)
            if wanted.marker is None or wanted.marker.evaluate({"extra": extra}):
                reached(wanted.name, frozenset(wanted.extras), found, seen)


def main() -> None:
    found: dict[str, str] = {}
    reached("temper-ml", frozenset({"dev", "docs", "bench"}), found, set())
    del found["temper-ml"]
    lines = [f"{name}=={version}" for name, version in sorted(found.items())]
    FILE.write_text("# The exact set that the tests pass with; written by tools/constraints.py.\n" + "\n".join(lines) + "\n")
    print(f"{len(lines)} packages in {FILE}")


if __name__ == "__main__":
    main()
