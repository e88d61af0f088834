"""The estimate against a hand-made sum, and against what a process really holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from temper.models.memory import estimate
from temper.parts import Problem

SHAPE = {"batch_tokens": 100, "hidden": 8, "layers": 3, "vocabulary": 50, "intermediate": 20}

MEASURE = """
import json, sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
from temper.models.memory import estimate

torch.set_num_threads(1)
rows, length = 3, 256
config = LlamaConfig(vocab_size=2048, hidden_size=256, intermediate_size=704, num_hidden_layers=2, num_attention_heads=4,
                     max_position_embeddings=length)

def train(config, steps, rows, precision):
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(steps):
        tokens = torch.randint(0, config.vocab_size, (rows, length))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return sum(one.numel() for one in model.parameters())

small = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
train(small, 1, 1, "float32")  # what the libraries take for themselves

def resident(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))

found = {}
for precision in ("float32", "bfloat16"):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak counts from here
    before = resident("VmRSS")
    count = train(config, 2, rows, precision)
    told = estimate(parameters=count, trainable=count, optimizer=2, batch_tokens=rows * length, hidden=256, layers=2, vocabulary=2048,
                    intermediate=704, precision=precision)
    found[precision] = (resident("VmHWM") - before) / told.total
print(json.dumps(found))
"""


def test_by_hand():
    found = estimate(parameters=1000, trainable=10, optimizer=2, **SHAPE)
    assert (found.weights, found.gradients, found.optimizer) == (4000, 40, 80)
    assert found.activations == 3 * 100 * (16 * 8 + 7 * 8 * 4 + 4 * 20 * 4)
    assert found.logits == 3 * 100 * 50 * 4
    assert found.total == 4000 + 40 + 80 + found.activations + found.logits


def test_autocast_keeps_a_second_copy_and_narrow_activations():
    found = estimate(parameters=1000, trainable=1000, optimizer=0, precision="bfloat16", **SHAPE)
    assert found.weights == 1000 * 6
    assert found.optimizer == 0
    assert found.activations == 3 * 100 * (16 * 8 + 9 * 8 * 2 + 4 * 20 * 2)
    assert estimate(parameters=1000, trainable=8, optimizer=2, precision="bfloat16", weights="bfloat16", **SHAPE).weights == 2000


def test_a_model_that_only_runs_holds_one_layer():
    found = estimate(parameters=1000, trainable=0, optimizer=2, **SHAPE)
    assert (found.gradients, found.optimizer) == (0, 0)
    assert found.activations * 3 == estimate(parameters=1000, trainable=1, optimizer=2, **SHAPE).activations


def test_unknown_format():
    with pytest.raises(Problem, match="no number format `bfloat61`; did you mean `bfloat16`"):
        estimate(parameters=1, trainable=1, optimizer=2, precision="bfloat61", **SHAPE)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_against_a_real_process():
    # with freed pieces given back at once, the process shows what lives at once
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", MEASURE], env=environment, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert 0.75 < found["float32"] < 1.25, found
    assert 0.75 < found["bfloat16"] < 1.25, found
