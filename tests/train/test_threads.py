"""Threads beside the trainer compute on one core, and nobody else's are changed."""

from __future__ import annotations

import threading

import torch

from temper.train.threads import beside


def test_a_thread_beside_the_trainer_has_no_team():
    many = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        began, told = [], []
        pool = beside("test", lambda: began.append(threading.current_thread().name))
        # Also after a parallel operation, at which torch asks the process for its number.
        assert pool.submit(lambda: (torch.empty(1 << 20).zero_(), torch.get_num_threads())[1]).result() == 1
        assert began[0].startswith("test")
        assert torch.get_num_threads() == 2
        other = threading.Thread(target=lambda: told.append(torch.get_num_threads()))
        other.start()
        other.join()
        assert told == [2]
        pool.shutdown()
    finally:
        torch.set_num_threads(many)
