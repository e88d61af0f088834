"""Which rows teach and which test; errors estimated by the bootstrap.  After Raschka 2018

A split is a pair (rows that teach, rows that test), sorted. With `labels` [n] the classes are in each part as they are in the whole,
as far as their counts divide.
"""

from __future__ import annotations

from typing import Any

from temper.lazy import numpy
from temper.parts import Problem
from temper.statistics.shared import finite, share

Split = tuple["numpy.ndarray", "numpy.ndarray"]


def holdout(n: int, test: float, *, labels: Any = None, seed: int = 0) -> Split:
    """One split, `test` the share of rows that test."""
    from sklearn.model_selection import train_test_split

    share(test, "the share that tests")
    parts = _ours(train_test_split, numpy.arange(n), test_size=test, random_state=seed, stratify=_checked(labels, n))
    return numpy.sort(parts[0]), numpy.sort(parts[1])


def k_fold(n: int, folds: int, *, labels: Any = None, seed: int = 0) -> list[Split]:
    """Each row tests once. `folds` = n is leave-one-out."""
    from sklearn.model_selection import KFold, StratifiedKFold

    labels = _checked(labels, n)
    splitter = KFold if labels is None else StratifiedKFold
    return _ours(lambda: list(splitter(folds, shuffle=True, random_state=seed).split(numpy.zeros(n), labels)))


def nested(n: int, outer: int, inner: int, *, labels: Any = None, seed: int = 0) -> list[tuple[Split, list[Split]]]:
    """Folds within folds: the inner splits, of the rows that teach alone, choose settings; the outer one tests the choice."""
    labels = _checked(labels, n)
    made = []
    for number, (teach, test) in enumerate(k_fold(n, outer, labels=labels, seed=seed)):
        inside = k_fold(len(teach), inner, labels=None if labels is None else labels[teach], seed=seed + 1 + number)
        made.append(((teach, test), [(teach[one], teach[other]) for one, other in inside]))
    return made


def five_by_two(n: int, *, labels: Any = None, seed: int = 0) -> list[Split]:
    """Ten splits: 2 r teaches what 2 r + 1 tests, and the other way round. For `tests.five_by_two_F`.  Dietterich 1998"""
    return [split for number in range(5) for split in k_fold(n, 2, labels=labels, seed=5 * seed + number)]


def out_of_bag(n: int, samples: int, *, seed: int = 0) -> list[Split]:
    """Bootstrap samples: n rows drawn with replacement (sorted, some of them several times) teach; those never drawn test."""
    generator = numpy.random.default_rng(seed)
    drawn = numpy.sort(generator.integers(0, n, (samples, n)), axis=1)
    return [(rows, numpy.setdiff1d(numpy.arange(n), rows)) for rows in drawn]


def left_out_error(losses: Any) -> float:
    """The leave-one-out bootstrap error: losses [samples, n], NaN where a row taught.  Efron and Tibshirani 1997

    Formula: the mean over rows of the mean loss over those samples in which the row was not drawn. Rows drawn in every sample do not count.
    """
    losses = numpy.asarray(losses, dtype=numpy.float64)
    times = (~numpy.isnan(losses)).sum(0)
    if not times.any():
        raise Problem("every row taught in every sample; draw more samples")
    return float((numpy.nansum(losses, 0)[times > 0] / times[times > 0]).mean())


def no_information_error(labels: Any, predicted: Any) -> float:
    """The error rate if labels and predictions had nothing to do with each other.  Efron and Tibshirani 1997

    Formula: sum_k p_k (1 - q_k), p_k the share of class k among the labels, q_k among the predictions.
    """
    labels, predicted = numpy.asarray(labels), numpy.asarray(predicted)
    return float(sum((labels == kind).mean() * (predicted != kind).mean() for kind in numpy.unique(labels)))


def point632(training: float, left_out: float) -> float:
    """The .632 estimate of an error: that on the rows that taught is too low, the left-out one too high.  Efron 1983

    Formula: 0.368 training + 0.632 left_out, since a sample holds 1 - 1/e = 0.632 of the rows. training: the error on all rows of a
    model taught by all rows. left_out: `left_out_error`.
    """
    training, left_out = finite([training, left_out], "errors").tolist()
    return 0.368 * training + 0.632 * left_out


def point632_plus(training: float, left_out: float, no_information: float) -> float:
    """The .632+ estimate: leans on the left-out error the more a model overfits.  Efron and Tibshirani 1997

    Formula: left_out' = min(left_out, no_information); R = (left_out' - training)/(no_information - training), 0 unless both exceed
    training; (1 - w) training + w left_out' with w = 0.632/(1 - 0.368 R). `point632` where R is 0; left_out' where R is 1.
    """
    training, left_out, no_information = finite([training, left_out, no_information], "errors").tolist()
    left_out = min(left_out, no_information)
    overfit = (left_out - training) / (no_information - training) if left_out > training and no_information > training else 0.0
    weight = 0.632 / (1 - 0.368 * overfit)
    return (1 - weight) * training + weight * left_out


def _checked(labels: Any, n: int) -> Any:
    if labels is None:
        return None
    labels = numpy.asarray(labels)
    if len(labels) != n:
        raise Problem(f"{len(labels)} labels for {n} rows; give one for each")
    return labels


def _ours(split: Any, *arguments: Any, **settings: Any) -> Any:
    try:
        return split(*arguments, **settings)
    except ValueError as error:  # too few rows or too few of a class: the library's own words say which
        raise Problem(f"these rows cannot be split so: {error}") from None
