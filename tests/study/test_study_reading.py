"""Study files: arms, budgets, claims; what is wrong is told with file, line, value, rule and the nearest right word."""

from __future__ import annotations

import pytest

from temper import parts
from temper.parts import Problem
from temper.study.arms import arms
from temper.study.budgets import budgeted, held
from temper.study.running import needed, shortened


def test_arms_are_named_changes_or_the_places_of_a_grid():
    named = arms({"full": {"tune.method": "full"}, "as it is": None})
    assert [(one.name, dict(one.changes), dict(one.at)) for one in named] == [
        ("full", {"tune.method": "full"}, {"arm": "full"}),
        ("as it is", {}, {"arm": "as it is"}),
    ]
    grid = arms({"grid": {"tune.updates": [2, 4], "size": {"small": {"base.x": 1}, "large": {"base.x": 2, "base.y": 3}}}})
    assert [one.name for one in grid] == ["updates=2 small", "updates=2 large", "updates=4 small", "updates=4 large"]
    assert grid[1].changes == {"tune.updates": 2, "base.x": 2, "base.y": 3}
    assert grid[1].at == {"tune.updates": 2, "size": "large"}


def test_a_study_reads_its_recipe_and_puts_changes_and_seeds_in(study):
    made = study()
    assert [arm.name for arm in made.arms] == ["low", "high"]
    assert made.seeds == (0, 1)
    assert made.baseline == "low"
    plan = made.plan(made.arm("high"), 1)
    assert [(step.name, step.seed) for step in plan.steps] == [("warm", 7), ("tune", 1), ("text", 1)]
    assert plan.step("tune").spec.optimizer.lr == 3e-2
    assert made.plan(made.arm("low"), 1).step("tune").spec.optimizer.lr == 1e-5


def test_parts_are_replaced_before_settings_inside_them_change(study):
    made = study(("high: {tune.optimizer.adamw.lr: 3.0e-2}", "high: {tune.optimizer.sgd.lr: 0.1, tune.optimizer: sgd, tune.clip: none}"))
    spec = made.plan(made.arm("high"), 0).step("tune").spec
    assert parts.mark_of(spec.optimizer).name == "sgd"
    assert spec.optimizer.lr == 0.1
    assert spec.clip is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("vary:", "varies:"), "study.yaml:11:1: `varies`: a study has no key `varies`; did you mean `vary`"),
        (("better: high", "better: hihg"), "no arm `hihg`; did you mean `high`"),
        (
            ("tune.optimizer.adamw.lr: 3.0e-2", "tune.optimiser.adamw.lr: 3.0e-2"),
            "has no slot or setting `optimiser`; did you mean `optimizer`",
        ),
        (("tune.optimizer.adamw.lr: 3.0e-2", "tuen.clip: 1.0"), "no step `tuen`; did you mean `tune`"),
        (("seeds: 2", "seeds: 0"), "0: `seeds` is how many"),
        (("seeds: 2", "seeds: [1, 1]"), "different whole numbers"),
        (("seeds: 2", "budget: {updates: 3, tokens: 5}"), "updates and tokens given: one thing is held equal"),
        (("seeds: 2", "budget: {}"), "nothing given"),
        (("seeds: 2", "budget: {update: 3}"), "no setting `update`; did you mean `updates`"),
        (("seeds: 2", "budget: {trials: true}"), "a budget of trials needs `tune:`"),
        (("seeds: 2", "budget: {updates: 3, of: [text]}"), "no training step `text`"),
        (("nats: text.tune", "nats: test.tune"), "measure `nats`: no step `test`; did you mean `text`"),
        (("margin: 0.01", "margin: wide"), '"wide": a number is asked for'),
        (("{better: high, than: low, margin: 0.01}", "{better: high}"), "has `better`, `than`"),
        (
            ("{better: high, than: low, margin: 0.01}", "{of: {low nats: 1}, above: 0, below: 1}"),
            "a claim of a number has `above` or `below`",
        ),
        (("{better: high, than: low, margin: 0.01}", "{of: {low nast: 1}, above: 0}"), "`nast` is not measured; did you mean `nats`"),
        (("{better: high, than: low, margin: 0.01}", "{quantity: law.b, above: 0}"), "no fit `law`"),
        (("seeds: 2", "fit: {law: {law: power-law, x: arm}}"), "2 arms lie on it; a law needs at least 3"),
        (("seeds: 2", "tune: {trials: 2, over: {tune.clip: {log: {low: 1.0, high: 2.0}}}}"), "`by` is missing"),
        (("seeds: 2", "tune: {trials: 2, by: text.tune.perplexity, over: {}}"), "is measured too"),
        (("seeds: 2", "tune: {trials: 2, by: tune.train_loss}"), "nothing to try for arm `low`"),
        (("seeds: 2", "tune: {by: tune.train_loss, over: {tune.clip: {log: {low: 0.0, high: 2.0}}}}"), "begins above 0"),
        (("seeds: 2", "tune: {by: tune.train_loss, over: {tune.clip: {uniform: {low: 3.0, high: 2.0}}}}"), "begins below its end"),
    ],
)
def test_what_is_wrong_is_told(study, change, said):
    with pytest.raises(Problem) as raised:
        study(change)
    assert said in str(raised.value)
    assert "study.yaml" in str(raised.value) or "arm `high`" in str(raised.value)


def test_a_budget_takes_the_place_of_every_other_length(study):
    made = study(("seeds: 2", "budget: {tokens: 200}"))
    plan = budgeted(made, made.arm("low"), 0)
    assert held(made, plan) == ["tune"]  # `warm` is the same in all arms
    assert (plan.step("tune").spec.tokens, plan.step("tune").spec.updates) == (200, None)
    assert plan.step("warm").spec.updates == 2
    named = study(("seeds: 2", "budget: {updates: 5, of: [warm, tune]}"))
    assert [budgeted(named, named.arm("low"), 0).step(one).spec.updates for one in ("warm", "tune")] == [5, 5]


def test_a_change_of_the_recipes_own_reaches_every_training_step(study):
    made = study(("high: {tune.optimizer.adamw.lr: 3.0e-2}", "high: {data: rows.jsonl}"))
    assert held(made, made.plan(made.arm("low"), 0)) == ["warm", "tune"]


def test_a_trial_runs_what_its_figure_needs_and_no_more(study):
    made = study()
    plan = made.plan(made.arm("low"), 0)
    assert [step.name for step in needed(plan, ["tune"]).steps] == ["warm", "tune"]
    assert [step.name for step in needed(plan, ["text"]).steps] == ["warm", "tune", "text"]
    assert shortened(made, plan, 0.5).step("tune").spec.updates == 2  # 1.5, rounded to even
    assert shortened(made, plan, 0.5).step("warm").spec.updates == 2
