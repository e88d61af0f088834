"""Threads beside the one that trains."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from temper.lazy import torch


def beside(name: str, begin: Callable[[], None] = lambda: None) -> ThreadPoolExecutor:
    """A pool of one thread, which torch computes in on one core. begin: called in it first.

    Every thread that torch computes in has a team of threads of its own. Once all teams together are more than the cores, OpenMP lets each
    sleep between two operations, the trainer's too: products of small matrices then take 1.5 times as long, copies 1.4 times.
    """
    pool, many = ThreadPoolExecutor(1, name, begin), torch.get_num_threads()
    pool.submit(_alone).result()
    torch.set_num_threads(many)  # what the threads of others begin with
    return pool


def _alone() -> None:
    torch.get_num_threads()  # a thread that never asked takes the process's number at its first operation, whatever was set before
    torch.set_num_threads(1)
