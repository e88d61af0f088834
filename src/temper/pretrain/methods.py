"""Published ways to pre-train, one entry each."""

from __future__ import annotations

from temper.pretrain.engine import Pretrain
from temper.pretrain.shape import T5
from temper.pretrain.tokenizer import ByteBPE
from temper.train.objectives import SpanMixture

CAUSAL = Pretrain()
UL2 = Pretrain(
    objective=SpanMixture(), tokenizer=ByteBPE(reserve=("spans",)), shape=T5(), paper="UL2: Unifying Language Learning Paradigms"
)
"""An encoder-decoder, as the paper's large one; a decoder alone with `shape: llama`."""
