"""A step of LoRA against its floor, and on frozen weights held in NF4: time, and bytes of what is frozen.

    python benchmarks/lora_floor.py [--pairs 5] [--rank 8]

A Llama of the shape of `house:lm` (hidden 192, 4 layers, vocabulary 4,096), LoRA of rank 8 on all linear layers, an update of 32 rows whose
lengths are log-normal, about 130 tokens on average, in bf16 autocast. A step is the forward and the backward pass, clipping and fused
AdamW. The first steps warm up; the figure is the median of the others.

floor: what no implementation of LoRA on these layers can leave out. The passes of the same model with all weights frozen but a bias of the
first attention's queries, so that gradients go through every layer down to there, and no further: LoRA's own need not go below either.
To it is added the time of the bare low-rank products on matrices that lie ready, forward (x A', h B') and backward (for A, B and x), of
each layer by itself or of layers with one input together, whichever is faster. No dropout, no scale, no casts, no optimizer.

nf4: the same LoRA on a base in NF4, whose layers are computed by the model's own code, every weight made floats in every product. Its bytes
are compared with the fewest that the format can take, 4 + 8/64 + 32/(64 x 256) bits a weight.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import harness
from harness import Arm, Bench

ROWS, VOCABULARY, WARM = 32, 4096, 3


# ------------------------------------------------------------------------------------------------------- the model


def model_of(settings: Mapping[str, Any]) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden = settings["hidden"]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=-(-8 * hidden // 3 // 32) * 32,
        num_hidden_layers=settings["layers"],
        num_attention_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def batch_of(settings: Mapping[str, Any]) -> Any:
    """Rows of random tokens, of which each but the first is a target."""
    import numpy

    from temper.train.batching import collate
    from temper.train.examples import Example

    draw, numbers = random.Random(0), numpy.random.default_rng(0)
    lengths = sorted(min(512, max(8, round(draw.lognormvariate(settings["location"], 0.75)))) for _ in range(ROWS))
    return collate([Example(numbers.integers(3, VOCABULARY, size, numpy.int32), numpy.ones(size, bool), 0) for size in lengths])


def adapted(model: Any, settings: Mapping[str, Any], in_nf4: bool) -> Any:
    import torch

    from temper.models.deltas import prepare
    from temper.models.deltas.base import NF4, AsLoaded
    from temper.models.deltas.delta import Lora
    from temper.models.deltas.init import Default

    made = prepare(model, None, Lora(rank=settings["rank"]), Default(), NF4() if in_nf4 else AsLoaded(), seed=0)
    with torch.no_grad():
        for name, one in made.named_parameters():
            if "lora_B" in name:
                one.normal_(std=0.01)
    return made.train()


def timed(step: Callable[[], Any], steps: int) -> float:
    """Seconds: the median of so many, after some that warm up."""
    found = []
    for _ in range(WARM + steps):
        begun = time.perf_counter()
        step()
        found.append(time.perf_counter() - begun)
    return statistics.median(found[WARM:])


def stepping(model: Any, batch: Any) -> Callable[[], None]:
    """One update of what a model trains."""
    import torch

    from temper.train.objectives import Causal
    from temper.train.precision import autocast

    trained, loss = [one for one in model.parameters() if one.requires_grad], Causal()
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0, fused=True)

    def step() -> None:
        with autocast("cpu", "bf16"):
            total = loss(model, batch).mean
        total.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


# --------------------------------------------------------------------------------------------------------- the arms


def ours(settings: dict[str, Any]) -> dict[str, Any]:
    from temper.models.nf4 import frozen_bytes
    from temper.train.faster import faster

    batch, model = batch_of(settings), adapted(model_of(settings), settings, settings.get("nf4", False))
    with faster(model, device="cpu"):
        seconds = timed(stepping(model, batch), settings["steps"])
    return {"seconds": seconds, "tokens": batch.tokens, "frozen_bytes": frozen_bytes(model)}


def floor(settings: dict[str, Any]) -> dict[str, Any]:
    import torch

    from temper.train.faster import faster

    batch, model = batch_of(settings), model_of(settings).requires_grad_(False).train()
    first: Any = model.model.layers[0].self_attn.q_proj
    first.bias = torch.nn.Parameter(torch.zeros(first.out_features))
    with faster(model, device="cpu"):
        passes = timed(stepping(model, batch), settings["steps"])
        low_rank = low_rank_seconds(model, batch.tokens, settings)
    return {"seconds": passes + low_rank, "passes_seconds": passes, "low_rank_seconds": low_rank, "tokens": batch.tokens}


def low_rank_seconds(model: Any, tokens: int, settings: Mapping[str, Any]) -> float:
    """The bare low-rank products of all layers: each by itself, or together those that share an input; whichever is faster."""
    layer, rank = model.model.layers[0], settings["rank"]
    groups = [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]
    seconds = 0.0
    for group in groups:
        modules = [getattr(layer.self_attn, name, None) or getattr(layer.mlp, name) for name in group]
        inputs, outputs = modules[0].in_features, [one.out_features for one in modules]
        apart = sum(timed(products(tokens, inputs, some, rank), 10) for some in outputs)
        together = timed(products(tokens, inputs, sum(outputs), rank * len(outputs)), 10)
        seconds += min(apart, together)
    return seconds * settings["layers"]


def products(tokens: int, inputs: int, outputs: int, rank: int) -> Callable[[], None]:
    """y += (x A') B', then the gradients of B and A, and what is added to that of x."""
    import torch

    def some(*shape: int) -> Any:
        return torch.randn(shape, dtype=torch.bfloat16)

    x, dx, y, dy = some(tokens, inputs), some(tokens, inputs), some(tokens, outputs), some(tokens, outputs)
    a, b = some(rank, inputs), some(outputs, rank)

    def run() -> None:
        low = torch.mm(x, a.t())
        y.addmm_(low, b.t())
        torch.mm(dy.t(), low)
        dlow = torch.mm(dy, b)
        torch.mm(dlow.t(), x)
        dx.addmm_(dlow, a)

    return run


def nf4_bytes(settings: dict[str, Any]) -> dict[str, Any]:
    from temper.models.deltas.base import NF4
    from temper.models.nf4 import size

    return {"bytes": size(NF4()(model_of(settings)))[0]}


def least_bytes(settings: dict[str, Any]) -> dict[str, Any]:
    """By arithmetic, from the shapes alone."""
    from temper.models.deltas.where import free_linears

    model = model_of(settings)
    weights = sum(model.get_submodule(name).weight.numel() for name in free_linears(model))
    return {"bytes": weights * (4 + 8 / 64 + 32 / (64 * 256)) / 8, "weights": weights}


ARMS = {one.__name__: one for one in (ours, floor, nf4_bytes, least_bytes)}


def main() -> None:
    ask = harness.options(__doc__, __file__)
    ask.add_argument("--rank", type=int, default=8, help="of LoRA (default: 8)")
    given = harness.begin(ask, ARMS)
    bench = Bench(given)
    shape = {"hidden": 64, "layers": 1} if given.quick else {"hidden": 192, "layers": 4}
    settings = {**shape, "rank": given.rank, "location": 4.0 if given.quick else 4.6, "steps": 3 if given.quick else 40}
    bench.compare(
        f"a step of LoRA, rank {given.rank}, on the house model's shape",
        {
            "ours": Arm("ours", settings, says="on float weights"),
            "floor": Arm("floor", settings, says="frozen passes and bare low-rank products"),
            "nf4": Arm("ours", {**settings, "nf4": True}, says="on weights in NF4"),
        },
        "seconds",
        unit="s",
        higher=False,
        goals={"floor": 1 / 1.05},
        about=settings,
    )
    bench.compare(
        "bytes of frozen linear weights in NF4",
        {"ours": Arm("nf4_bytes", settings), "least": Arm("least_bytes", settings, says="4 + 8/64 + 32/(64 x 256) bits a weight")},
        "bytes",
        unit="B",
        higher=False,
        goals={"least": 1 / 1.05},
        about=settings,
    )
    bench.close()


if __name__ == "__main__":
    main()
