"""Records -> figures, against hand-worked numbers and closed forms."""

from __future__ import annotations

import json
import math

import numpy
import pytest
import torch

from temper.evaluate import records as tabled
from temper.evaluate.metric import ExactMatch, PassUntil, TokenEdit, _spaced, _squad
from temper.evaluate.subject import Choices, divergence, neighbours, token_statistics
from temper.parts import Problem


def value(estimate):
    return float(estimate.statistic(estimate.terms.sum(0)))


def records(confidence, correct):
    return {"row": numpy.arange(len(confidence)), "confidence": numpy.array(confidence), "correct": numpy.array(correct)}


def test_expected_calibration_error_by_hand():
    # four records, two bins of two: (0.2, 0.4 | 1 right) gap |0.3 - 0.5| = 0.2, (0.6, 0.8 | 2 right) gap |0.7 - 1| = 0.3
    made = records([0.8, 0.2, 0.6, 0.4], [True, False, True, True])
    assert value(tabled.calibration_error("ece", made, bins=2)) == pytest.approx((2 * 0.2 + 2 * 0.3) / 4)
    # one bin: |0.5 - 0.75|; a bin each: the mean of |gap| = (0.2 + 0.2 + 0.4 + 0.6) / 4
    assert value(tabled.calibration_error("ece", made, bins=1)) == pytest.approx(0.25)
    assert value(tabled.calibration_error("ece", made, bins=4)) == pytest.approx(0.35)


def test_gaps_of_opposite_sign_do_not_cancel_between_bins():
    made = records([0.1, 0.1001, 0.9, 0.9001], [True, True, False, False])
    assert value(tabled.calibration_error("ece", made, bins=2)) == pytest.approx(0.9, abs=1e-3)
    assert value(tabled.calibration_error("ece", made, bins=1)) == pytest.approx(0, abs=1e-3)


def test_bins_have_equal_mass_and_follow_confidence():
    confidence = numpy.random.default_rng(0).random(1003) ** 5  # far from uniform
    found = tabled.equal_mass(confidence, 10)
    assert set(numpy.bincount(found)) <= {100, 101}
    order = numpy.argsort(confidence)
    assert (numpy.diff(found[order]) >= 0).all()


def test_equal_confidences_share_a_bin_whatever_their_order():
    confidence = numpy.array([1.0] * 7 + [0.5] + [0.25, 0.125])
    rng = numpy.random.default_rng(0)
    for _ in range(5):
        shuffled = rng.permutation(10)
        found = tabled.equal_mass(confidence[shuffled], 5)
        assert len(set(found[confidence[shuffled] == 1.0])) == 1
        assert sorted(numpy.bincount(found)[numpy.bincount(found) > 0]) == [1, 2, 7]


def test_calibrated_confidence_has_an_error_near_its_floor_and_overconfidence_has_not():
    rng = numpy.random.default_rng(1)
    confidence = rng.random(200_000)
    made = records(confidence, rng.random(200_000) < confidence)
    error, floor = value(tabled.calibration_error("ece", made, 15)), tabled.reliability(made, 15)["floor"]
    assert error < 0.006
    assert error == pytest.approx(floor, rel=0.7)
    # p(right) = confidence^2: the error is the mean of confidence - confidence^2, 1/6
    over = records(confidence, rng.random(200_000) < confidence**2)
    assert value(tabled.calibration_error("ece", over, 15)) == pytest.approx(1 / 6, abs=0.005)


def test_floor_is_the_mean_error_of_calibrated_models():
    rng = numpy.random.default_rng(2)
    confidence = rng.uniform(0.3, 0.9, 600)
    errors = [value(tabled.calibration_error("ece", records(confidence, rng.random(600) < confidence), 6)) for _ in range(400)]
    assert tabled.reliability(records(confidence, confidence > 1), 6)["floor"] == pytest.approx(numpy.mean(errors), rel=0.06)


def test_reliability_table_by_hand():
    table = tabled.reliability(records([0.8, 0.2, 0.6, 0.4], [True, False, True, True]), 2)
    assert json.loads(json.dumps(table)) == table
    first, second = table["bins"]
    assert first == {"count": 2, "from": 0.2, "to": 0.4, "confidence": pytest.approx(0.3), "accuracy": 0.5}
    assert second == {"count": 2, "from": 0.6, "to": 0.8, "confidence": pytest.approx(0.7), "accuracy": 1.0}
    expected = math.sqrt(2 / math.pi) * (math.sqrt(0.2 * 0.8 + 0.4 * 0.6) + math.sqrt(0.8 * 0.2 + 0.6 * 0.4)) / 4
    assert table["floor"] == pytest.approx(expected)


def test_likelihood_by_hand():
    made = tabled.likelihood({"row": [0, 1], "nll": numpy.array([3.0, 5.0]), "tokens": numpy.array([2, 6]), "bytes": numpy.array([10, 22])})
    found = {one.name: value(one) for one in made}
    # 8 nats over 8 tokens and 32 bytes; the mean of the rows' own means would be 1.17
    assert found == pytest.approx({"perplexity": math.e, "nats_per_token": 1.0, "bits_per_byte": 0.25 / math.log(2)})


def test_likelihood_without_bytes_has_no_bits_per_byte():
    made = tabled.likelihood({"row": [0], "nll": numpy.array([3.0]), "tokens": numpy.array([1]), "bytes": numpy.array([0])})
    assert [math.isfinite(value(one)) for one in made] == [True, True, False]


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


# -------------------------------------------------------------------------------------------------- several models


def test_divergence_against_float64(monkeypatch):
    monkeypatch.setattr("temper.evaluate.subject._CHUNK", 70)
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(23, 11, generator=generator) * 3 for _ in range(2))
    same, kl = divergence(one, other)
    q, p = one.double().log_softmax(-1), other.double().log_softmax(-1)
    assert kl == pytest.approx(torch.nn.functional.kl_div(p, q, reduction="none", log_target=True).sum(-1).numpy(), abs=1e-5)
    assert (same.astype(bool) == (q.argmax(-1) == p.argmax(-1)).numpy()).all()
    assert 0 < same.sum() < 23
    same, kl = divergence(one, one)
    assert (same.all(), kl.any()) == (True, False)
    with pytest.raises(Problem, match="vocabularies of 11 and 7 tokens cannot be compared"):
        divergence(one, other[:, :7])


# ---------------------------------------------------------------------------------------------------------- choices


def choices(*rows, answers, characters=None):
    """Rows with the probabilities of their choices, up to a factor a row."""
    flat = numpy.log(numpy.concatenate([numpy.array(one) * 1e-4 for one in rows]))
    sizes = numpy.array([len(one) for one in rows])
    return Choices(numpy.arange(len(rows)), numpy.array(answers), sizes, flat, numpy.array(characters or [1] * int(sizes.sum())))


def test_choices_by_hand():
    made = choices([0.5, 0.3, 0.2], [0.1, 0.9], answers=[1, 1])
    assert made.predicted.tolist() == [0, 1]
    assert made.truth == pytest.approx([0.3, 0.9])
    assert made.confidence == pytest.approx([0.5, 0.9])
    assert made.entropy == pytest.approx([-sum(p * math.log(p) for p in row) for row in ([0.5, 0.3, 0.2], [0.1, 0.9])])
    assert made.brier == pytest.approx([0.5**2 + 0.7**2 + 0.2**2, 2 * 0.1**2])
    other = choices([0.2, 0.2, 0.6], [0.5, 0.5], answers=[1, 1])
    by_hand = [sum(q * math.log(q / p) for q, p in zip(*pair)) for pair in (([0.2, 0.2, 0.6], [0.5, 0.3, 0.2]), ([0.5, 0.5], [0.1, 0.9]))]
    assert made.divergence(other) == pytest.approx(by_hand)
    assert made.divergence(made) == pytest.approx([0, 0], abs=1e-12)


def test_a_long_choice_wins_by_character():
    # ln 0.5e-4 / 2 is below ln 0.3e-4 / 4
    made = choices([0.5, 0.3], answers=[1], characters=[2, 4])
    assert (made.predicted.tolist(), made.normalised.tolist()) == ([0], [1])


def test_brier_of_choices_and_of_answers_is_sklearns():
    from sklearn.metrics import brier_score_loss

    rng = numpy.random.default_rng(0)
    shares, answers = rng.dirichlet(numpy.ones(4), 50), rng.integers(0, 4, 50)
    made = choices(*shares, answers=answers)
    assert made.brier.mean() == pytest.approx(brier_score_loss(answers, shares, labels=range(4), scale_by_half=False))


# ---------------------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize(
    ("text", "squad", "spaced"),
    [
        (" The  Cat. ", "cat", "The Cat."),
        ("an apple, a day", "apple day", "an apple, a day"),
        ("Theatre", "theatre", "Theatre"),
        ("u.s.a.", "usa", "u.s.a."),
        ("the", "", "the"),
        ("don't\tstop", "dont stop", "don't stop"),
    ],
)
def test_answers_are_read_as_squad_reads_them(text, squad, spaced):
    assert (_squad(text), _spaced(text)) == (squad, spaced)


def test_estimates_of_answers_by_hand():
    found = {one.name: value(one) for one in TokenEdit().estimates("token_edit", {"edits": [0, 3], "share": [0.0, 0.75]})}
    assert found == {"token_edit_distance": 0.375, "token_edits": 1.5}
    passed = {"right": numpy.array([2, 1, 2]), "samples": numpy.array([4, 10, 2])}
    found = {one.name: value(one) for one in PassUntil().estimates("pass_until", passed)}
    assert found == pytest.approx({"pass_probability": (0.5 + 0.1 + 1) / 3, "log_pass": math.log(0.5 * 0.1) / 3, "never_passed": 0})
    never = PassUntil().estimates("pass_until", {"right": numpy.array([0, 1]), "samples": numpy.array([10, 10])})
    assert [value(one) for one in never] == [0.05, -math.inf, 0.5]


def test_a_table_of_another_metric_has_no_estimates_here():
    assert ExactMatch().estimates("accuracy", {"correct": [True]}) == ()


# ------------------------------------------------------------------------------------------------- tables and files


def test_tables_come_back_from_their_files(tmp_path):
    one = tabled.Table("t", "tune[x]", {"row": numpy.array([0, 2]), "ok": numpy.array([True, False])}, numpy.array([0, 1]))
    labels = {"skill": numpy.array(["a b", ""])}
    two = tabled.Table("u", "base", {"row": numpy.array([1, 3]), "v": numpy.array([0.5, 2.0], numpy.float32)}, numpy.array([4, 4]), labels)
    three = tabled.Table(
        "u", "tune[x]", {"row": numpy.array([1, 3]), "v": numpy.array([1.5, 2.0], numpy.float32)}, numpy.array([4, 4]), labels
    )
    tabled.write([one, two, three], tmp_path)
    for made, read in zip([one, two, three], tabled.load(tmp_path), strict=True):
        assert (made.name, made.model, made.records.keys()) == (read.name, read.model, read.records.keys())
        assert all((made.records[name] == read.records[name]).all() for name in made.records)
        assert all(made.records[name].dtype == read.records[name].dtype for name in made.records)
        assert (read.unit == made.unit).all()
        assert {name: some.tolist() for name, some in read.labels.items()} == {name: some.tolist() for name, some in made.labels.items()}


class Means:
    """Estimates the mean of `v`, and a share of nothing."""

    def estimates(self, table, records):
        v = records["v"]
        return tabled.mean("v", v, "", "higher"), tabled.Estimate("none", tabled.columns(v, 0 * v), tabled.ratio, "", "lower")


def test_figures_are_sums_by_unit_and_by_label():
    records = {"row": numpy.arange(4), "v": numpy.array([1.0, 2.0, 4.0, 8.0])}
    labels = {"skill": numpy.array(["sort", "", "sort", "add"]), "length": numpy.array(["1/2", "1/2", "2/2", "2/2"])}
    made = tabled.figures([Means()], [tabled.Table("t", "tune", records, numpy.array([7, 7, 3, 9]), labels)])
    assert {name: one.value for name, one in made.items()} == {
        "tune.v": 3.75,
        "tune.v[skill=add]": 8.0,
        "tune.v[skill=sort]": 2.5,
        "tune.v[length=1/2]": 1.5,
        "tune.v[length=2/2]": 6.0,
    }
    whole, part = made["tune.v"], made["tune.v[length=1/2]"]
    assert (whole.units.tolist(), whole.sums.tolist()) == ([3, 7, 9], [[4, 1], [3, 2], [8, 1]])
    assert (part.units.tolist(), part.sums.tolist()) == ([7], [[3, 2]])
    assert (whole.unit, whole.better) == ("", "higher")
