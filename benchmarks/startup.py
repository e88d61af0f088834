"""How long commands take from start to end, beside Python itself: the median of nine runs, and how many modules each imports.

python benchmarks/startup.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

RUNS = 9
COMMAND = """
import sys
sys.argv = ["temper", *sys.argv[1:]]
try:
    if sys.argv[1:]:
        from temper.cli import main
        main()
finally:
    print(len(sys.modules), file=sys.stderr)
"""


def measured(*arguments: str) -> tuple[float, int]:
    """Median seconds of a process, the first (with cold caches) left out, and its modules at the end."""
    times, modules = [], 0
    for _ in range(RUNS + 1):
        begun = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", COMMAND, *arguments], capture_output=True, text=True)
        times.append(time.perf_counter() - begun)
        if done.returncode:
            sys.exit(f"`temper {' '.join(arguments)}` failed:\n{done.stderr}")
        modules = int(done.stderr.split()[-1])
    return statistics.median(times[1:]), modules


def main() -> None:
    print(f"{'command':<24}{'seconds':>9}{'modules':>9}")
    for arguments in ((), ("--help",), ("methods",), ("papers", "gptq")):
        seconds, modules = measured(*arguments)
        name = " ".join(("temper", *arguments)) if arguments else "python (nothing else)"
        print(f"{name:<24}{seconds:>9.3f}{modules:>9}")


if __name__ == "__main__":
    main()
