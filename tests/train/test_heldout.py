"""The held-out loss is the mean over all targets, however the examples are batched."""

from __future__ import annotations

import pytest
import torch

from temper.train.heldout import heldout
from temper.train.objectives import Causal, Sum


@pytest.mark.parametrize("tokens", [1, 64, 10_000])
def test_mean_over_targets(llama, examples, tokens: int):
    model, held = llama().eval(), examples(completion=True)
    total, count = 0.0, 0
    with torch.no_grad():
        for one in held:
            ids = torch.from_numpy(one.tokens).long()
            logprobs = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            chosen = torch.from_numpy(one.supervised[1:])
            total, count = total - float(logprobs[chosen].sum()), count + int(chosen.sum())
        found = heldout(held, Causal(), device="cpu", tokens=tokens)(model)
    assert found == {"heldout_loss": pytest.approx(total / count, rel=1e-5)}


def test_pairs_stay_together_and_extras_are_means(examples):
    held = examples(side=True)
    seen = []

    def loss(_, batch) -> Sum:
        assert batch.rows[::2] == batch.rows[1::2]
        seen.extend(batch.rows)
        pairs = len(batch.rows) // 2
        return Sum(torch.tensor(3.0 * pairs), pairs, {"margin": torch.tensor(0.5 * pairs)})

    assert heldout(held, loss, device="cpu", tokens=50)(None) == {"heldout_loss": 3.0, "heldout_margin": 0.5}
    assert sorted(seen) == [one.source for one in held]
