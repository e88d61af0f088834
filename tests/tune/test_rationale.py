"""The loss of labels and rationales: two cross-entropies, however the rows are cut, and the plain loss where rationales weigh nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from temper.context import Context
from temper.models import io
from temper.parts import Problem
from temper.passport import Artefact
from temper.tasks.rows import Rows
from temper.tasks.source import Rationales, Task
from temper.tasks.verifiable import Brackets
from temper.train.batching import Bucketed, Packed, collate, planned
from temper.train.examples import encode
from temper.train.objectives import Causal
from temper.tune.loss import Rationale

ROWS = Rationales(source=Task(task=Brackets(longest=5), count=8, test_count=2)).load("train").rows
LABELS = [row for row in ROWS if row["prompt"].startswith("[label]")]


@pytest.fixture
def model(base: Artefact) -> Any:
    return io.load_model(base)


@pytest.fixture
def tokenizer(base: Artefact) -> Any:
    return io.load_tokenizer(base)


def examples(rows: list[dict[str, Any]], tokenizer: Any) -> Any:
    return encode(Rows("completion", rows, "rows", "a test"), tokenizer, max_length=None)


def started(part: Rationale, given: Any, tokenizer: Any, folder: Path) -> Any:
    context = Context.scratch(folder, 0, "tune")
    context.give("tokenizer", tokenizer)
    context.give("examples", given)
    return part.start(context.at("loss"))


def mean(model: Any, rows: list[dict[str, Any]], tokenizer: Any) -> float:
    """Nats per target in float64, one row at a time."""
    total, count = 0.0, 0
    for one in examples(rows, tokenizer):
        tokens = torch.tensor(one.tokens[None].astype("int64"))
        logs = model.double()(tokens).logits[0, :-1].log_softmax(-1)
        picked = logs.gather(1, tokens[0, 1:, None])[:, 0][torch.tensor(one.supervised[1:])]
        total, count = total - picked.sum().item(), count + len(picked)
    model.float()
    return total / count


@pytest.mark.parametrize("weight", [1.0, 0.3, 0.0])
@torch.no_grad()
def test_the_whole_set_gives_the_sum_of_two_cross_entropies(weight: float, model: Any, tokenizer: Any, tmp_path: Path):
    given = examples(ROWS, tokenizer)
    loss = started(Rationale(weight=weight), given, tokenizer, tmp_path)
    label, rationale = (mean(model, [row for row in ROWS if row["prompt"].startswith(word)], tokenizer) for word in ("[label]", "[rat"))
    found = loss(model, collate(given))
    assert found.mean.item() == pytest.approx(label + weight * rationale, rel=1e-5)
    assert found.count == examples(LABELS, tokenizer).supervised
    assert [found.extras[name].item() / found.count for name in ("label", "rationale")] == pytest.approx([label, rationale], rel=1e-5)


def test_rationales_of_no_weight_leave_the_loss_of_the_labels(model: Any, tokenizer: Any, tmp_path: Path):
    given = examples(ROWS, tokenizer)
    found = started(Rationale(weight=0.0), given, tokenizer, tmp_path)(model, collate(given))
    plain = Causal()(model, collate(examples(LABELS, tokenizer)))
    assert found.count == plain.count
    slopes = [torch.autograd.grad(one.mean, list(model.parameters())) for one in (found, plain)]
    assert all(torch.allclose(one, two, atol=1e-6) for one, two in zip(*slopes))


@pytest.mark.parametrize(
    "batching",
    [Bucketed(size=3), Bucketed(size=16, layout="packed"), Packed(length=2000, size=1, documents="separate")],
)
@torch.no_grad()
def test_micro_batches_add_up(batching: Any, model: Any, tokenizer: Any, tmp_path: Path):
    model.config.max_position_embeddings = 4096
    given = examples(ROWS, tokenizer)
    loss = started(Rationale(weight=0.5), given, tokenizer, tmp_path)
    plan, whole = planned(batching, given, Context.scratch(tmp_path / "b", 0, "tune").stream("batching")), loss(model, collate(given))
    sums = [loss(model, one) for update in range(plan.updates_per_epoch) for one in plan.update(update)]
    assert sum(one.total.item() for one in sums) == pytest.approx(whole.total.item(), rel=1e-5)
    assert sum(one.count for one in sums) == whole.count


@pytest.mark.parametrize(
    ("part", "rows", "text"),
    [
        (Rationale(), LABELS, r'no row\'s prompt begins with "\[rationale\]"; give data `rationales`'),
        (Rationale(), [row for row in ROWS if row not in LABELS], r'no row\'s prompt begins with "\[label\]"'),
        (Rationale(), [{"prompt": "copy a =", "completion": " a"}], r'begins with neither "\[label\]" nor "\[rationale\]"'),
    ],
)
def test_rows_without_prefixes_are_refused(part: Rationale, rows: Any, text: str, tokenizer: Any, tmp_path: Path):
    with pytest.raises(Problem, match=text):
        started(part, examples(rows, tokenizer), tokenizer, tmp_path)


def test_labels_alone_do_where_rationales_weigh_nothing(model: Any, tokenizer: Any, tmp_path: Path):
    given = examples(LABELS, tokenizer)
    found = started(Rationale(weight=0.0), given, tokenizer, tmp_path)(model, collate(given))
    assert found.total.item() == pytest.approx(Causal()(model, collate(given)).total.item(), rel=1e-6)


def test_prefixes_that_cannot_be_told_apart_are_refused():
    with pytest.raises(ValueError, match="neither may begin with the other"):
        Rationale(label="[a", rationale="[a]")
