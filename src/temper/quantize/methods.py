"""Published ways to quantise a model, each a choice of parts."""

from __future__ import annotations

from temper.quantize import calibrate, objective, solver
from temper.quantize.engine import Quantize

RTN = Quantize()
"""Round to nearest: no data, seconds."""

GPTQ = Quantize(
    objective=objective.LayerOutput(),
    solver=solver.GPTQ(),
    calibrate=calibrate.Samples(),
    paper="GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
)
