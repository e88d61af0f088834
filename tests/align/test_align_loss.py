from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from temper.align.likelihood import PerToken, Whole
from temper.align.loss import DPO, SFT, Loss, added, dpo
from temper.align.scores import compare, drift, margin
from temper.parts import Problem, fill

# One pair by hand: log p(w) = -1, log p(l) = -2, log p_ref(w) = -1.5, log p_ref(l) = -1.75, beta = 0.4.
# margin = (-1 + 1.5) - (-2 + 1.75) = 0.75, so beta m = 0.3.
PAIR = [torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in (-1.0, -2.0, -1.5, -1.75)]
BETA = 0.4


def test_dpo_by_hand():
    loss = dpo(*PAIR, beta=BETA)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.3)), abs=1e-15)
    assert loss.item() == pytest.approx(0.5543552444685270, abs=1e-14)
    # d/dm -log sigmoid(beta m) = -beta sigmoid(-beta m) = -0.4 / (1 + e^0.3)
    slope = -0.4 / (1 + math.exp(0.3))
    gradient = torch.autograd.grad(loss, PAIR)
    assert [one.item() for one in gradient] == pytest.approx([slope, -slope, -slope, slope], abs=1e-15)


def test_dpo_with_smoothing_by_hand():
    loss = dpo(*PAIR, beta=BETA, label_smoothing=0.25)
    assert loss.item() == pytest.approx(0.75 * math.log(1 + math.exp(-0.3)) + 0.25 * math.log(1 + math.exp(0.3)), abs=1e-15)
    # - (1 - e) beta sigmoid(-x) + e beta sigmoid(x)
    slope = 0.4 * (-0.75 / (1 + math.exp(0.3)) + 0.25 / (1 + math.exp(-0.3)))
    assert torch.autograd.grad(loss, PAIR[0])[0].item() == pytest.approx(slope, abs=1e-15)


def test_dpo_equals_the_formula_that_trl_publishes():
    torch.manual_seed(0)
    policy_chosen, policy_rejected, reference_chosen, reference_rejected = 10 * torch.randn(4, 50, dtype=torch.float64)
    for beta, smoothing in ((0.1, 0.0), (0.5, 0.1), (5.0, 0.3)):
        # trl's sigmoid loss: the log-ratio of the policy's two responses less that of the reference
        logits = (policy_chosen - policy_rejected) - (reference_chosen - reference_rejected)
        theirs = -F.logsigmoid(beta * logits) * (1 - smoothing) - F.logsigmoid(-beta * logits) * smoothing
        ours = dpo(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta, smoothing)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_dpo_gradient_against_differences():
    torch.manual_seed(1)
    values = [torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    assert torch.autograd.gradcheck(lambda *given: dpo(*given, beta=0.7, label_smoothing=0.2), values)


def test_dpo_at_the_reference_and_far_from_it():
    start = torch.tensor([-3.7, -120.25])
    assert torch.equal(margin(start, start.flip(0), start, start.flip(0)), torch.zeros(2))
    assert torch.equal(dpo(start, start.flip(0), start, start.flip(0), beta=0.1), F.softplus(torch.zeros(2)))  # log 2, exactly
    far = dpo(torch.tensor([1e4, -1e4]), torch.tensor([-1e4, 1e4]), torch.zeros(2), torch.zeros(2), beta=1.0)
    assert far.tolist() == [0.0, 2e4]


LOGPROBS = torch.tensor([[0.0, -1.0, -2.0], [0.0, -3.0, 0.0], [0.0, -0.5, 0.0], [0.0, -1.0, -1.0]])
REFERENCE = torch.tensor([[0.0, -1.5, -2.0], [0.0, -2.0, 0.0], [0.0, -0.5, 0.0], [0.0, -1.0, -3.0]])
MASK = torch.tensor([[False, True, True], [False, True, False], [False, True, False], [False, True, True]])


@pytest.mark.parametrize(
    ("likelihood", "chosen", "rejected", "margins"),
    [(Whole(), [-3.0, -0.5], [-3.0, -2.0], [1.5, -2.0]), (PerToken(), [-1.5, -0.5], [-3.0, -1.0], [1.25, -1.0])],
)
def test_sides_of_a_batch_by_hand(likelihood, chosen, rejected, margins):
    one = compare(LOGPROBS, REFERENCE, MASK, likelihood)
    assert one.chosen.tolist() == chosen
    assert one.rejected.tolist() == rejected
    assert one.margin.tolist() == margins


def test_drift_by_hand():
    # halves of mean squares: (0.25 + 0) / 2 / 2, 1 / 2, 0, (0 + 4) / 2 / 2
    assert drift(LOGPROBS, REFERENCE, MASK).tolist() == [0.0625, 0.5, 0.0, 1.0]
    assert compare(LOGPROBS, REFERENCE, MASK, Whole()).drift.tolist() == [0.28125, 0.5]
    assert torch.equal(drift(LOGPROBS, LOGPROBS, MASK), torch.zeros(4))


def test_drift_is_the_divergence_to_second_order():
    torch.manual_seed(2)
    logits = torch.randn(1000, dtype=torch.float64)
    for size in (1e-1, 1e-2):
        p, q = logits.log_softmax(0), (logits + size * torch.randn(1000, dtype=torch.float64)).log_softmax(0)
        exact = (p.exp() * (p - q)).sum()
        estimate = (p.exp() * (p - q) ** 2 / 2).sum()  # what `drift` is the mean of, under samples of p
        assert abs(estimate / exact - 1) < size


def test_sft_by_hand_and_a_list_of_losses():
    one = compare(LOGPROBS, REFERENCE, MASK, Whole())
    assert SFT()(one).tolist() == [1.5, 0.5]
    assert SFT(weight=0.1)(one).tolist() == pytest.approx([0.15, 0.05])
    assert DPO(beta=0.4, weight=2.0)(one).tolist() == pytest.approx([2 * math.log(1 + math.exp(-0.6)), 2 * math.log(1 + math.exp(0.8))])
    together = added([DPO(beta=0.4), SFT(weight=0.1)])(one)
    torch.testing.assert_close(together, DPO(beta=0.4)(one) + 0.1 * SFT()(one))


def test_settings_are_refused():
    for raw, text in (
        ({"dpo": {"beta": 0}}, "must be above 0"),
        ({"dpo": {"label_smoothing": 0.5}}, "must be below 0.5"),
        ({"dpoo": {}}, "did you mean `dpo`?"),
        (["dpo", {"sft": {"wieght": 1}}], "did you mean `weight`?"),
    ):
        with pytest.raises(Problem, match=text.replace("?", r"\?")):
            fill(Loss.__slot__, raw)
