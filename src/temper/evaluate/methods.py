"""What is commonly measured together."""

from __future__ import annotations

from temper.evaluate.engine import Evaluate
from temper.evaluate.metric import Accuracy, Calibration, Perplexity

PERPLEXITY = Evaluate(metric=Perplexity())
ACCURACY = Evaluate(metric=Accuracy())
CALIBRATION = Evaluate(metric=Calibration(), paper="On Calibration of Modern Neural Networks")
LANGUAGE = Evaluate(metric=(Perplexity(), Calibration(of="tokens")))
"""A language model on held-out text."""
ANSWERS = Evaluate(metric=(Accuracy(), Calibration(of="answers")))
"""A model on questions with one right answer."""
