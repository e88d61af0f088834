from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from align_together import align
from safetensors.torch import load_file

from temper.world import World


def test_two_processes_align_as_one(tmp_path, policy):
    """Attempts are made once, the reference's log-probabilities and the updates are shared out."""
    given = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(20000 + os.getpid() % 20000),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(Path(__file__).with_name("align_together.py")), str(policy.path), str(tmp_path / "two")]
    started = [
        subprocess.Popen(command, env={**given, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for process in started:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors[-3000:]
    alone = align(policy.path, tmp_path / "one", World())
    for rank in range(2):
        assert json.loads((tmp_path / "two" / f"figures-{rank}.json").read_text()) == pytest.approx(alone, rel=1e-3)
    assert not (tmp_path / "two" / "thrown away").exists()
    for name in ("work/reference.safetensors", "out/model/adapter_model.safetensors"):
        one, two = (load_file(tmp_path / folder / name) for folder in ("one", "two"))
        assert one.keys() == two.keys()
        for key in one:
            torch.testing.assert_close(two[key], one[key], rtol=1e-3, atol=1e-5)
