"""This machine: what it is, whether a GPU is used, and what a piece of work took of it."""

from __future__ import annotations

import os
import platform
import resource
from pathlib import Path
from typing import Any

from temper import keys
from temper.context import write


def device() -> str:
    """`cuda` where torch would find a GPU. Asked of the system, not of torch: a key must not import it."""
    if os.environ.get("TEMPER_DEVICE"):
        return os.environ["TEMPER_DEVICE"]
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1")
    return "cuda" if Path("/proc/driver/nvidia/version").exists() and not hidden and keys.cuda_build() else "cpu"


def machine() -> dict[str, Any]:
    """The machine by its processor's flags, cores and memory. No host name."""
    flags: set[str] = set()
    info = Path("/proc/cpuinfo")
    if info.exists():
        line = next((one for one in info.read_text().splitlines() if one.startswith(("flags", "Features"))), "")
        flags = {one for one in line.split() if one.startswith(("avx", "amx", "asimd", "sve", "bf16"))}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count(), "memory": memory, "flags": sorted(flags)}


def reset_peak() -> bool:
    """Starts the count of peak memory afresh where the system can (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_memory() -> int:
    """Greatest resident memory of this process since `reset_peak`, bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(one for one in status.read_text().splitlines() if one.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def clock(scratch: Path, seconds: float | None = None) -> float:
    """Seconds that interrupted tries of a step took, kept beside its checkpoints."""
    file = scratch / "seconds"
    if seconds is not None:
        write(file, f"{seconds:.3f}")
        return seconds
    return float(file.read_text()) if file.exists() else 0.0
