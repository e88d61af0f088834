"""Work in processes that may be killed: forks of one that has imported torch, once, and in which no thread runs."""

from __future__ import annotations

import functools
import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def server(module: str) -> Iterator[Callable[..., str]]:
    """Gives what runs `module`'s function of a name in a fork, with a folder and JSON values, and returns what it printed."""
    command = [sys.executable, "-c", "import sys; sys.path.insert(0, sys.argv[1]); import forks; forks.serve(sys.argv[2])"]
    process = subprocess.Popen([*command, str(Path(__file__).parent), module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None

    def run(name: str, folder: Path, *given: object) -> str:
        process.stdin.write(json.dumps([name, str(folder), *given]) + "\n")
        process.stdin.flush()
        status, told = json.loads(process.stdout.readline())
        assert status == 0, told
        return told

    try:
        yield run
    finally:
        process.kill()
        process.communicate()


def serve(module: str) -> None:
    import torch

    torch.set_num_threads(1)
    here = importlib.import_module(module)
    for line in sys.stdin:
        name, folder, *given = json.loads(line)
        told = Path(folder) / "told"
        child = start(functools.partial(getattr(here, name), Path(folder), *given), told)
        print(json.dumps([wait(child), told.read_text()]), flush=True)


def start(work: Callable[[], object], told: Path) -> int:
    """Forks; the child does the work, and what it prints goes to a file. Gives its number."""
    child = os.fork()
    if child:
        return child
    try:
        with told.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        work()
        sys.stdout.flush()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(1)


def wait(child: int) -> int:
    """How it ended: 0, an exit status, or a signal's number below 0."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
