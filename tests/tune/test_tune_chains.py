"""Chains: an adapter that tuning leaves, aligned: it goes on, or is merged under a new one; and what a new one may start as."""

from __future__ import annotations

import collections
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from temper.align import engine
from temper.align.engine import Align
from temper.context import Context
from temper.models import io
from temper.models.deltas import delta as deltas
from temper.models.deltas.base import Merged
from temper.models.deltas.budget import ExplainedVariance, SensitivityCubic
from temper.models.deltas.delta import Lora, SideLadder, SvdTriplet, TriFactor
from temper.models.deltas.init import Corda, Eva, Pissa, Vocabulary
from temper.parts import Problem
from temper.passport import Artefact, Inputs, Passport
from temper.run import complete
from temper.train.batching import Bucketed
from temper.train.optimizers import AdamW
from temper.tune.engine import Tune

LEARN: dict[str, Any] = {"updates": 8, "batching": Bucketed(size=8), "precision": "float32", "optimizer": AdamW(lr=2e-2, weight_decay=0.0)}
STILL: dict[str, Any] = {**LEARN, "updates": 1, "optimizer": AdamW(lr=1e-30, weight_decay=0.0)}
PROMPT_TUNING = deltas.PromptTuning(num_virtual_tokens=4)  # type: ignore[attr-defined]
PREFIX_TUNING = deltas.PrefixTuning(num_virtual_tokens=4)  # type: ignore[attr-defined]
ADAPTERS = [
    pytest.param(Tune(delta=Lora(rank=4), **LEARN), id="lora"),
    pytest.param(Tune(delta=TriFactor(rank=6), **LEARN), id="tri-factor"),
    pytest.param(Tune(delta=SvdTriplet(rank=6), budget=SensitivityCubic(target=3, interval=1), **LEARN), id="svd-triplet"),
]


@pytest.fixture(scope="session")
def preferences(given) -> Any:
    """Letters are preferred in order."""
    rows = [
        {"prompt": f"copy {a} {b} {c} =", "chosen": f" {a} {b} {c}", "rejected": f" {c} {b} {a}"}
        for a in "abcd" for b in "abcd" for c in "abcd" if a != c
    ]  # fmt: skip
    return given([row for index, row in enumerate(rows) if index % 6], rows[::6])


@pytest.fixture
def aligned(tmp_path: Path, base: Artefact, preferences: Any) -> Callable[..., Artefact]:
    """`aligned(name, spec, model=base)`: the artefact of one step, as `run` makes it; its `name` holds the notes."""

    def step(name: str, spec: Align, model: Artefact = base) -> Artefact:
        context, inputs = Context.scratch(tmp_path / name, 0, "align"), Inputs(model=model, data=preferences)
        predicted = engine.passport(spec, {"model": model.passport, "data": Passport("preference")})
        output = engine.run(spec, inputs, context)
        passport = complete(output.passport or predicted, context.out, name, inputs, output.base)
        return Artefact(name, context.out, passport, output.base, output.figures, name=" / ".join(context.notes))

    return step


def logits(source: Artefact) -> torch.Tensor:
    with torch.no_grad():
        return io.load_model(source, constraints=False)(torch.arange(20, 44).view(2, 12)).logits


def close(one: torch.Tensor, two: torch.Tensor, most: float = 2e-5) -> None:
    torch.testing.assert_close(one, two, atol=most, rtol=1e-5)


NEARLY: dict[type, tuple[float, ...]] = collections.defaultdict(tuple, {TriFactor: (2e-3,)})
"""How far a new delta may be from nothing: LoRA-XS draws its square matrix of deviation 1e-5."""


@pytest.mark.parametrize("spec", ADAPTERS)
def test_a_tuned_adapter_goes_on_in_aligning(spec: Tune, tuned, aligned, base: Artefact):
    first = tuned("first", spec)
    still = aligned("still", Align(**STILL), first)  # silent about the delta: whatever comes in goes on
    close(logits(still), logits(first))
    assert still.figures["heldout_kl"].value < 1e-9
    assert still.figures["heldout_margin"].value == pytest.approx(0, abs=1e-4)
    second = aligned("second", Align(**LEARN), first)
    assert second.base is base
    assert second.passport.kind == "adapter"
    assert second.passport.reference == first.id
    assert second.passport.adapters == ("first", "second")
    assert second.figures["heldout_kl"].value > 1e-4
    assert second.figures["train_loss"].value < 0.69  # log 2 = 0.693 nats is the reference's
    assert (logits(second) - logits(first)).abs().max() > 1e-2
    named = aligned("named", Align(delta=spec.delta, **STILL), first)  # what it is, asked for by name
    close(logits(named), logits(first))


@pytest.mark.parametrize("spec", ADAPTERS)
def test_a_tuned_adapter_is_merged_under_a_new_one(spec: Tune, tuned, aligned):
    first = tuned("first", spec)
    fresh: dict[str, Any] = {"base": Merged(), "delta": spec.delta, "budget": spec.budget}
    still = aligned("still", Align(**fresh, **STILL), first)
    close(logits(still), logits(first), *NEARLY[type(spec.delta)])
    assert still.figures["heldout_kl"].value < 1e-6
    second = aligned("second", Align(**fresh, **LEARN), first)
    assert second.base is first
    assert second.passport.reference == first.id
    assert second.passport.adapters == ("first", "second")
    assert second.passport.base == first.passport.base
    assert (logits(second) - logits(first)).abs().max() > 1e-3
    third = aligned("third", Align(**LEARN), second)  # and goes on again, on the same pair beneath it
    assert third.base is first
    assert third.passport.reference == second.id
    assert third.passport.adapters == ("first", "second", "third")


def test_a_budget_is_for_a_new_adapter(tuned, aligned):
    triplets = SvdTriplet(rank=6)
    first = tuned("first", Tune(delta=triplets, **LEARN))
    with pytest.raises(Problem, match="an adapter that came in goes on with its own; leave `budget` out"):
        aligned("second", Align(delta=triplets, budget=SensitivityCubic(target=3, interval=1), **LEARN), first)


@pytest.mark.parametrize(
    "changes",
    [
        {"init": Corda(samples=16)},
        {"init": Eva(samples=16)},
        {"init": Eva(samples=16), "budget": ExplainedVariance(samples=16)},
        {"init": Pissa()},
        {"delta": SideLadder(shrink=4, join="add")},
        {"delta": TriFactor(rank=6)},
    ],
    ids=["corda", "eva", "eva, budget", "pissa", "side-ladder", "tri-factor"],
)
def test_what_starts_as_nothing_is_aligned_from_the_policy_itself(changes: dict[str, Any], aligned, base: Artefact):
    still = aligned("still", Align(**changes, **STILL))
    close(logits(still), logits(base), *NEARLY[type(changes.get("delta"))])
    assert still.figures["heldout_kl"].value < 1e-6
    made = aligned("made", Align(**changes, **LEARN))
    assert made.passport.reference == base.id
    assert made.figures["heldout_kl"].value > 1e-3
    assert (logits(made) - logits(base)).abs().max() > 1e-3


@pytest.mark.parametrize(
    "changes",
    [{"delta": PROMPT_TUNING}, {"delta": PROMPT_TUNING, "init": Vocabulary()}, {"delta": PREFIX_TUNING}, {"delta": SideLadder(shrink=4)}],
    ids=["prompt-tuning", "vocabulary", "prefix-tuning", "side-ladder"],
)
def test_what_does_not_is_refused_before_training(changes: dict[str, Any], aligned, tmp_path: Path):
    with pytest.raises(Problem, match=r"before the first update the policy is .* nats per token from its reference"):
        aligned("made", Align(**changes, **LEARN))
    assert not list((tmp_path / "made").rglob("model"))


@pytest.mark.parametrize("delta", [PROMPT_TUNING, PREFIX_TUNING], ids=["prompt-tuning", "prefix-tuning"])
def test_virtual_tokens_that_come_in_go_on(delta: Any, tuned, aligned):
    """Their reference has them too, and pairs stand in two rows, before each of which they are."""
    first = tuned("first", Tune(delta=delta, **LEARN))
    still = aligned("still", Align(**STILL), first)
    assert still.figures["heldout_kl"].value < 1e-9
    made = aligned("made", Align(**LEARN), first)
    assert made.passport.reference == first.id
    assert made.figures["heldout_kl"].value > 0
    assert "two rows" in (made.path.parent / "work" / "decisions.json").read_text()
