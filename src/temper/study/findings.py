"""The rule that turns figures into a finding: claims, their tests, one verdict. Pure functions of what is stored with a card."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from temper.parts import Problem
from temper.report.study import Comparison
from temper.statistics import corrections, effects, power
from temper.study.evidence import Data, Key
from temper.study.reading import Claim, Study, term
from temper.study.significance import Evidence, Test

Verdict = Literal["holds here", "unclear", "does not hold here"]
_CORRECTIONS: Mapping[str, Callable[[Sequence[float]], list[float]]] = {
    "holm": corrections.holm,
    "bonferroni": corrections.bonferroni,
    "none": list,
}
POWER = 0.8
"""Of the minimum detectable difference."""


@dataclasses.dataclass(frozen=True)
class Judged:
    """A claim with its figures. says: which side of the margin it claims, `above` or `below`. p_above, p_below: chances, not yet corrected,
    of such figures were the number on the margin's other side."""

    comparison: Comparison
    says: Literal["above", "below"]
    p_above: float
    p_below: float


def verdicts(p: Sequence[tuple[float, float]], level: float, correction: str) -> list[Verdict]:
    """What claims come to. p: for each, the chance of such figures were it false, and were it true.

    A claim holds where the first, corrected for the number of claims, is at most (1 - level) / 2; it does not where the second is; else
    it is unclear. One claim by the bootstrap holds where its whole interval lies beyond the margin.
    """
    correct, bound = _CORRECTIONS[correction], (1 - level) / 2
    found: list[Verdict] = []
    for false, true in zip(correct([one for one, _ in p]), correct([one for _, one in p]), strict=True):
        found.append("holds here" if false <= bound else "does not hold here" if true <= bound else "unclear")
    return found


def overall(found: Sequence[Verdict]) -> Verdict | Literal[""]:
    """All must hold; one that does not is enough for the whole not to."""
    if not found:
        return ""
    if "does not hold here" in found:
        return "does not hold here"
    return "unclear" if "unclear" in found else "holds here"


def judge(study: Study, data: Data) -> list[Judged]:
    """Every claim, or, where none was made, every arm against the baseline, with its verdict."""
    if study.claims:
        made = [_claimed(claim, study, data) for claim in study.claims]
        groups = [made]
    else:
        others = [arm.name for arm in study.arms if arm.name != study.baseline]
        groups = [[_compared(arm, study.baseline, figure, study, data) for arm in others] for figure in study.measure]
    return [one for group in groups if group for one in _corrected(group, study, bool(study.claims))]


def _corrected(group: Sequence[Judged], study: Study, claimed: bool) -> list[Judged]:
    sides = [(one.p_above, one.p_below) if one.says == "above" else (one.p_below, one.p_above) for one in group]
    found = verdicts(sides, study.finding.level, study.finding.correction)
    adjusted = _CORRECTIONS[study.finding.correction]([min(1.0, 2 * min(pair)) for pair in sides])
    words = {"holds here": "better", "does not hold here": "worse", "unclear": "unclear"}
    return [
        dataclasses.replace(
            one, comparison=dataclasses.replace(one.comparison, p_adjusted=p, verdict=verdict if claimed else words[verdict])
        )
        for one, p, verdict in zip(group, adjusted, found, strict=True)
    ]


def _claimed(claim: Claim, study: Study, data: Data) -> Judged:
    if claim.better:
        figure = claim.figure or next(iter(study.measure))
        return _compared(claim.better, claim.than, figure, study, data, claim)
    if claim.quantity:
        name, _, parameter = claim.quantity.partition(".")
        evidence, unit = data.of_law(study.fits[name], parameter or "b"), ""
        what = claim.quantity
    else:
        weights: dict[Key, float] = {term(word, study): weight for word, weight in claim.of.items()}
        evidence, unit = data.sum(weights), data.measured[next(iter(weights))].unit
        what = " ".join(
            f"{'-' if weight < 0 else '+'} {'' if abs(weight) == 1 else f'{abs(weight):g} '}{word}" for word, weight in claim.of.items()
        )
        what = what.removeprefix("+ ")
    margin = claim.above if claim.above is not None else claim.below
    assert margin is not None
    says: Literal["above", "below"] = "above" if claim.above is not None else "below"
    text = claim.says or f"{what} is {says} {margin:g}"
    return _tested(evidence, margin, says, claim.test or study.finding.test, study, claim=text, better="", than="", figure=what, unit=unit)


def _compared(better: str, than: str, figure: str, study: Study, data: Data, claim: Claim | None = None) -> Judged:
    one, two = study.arm(better).name, study.arm(than).name
    like = data.measured[one, figure]
    if like.better is None:
        raise Problem(
            f"which way `{figure}` is better is not known; claim it by `of: {{'{one} {figure}': 1, '{two} {figure}': -1}}`", ("finding",)
        )
    sign = 1.0 if like.better == "higher" else -1.0
    evidence = data.sum({(one, figure): sign, (two, figure): -sign})
    margin, test = (claim.margin, claim.test) if claim else (0.0, None)
    if margin > 0:
        text = f"{one} has a better {figure} than {two} by more than {margin:g}"
    else:
        text = (
            f"{one} has a better {figure} than {two}" if not margin else f"{one}'s {figure} is no more than {-margin:g} worse than {two}'s"
        )
    return _tested(
        evidence,
        margin,
        "above",
        test or study.finding.test,
        study,
        claim=(claim.says if claim else "") or text,
        better=one,
        than=two,
        figure=figure,
        unit=like.unit,
    )


def _tested(evidence: Evidence, margin: float, says: Literal["above", "below"], test: Test, study: Study, **words: Any) -> Judged:
    found = test(evidence, margin, study.finding.level)
    effect, detectable = None, None
    if evidence.seeds is not None and len(evidence.seeds) > 1 and (spread := float(evidence.seeds.std(ddof=1))):
        effect = effects.cohens_dz(evidence.seeds)
        detectable = power.minimum_detectable(spread, len(evidence.seeds), level=study.finding.level, power=POWER)
    return Judged(
        Comparison(
            difference=float(found.estimate),
            low=float(found.low),
            high=float(found.high),
            margin=margin,
            test=found.name,
            p=min(1.0, 2 * min(found.p_above, found.p_below)),
            p_adjusted=1.0,
            effect=effect,
            effect_name="Cohen's d over seeds" if effect is not None else "",
            detectable=detectable,
            verdict="unclear",
            **words,
        ),
        says,
        found.p_above,
        found.p_below,
    )


def sentence(study: Study, judged: Sequence[Judged]) -> str:
    """The finding in words."""
    if not judged:
        return "Nothing is left to compare."
    if study.claims:
        held: Mapping[str, list[str]] = {word: [] for word in ("holds here", "unclear", "does not hold here")}
        for one in judged:
            held[one.comparison.verdict].append(one.comparison.claim)
        said = {word: "; ".join(claims) for word, claims in held.items() if claims}
        if len(said) == 1:  # the verdict stands beside it
            text = next(iter(said.values()))
            return f"{text[:1].upper()}{text[1:]}."
        return " ".join(f"{word.capitalize()}: {claims}." for word, claims in said.items())
    main = [one.comparison for one in judged if one.comparison.figure == next(iter(study.measure))]
    better = [f"{one.better} ({one.difference:+.3g})" for one in main if one.verdict == "better"]
    worse = [f"{one.better} ({one.difference:+.3g})" for one in main if one.verdict == "worse"]
    unclear = [one.better for one in main if one.verdict == "unclear"]
    parts = [
        f"better than {study.baseline} in {main[0].figure}: {', '.join(better)}" if better else "",
        f"worse: {', '.join(worse)}" if worse else "",
        f"no difference shown: {', '.join(unclear)}" if unclear else "",
    ]
    text = "; ".join(one for one in parts if one)
    return text[:1].upper() + text[1:] + "."
