"""A tiny run for several processes: `torchrun ... sharing.py FOLDER KIND PLAN UPDATES ...`, a few in one start; also imported."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from temper.context import Context, Stream
from temper.train import distribution
from temper.train.batching import Bucketed, Packed, Padded
from temper.train.examples import Example
from temper.train.loop import train, trainable
from temper.train.objectives import Causal
from temper.train.optimizers import AdamW
from temper.train.schedules import Cosine
from temper.world import World, join, leave

PLANS = {
    "padded": Padded(size=2, accumulate=2),
    "one batch": Padded(size=5),
    "bucketed": Bucketed(size=4, tokens=30),
    "packed": Packed(length=16, size=2, accumulate=2),
    "single": Padded(size=1),
}


def data() -> list[Example]:
    draw = numpy.random.default_rng(0)
    lengths = draw.integers(3, 25, 16)
    return [Example(draw.integers(1, 64, n).astype(numpy.int32), numpy.arange(n) >= n // 2, i) for i, n in enumerate(lengths)]


def run(folder: Path, kind: str, plan: str, updates: int, stop: int | None = None, world: World | None = None) -> dict:
    """A session of a run with a model of its own; `stop`: after so many updates, as if killed. Gives losses, norms and weights."""
    world = world or World()
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape)).double()
    context = Context.scratch(folder, seed=3)
    context.world = world
    spread = distribution.spread(model, world, kind, "cpu")
    ends = []

    def loss(model, batch):
        if stop is not None and batch.update == stop:
            raise InterruptedError
        return Causal()(model, batch)

    try:
        history = train(
            model,
            PLANS[plan](data(), Stream("batches")),
            loss,
            optimizer=AdamW(lr=0.01).build(trainable(spread.model)),
            schedule=Cosine(),
            updates=updates,
            context=context,
            spread=spread,
            checkpoint_every=2,
            keep=(3,),
            on_keep=lambda name, folder: ends.append(total(model)),
        )
    except InterruptedError:
        return {}
    return {
        "resumed": history.resumed,
        "loss": [row["loss"] for row in history.rows],
        "norm": [row["grad_norm"] for row in history.rows],
        "tokens": history.tokens,
        "weights": total(model),
        "kept": ends,
    }


def total(model: torch.nn.Module) -> list[float]:
    return [float(one.detach().sum()) for one in model.parameters()]


def main() -> None:
    world = join()
    made = {}
    for word in sys.argv[2:]:
        kind, plan, updates, stop = word.split(":")
        folder = Path(sys.argv[1]) / f"{kind}-{plan}-{updates}-{stop}"
        made[word] = run(folder, kind, plan, int(updates), int(stop) if stop else None, world)
    if world.main:
        (Path(sys.argv[1]) / "made.json").write_text(json.dumps(made))
    leave()


if __name__ == "__main__":
    main()
