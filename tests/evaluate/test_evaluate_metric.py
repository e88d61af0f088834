"""Records -> figures, against hand-worked numbers and closed forms."""

from __future__ import annotations

import json
import math

import numpy
import pytest
import torch

from temper.evaluate import metric
from temper.evaluate.subject import neighbours, token_statistics
from temper.parts import Problem


def value(estimate):
    return float(estimate.statistic(estimate.terms.sum(0)))


def records(confidence, correct):
    return {"row": numpy.arange(len(confidence)), "confidence": numpy.array(confidence), "correct": numpy.array(correct)}


def test_expected_calibration_error_by_hand():
    # four records, two bins of two: (0.2, 0.4 | 1 right) gap |0.3 - 0.5| = 0.2, (0.6, 0.8 | 2 right) gap |0.7 - 1| = 0.3
    made = records([0.8, 0.2, 0.6, 0.4], [True, False, True, True])
    assert value(metric.calibration_error("ece", made, bins=2)) == pytest.approx((2 * 0.2 + 2 * 0.3) / 4)
    # one bin: |0.5 - 0.75|; a bin each: the mean of |gap| = (0.2 + 0.2 + 0.4 + 0.6) / 4
    assert value(metric.calibration_error("ece", made, bins=1)) == pytest.approx(0.25)
    assert value(metric.calibration_error("ece", made, bins=4)) == pytest.approx(0.35)


def test_gaps_of_opposite_sign_do_not_cancel_between_bins():
    made = records([0.1, 0.1001, 0.9, 0.9001], [True, True, False, False])
    assert value(metric.calibration_error("ece", made, bins=2)) == pytest.approx(0.9, abs=1e-3)
    assert value(metric.calibration_error("ece", made, bins=1)) == pytest.approx(0, abs=1e-3)


def test_bins_have_equal_mass_and_follow_confidence():
    confidence = numpy.random.default_rng(0).random(1003) ** 5  # far from uniform
    found = metric.equal_mass(confidence, 10)
    assert set(numpy.bincount(found)) <= {100, 101}
    order = numpy.argsort(confidence)
    assert (numpy.diff(found[order]) >= 0).all()


def test_equal_confidences_share_a_bin_whatever_their_order():
    confidence = numpy.array([1.0] * 7 + [0.5] + [0.25, 0.125])
    rng = numpy.random.default_rng(0)
    for _ in range(5):
        shuffled = rng.permutation(10)
        found = metric.equal_mass(confidence[shuffled], 5)
        assert len(set(found[confidence[shuffled] == 1.0])) == 1
        assert sorted(numpy.bincount(found)[numpy.bincount(found) > 0]) == [1, 2, 7]


def test_calibrated_confidence_has_an_error_near_its_floor_and_overconfidence_has_not():
    rng = numpy.random.default_rng(1)
    confidence = rng.random(200_000)
    made = records(confidence, rng.random(200_000) < confidence)
    error, floor = value(metric.calibration_error("ece", made, 15)), metric.reliability(made, 15)["floor"]
    assert error < 0.006
    assert error == pytest.approx(floor, rel=0.7)
    # p(right) = confidence^2: the error is the mean of confidence - confidence^2, 1/6
    over = records(confidence, rng.random(200_000) < confidence**2)
    assert value(metric.calibration_error("ece", over, 15)) == pytest.approx(1 / 6, abs=0.005)


def test_floor_is_the_mean_error_of_calibrated_models():
    rng = numpy.random.default_rng(2)
    confidence = rng.uniform(0.3, 0.9, 600)
    errors = [value(metric.calibration_error("ece", records(confidence, rng.random(600) < confidence), 6)) for _ in range(400)]
    assert metric.reliability(records(confidence, confidence > 1), 6)["floor"] == pytest.approx(numpy.mean(errors), rel=0.06)


def test_reliability_table_by_hand():
    table = metric.reliability(records([0.8, 0.2, 0.6, 0.4], [True, False, True, True]), 2)
    assert json.loads(json.dumps(table)) == table
    first, second = table["bins"]
    assert first == {"count": 2, "from": 0.2, "to": 0.4, "confidence": pytest.approx(0.3), "accuracy": 0.5}
    assert second == {"count": 2, "from": 0.6, "to": 0.8, "confidence": pytest.approx(0.7), "accuracy": 1.0}
    expected = math.sqrt(2 / math.pi) * (math.sqrt(0.2 * 0.8 + 0.4 * 0.6) + math.sqrt(0.8 * 0.2 + 0.6 * 0.4)) / 4
    assert table["floor"] == pytest.approx(expected)


def test_likelihood_by_hand():
    made = metric.likelihood({"row": [0, 1], "nll": numpy.array([3.0, 5.0]), "tokens": numpy.array([2, 6]), "bytes": numpy.array([10, 22])})
    found = {one.name: value(one) for one in made}
    # 8 nats over 8 tokens and 32 bytes; the mean of the rows' own means would be 1.17
    assert found == pytest.approx({"perplexity": math.e, "nats_per_token": 1.0, "bits_per_byte": 0.25 / math.log(2)})


def test_likelihood_without_bytes_is_refused():
    with pytest.raises(Problem, match="spell no byte"):
        metric.likelihood({"row": [0], "nll": numpy.array([3.0]), "tokens": numpy.array([1]), "bytes": numpy.array([0])})


def test_token_statistics_against_float64(monkeypatch):
    monkeypatch.setattr("temper.evaluate.subject._CHUNK", 70)  # several chunks, the last one shorter
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(23, 11, generator=generator) * 4, torch.randint(11, (23,), generator=generator)
    nll, confidence, correct, brier = token_statistics(logits, targets)
    shares = logits.double().softmax(-1)
    one = torch.nn.functional.one_hot(targets, 11)
    assert nll == pytest.approx(-shares.gather(-1, targets[:, None]).squeeze(-1).log().numpy(), abs=1e-5)
    assert confidence == pytest.approx(shares.max(-1).values.numpy(), abs=1e-6)
    assert (correct == (shares.argmax(-1) == targets).numpy()).all()
    assert brier == pytest.approx((shares - one).square().sum(-1).numpy(), abs=1e-6)


def test_token_statistics_where_the_target_has_no_float32_share():
    nll, confidence, correct, brier = token_statistics(torch.tensor([[0.0, 300.0]]), torch.tensor([0]))
    assert (nll[0], confidence[0], correct[0], brier[0]) == (300.0, 1.0, 0.0, 2.0)


def test_neighbours_hold_every_index_once_within_the_budget():
    lengths = [3, 9, 1, 40, 9, 2, 8]
    groups = neighbours(lengths, 20)
    assert groups == [[3], [1, 4], [6, 0], [5, 2]]
