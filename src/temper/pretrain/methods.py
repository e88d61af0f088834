"""Published ways to pre-train, one entry each."""

from __future__ import annotations

from temper.pretrain.engine import Pretrain

CAUSAL = Pretrain()
