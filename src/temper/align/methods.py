"""The methods of `align` by name."""

from __future__ import annotations

from temper.align import loss
from temper.align.engine import Align
from temper.align.likelihood import PerToken
from temper.align.source import Attempts

DPO = Align(paper="Direct Preference Optimization: Your Language Model is Secretly a Reward Model")
LENGTH_NORMALIZED_DPO = Align(likelihood=PerToken(), loss=loss.DPO(beta=5.0))
"""DPO on mean log-probabilities, with the beta of Lambert et al. 2024, "Tülu 3: Pushing Frontiers in Open Language Model Post-Training"."""
CHECKED_DPO = Align(source=Attempts(), loss=(loss.DPO(), loss.SFT()), paper="Iterative Reasoning Preference Optimization")
"""DPO on the policy's own attempts, a right one against a wrong one, beside supervised learning of the right one: one round of Pang et
al. 2024, "Iterative Reasoning Preference Optimization", eq. 1 with alpha 1; `repeat` gives the rounds."""
