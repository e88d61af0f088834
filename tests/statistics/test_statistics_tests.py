"""Paired tests, corrections and effect sizes against scipy, statsmodels, mlxtend and sums by hand."""

from __future__ import annotations

import itertools
import math

import numpy
import pytest
from mlxtend import evaluate as mlxtend
from scipy import optimize, stats
from statsmodels.stats import contingency_tables
from statsmodels.stats.multitest import multipletests

from temper.parts import Problem
from temper.statistics import corrections, effects, tests

DIFFERENCES = numpy.random.default_rng(5).normal(0.4, 1.0, 12)
TIED = numpy.array([0.5, -0.5, 1.0, 1.0, -0.5, 2.0, 0.0, 1.5])


@pytest.mark.parametrize("margin", [0.0, 0.3])
def test_paired_t(margin):
    made = tests.paired_t(DIFFERENCES, margin=margin, level=0.9)
    for side, p in (("greater", made.p_above), ("less", made.p_below)):
        peer = stats.ttest_rel(DIFFERENCES, numpy.full(12, margin), alternative=side)
        assert p == pytest.approx(peer.pvalue, rel=1e-12)
    assert (made.low, made.high) == pytest.approx(tuple(stats.ttest_1samp(DIFFERENCES, 0).confidence_interval(0.9)), rel=1e-12)
    assert (made.estimate, made.n) == (pytest.approx(DIFFERENCES.mean()), 12)


def test_paired_t_without_spread_or_with_two():
    assert (tests.paired_t([2.0, 2.0]).p_above, tests.paired_t([2.0, 2.0]).p_below) == (0.0, 1.0)
    assert (tests.paired_t([0.0, 0.0]).p_above, tests.paired_t([0.0, 0.0]).p_below) == (1.0, 1.0)
    alike = tests.paired_t([0.1, 0.1, 0.1], margin=0.1)  # whose mean rounds to something else
    assert (alike.p_above, alike.p_below, alike.low) == (1.0, 1.0, 0.1)
    assert tests.paired_t([1.0, 3.0]).p_above == pytest.approx(stats.t.sf(2.0, 1))


@pytest.mark.parametrize("n", [5, 12, 40])
def test_wilcoxon_is_scipys_exact_one(n):
    differences = numpy.random.default_rng(n).normal(0.3, 1.0, n)
    made = tests.wilcoxon(differences, margin=0.1)
    for side, p in (("greater", made.p_above), ("less", made.p_below)):
        assert p == pytest.approx(stats.wilcoxon(differences - 0.1, alternative=side, method="exact").pvalue, rel=1e-10)


def test_wilcoxon_with_ties_counts_all_signs():
    """Zeros left out, ties at their mean rank: the share of the 2^7 signs that give as large a sum."""
    left = TIED[TIED != 0]
    ranks = stats.rankdata(abs(left))
    sums = [ranks[list(signs)].sum() for signs in itertools.product([False, True], repeat=len(left))]
    made = tests.wilcoxon(TIED)
    assert made.p_above == pytest.approx(numpy.mean(numpy.array(sums) >= ranks[left > 0].sum()), rel=1e-12)
    assert made.p_below == pytest.approx(numpy.mean(numpy.array(sums) >= ranks[left < 0].sum()), rel=1e-12)


def test_wilcoxon_interval_is_the_margins_that_are_not_significant():
    """Just inside each end the two-sided test is not significant, just outside it is; the estimate is Hodges' and Lehmann's."""
    made = tests.wilcoxon(DIFFERENCES, level=0.9)
    for end, inward in ((made.low, 1e-9), (made.high, -1e-9)):
        inside, outside = (tests.wilcoxon(DIFFERENCES, margin=end + step) for step in (inward, -inward))
        assert min(inside.p_above, inside.p_below) > 0.05 >= min(outside.p_above, outside.p_below)
    means = [(a + b) / 2 for a, b in itertools.combinations_with_replacement(DIFFERENCES, 2)]
    assert made.estimate == pytest.approx(numpy.median(means))
    few = tests.wilcoxon(DIFFERENCES[:5])
    assert (few.low, few.high) == (-math.inf, math.inf)
    assert math.isfinite(tests.wilcoxon(DIFFERENCES[:6]).low)


def test_wilcoxon_of_many_goes_over_into_the_normal_one():
    many = numpy.random.default_rng(0).normal(0.05, 1.0, 301)
    exact, normal = tests.wilcoxon(many[:300]), tests.wilcoxon(many)
    assert normal.p_above == pytest.approx(
        stats.wilcoxon(many, alternative="greater", method="asymptotic", correction=True).pvalue, rel=1e-10
    )
    assert normal.low == pytest.approx(exact.low, abs=0.01)
    assert normal.high == pytest.approx(exact.high, abs=0.01)


@pytest.mark.parametrize(("first", "second"), [(9, 3), (1, 7), (0, 4), (5, 5), (0, 0), (40, 21)])
def test_mcnemar_p_values(first, second):
    exact = tests.mcnemar(first, second, 100, mid_p=False)
    table = [[20, first], [second, 80 - first - second]]
    assert min(1, 2 * min(exact.p_above, exact.p_below)) == pytest.approx(contingency_tables.mcnemar(table, exact=True).pvalue)
    if first + second:
        assert exact.p_above == pytest.approx(stats.binomtest(first, first + second, alternative="greater").pvalue)
    half = tests.mcnemar(first, second, 100)
    assert half.p_above == pytest.approx(exact.p_above - stats.binom.pmf(first, first + second, 0.5) / 2)
    assert half.p_above + half.p_below == pytest.approx(1.0)


def test_mcnemar_interval_is_tangos():
    """The example of Fagerland, Lydersen and Laake 2014: 1 and 7 of 21 pairs differ, Tango's interval is -0.517 to -0.026."""
    made = tests.mcnemar(1, 7, 21)
    assert (made.estimate, made.low, made.high) == (
        pytest.approx(-6 / 21),
        pytest.approx(-0.517, abs=5e-4),
        pytest.approx(-0.026, abs=5e-4),
    )


@pytest.mark.parametrize(("b", "c", "n"), [(9, 3, 50), (0, 4, 30), (0, 0, 20), (12, 0, 12), (30, 28, 200)])
def test_tangos_interval_by_searching_for_the_likeliest_share(b, c, n):
    """At a finite end, the score of the difference over its error under the likeliest share that allows it is +-z."""

    def score(delta):
        def loss(q):
            cells = numpy.array([q + delta, q, 1 - 2 * q - delta])
            seen = numpy.array([b, c, n - b - c])
            return -float((seen[seen > 0] * numpy.log(numpy.maximum(cells[seen > 0], 1e-300))).sum())

        q = optimize.minimize_scalar(loss, bounds=(max(0, -delta), (1 - delta) / 2), method="bounded", options={"xatol": 1e-12}).x
        return (b - c - n * delta) / math.sqrt(n * (2 * q + delta * (1 - delta)))

    made = tests.mcnemar(b, c, n, level=0.9)
    for end, z, furthest in ((made.low, stats.norm.isf(0.05), -n), (made.high, -stats.norm.isf(0.05), n)):
        assert end * n == furthest if b - c == furthest else score(end) == pytest.approx(z, rel=1e-4)
    assert -1 <= made.low <= made.estimate <= made.high <= 1


class Silent:
    def fit(self, X, y):
        return self


@pytest.mark.parametrize("seed", range(3))
def test_five_by_two_is_mlxtends(seed):
    """mlxtend is handed the scores of two models in the order in which it asks for them."""
    differences = numpy.random.default_rng(seed).normal(0.5, 1.0, (5, 2))
    for test, peer in ((tests.five_by_two_t, mlxtend.paired_ttest_5x2cv), (tests.five_by_two_F, mlxtend.combined_ftest_5x2cv)):
        asked = iter(numpy.stack([differences.ravel(), numpy.zeros(10)], 1).ravel())
        _, p = peer(Silent(), Silent(), numpy.zeros((8, 1)), numpy.zeros(8), scoring=lambda model, X, y, asked=asked: next(asked))
        made = test(differences)
        assert 2 * min(made.p_above, made.p_below) == pytest.approx(p, rel=1e-10)
        assert (made.p_above < made.p_below) == (made.estimate > 0)
        brink = test(differences - made.low)
        assert 2 * brink.p_above == pytest.approx(0.05, rel=1e-8)
        assert made.low < made.estimate < made.high


def test_five_by_two_F_without_an_interval_of_its_own():
    """Halves agree, splits do not: every shift is significant, so the reach is the t-test's."""
    made = tests.five_by_two_F(numpy.array([[-2, -2.1], [2, 2.1], [1, 1.1], [-1, -1.1], [0, 0.1]]))
    assert made.high - made.estimate == pytest.approx(stats.t.isf(0.025, 5) * math.sqrt(0.025 / 5))
    assert (tests.five_by_two_F(numpy.zeros((5, 2))).p_above, tests.five_by_two_F(numpy.ones((5, 2))).p_above) == (1.0, 0.0)


def test_cochran_q():
    right = (numpy.random.default_rng(1).random((40, 3)) < [0.5, 0.6, 0.8]).astype(int)
    made, peer = tests.cochran_q(right), contingency_tables.cochrans_q(right)
    assert (made.statistic, made.p, made.n) == (pytest.approx(peer.statistic), pytest.approx(peer.pvalue), 40)
    assert (made.statistic, made.p) == pytest.approx(mlxtend.cochrans_q(numpy.ones(40), *right.T))
    assert tests.cochran_q(numpy.ones((4, 3))).p == 1.0


@pytest.mark.parametrize(
    ("correct", "name"), [(corrections.holm, "holm"), (corrections.bonferroni, "bonferroni"), (corrections.benjamini_hochberg, "fdr_bh")]
)
@pytest.mark.parametrize("p", [[0.01, 0.04, 0.03, 0.005], [0.2, 0.2, 0.9], [0.03], [1e-12, 1.0, 0.5, 0.5, 0.001, 0.049]])
def test_corrections(correct, name, p):
    assert correct(p) == pytest.approx(multipletests(p, method=name)[1].tolist(), rel=1e-12)
    assert correct([]) == []


def test_effects():
    assert effects.cohens_dz([1.0, 2.0, 3.0]) == 2.0
    assert effects.hedges_g([1.0, 2.0, 3.0]) == pytest.approx(2.0 * math.gamma(1) / (math.sqrt(1) * math.gamma(0.5)))
    assert (effects.cohens_dz([0.1, 0.1, 0.1]), effects.cohens_dz([0.0, 0.0])) == (math.inf, 0.0)
    first, second = numpy.random.default_rng(2).integers(0, 9, (2, 25))
    assert effects.cliffs_delta(first, second[:20]) == pytest.approx(2 * stats.mannwhitneyu(first, second[:20]).statistic / 500 - 1)
    assert (effects.odds_ratio(6, 3), effects.odds_ratio(2, 0)) == (2.0, math.inf)


def test_hedges_g_has_no_bias():
    draws = numpy.random.default_rng(0).normal(0.7, 1.0, (4000, 6))
    assert numpy.mean([effects.hedges_g(one) for one in draws]) == pytest.approx(0.7, abs=0.03)
    assert numpy.mean([effects.cohens_dz(one) for one in draws]) > 0.78


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: tests.paired_t([1.0]), "1 differences: at least 2"),
        (lambda: tests.paired_t([1.0, math.nan]), "1 of 2 differences are no finite numbers"),
        (lambda: tests.paired_t([1.0, 2.0], level=1.0), "1: the level"),
        (lambda: tests.wilcoxon([math.inf, 1.0]), "no finite numbers"),
        (lambda: tests.wilcoxon(numpy.zeros(5001)), "5001 differences"),
        (lambda: tests.mcnemar(3, 3, 5), "3 and 3 pairs that differ, of 5"),
        (lambda: tests.mcnemar(-1, 3, 5), "`only_first` is a count"),
        (lambda: tests.five_by_two_F(numpy.zeros((2, 5))), r"\[5, 2\]"),
        (lambda: tests.cochran_q([[0, 2]]), "of 0 or 1"),
        (lambda: corrections.holm([0.1, math.nan]), "from 0 to 1"),
        (lambda: effects.odds_ratio(0, 0), "no pair differs"),
        (lambda: effects.hedges_g([1.0, 2.0]), "at least 3"),
    ],
)
def test_refusals(call, says):
    with pytest.raises(Problem, match=says):
        call()
