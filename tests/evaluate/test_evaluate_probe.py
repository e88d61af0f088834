"""What a probe reads off models whose hidden states are known: of the bigram models, each token's own unit vector."""

from __future__ import annotations

import numpy
import pytest
from bigrams import WORDS, bigram, drawn_table, tokenizer

from temper.context import Context
from temper.evaluate.engine import Evaluate
from temper.evaluate.probe import Linear, crossed, folds, states
from temper.evaluate.subject import Subject
from temper.parts import Problem, build
from temper.tasks.rows import Rows


def subject(tmp_path, rows, shape="text", **spec):
    return Subject(
        "m", bigram(drawn_table()), tokenizer(), Rows(shape, rows, "given", "here"), Evaluate(**spec), Context.scratch(tmp_path), "0"
    )


def texts(count=60, seed=0):
    """Rows of six words; `more` says whether `a` is more frequent than `b`."""
    rng = numpy.random.default_rng(seed)
    drawn = [rng.choice(list("abcd"), 6, p=(0.4, 0.4, 0.1, 0.1)).tolist() for _ in range(count)]
    return [{"text": " ".join(words), "more": words.count("a") > words.count("b"), "group": f"g{n % 30}"} for n, words in enumerate(drawn)]


def unit_vectors(words):
    return numpy.eye(len(WORDS))[[WORDS.index(word) for word in words]]


def accuracies(part, measured):
    estimates = part.estimates("probe", measured.records)
    assert all(len(one.terms) == len(measured.records["row"]) for one in estimates)
    return {one.name: float(one.statistic(one.terms.sum(0))) for one in estimates}


def test_states_are_means_over_the_tokens_of_a_text(tmp_path):
    rows = texts(9)
    row, found = states(subject(tmp_path, rows, batch=20), "mean")
    assert row.tolist() == list(range(9))
    assert found.shape == (2, 9, len(WORDS))
    wanted = [unit_vectors(["<s>", *one["text"].split(), "</s>"]).mean(0) for one in rows]
    numpy.testing.assert_allclose(found[0], wanted, atol=1e-6)
    numpy.testing.assert_allclose(found[1], numpy.array(wanted) * len(WORDS) ** 0.5, rtol=1e-4, atol=1e-6)  # after the last norm


def test_windows_of_a_text_count_every_token_once(tmp_path):
    rows = texts(5)
    whole, cut = states(subject(tmp_path / "1", rows), "mean"), states(subject(tmp_path / "2", rows, length=3), "mean")
    numpy.testing.assert_allclose(whole[1], cut[1], atol=1e-6)
    row, last = states(subject(tmp_path / "3", rows, length=3), "last")
    assert row.tolist() == list(range(5))
    numpy.testing.assert_allclose(last[0], [unit_vectors(["</s>"])[0]] * 5, atol=1e-6)


def test_of_a_question_the_answer_is_not_seen(tmp_path):
    rows = [{"prompt": "a b c", "completion": " d d"}, {"prompt": "d", "completion": " a"}]
    _, mean = states(subject(tmp_path / "1", rows, "completion"), "mean")
    numpy.testing.assert_allclose(mean[0], [unit_vectors(["<s>", *"abc"]).mean(0), unit_vectors(["<s>", "d"]).mean(0)], atol=1e-6)
    _, last = states(subject(tmp_path / "2", rows, "completion"), "last")
    numpy.testing.assert_allclose(last[0], unit_vectors("cd"), atol=1e-6)


def test_the_map_is_ridge_regression_in_closed_form():
    rng = numpy.random.default_rng(0)
    found, classes = rng.normal(size=(50, 4)) * [1, 5, 0.1, 2] + 3, rng.choice(["x", "y", "z"], 50)
    found[:, 0] += classes == "y"
    split = folds(classes, numpy.arange(50), 5)
    made = crossed(found, classes, split, 0.3)
    for teach, test in split:
        middle, spread = found[teach].mean(0), found[teach].std(0)
        z, y = (found[teach] - middle) / spread, numpy.where(classes[teach, None] == ["x", "y", "z"], 1.0, -1.0)
        weights = numpy.linalg.solve(z.T @ z / len(z) + 0.3 * numpy.eye(4), z.T @ (y - y.mean(0)) / len(z))
        scores = (found[test] - middle) / spread @ weights + y.mean(0)
        assert made[test].tolist() == numpy.array(["x", "y", "z"])[scores.argmax(1)].tolist()


def test_every_row_is_read_once_and_no_group_is_on_both_sides():
    classes, groups = numpy.repeat(["x", "y"], 30), numpy.tile(numpy.arange(12), 5)
    split = folds(classes, groups, 4)
    assert sorted(numpy.concatenate([test for _, test in split]).tolist()) == list(range(60))
    assert not any(set(groups[teach]) & set(groups[test]) for teach, test in split)


def test_a_class_that_the_states_hold_is_read_off_and_another_is_not(tmp_path):
    rows = texts(240)
    rng = numpy.random.default_rng(5)
    rows = [{**row, "noise": int(rng.integers(2)), "group": n} for n, row in enumerate(rows)]
    given = subject(tmp_path, rows)
    part = Linear(key="more")
    (measured,) = part(given)
    found = accuracies(part, measured)
    assert set(found) == {"probe_chance", "probe_layer_0", "probe_layer_1"}
    frequent = max(sum(row["more"] for row in rows), sum(not row["more"] for row in rows)) / 240
    assert found["probe_chance"] == pytest.approx(frequent)
    assert found["probe_layer_0"] > 0.95
    assert found["probe_layer_1"] > 0.95
    noise = Linear(key="noise")
    assert abs(accuracies(noise, noise(given)[0])["probe_layer_0"] - 0.5) < 4 * 0.5 / 240**0.5
    hits = numpy.reshape(measured.records["correct"], (2, 240))
    assert [found["probe_layer_0"], found["probe_layer_1"]] == pytest.approx(hits.mean(1).tolist())
    assert part.estimates("accuracy", measured.records) == ()
    assert sorted(set(measured.records["row"].tolist())) == list(range(240))


def test_rare_classes_and_rows_without_one_are_left_out(tmp_path):
    rows = [{"text": "a b", "kind": kind} for kind in ["x"] * 8 + ["y"] * 8 + ["rare"] * 4 + [None] * 3] + [{"text": "a b"}]
    (measured,) = Linear(key="kind", folds=5)(subject(tmp_path, rows))
    assert sorted(set(measured.records["row"].tolist())) == list(range(16))
    with pytest.raises(Problem, match="a probe of `kind` needs two classes of rows in 9 groups each"):
        Linear(key="kind", folds=9)(subject(tmp_path, rows))
    together = [{**row, "group": "one"} for row in rows]
    with pytest.raises(Problem, match="needs two classes"):
        Linear(key="kind")(subject(tmp_path, together))
    with pytest.raises(Problem, match="must be at least 2"):
        build(Linear, {"folds": 1})
