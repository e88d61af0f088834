"""What is commonly measured together."""

from __future__ import annotations

from temper.evaluate.engine import Evaluate
from temper.evaluate.metric import Accuracy, Agreement, Calibration, Choice, ExactMatch, Forgetting, PassUntil, Perplexity, TokenEdit
from temper.evaluate.slice import Confidence

PERPLEXITY = Evaluate(metric=Perplexity())
ACCURACY = Evaluate(metric=Accuracy())
CALIBRATION = Evaluate(metric=Calibration(), paper="On Calibration of Modern Neural Networks")
LANGUAGE = Evaluate(metric=(Perplexity(), Calibration(of="tokens")))
"""A language model on held-out text."""
ANSWERS = Evaluate(metric=(Accuracy(), Calibration(of="answers")))
"""A model on questions with one right answer."""
EXACT_MATCH = Evaluate(metric=ExactMatch())
CHOICE = Evaluate(metric=Choice())
FORGETTING = Evaluate(metric=Forgetting())
AGREEMENT = Evaluate(metric=Agreement())
PASS_UNTIL = Evaluate(metric=PassUntil(), paper="Unlock Predictable Scaling from Emergent Abilities")
EMERGENCE_MIRAGE = Evaluate(
    metric=(Accuracy(), ExactMatch(normalise="space"), TokenEdit(), Perplexity()),
    paper="Are Emergent Abilities of Large Language Models a Mirage?",
)
"""The same answers under metrics that leap and metrics that do not."""
QUANTISED_CONFIDENCE = Evaluate(
    metric=(Choice(), Agreement(of="choices")),
    slice=Confidence(),
    paper="When Quantization Affects Confidence of Large Language Models?",
)
"""Choices of a compressed model, by how sure the full one, its `reference`, was of the right one."""
