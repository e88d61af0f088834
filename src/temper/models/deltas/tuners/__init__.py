"""Adapter types that peft lacks, as peft has its own."""

from __future__ import annotations

KINDS = ("TRI_FACTOR", "LOW_RANK_EXPERTS", "SPARSE", "SIDE_LADDER")
"""Their names in `adapter_config.json`."""


def register() -> None:
    """Makes every type of ours known to peft. Called wherever a configuration is built or a folder read; again, it does nothing."""
    from temper.models.deltas.tuners import low_rank_experts, side_ladder, sparse, tri_factor

    tri_factor.known()
    low_rank_experts.known()
    side_ladder.known()
    sparse.known()
