"""Published ways to tune, one entry each."""

from __future__ import annotations

from temper.models.deltas.delta import Full, Lora
from temper.models.deltas.init import Olora, Pissa
from temper.train.optimizers import AdamW
from temper.tune.engine import Tune

FULL = Tune(delta=Full(), optimizer=AdamW(lr=1e-4, weight_decay=0.0))
LORA = Tune(delta=Lora(), paper="LoRA: Low-Rank Adaptation of Large Language Models")
RSLORA = Tune(delta=Lora(rank_stabilized=True), paper="A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA")
DORA = Tune(delta=Lora(dora=True), paper="DoRA: Weight-Decomposed Low-Rank Adaptation")
OLORA = Tune(init=Olora(), paper="OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models")
PISSA = Tune(
    delta=Lora(rank=16, alpha=16.0),
    init=Pissa(),
    paper="PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
)
