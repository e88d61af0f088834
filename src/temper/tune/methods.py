"""Published ways to tune, one entry each."""

from __future__ import annotations

from temper.models.deltas.delta import Full, Lora
from temper.models.deltas.init import Olora, Pissa
from temper.train.optimizers import AdamW
from temper.tune.engine import Tune

FULL = Tune(delta=Full(), optimizer=AdamW(lr=1e-4, weight_decay=0.0))
LORA = Tune(delta=Lora())
RSLORA = Tune(delta=Lora(rank_stabilized=True))
DORA = Tune(delta=Lora(dora=True))
OLORA = Tune(init=Olora())
PISSA = Tune(
    delta=Lora(rank=16, alpha=16.0),
    init=Pissa(),
    paper="PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
)
