"""glibc's allocator told to keep the memory that a training step frees: the next step asks for the same again.

By default it maps large blocks afresh and gives them back at once, and the kernel fills every page with zeros each time: on a small
model a third of a step.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -2, -3, -4  # mallopt's names, from malloc.h
_KEEPING = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 64 * 2**20}
_USUAL = {_MMAP_MAX: 65536, _MMAP_THRESHOLD: 32 * 2**20, _TRIM_THRESHOLD: 64 * 2**20, _TOP_PAD: 0}


@contextmanager
def keeping_memory() -> Iterator[None]:
    """Within, freed memory stays with the process; after it, it goes back. Nothing where the C library is not glibc or the user has
    set it up (`MALLOC_...`, `GLIBC_TUNABLES`, another allocator preloaded)."""
    given = any(name.startswith("MALLOC_") or name in ("GLIBC_TUNABLES", "LD_PRELOAD") for name in os.environ)
    library = None if given or platform.libc_ver()[0] != "glibc" else ctypes.CDLL(None)
    if library is None or not hasattr(library, "mallopt"):
        yield
        return
    _set(library, _KEEPING)
    try:
        yield
    finally:
        _set(library, _USUAL)
        library.malloc_trim(0)


def _set(library: ctypes.CDLL, options: dict[int, int]) -> None:
    for option, value in options.items():
        library.mallopt(ctypes.c_int(option), ctypes.c_int(value))
