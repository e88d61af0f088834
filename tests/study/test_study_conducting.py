"""A study from its file to its report: runs shared with the store, trials alike for all arms, claims held against the rule."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import signal
import subprocess
import sys
import time

import numpy
import pytest

import temper.study
from temper.evaluate import records
from temper.parts import Problem
from temper.report.study import read as read_report
from temper.report.study import write
from temper.statistics import tests
from temper.store import Store
from temper.study import Ways, cards, conduct, conducting
from temper.study.ablation import ablation, contributions
from temper.study.evidence import SEEDS
from temper.study.findings import overall, verdicts
from temper.study.running import Job, cell
from temper.study.search import Halving, Random, best, shares
from temper.study.trials import candidates


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    """Shared by the tests of this file: what one of them made the others need not make."""
    return Store(tmp_path_factory.mktemp("store"))


def test_a_study_finds_what_its_figures_say(study, store, tmp_path):
    made = study()
    done = conduct(made, Ways(store))
    report = done.report
    low, high = report.arms
    assert [arm.name for arm in report.arms] == ["low", "high"]
    # Every arm's figure is the mean of its runs', which are those of the artefacts.
    for arm in report.arms:
        assert arm.figures["nats"].value == pytest.approx(numpy.mean([run.figures["nats"] for run in arm.runs]))
        assert arm.figures["nats"].low < arm.figures["nats"].value < arm.figures["nats"].high
        assert {run.seed for run in arm.runs} == {0, 1}
    one = report.comparisons[0]
    assert one.difference == pytest.approx(low.figures["nats"].value - high.figures["nats"].value)  # less is better
    assert one.low <= one.difference <= one.high
    assert (report.verdict == "holds here") == (one.low > 0.01)
    # The warm start is one artefact for all arms and seeds, and its cost no arm's own.
    keys = {cell.steps["warm"].key for some in done.data.cells.values() for cell in some}
    assert len(keys) == 1
    assert low.costs["updates"] == 3
    assert low.costs["seconds"] > 0
    assert low.costs["bytes"] > 0
    # Again, nothing is made, and the figures are the same to the last bit.
    again = conduct(made, Ways(store)).report
    assert all(run.status == "from the store" for arm in again.arms for run in arm.runs)
    assert [dataclasses.asdict(one) for one in again.comparisons] == [dataclasses.asdict(one) for one in report.comparisons]
    write(report, tmp_path / "report.html")
    assert read_report(json.loads((tmp_path / "report.json").read_text())).finding == report.finding
    assert len(list(csv.DictReader((tmp_path / "report.csv").open()))) == 4


def test_examples_are_paired_and_the_interval_is_that_of_a_slow_bootstrap(study, store):
    made = study()
    data = conduct(made, Ways(store)).data
    low, high = data.measured["low", "nats"], data.measured["high", "nats"]
    assert low.arm.data == high.arm.data != SEEDS
    assert low.arm.sums.shape[0] == 2
    count = low.arm.sums.shape[1]
    assert count > 8
    for (arm, name), one in data.measured.items():
        for seed, run in enumerate(data.cells[arm]):
            assert float(one.arm.statistic(one.arm.sums[seed].sum(0))) == pytest.approx(run.figures[made.measure[name]].value, rel=1e-6)
    draws = data.sum({("low", "nats"): 1, ("high", "nats"): -1}).draws(4000)
    slow, generator = [], numpy.random.default_rng(1)
    for _ in range(2000):
        seeds, units = generator.integers(0, 2, 2), generator.integers(0, count, count)
        values = [numpy.mean([one.arm.statistic(one.arm.sums[seed][units].sum(0)) for seed in seeds]) for one in (low, high)]
        slow.append(values[0] - values[1])
    assert draws.mean() == pytest.approx(numpy.mean(slow), abs=4 * numpy.std(slow) / math.sqrt(2000))
    assert draws.std() == pytest.approx(numpy.std(slow), rel=0.1)


def test_records_without_a_model_give_the_figures_of_the_artefact(study, store):
    made = study()
    done = conduct(made, Ways(store))
    cell_ = done.data.cells["low"][0]
    artefact = store.get(cell_.steps["text"].key)
    found = records.read(artefact.path, made.plan(made.arm("low"), 0).step("text").spec)
    assert {name: one.value for name, one in found.items()} == pytest.approx({name: one.value for name, one in artefact.figures.items()})


def test_trials_are_as_many_for_every_arm_at_the_same_shares(study, store):
    made = study(
        (
            "seeds: 2",
            "seeds: 1\ntune: {trials: 3, by: tune.train_loss, "
            "over: {tune.optimizer.adamw.betas: {choice: {values: [[0.9, 0.9], [0.8, 0.9]]}}}, "
            "arms: {low: {tune.clip: {uniform: {low: 0.5, high: 2.0}}}}}",
        ),
        ("than: low, margin: 0.01", "than: low"),
    )
    report = conduct(made, Ways(store)).report
    by_arm = {name: [one for one in report.trials if one.arm == name] for name in ("low", "high")}
    assert [len(some) for some in by_arm.values()] == [3, 3]
    assert set(by_arm["low"][0].settings) == {"tune.optimizer.adamw.betas", "tune.clip"}
    for name, some in by_arm.items():
        chosen = [one for one in some if one.chosen]
        assert len(chosen) == 1
        assert chosen[0].figure == min(one.figure for one in some)
        assert report.arms[["low", "high"].index(name)].tuned == chosen[0].settings
    assert candidates(made, "low") == candidates(made, "low")


def test_a_trial_that_breaks_loses_and_a_run_that_breaks_stops_the_study(study, store):
    broken = "tune.optimizer.adamw.lr: {choice: {values: [1.0e-3, 1.0e+30]}}"
    made = study(("seeds: 2", f"seeds: 1\ntune: {{trials: 2, by: tune.train_loss, over: {{{broken}}}}}"), ("margin: 0.01", "margin: 0"))
    trials = [one for one in conduct(made, Ways(store)).report.trials if one.arm == "low"]
    assert {one.settings["tune.optimizer.adamw.lr"]: one.figure is None for one in trials} == {1e-3: False, 1e30: True}
    with pytest.raises(Exception, match="step `tune` failed"):
        cell(made, Job("low", 0, {"tune.optimizer.adamw.lr": 1e30}, ("text.tune.perplexity",)), store)


def test_search_spends_what_it_says():
    asked: list[tuple[int, float]] = []

    def run(wanted):
        asked.extend(wanted)
        return [abs(number - 5) + (math.nan if number == 7 else 0) for number, _ in wanted]

    assert best(Random()(8, run)).number == 5
    assert asked == [(number, 1.0) for number in range(8)]
    asked.clear()
    tried = Halving(first=0.25, keep=2)(8, run)
    assert [sum(one.rung == rung for one in tried) for rung in (0, 1, 2)] == [8, 4, 2]
    assert [effort for _, effort in asked] == [0.25] * 8 + [0.5] * 4 + [1.0] * 2
    assert best(tried).number == 5
    assert best(Random()(1, lambda wanted: [math.nan])) is None
    rows = numpy.array(shares(10, 2, 3))
    assert (numpy.sort((rows * 10).astype(int), axis=0) == numpy.arange(10)[:, None]).all()  # every tenth once
    assert shares(10, 2, 3) == shares(10, 2, 3) != shares(10, 2, 4)


def test_verdicts_follow_from_chances_alone():
    assert verdicts([(0.02, 0.98)], 0.95, "holm") == ["holds here"]
    assert verdicts([(0.03, 0.97)], 0.95, "holm") == ["unclear"]
    assert verdicts([(0.98, 0.02)], 0.95, "holm") == ["does not hold here"]
    assert verdicts([(0.02, 0.98), (0.5, 0.5)], 0.95, "holm") == ["unclear", "unclear"]
    assert verdicts([(0.02, 0.98), (0.5, 0.5)], 0.95, "none") == ["holds here", "unclear"]
    assert overall([]) == ""
    assert overall(["holds here", "holds here"]) == "holds here"
    assert overall(["holds here", "unclear"]) == "unclear"
    assert overall(["holds here", "unclear", "does not hold here"]) == "does not hold here"


def test_claims_of_numbers_and_other_tests(study, store):
    made = study(
        (
            "{better: high, than: low, margin: 0.01}",
            "{of: {low nats: 1, high nats: -1}, above: -100, test: paired-t}\n    - {of: {low perplexity: 1}, below: 0}",
        ),
    )
    report = conduct(made, Ways(store)).report
    first, second = report.comparisons
    assert (first.test, first.verdict) == ("paired t", "holds here")
    assert second.verdict == "does not hold here"
    assert report.verdict == "does not hold here"
    assert "low perplexity is below 0" in report.finding
    unfit = study(("margin: 0.01", "margin: 0, test: mcnemar"))
    with pytest.raises(Problem, match="McNemar's test compares two arms at one seed"):
        conduct(unfit, Ways(store))


def test_without_claims_every_arm_is_compared_with_the_baseline(study, store):
    made = study(("finding:\n  claims:\n    - {better: high, than: low, margin: 0.01}\n", ""))
    report = conduct(made, Ways(store)).report
    assert report.verdict == ""
    assert [(one.better, one.than, one.figure) for one in report.comparisons] == [("high", "low", "nats"), ("high", "low", "perplexity")]
    assert report.comparisons[0].verdict in ("better", "worse", "unclear")


def test_figures_without_examples_are_tested_over_seeds(study, store):
    """Two seeds' draws would always agree with themselves; one run of each arm shows nothing."""
    measured = ("nats: text.tune.nats_per_token\n  perplexity: text.tune.perplexity", "loss: tune.train_loss")
    two = conduct(study(measured, ("margin: 0.01", "margin: 0")), Ways(store)).report.comparisons[0]
    assert two.test == "paired t"
    one = conduct(study(measured, ("margin: 0.01", "margin: 0"), ("seeds: 2", "seeds: 1")), Ways(store)).report
    assert (one.comparisons[0].test, one.comparisons[0].low, one.verdict) == ("one run, no test", -math.inf, "unclear")


def test_mcnemar_counts_the_examples_that_one_arm_gets_right(study, store):
    made = study(
        ("method: perplexity", "metric: accuracy"),
        ("nats: text.tune.nats_per_token\n  perplexity: text.tune.perplexity", "right: text.tune.accuracy"),
        ("margin: 0.01", "margin: 0, test: mcnemar"),
        ("seeds: 2", "seeds: 1"),
    )
    done = conduct(made, Ways(store))
    first, second = (done.data.measured[arm, "right"].arm.sums[0][:, 0] for arm in ("high", "low"))
    found = tests.mcnemar(int((first > second).sum()), int((second > first).sum()), len(first))
    told = done.report.comparisons[0]
    assert (told.difference, told.low, told.high) == (found.estimate, found.low, found.high)


def test_a_law_through_arms_and_a_run_left_out(study, store):
    made = study(
        (
            "vary:\n  low: {tune.optimizer.adamw.lr: 1.0e-5}\n  high: {tune.optimizer.adamw.lr: 3.0e-2}",
            "vary: {grid: {tune.updates: [1, 2, 3, 4]}}",
        ),
        ("seeds: 2", "fit: {law: {law: log-law, x: tune.updates, predict: 4}}"),
        ("{better: high, than: low, margin: 0.01}", "{quantity: law.error, below: 1}"),
    )
    done = conduct(made, Ways(store))
    law = done.report.fits[0]
    assert [point.x for point in law.points] == [1, 2, 3]
    x, y = numpy.log([1, 2, 3]), [point.y for point in law.points]
    slope, constant = numpy.polyfit(x, y, 1)
    assert law.parameters["a"].value == pytest.approx(slope)
    assert law.held_out.predicted == pytest.approx(constant + slope * math.log(4))
    assert law.parameters["error"].value == pytest.approx(abs(law.held_out.predicted / law.held_out.y - 1))
    assert done.report.comparisons[0].difference == pytest.approx(law.parameters["error"].value)


def test_wall_time_is_held_equal_by_runs_of_its_own(study, store, tmp_path):
    made = study(("seeds: 2", "seeds: 1\nbudget: {seconds: 0.3}"))
    done = conduct(made, Ways(store))
    for some in done.data.cells.values():
        assert some[0].made
        assert done.study.digest[:8] in store.record(some[0].steps["tune"].key)["ingredients"]["apart"]
    assert not any(cell.made for some in conduct(made, Ways(store)).data.cells.values() for cell in some)  # an interrupted study goes on
    other = study(("seeds: 2", "seeds: 1\nbudget: {seconds: 0.3}"), ("about: does", "about: Does"))
    assert all(cell.made for some in conduct(other, Ways(store)).data.cells.values() for cell in some)


def test_an_arm_that_needs_more_memory_is_left_out_and_its_claims_cannot_hold(study, store, tmp_path, monkeypatch):
    with pytest.raises(Problem, match=r"every arm needs more bytes of memory than the budget: low \S+, high \S+; give more"):
        conduct(study(("seeds: 2", "seeds: 1\nbudget: {memory: 1.0}")), Ways(Store(tmp_path / "store"), workers=2))
    monkeypatch.setattr(conducting, "_over", lambda study, cells: {"low": 2e9})
    report = conduct(study(("than: low, margin: 0.01}", "than: low}\n    - {of: {high nats: 1}, above: 0}")), Ways(store)).report
    assert [arm.name for arm in report.arms] == ["high"]
    assert report.comparisons[0].verdict == "holds here"
    assert report.verdict == "unclear"
    assert "1 of 2 claims fall away with them, so the whole cannot hold" in report.notes


def test_a_law_through_single_runs_without_examples_shows_nothing(study, store):
    made = study(
        (
            "vary:\n  low: {tune.optimizer.adamw.lr: 1.0e-5}\n  high: {tune.optimizer.adamw.lr: 3.0e-2}",
            "vary: {grid: {tune.updates: [1, 2, 3, 4]}}",
        ),
        ("nats: text.tune.nats_per_token\n  perplexity: text.tune.perplexity", "loss: tune.train_loss"),
        ("seeds: 2", "seeds: 1\nfit: {law: {law: log-law, x: tune.updates}}"),
        ("{better: high, than: low, margin: 0.01}", "{quantity: law.a, below: 100}"),
    )
    report = conduct(made, Ways(store)).report
    assert (report.comparisons[0].test, report.verdict) == ("one run, no test", "unclear")
    assert report.arms[0].figures["loss"].low is None


def test_processes_and_ray_give_the_same_figures(study, tmp_path):
    made = study(("seeds: 2", "seeds: 1"))
    here = conduct(made, Ways(Store(tmp_path / "here"))).report
    there = conduct(made, Ways(Store(tmp_path / "there"), workers=2)).report
    figures = [[arm.runs[0].figures for arm in report.arms] for report in (here, there)]
    assert figures[0] == [pytest.approx(one, rel=1e-5) for one in figures[1]]
    pytest.importorskip("ray", reason="ray is not installed: pip install 'temper-ml[ray]'")
    ray = conduct(made, Ways(Store(tmp_path / "ray"), ray="local")).report
    assert [arm.runs[0].figures for arm in ray.arms] == [pytest.approx(one, rel=1e-5) for one in figures[0]]


def test_an_interrupted_study_goes_on(written, rows, tmp_path):
    (rows / "going.yaml").write_text(written(("seeds: 2", "seeds: 3")))
    command = [
        sys.executable,
        "-m",
        "temper",
        "study",
        str(rows / "going.yaml"),
        "--store",
        str(tmp_path / "store"),
        "--out",
        str(tmp_path / "out"),
        "--json",
    ]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    for line in first.stderr:
        if line.startswith("2/6"):
            break
    first.send_signal(signal.SIGKILL)
    first.wait()
    time.sleep(0.1)
    second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert second.returncode == 0, second.stderr
    report = json.loads(second.stdout)
    assert [run["status"] for run in report["arms"][0]["runs"]][:2] == ["from the store"] * 2
    assert (tmp_path / "out" / "report.html").is_file()


def test_an_ablation_replaces_every_part_by_the_default(study, store):
    ground = study(("seeds: 2", "seeds: 1"))
    made = ablation(ground, "tune", "pissa", pairs=True)
    assert made.arms[0].name == "whole"
    assert {arm.name for arm in made.arms} > {"without init"}
    spec = made.plan(made.arm("without init"), 0).step("tune").spec
    whole = made.plan(made.arm("whole"), 0).step("tune").spec
    assert spec.init != whole.init
    assert dataclasses.replace(spec, init=whole.init) == whole
    done = conduct(made, Ways(store))
    told = contributions(made, list(done.judged))
    assert [one.replaced for one in told] == ["tune.delta: lora(rank=16)", "tune.init: pissa", "tune.delta+init: lora(rank=16) + pissa"]
    assert [one.by for one in told] == ["lora", "default", "lora + default"]
    first = done.report.comparisons[0]
    assert told[0].difference == pytest.approx(-first.difference)
    with pytest.raises(Problem, match="defaults in every slot"):
        ablation(ground, "tune", "lora")


def test_a_card_keeps_figures_rule_and_attempts(study, store, tmp_path):
    done = conduct(study(), Ways(store))
    first = cards.card(done, "tune", "full")
    path = cards.save(first, tmp_path)
    assert path == tmp_path / "tune" / "full.json"
    again = cards.card(done, "tune", "full", cards.attempts("tune", "full", tmp_path))
    assert len(again["attempts"]) == 2
    assert again["verdict"] == cards.rederived(again) == done.report.verdict
    assert cards.rederived({**again, "comparisons": [{**again["comparisons"][0], "p_above": 0.5, "p_below": 0.5}]}) == "unclear"
    silent = conduct(study(("finding:\n  claims:\n    - {better: high, than: low, margin: 0.01}\n", "")), Ways(store))
    with pytest.raises(Problem, match="claims nothing"):
        cards.card(silent, "tune", "full")


def test_methods_are_found_by_name():
    assert temper.study.method("pissa") == ("tune", "pissa")
    assert temper.study.method("tune.pissa") == ("tune", "pissa")
    with pytest.raises(Problem, match="no method `pisa`; did you mean `pissa`"):
        temper.study.method("pisa")
