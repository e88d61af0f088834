"""The kernels of `kernels.cpp`, built once a machine by its own C++ compiler and called through ctypes."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC")

_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "d": ctypes.c_double}
_KERNELS = {
    "add": "pppii",
    "norm": "ppppiiiidd",
    "norm_backward": "pppppppiiiid",
    "silu": "ppiii",
    "silu_backward": "pppiii",
    "gelu": "ppiii",
    "gelu_backward": "pppiii",
    "drop": "ppiiiiid",
    "cross": "ppppiii",
    "attention": "p",
    "attention_backward": "p",
}
"""What each takes: pointers, integers, doubles. There is one for every format of `_KINDS`."""
_KINDS = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def _named(kind: str, names: str) -> list[tuple[str, Any]]:
    return [(name, _TYPES[kind]) for name in names.split()]


class Attention(ctypes.Structure):
    """`struct Attention` of the kernels; what its fields mean is said there."""

    _fields_ = [
        *_named("p", "q k v o dout dq dk dv cos sin q_weight k_weight lse dq_weight dk_weight first last begins"),
        *_named("i", "q_token q_head k_token k_head v_token v_head sequences tokens heads kv_heads size threads"),
        *_named("d", "scale eps offset"),
    ]


@functools.cache
def library() -> tuple[dict[tuple[str, torch.dtype], Callable[..., None]] | None, str]:
    """The built kernels by name and format, or None, and why there are none. Building takes some 5 s of one core, once a machine.

    `TEMPER_KERNELS=off` leaves them out.
    """
    if os.environ.get("TEMPER_KERNELS") == "off":
        return None, "TEMPER_KERNELS is off"
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if sys.platform != "linux" or compiler is None:
        return None, "there is no g++ to build the kernels with"
    try:
        built = ctypes.CDLL(str(_built(compiler)))
    except subprocess.CalledProcessError as problem:
        return None, f"{compiler} does not build the kernels: {problem.stderr.strip().splitlines()[-1:]}"
    except OSError as problem:
        return None, f"the kernels cannot be loaded: {problem}"
    return {
        (name, kind): _function(built, f"{name}_{called}", types) for name, types in _KERNELS.items() for kind, called in _KINDS.items()
    }, ""


def _function(built: ctypes.CDLL, name: str, types: str) -> Callable[..., None]:
    function = getattr(built, name)
    function.argtypes, function.restype = [_TYPES[one] for one in types], None
    return function


def _built(compiler: str) -> Path:
    """The library's file in the user's cache, built where it is not there yet. Its name says what it was made of and for."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    info = Path("/proc/cpuinfo")
    processor = (
        next((line for line in info.read_text().splitlines() if line.startswith(("flags", "Features"))), "") if info.exists() else ""
    )
    made_of = "|".join((SOURCE.read_text(encoding="utf8"), version, *FLAGS, platform.machine(), processor))
    home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "temper" / "kernels"
    file = home / f"{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.so"
    if not file.exists():
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=home) as scratch:
            unlinked, linked = Path(scratch) / "kernels.o", Path(scratch) / "kernels.so"
            # Linked without OpenMP: the loader finds torch's own, so that there is one team of threads and not two.
            for command in ([*FLAGS, "-c", SOURCE, "-o", unlinked], ["-shared", unlinked, "-o", linked]):
                subprocess.run([compiler, *map(str, command)], capture_output=True, text=True, check=True)
            linked.replace(file)
    return file


def suits(*tensors: torch.Tensor | None) -> bool:
    """Whether the kernels take these tensors: on the CPU, in float32 or bfloat16, and built."""
    return all(one is None or (one.dtype in _KINDS and one.is_cpu) for one in tensors) and library()[0] is not None


def call(name: str, kind: torch.dtype, *arguments: torch.Tensor | int | float | ctypes.Structure | None) -> None:
    """Calls a kernel for numbers of type `kind`. Tensors are contiguous, and live until it returns."""
    kernels = library()[0]
    assert kernels is not None
    kernels[name, kind](*map(_given, arguments))


def _given(argument: Any) -> Any:
    """Tensors and structures by where they begin in memory."""
    if isinstance(argument, torch.Tensor):
        return argument.data_ptr()
    return ctypes.addressof(argument) if isinstance(argument, ctypes.Structure) else argument
