"""The loop: what an update is, what it logs, what it refuses."""

from __future__ import annotations

import dataclasses
import math
import os
import signal

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open

from temper.context import Context
from temper.parts import Problem, Slot, part, spec
from temper.train import precision
from temper.train.batching import Bucketed, Packed, Padded
from temper.train.loop import how_long, train, trainable
from temper.train.objectives import Causal, Objective, Sum
from temper.train.optimizers import SGD, AdamW
from temper.train.schedules import Constant, Cosine

FOUR, DESCENT, CAUSAL = Padded(size=4), SGD(lr=0.1, momentum=0.0), Causal()


@pytest.fixture
def run(tmp_path, llama, examples, stream):
    """Trains a tiny Llama; gives the model, the history and the context. Settings replace the defaults."""
    numbers = iter(range(100))

    def go(*, model=None, batching=FOUR, data=None, optimizer=DESCENT, loss=CAUSAL, updates=3, **settings):
        context = settings.pop("context", None) or Context.scratch(tmp_path / str(next(numbers)))
        model = model if model is not None else llama().double()
        build = optimizer.build if hasattr(optimizer, "build") else optimizer
        plan = batching(examples(completion=True) if data is None else data, stream)
        made = build(trainable(model, settings.get("live")))
        given = {"schedule": Constant(), "clip": None, **settings}
        return model, train(model, plan, loss, optimizer=made, updates=updates, context=context, **given), context

    return go


FLOAT = {"rtol": 1e-5, "atol": 1e-7}  # Llama's norms compute in float32 even in a float64 model


def weights(model):
    return {name: one.detach().clone() for name, one in model.named_parameters()}


def assert_same(one, two, **tolerance):
    one, two = weights(one), weights(two)
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], **(tolerance or {"rtol": 0, "atol": 0}))


# -------------------------------------------------------------------------------------------------- what an update is


def test_accumulating_k_batches_of_b_equals_one_of_kb(run):
    one, first, _ = run(batching=Padded(size=6))
    two, second, _ = run(batching=Padded(size=2, accumulate=3))
    assert_same(one, two, rtol=1e-9, atol=1e-11)
    for a, b in zip(first.rows, second.rows, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-6)


def test_bucketed_trains_as_padded_does(run):
    one, *_ = run(batching=Padded(size=6))
    two, *_ = run(batching=Bucketed(size=6, tokens=30))
    assert_same(one, two, rtol=1e-9, atol=1e-11)


def test_an_update_is_a_step_along_the_mean_gradient(run, llama, examples, stream):
    model, history, _ = run(updates=1)
    reference = llama().double()
    (batch,) = Padded(size=4)(examples(completion=True), stream).update(0)
    result = Causal()(reference, batch)
    result.mean.backward()
    norm = math.sqrt(sum(float(one.grad.square().sum()) for one in reference.parameters()))
    with torch.no_grad():
        for one in reference.parameters():
            one -= 0.1 * one.grad
    assert_same(model, reference, **FLOAT)
    assert history.rows[0]["loss"] == pytest.approx(float(result.mean), rel=1e-6)
    assert history.rows[0]["grad_norm"] == pytest.approx(norm, rel=1e-6)


@pytest.mark.parametrize(("clip", "expected"), [(0.05, 0.05), (None, None), (1e6, None)])
def test_clipping_bounds_the_norm_of_the_change(run, llama, clip, expected):
    before = weights(llama().double())
    model, history, _ = run(updates=1, clip=clip, batching=Padded(size=2, accumulate=2))
    change = math.sqrt(sum(float((one - before[name]).square().sum()) for name, one in weights(model).items()))
    norm = history.rows[0]["grad_norm"]
    assert norm > 0.05
    assert change == pytest.approx(0.1 * (expected or norm), rel=1e-4)


def test_the_rate_follows_the_schedule_in_the_middle_of_each_update(run):
    _, history, _ = run(updates=4, schedule=Cosine(warmup=0.0), optimizer=AdamW(lr=0.5))
    expected = [0.5 * (1 + math.cos(math.pi * (i + 0.5) / 4)) / 2 for i in range(4)]
    assert [row["lr"] for row in history.rows] == pytest.approx(expected)


def test_training_learns(run):
    _, history, _ = run(updates=40, optimizer=AdamW(lr=0.02), batching=Bucketed(size=14, tokens=100), clip=1.0)
    losses = [row["loss"] for row in history.rows]
    assert losses[0] > math.log(128) - 1
    assert losses[-1] < 0.3


# ------------------------------------------------------------------------------------------------------- optimizers


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation over plain descent: the gradient is taken where the loss is worst nearby.  Foret et al. 2021."""

    def __init__(self, parameters, lr=0.1, rho=0.05):
        super().__init__(parameters, {"lr": lr, "rho": rho})

    @torch.no_grad()
    def step(self, closure):
        (group,) = self.param_groups
        with torch.enable_grad():
            loss = closure()
        norm = torch.nn.utils.get_total_norm([one.grad for one in group["params"]])
        shifts = [one.grad * (group["rho"] / norm) for one in group["params"]]
        torch._foreach_add_(group["params"], shifts)
        with torch.enable_grad():
            closure()
        torch._foreach_sub_(group["params"], shifts)
        for one in group["params"]:
            one -= group["lr"] * one.grad
        return loss


class MeZO(torch.optim.Optimizer):
    """Zeroth-order descent from two forward passes.  Malladi et al. 2023, algorithm 1."""

    def __init__(self, parameters, lr=0.01, eps=1e-3):
        super().__init__(parameters, {"lr": lr, "eps": eps, "seed": 0})

    @torch.no_grad()
    def step(self, closure):
        (group,) = self.param_groups
        draw = torch.Generator().manual_seed(group["seed"])
        group["seed"] += 1
        directions = [torch.randn(one.shape, dtype=one.dtype, generator=draw) for one in group["params"]]
        losses = []
        for scale in (1, -2, 1):
            torch._foreach_add_(group["params"], directions, alpha=scale * group["eps"])
            losses.append(closure() if scale != 1 or not losses else None)
        slope = (losses[0] - losses[1]) / (2 * group["eps"])
        torch._foreach_add_(group["params"], directions, alpha=-float(group["lr"] * slope))
        return losses[0]


def by_hand(model, batches, cls):
    """The same optimizer over a closure written out: one batch, no clipping."""
    optimizer = cls(model.parameters())
    for batch in batches:

        def closure(batch=batch):
            optimizer.zero_grad()
            loss = Causal()(model, batch).mean
            if torch.is_grad_enabled():
                loss.backward()
            return loss

        optimizer.step(closure)
    return model


@pytest.mark.parametrize("cls", [SAM, MeZO])
def test_optimizers_of_two_passes_and_of_none_backward_go_through_the_loop(run, llama, examples, stream, cls):
    model, history, _ = run(batching=Padded(size=2, accumulate=3), optimizer=cls, updates=4)
    plan = Padded(size=6)(examples(completion=True), stream)
    reference = by_hand(llama().double(), [plan.update(i)[0] for i in range(4)], cls)
    assert_same(model, reference, **FLOAT)
    assert ("grad_norm" in history.rows[0]) is (cls is SAM)
    assert all((one.grad is None) is (cls is MeZO) for one in model.parameters())


def test_passes_of_one_update_draw_the_same_dropout(run, llama):
    seen = []

    class Twice(SAM):
        def step(self, closure):
            seen.append([float(closure()) for _ in range(2)])

    model = llama(attention_dropout=0.3).double()
    run(model=model, optimizer=Twice, updates=2, batching=Padded(size=2, accumulate=2))
    assert seen[0][0] == seen[0][1]
    first = seen[0][0]
    run(model=llama(attention_dropout=0.0).double(), optimizer=Twice, updates=1, batching=Padded(size=2, accumulate=2))
    assert seen[-1][0] != first  # the dropout was there


def test_adamw_and_sgd_are_torch_s_own_and_spare_vectors(llama):
    model = llama()
    for made, name in ((AdamW(weight_decay=0.1), "AdamW"), (SGD(weight_decay=0.1, nesterov=True), "SGD")):
        optimizer = made.build(trainable(model))
        matrices, vectors = optimizer.param_groups
        assert type(optimizer) is getattr(torch.optim, name)
        assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
        assert all(one.ndim > 1 for one in matrices["params"])
        assert all(one.ndim == 1 for one in vectors["params"])
        assert len(matrices["params"]) + len(vectors["params"]) == len(list(model.parameters()))
        assert matrices["fused"]


def test_adamw_s_first_update_by_hand():
    weight, gain = torch.nn.Parameter(torch.full((1, 1), 2.0)), torch.nn.Parameter(torch.full((1,), 2.0))
    optimizer = AdamW(lr=0.1, weight_decay=0.5).build([weight, gain])
    weight.grad, gain.grad = torch.full((1, 1), 3.0), torch.full((1,), -3.0)
    optimizer.step()
    assert weight.item() == pytest.approx(2.0 - 0.1 * 0.5 * 2.0 - 0.1)  # the first step of Adam is the gradient's sign
    assert gain.item() == pytest.approx(2.0 + 0.1)


def test_nesterov_needs_momentum():
    with pytest.raises(ValueError, match="give a momentum"):
        SGD(momentum=0.0, nesterov=True)


# -------------------------------------------------------------------------------------------------- what it reports


def test_the_curve_has_a_row_an_update(run):
    _, history, context = run(updates=3)
    assert [row["step"] for row in history.rows] == [1, 2, 3]
    assert set(history.rows[0]) == {"step", "loss", "grad_norm", "lr", "tokens", "seconds"}
    assert history.rows == context.curve()
    assert history.tokens == history.rows[-1]["tokens"]
    assert (history.updates, history.resumed) == (3, 0)


def test_extras_are_means_over_the_update(run):
    def loss(model, batch):
        result = Causal()(model, batch)
        return dataclasses.replace(result, extras={"twice": 2 * result.total, "length": batch.targets * 3.0})

    _, history, _ = run(loss=loss, batching=Padded(size=2, accumulate=3), updates=1)
    assert history.rows[0]["twice"] == pytest.approx(2 * history.rows[0]["loss"], rel=1e-6)
    assert history.rows[0]["length"] == pytest.approx(3.0)


def test_progress_is_tracked(run, tmp_path):
    shown = []
    context = Context.scratch(tmp_path / "tracked")
    context.show = lambda track: shown.append((track.done, track.total, track.tokens, track.shown.get("loss")))
    _, history, _ = run(context=context, updates=3)
    assert [one[0] for one in shown] == [0, 1, 2, 3, 3]
    assert shown[-1] == (3, 3, history.tokens, history.rows[-1]["loss"])


def test_evaluation_joins_the_curve_and_leaves_the_model_training(run, llama):
    modes = []

    def evaluate(model):
        modes.append((model.training, torch.is_grad_enabled()))
        torch.rand(7)
        return {"held_out": float(len(modes))}

    model = llama(attention_dropout=0.3).double().eval()
    _, history, _ = run(model=model, evaluate=evaluate, evaluate_every=2, updates=5)
    assert modes == [(False, False)] * 3
    assert [(row["step"], row["held_out"]) for row in history.rows if "held_out" in row] == [(2, 1.0), (4, 2.0), (5, 3.0)]
    assert not model.training
    other = llama(attention_dropout=0.3).double()
    run(model=other, updates=5)
    assert_same(model, other)


def test_the_caller_s_random_state_is_left_alone(run):
    before = torch.get_rng_state()
    run(updates=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_seed_decides_dropout(run, llama, tmp_path):
    one, *_ = run(model=llama(attention_dropout=0.3).double(), context=Context.scratch(tmp_path / "a", seed=1))
    two, *_ = run(model=llama(attention_dropout=0.3).double(), context=Context.scratch(tmp_path / "b", seed=1))
    other, *_ = run(model=llama(attention_dropout=0.3).double(), context=Context.scratch(tmp_path / "c", seed=2))
    assert_same(one, two)
    assert any(not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))


# -------------------------------------------------------------------------------------------------- what it refuses


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_update_and_rows_before_anything_changes(run, llama, examples, stream, bad, tmp_path):
    model = llama().double()
    seen = []

    def loss(model, batch):
        result = Causal()(model, batch)
        seen.append(weights(model))
        return dataclasses.replace(result, total=result.total * bad) if batch.update == 2 else result

    (batch,) = Padded(size=4)(examples(completion=True), stream).update(2)
    rows = ", ".join(str(row + 1) for row in batch.rows)
    context = Context.scratch(tmp_path / "failing")
    with pytest.raises(FloatingPointError, match=f"^update 3, rows {rows}: the loss is {bad}; lower the rate, or look at these rows; "):
        run(model=model, loss=loss, updates=4, context=context)
    for name, one in weights(model).items():
        assert torch.equal(one, seen[2][name])
    with safe_open(context.work / "failed/update-3-batch-1.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("input_ids"), batch.input_ids)
        assert file.metadata() == {"rows": f"[{rows}]"}


def test_a_gradient_that_is_not_finite_is_told_apart(run):
    def loss(model, batch):
        result = Causal()(model, batch)
        return dataclasses.replace(result, total=result.total + (next(model.parameters()).flatten()[0] * 0).abs().sqrt())

    with pytest.raises(FloatingPointError, match=r"update 1, rows .*: the gradient's norm is nan"):
        run(loss=loss)


def test_an_update_without_a_target_is_an_error(run, examples):
    data = examples(4)
    for one in data:
        one.supervised[1:] = False
    with pytest.raises(Problem, match=r"update 1, rows .*: no supervised token"):
        run(data=data)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_its_update_and_the_run_goes_on_from_there(run, llama, tmp_path, number):
    whole, *_ = run(model=llama(), updates=5)
    handler = signal.getsignal(number)

    def loss(model, batch):
        if batch.update == 1:
            os.kill(os.getpid(), number)
        return Causal()(model, batch)

    context = Context.scratch(tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt, match="stopped after update 2 of 5, which is checkpointed"):
        run(model=llama(), loss=loss, updates=5, context=context)
    assert signal.getsignal(number) is handler
    model, history, _ = run(model=llama(), updates=5, context=context)
    assert history.resumed == 2
    assert_same(model, whole)


def test_the_best_model_by_held_out_loss_is_kept(run, llama, tmp_path):
    losses = {1: 3.0, 2: 2.0, 3: 2.5, 4: 2.0}
    seen, kept = [], []

    def evaluate(model):
        seen.append(weights(model))
        return {"heldout_loss": losses[len(seen)]}

    model = llama()

    def on_keep(name, folder):
        kept.append(weights(model))
        (folder / "loss").write_text(str(losses[len(seen)]))

    *_, context = run(model=model, updates=4, evaluate=evaluate, evaluate_every=1, keep_best=True, on_keep=on_keep)
    assert (context.work / "kept/best/loss").read_text() == "2.0"
    assert len(kept) == 2
    for name, one in kept[-1].items():
        assert torch.equal(one, seen[1][name])


def test_nothing_to_train_is_an_error(llama):
    with pytest.raises(Problem, match="no parameter requires a gradient"):
        trainable(llama().requires_grad_(False))


def test_a_run_s_length(examples, stream):
    plan = Padded(size=4)(examples(14), stream)
    assert plan.updates_per_epoch == 4
    assert [how_long(plan, epochs=epochs) for epochs in (1, 2.0, 0.1, 1.3)] == [4, 8, 1, 6]
    assert how_long(plan, updates=7) == 7
    for given in ({}, {"epochs": 1, "updates": 3}):
        with pytest.raises(Problem, match="give one of the two"):
            how_long(plan, **given)
    for given in ({"epochs": 0}, {"updates": 0}):
        with pytest.raises(Problem, match="trains nothing"):
            how_long(plan, **given)


# -------------------------------------------------------------------------------------------------- precision, peft


def test_bf16_trains_float32_weights(run, llama):
    one, first, _ = run(model=llama(), precision="float32", updates=4)
    two, second, _ = run(model=llama(), precision="bf16", updates=4)
    assert all(one.dtype == torch.float32 for one in two.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))
    for a, b in zip(first.rows, second.rows, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.02)


def test_precision_is_chosen_by_what_this_device_gains(llama, monkeypatch):
    model, before = llama(), torch.get_rng_state()
    value, reason = precision.choose(model, "cpu")
    assert value in ("float32", "bf16")
    assert "128 x 32" in reason or "64 x 32" in reason or "32 x 32" in reason or "32 x 64" in reason
    assert torch.equal(torch.get_rng_state(), before)
    monkeypatch.setattr(precision, "_gain", lambda *_: 3.0)
    assert precision.choose(model, "cpu")[0] == "bf16"
    monkeypatch.setattr(precision, "_gain", lambda *_: 1.1)
    value, reason = precision.choose(model, "cpu")
    assert value == "float32"
    assert "1.10 times as fast" in reason
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    assert precision.choose(model, "cuda") == ("float32", "this GPU has no bf16 arithmetic")


def test_an_adapter_trains_alone_and_alone_is_kept(run, llama):
    model = get_peft_model(llama().double(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"])).double()
    before = weights(model)
    _, _, context = run(model=model, updates=2, keep=(2,))
    changed = {name for name, one in weights(model).items() if not torch.equal(one, before[name])}
    assert changed
    assert all("lora" in name for name in changed)
    with safe_open(context.work / "kept" / "2" / "tensors-0.safetensors", "pt") as file:
        assert all("lora" in name for name in file.keys() if "model" in name)  # noqa: SIM118


def test_packed_training_runs_in_both_ways(run):
    for documents in ("joined", "separate"):
        _, history, _ = run(batching=Packed(length=16, size=2, documents=documents), updates=3)
        assert all(math.isfinite(row["loss"]) for row in history.rows)


# -------------------------------------------------------------------------------------------------------- live slots


class Tilt:
    """Adds a learnt constant to the loss and counts its calls."""

    def __init__(self):
        self.value = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
        self.calls = 0

    def __call__(self, model, batch):
        self.calls += 1
        result = Causal()(model, batch)
        return Sum(result.total + self.value.square() * result.count, result.count)

    def parameters(self):
        return [self.value]

    def state_dict(self):
        return {"value": self.value, "calls": self.calls}

    def load_state_dict(self, state):
        with torch.no_grad():
            self.value.copy_(state["value"])
        self.calls = state["calls"]


@part
class Tilted(Objective):
    """The causal loss plus the square of a number of its own."""

    def start(self, context):
        return Tilt()

    def __call__(self, model, batch): ...


@spec
class Work:
    """A spec of one slot."""

    loss: Slot[Objective] = Tilted()


def test_live_parts_are_trained_told_of_progress_and_kept(run, tmp_path):
    context = Context.scratch(tmp_path / "live")
    live = context.start(Work())
    told = []
    advance = live.advance
    live.advance = lambda progress: (told.append((progress.step, progress.steps, progress.tokens)), advance(progress))
    _, history, _ = run(context=context, live=live, loss=live.loss, updates=3)
    assert live.loss.value.item() == pytest.approx(0.8**3)
    assert [one[:2] for one in told] == [(0, 3), (1, 3), (2, 3)]
    assert [one[2] for one in told] == [0, *(row["tokens"] for row in history.rows[:2])]
    again = context.start(Work())
    run(context=context, live=again, loss=again.loss, updates=3)  # all done: only the state comes back
    assert again.loss.calls == 3
    assert again.loss.value.item() == live.loss.value.item()
