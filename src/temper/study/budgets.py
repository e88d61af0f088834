"""What every arm may spend, put into its recipe; and what a run did spend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from temper import parts
from temper.parts import Problem, nearest, plain
from temper.recipe import Plan, Step
from temper.study.arms import Arm
from temper.study.reading import Study

if TYPE_CHECKING:
    from temper.study.running import Stepped

LENGTHS = ("updates", "tokens", "seconds", "flops")
"""Budgets that are settings of a training step: its length."""
COSTS = ("seconds", "tokens", "updates", "flops", "peak_memory", "bytes")
"""What is reported of every arm."""


def budgeted(study: Study, arm: Arm, seed: int, *more: Mapping[str, Any]) -> Plan:
    """An arm's plan with the study's budget in the steps that it holds for."""
    made = study.plan(arm, seed, *more)
    budget = study.budget
    if budget is None or budget.kind not in LENGTHS:
        return made
    amount = getattr(budget, budget.kind)
    lengths = {f"{name}.{one}": None for name in held(study, made) for one in (*LENGTHS, "epochs")}
    return study.plan(arm, seed, *more, lengths, {f"{name}.{budget.kind}": amount for name in held(study, made)})


def held(study: Study, plan: Plan) -> list[str]:
    """Names of the steps that the budget holds for: as the study says, else those that train and that the arms' changes reach."""
    training = [step for step in plan.steps if trains(step) and not step.name.startswith("house:")]
    budget = study.budget
    if budget is not None and budget.of:
        names = [step.name for step in training]
        for at, name in enumerate(budget.of):
            if name not in names:
                raise Problem(f"no training step `{name}`{nearest(name, names)}", ("budget", "of", at))
        return list(budget.of)
    touched = {plain(key.partition(".")[0]) for arm in study.arms for key in arm.changes}
    whole = bool(touched & {plain(one) for one in ("model", "data", "steps", "use")})
    reached: list[int] = []
    for index, step in enumerate(plan.steps):
        if whole or plain(step.name) in touched or any(one.index in reached for one in step.given):
            reached.append(index)
    return [plan.steps[index].name for index in reached if plan.steps[index] in training]


def trains(step: Step) -> bool:
    """Whether a step's length can be set."""
    return all(name in parts.settings(type(step.spec)) for name in LENGTHS)


def spent(steps: Mapping[str, Stepped], counted: Sequence[str]) -> dict[str, float]:
    """What a run spent on the steps named: sums of time, tokens, updates and operations, the greatest memory, bytes of the last model."""
    found: dict[str, float] = {}
    for name in counted:
        for cost, value in steps[name].costs.items():
            if cost == "bytes":
                found[cost] = value
            elif cost == "peak_memory":
                found[cost] = max(found.get(cost, 0.0), value)
            else:
                found[cost] = found.get(cost, 0.0) + value
    return found


def own(runs: Mapping[str, Mapping[str, Stepped]]) -> dict[str, list[str]]:
    """Arm -> the steps of its run that the study is about: not those that all arms share, nor evaluations. runs: arm -> its steps."""
    keys = [{one.key for one in steps.values()} for steps in runs.values()]
    shared = set.intersection(*keys) if len(keys) > 1 else set()
    return {arm: [name for name, one in steps.items() if one.key not in shared and one.kind != "figures"] for arm, steps in runs.items()}
