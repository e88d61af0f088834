"""Starts of LoRA that look at the weights or at data, beside peft's: PiSSA exact and by subspace iteration, CorDA, EVA.

    python benchmarks/inits.py [--workload pissa-exact pissa-16 corda eva] [--pairs 5]

A Llama of hidden 512 and 8 layers, not trained; LoRA of rank 16 on all its linear layers. Timed is everything from the plain model and
token ids in memory to the model that trains: where an init looks at data, its passes over them too. Both see the same 64 rows of 128
tokens: ours in batches of 8; EVA of peft in the same batches, over and over until its directions have settled (tau 0.99); CorDA of peft
a row at a time, which is how its hook takes them. EVA leaves all ranks equal (rho 1) on both sides.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import harness
from harness import Arm

RANK = 16


def world(settings: Mapping[str, Any]) -> tuple[Any, list[str], list[Any]]:
    """A model, the names of its linear layers, and batches."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from temper.models.deltas.where import AllLinear
    from temper.train.batching import collate
    from temper.train.examples import Example

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=settings["hidden"],
        intermediate_size=settings["hidden"] * 8 // 3 // 32 * 32,
        num_hidden_layers=settings["layers"],
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=settings["tokens"],
    )
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    ids = torch.randint(0, 4096, (settings["rows"], settings["tokens"])).int().numpy()
    learnt = torch.ones(settings["tokens"], dtype=torch.bool).numpy()
    examples = [Example(row, learnt, source) for source, row in enumerate(ids)]
    return model, AllLinear()(model), [collate(examples[start : start + 8]) for start in range(0, len(examples), 8)]


def clocked(work: Callable[[], Any]) -> dict[str, Any]:
    """Seconds of the work, and how long what the adapters take of the weights is, which equal starts have in common."""
    import torch

    from temper.models.deltas.init import low_rank_layers

    begun = time.perf_counter()
    model = work()
    seconds = time.perf_counter() - begun
    with torch.no_grad():
        length = sum(float(layer.get_delta_weight("default").square().sum()) for _, layer in low_rank_layers(model)) ** 0.5
    return {"seconds": seconds, "length": length}


def ours(settings: Mapping[str, Any]) -> dict[str, Any]:
    import peft.tuners.lora  # noqa: F401  imports do not count
    import scipy.linalg  # noqa: F401

    import temper.models.deltas.tuners.base
    import temper.models.parametrizations  # noqa: F401
    from temper.models.deltas import attach
    from temper.models.deltas.delta import Lora
    from temper.models.deltas.init import Corda, Eva, Pissa
    from temper.models.statistics import Statistics
    from temper.train.objectives import Causal

    model, names, batches = world(settings)
    init: Any = {"pissa-exact": Pissa(), "pissa-16": Pissa(iterations=16), "corda": Corda(), "eva": Eva()}[settings["init"]]

    class Given:
        """What a context gives."""

        gifts: Mapping[str, Any] = {"statistics": Statistics(model, lambda: names, lambda: batches, Causal())}
        want = gifts.__getitem__

    def work() -> Any:
        live = init.start(Given) if hasattr(init, "start") else init
        return attach(model, None, Lora(rank=RANK, alpha=float(RANK)), live, seed=0)

    return clocked(work)


def peer(settings: Mapping[str, Any]) -> dict[str, Any]:
    import peft
    import torch
    from peft.tuners.lora.config import CordaConfig, EvaConfig
    from peft.tuners.lora.corda import preprocess_corda

    model, names, batches = world(settings)
    kind = {"pissa-exact": "pissa", "pissa-16": "pissa_niter_16"}.get(settings["init"], settings["init"])
    more: dict[str, Any] = {
        "corda": {"corda_config": CordaConfig(corda_method="ipm", verbose=False)},
        "eva": {"eva_config": EvaConfig(rho=1.0)},
    }
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names, init_lora_weights=kind, **more.get(kind, {}))  # type: ignore[arg-type]

    def rows() -> None:
        with torch.no_grad():
            for batch in batches:
                for row in batch.input_ids.split(1):
                    model(row, use_cache=False)

    def work() -> Any:
        if kind == "corda":
            preprocess_corda(model, config, run_model=rows)
        made = peft.get_peft_model(model, config)
        if kind == "eva":
            peft.initialize_lora_eva_weights(made, [dict(batch.inputs) for batch in batches], show_progress_bar=False)
        return made

    return clocked(work)


ARMS = {"ours": ours, "peer": peer}
TITLES = {"pissa-exact": "PiSSA, exact", "pissa-16": "PiSSA, 16 iterations", "corda": "CorDA, 64 rows", "eva": "EVA, 64 rows"}


def main() -> None:
    ask = harness.options(__doc__, __file__)
    ask.add_argument("--workload", nargs="+", choices=TITLES, default=[*TITLES])
    given = harness.begin(ask, ARMS)
    bench = harness.Bench(given)
    size = {"hidden": 64, "layers": 2, "rows": 8, "tokens": 64} if given.quick else {"hidden": 512, "layers": 8, "rows": 64, "tokens": 128}
    for name in given.workload:
        settings = {**size, "init": name}
        bench.compare(
            f"{TITLES[name]}: a start of LoRA, hidden {size['hidden']}, {size['layers']} layers, rank {RANK}",
            {"ours": Arm("ours", settings), "peft": Arm("peer", settings, says="0.21's own")},
            "seconds",
            unit="s",
            higher=False,
            goals={"peft": 1.0},
            equal={"length": 0.01} if name == "pissa-exact" else {},
        )
    bench.close()


if __name__ == "__main__":
    main()
