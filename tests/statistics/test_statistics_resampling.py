"""Splits are disjoint, whole and alike in classes; the .632 estimates are mlxtend's and the papers'."""

from __future__ import annotations

import numpy
import pytest
from mlxtend.evaluate import BootstrapOutOfBag, bootstrap_point632_score
from mlxtend.evaluate.bootstrap_point632 import no_information_rate
from sklearn.datasets import make_classification
from sklearn.tree import DecisionTreeClassifier

from temper.parts import Problem
from temper.statistics import resampling

LABELS = numpy.repeat(["a", "b"], [60, 40])


def whole(split, rows):
    return sorted(numpy.concatenate(split)) == sorted(rows) and not set(split[0]) & set(split[1])


def shares(rows):
    return (LABELS[rows] == "a").mean()


def test_splits_are_whole_and_stratified():
    one = resampling.holdout(100, 0.25, labels=LABELS, seed=3)
    assert whole(one, range(100))
    assert (len(one[1]), shares(one[1])) == (25, 0.6)
    folds = resampling.k_fold(100, 5, labels=LABELS)
    assert all(whole(split, range(100)) and shares(split[1]) == 0.6 for split in folds)
    assert sorted(numpy.concatenate([test for _, test in folds])) == list(range(100))
    halves = resampling.five_by_two(100, labels=LABELS)
    assert len(halves) == 10
    assert all((halves[2 * r][0] == halves[2 * r + 1][1]).all() and (halves[2 * r][1] == halves[2 * r + 1][0]).all() for r in range(5))
    assert len({tuple(half) for half, _ in halves}) == 10


def test_nested_folds_never_show_the_outer_test():
    for (teach, test), inside in resampling.nested(100, 5, 4, labels=LABELS, seed=1):
        assert len(inside) == 4
        assert all(whole(split, teach) and not set(numpy.concatenate(split)) & set(test) for split in inside)
        assert all(shares(split[1]) == 0.6 for split in inside)


def test_splits_follow_from_the_seed():
    for make in (lambda seed: resampling.holdout(50, 0.5, seed=seed), lambda seed: resampling.out_of_bag(50, 3, seed=seed)[0]):
        assert (make(1)[0] == make(1)[0]).all()
        assert len(make(1)[0]) != len(make(2)[0]) or (make(1)[0] != make(2)[0]).any()


def test_out_of_bag_leaves_out_1_of_e():
    made = resampling.out_of_bag(500, 40)
    assert all(len(drawn) == 500 and not set(drawn) & set(left) and len(set(drawn)) + len(left) == 500 for drawn, left in made)
    assert numpy.mean([len(left) / 500 for _, left in made]) == pytest.approx(numpy.exp(-1), abs=0.01)


@pytest.mark.parametrize("seed", range(3))
def test_point632_is_mlxtends(seed):
    """On one bootstrap sample, with its model's errors on all rows and on those left out."""
    X, y = make_classification(80, 5, n_informative=3, flip_y=0.3, random_state=seed)
    tree = DecisionTreeClassifier(max_depth=3, random_state=0)
    teach, test = next(iter(BootstrapOutOfBag(n_splits=1, random_seed=seed).split(X)))
    predicted = tree.fit(X[teach], y[teach]).predict(X)
    training, left_out = (predicted != y).mean(), (predicted[test] != y[test]).mean()
    chance = resampling.no_information_error(y, predicted)
    assert chance == pytest.approx(no_information_rate(y, predicted, lambda a, b: numpy.mean(numpy.asarray(a) != numpy.asarray(b))))
    for method, error in (
        (".632", resampling.point632(training, left_out)),
        (".632+", resampling.point632_plus(training, left_out, chance)),
    ):
        peer = bootstrap_point632_score(tree, X, y, n_splits=1, method=method, random_seed=seed)[0]
        assert 1 - error == pytest.approx(peer, rel=1e-12)


def test_point632_plus_at_its_ends():
    assert resampling.point632_plus(0.1, 0.1, 0.5) == pytest.approx(0.1)  # no overfitting
    assert resampling.point632_plus(0.1, 0.05, 0.5) == pytest.approx(resampling.point632(0.1, 0.05))  # R is 0
    assert resampling.point632_plus(0.0, 0.7, 0.5) == pytest.approx(0.5)  # nothing learnt: the chance rate itself


def test_left_out_error_is_a_mean_of_rows():
    """Row 0 is left out twice, row 1 once, row 2 never: (0.5 + 1)/2, not the mean of three losses."""
    gone = numpy.nan
    assert resampling.left_out_error([[1.0, gone, gone], [0.0, 1.0, gone]]) == 0.75


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: resampling.k_fold(3, 5), "cannot be split so"),
        (lambda: resampling.holdout(10, 1.5), "1.5: the share that tests"),
        (lambda: resampling.k_fold(10, 2, labels=["a"] * 9), "9 labels for 10 rows"),
        (lambda: resampling.left_out_error([[numpy.nan]]), "draw more samples"),
        (lambda: resampling.point632(numpy.nan, 0.1), "no finite numbers"),
    ],
)
def test_refusals(call, says):
    with pytest.raises(Problem, match=says):
        call()
