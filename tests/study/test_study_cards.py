"""What ships with Temper: every study reads, and every card's verdict follows from its figures by its rule."""

from __future__ import annotations

import json

import numpy
import pytest

from temper import papers, parts
from temper.study import cards, load, read
from temper.study.reading import term

CARDS = sorted(papers.shipped("cards").glob("*/*.json"))
STUDIES = sorted(papers.shipped("studies").glob("*/*.yaml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_a_shipped_study_reads_and_claims_something(path):
    study = load(path)
    assert path.stem == "ground" or (study.claims and study.about and study.claim)
    assert path.parent.name in parts.engines()
    if study.paper:
        paper = papers.resolve(study.paper)
        assert (paper.engine, paper.name) == (path.parent.name, path.stem)


@pytest.mark.parametrize("path", CARDS, ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_a_cards_verdict_follows_from_its_figures(path):
    card = json.loads(path.read_text(encoding="utf8"))
    study = read(card["study"], "card.yaml", papers.shipped("studies") / card["engine"])
    assert card["verdict"] == cards.rederived(card) == card["attempts"][-1]["verdict"]
    assert card["attempts"][-1]["study"] == study.digest
    assert (card["level"], card["correction"]) == (study.finding.level, study.finding.correction)
    assert len(card["comparisons"]) == len(study.claims)
    for claim, found in zip(study.claims, card["comparisons"], strict=True):
        if claim.quantity:
            continue
        weights = {term(word, study): weight for word, weight in claim.of.items()}
        if claim.better:
            figure = found["figure"]
            sign = 1 if card["arms"][claim.better]["figures"][figure]["better"] == "higher" else -1
            weights = {(claim.better, figure): sign, (claim.than, figure): -sign}
        by_seed = [
            sum(weight * card["arms"][arm]["seeds"][str(seed)][figure] for (arm, figure), weight in weights.items()) for seed in study.seeds
        ]
        assert found["difference"] == pytest.approx(numpy.mean(by_seed), rel=1e-6, abs=1e-9)
        bound = claim.margin if claim.better else claim.above if claim.above is not None else claim.below
        assert found["margin"] == bound
        # The chances and the interval speak of one draw: one-sided chances below (1 - level) / 2 mean an interval beyond the margin.
        if found["test"] == "multi-bootstrap":
            tail = (1 - card["level"]) / 2
            assert (found["p_above"] <= tail) == (found["low"] > bound) or abs(found["low"] - bound) < 0.02 * (found["high"] - found["low"])


def test_every_card_is_of_a_study_that_ships_as_it_ran():
    for path in CARDS:
        card = json.loads(path.read_text(encoding="utf8"))
        assert (papers.shipped("studies") / card["engine"] / f"{card['method']}.yaml").read_text(encoding="utf8") == card["study"]


def test_a_study_is_found_by_its_methods_name():
    assert cards.find("tune.lora").name == "lora.yaml"
    assert cards.find("sft-power-law") == cards.find("evaluate.SFT_power_law")
    with pytest.raises(parts.Problem, match="no study `lroa`; did you mean `lora`"):
        cards.find("lroa")
    assert cards.ground("tune").is_file()
    with pytest.raises(parts.Problem, match="no ground for `evaluate`"):
        cards.ground("evaluate")
