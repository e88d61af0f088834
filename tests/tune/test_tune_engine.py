"""Tuning: what is learnt, what stays, what is left, what is refused."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from temper import parts
from temper.context import Context
from temper.models import io
from temper.models.deltas.base import Merged
from temper.models.deltas.budget import SensitivityCubic, StructuredIfDense
from temper.models.deltas.delta import Entries, Full, Lora, SideLadder
from temper.models.deltas.init import PrunedCopy
from temper.models.deltas.where import Attention
from temper.parts import Problem
from temper.passport import Artefact, Passport
from temper.train.batching import Bucketed
from temper.train.examples import encode
from temper.train.heldout import heldout
from temper.train.optimizers import AdamW, LayerwiseDecay
from temper.train.schedules import Constant
from temper.tune.engine import Tune, passport

Tuned = Callable[..., Artefact]
SHORT = Tune(updates=3, batching=Bucketed(size=8), optimizer=AdamW(lr=5e-3), precision="float32", evaluate_every=None)


def short(**changes) -> Tune:
    return dataclasses.replace(SHORT, **changes)


def weights(made: Artefact) -> dict[str, torch.Tensor]:
    (file,) = made.model.glob("*.safetensors")
    return load_file(file)


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def logits(source: Artefact | Path) -> torch.Tensor:
    tokens = torch.arange(20, 44).view(2, 12)
    with torch.no_grad():
        return io.load_model(source, constraints=False)(tokens).logits


# ------------------------------------------------------------------------------------------------------- learning


def test_learns_to_copy(tuned: Tuned):
    """A loss of log 4 = 1.39 nats would be guessing the letters; what is held out was never seen."""
    spec = Tune(delta=Full(), updates=250, batching=Bucketed(size=16), optimizer=AdamW(lr=6e-3), precision="float32")
    figures = tuned("full", spec).figures
    assert figures["heldout_loss"].value < 0.2
    assert figures["train_loss"].value < 0.1
    assert figures["updates"].value == 250


FAST = AdamW(lr=5e-3)
SUITED: dict[str, dict[str, Any]] = {
    "layerwise-decay": {"optimizer": LayerwiseDecay(base=FAST)},
    "adalora": {"budget": SensitivityCubic(target=6, interval=1), "optimizer": AdamW(lr=3e-2), "updates": 40},
    "lora-xs": {"optimizer": AdamW(lr=5e-2)},
    "lora-sb": {"optimizer": AdamW(lr=5e-2)},
    "spt": {"delta": Entries(share=0.1), "budget": StructuredIfDense(rank=2)},
    "prompt-tuning": {"optimizer": AdamW(lr=0.1), "updates": 40},
    "lst": {"delta": SideLadder(shrink=4), "init": PrunedCopy(score="fisher", samples=8), "optimizer": AdamW(lr=2e-2), "updates": 40},
    "ls-llama": {"updates": 40},
    "ls-unllama": {"updates": 40},
}
"""Settings that suit a model of width 32 and a short run."""


@pytest.mark.parametrize("name", sorted(parts.methods("tune")))
def test_every_method_learns_and_reloads_as_it_was(name: str, tuned: Tuned, base: Artefact, copies, given, tmp_path: Path):
    """The loss of rows held out, by the method's own loss, is far lower than before, and that of the folder is the one that was told."""
    changes = {"updates": 12, "optimizer": FAST, **SUITED.get(name, {})}
    spec = dataclasses.replace(parts.method("tune", name), batching=Bucketed(size=16), precision="float32", **changes)
    data = given(*(said(name, rows.rows) for rows in (copies.train, copies.test)))
    general = given([{"text": f"the letters are {row['prompt']}"} for row in copies.train.rows]) if name == "ewc-lora" else None
    made = tuned(name, spec, data=data, general=general)
    after = measured(spec, io.load_model(made, constraints=False), made, data, tmp_path / "after")
    assert after == pytest.approx(made.figures["heldout_loss"].value, abs=2e-6)
    still = dataclasses.replace(spec, updates=1, optimizer=AdamW(lr=1e-30))  # the same start
    start = tuned("still", still, data=data, general=general).figures["heldout_loss"].value
    assert after < start - 0.1
    if spec.head is None and name != "lora-mole":  # which have a loss of their own, that the model by itself does not
        assert after < measured(spec, io.load_model(base), base, data, tmp_path / "before") - 0.1


def said(name: str, rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Rows of copied letters as a method takes them: with the first letter as label, a label for each word, an answer and its working."""
    if name == "ls-llama":
        return [{**row, "completion": row["completion"].split()[0]} for row in rows]
    if name == "ls-unllama":
        tags = [" ".join("letter" if len(word) == 1 else "word" for word in row["prompt"].split()) for row in rows]
        return [{**row, "completion": tag} for row, tag in zip(rows, tags)]
    if name == "distilling-step-by-step":
        labels = [{"prompt": f"[label] {row['prompt']}", "completion": row["completion"].split()[0]} for row in rows]
        return labels + [{**row, "prompt": f"[rationale] {row['prompt']}"} for row in rows]
    return rows


def measured(spec: Tune, model: Any, source: Artefact, data: Any, folder: Path) -> float:
    """The held-out loss of a model by the loss of a spec."""
    context, tokenizer = Context.scratch(folder, 0, "tune"), io.load_tokenizer(source)
    train, test = (encode(rows, tokenizer, max_length=64) for rows in (data.train, data.test))
    for what, one in {"model": model.eval(), "tokenizer": tokenizer, "examples": train}.items():
        context.give(what, one)
    with torch.no_grad():
        return heldout(test, context.start(spec, only=("loss",)).loss, device="cpu")(model)["heldout_loss"]


def test_lora_leaves_the_base_as_it_was(tuned: Tuned, base: Artefact):
    before = {path: path.read_bytes() for path in base.model.iterdir()}
    made = tuned("lora", short())
    assert {path: path.read_bytes() for path in base.model.iterdir()} == before
    assert made.passport.kind == "adapter"
    assert made.base is base
    assert made.passport.base == base.passport.base
    assert all("lora_" in name for name in weights(made))
    assert not [path for path in made.path.rglob("*") if path.is_file() and str(base.path).encode() in path.read_bytes()]


def test_a_seed_is_a_run(tuned: Tuned):
    spec = short(delta=Lora(dropout=0.2))
    one, two, other = tuned("one", spec), tuned("two", spec), tuned("other", spec, seed=1)
    assert same(weights(one), weights(two))
    assert not same(weights(one), weights(other))


def test_what_is_kept_is_the_model_of_then(tuned: Tuned):
    constant = short(schedule=Constant(), keep=(2,))
    made, until_then = tuned("kept", constant), tuned("then", dataclasses.replace(constant, updates=2, keep=()))
    kept = dataclasses.replace(made, path=made.path / "checkpoints" / "2")
    assert same(weights(kept), weights(until_then))
    assert not same(weights(kept), weights(made))


def test_completions_alone_are_learnt(tuned: Tuned):
    notes = tuned("lora", short()).name
    assert "57 rows -> 57 examples" in notes
    assert "228 supervised" in notes  # three letters and the end token, 57 times


# --------------------------------------------------------------------------------------------------------- resume


class Stop(Exception):
    pass


@pytest.mark.parametrize("delta", [Lora(dropout=0.1), Full(), Entries(share=0.02)], ids=["lora", "full", "entries"])
def test_going_on_gives_the_same_weights(delta, tuned: Tuned):
    spec = short(delta=delta, updates=7, checkpoint_every=2, keep=(3, 6))

    def stop(track) -> None:
        if track.done == 5:
            raise Stop

    whole = tuned("whole", spec)
    with pytest.raises(Stop):
        tuned("broken", spec, show=stop)
    again = tuned("broken", spec)
    assert same(weights(whole), weights(again))
    for update in ("3", "6"):
        one, two = (dataclasses.replace(made, path=made.path / "checkpoints" / update) for made in (whole, again))
        assert same(weights(one), weights(two))
    figures = [{name: one.value for name, one in made.figures.items() if one.unit != "s"} for made in (whole, again)]
    assert figures[0] == figures[1]


# ------------------------------------------------------------------------------------------------- adapters coming in


def test_an_adapter_goes_on(tuned: Tuned, base: Artefact):
    first = tuned("first", short(delta=Lora(rank=4)))
    second = tuned("second", short(), model=first)
    assert second.base is base
    assert second.passport.adapters == ("first", "second")
    assert {name: one.shape for name, one in weights(first).items()} == {name: one.shape for name, one in weights(second).items()}
    assert not same(weights(first), weights(second))
    assert "the adapter that came in (LORA of rank 4) goes on training" in second.name
    tuned("third", short(delta=Lora(rank=4)), model=first)  # what it is, asked for by name


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"delta": Lora(rank=16)}, "its r is 4, not 16"),
        ({"delta": Lora(rank=4, dora=True)}, "its use_dora is False, not True"),
        ({"where": Attention()}, "it sits on 14 modules, not on the 8 that `attention` names"),
    ],
)
def test_another_adapter_than_asked_for_is_refused(changes, why: str, tuned: Tuned):
    first = tuned("first", short(delta=Lora(rank=4)))
    with pytest.raises(Problem) as caught:
        tuned("second", short(**changes), model=first)
    assert str(caught.value) == (
        f"`delta`: the adapter that comes in is not the one asked for: {why}. Leave `where` and `delta` out to go on "
        "with it as it is, or write `base: merged` for a new adapter on top"
    )


def test_an_adapter_is_merged_first(tuned: Tuned):
    first = tuned("first", short(optimizer=AdamW(lr=0.05)))
    still = tuned("still", short(base=Merged(), optimizer=AdamW(lr=1e-30)), model=first)
    assert still.base is first
    assert still.passport.adapters == ("first", "still")
    assert torch.allclose(logits(still), logits(first), atol=1e-5)
    whole = tuned("whole", short(base=Merged(), delta=Full(), optimizer=AdamW(lr=1e-30)), model=first)
    assert whole.passport.kind == "model"
    assert torch.allclose(logits(whole), logits(first), atol=1e-5)


# --------------------------------------------------------------------------------------------------------- refusals


MODEL = Passport("model", tokenizer="t", template="t", numbers="float32")
ROWS = Passport("completion")


@pytest.mark.parametrize(
    ("spec", "model", "data", "message"),
    [
        (
            Tune(),
            dataclasses.replace(MODEL, template=None),
            Passport("chat"),
            "`data`: chats need a chat template and the model's tokenizer has none; put a chat_template.jinja into the model's folder, "
            "or give rows with `prompt` and `completion`",
        ),
        (
            Tune(),
            dataclasses.replace(MODEL, tokenizer=None),
            ROWS,
            "`model`: the model has no tokenizer, which training needs; put `tokenizer.json` into its folder",
        ),
        (
            Tune(delta=Full()),
            dataclasses.replace(MODEL, kind="adapter"),
            ROWS,
            "`base`: an adapter comes in, and delta `full` trains the weights under it; write `base: merged`",
        ),
        (
            Tune(base=Merged()),
            dataclasses.replace(MODEL, kind="adapter", numbers="int4-g32-sym"),
            ROWS,
            "`base`: merging an adapter into int4-g32-sym weights would leave their grid; let it go on (`base: as-loaded`), "
            "or merge it before quantising",
        ),
        (
            Tune(),
            dataclasses.replace(MODEL, mask=0.5, numbers="int4-g32-sym"),
            ROWS,
            "`delta`: the model is both pruned (density 0.5) and quantised (int4-g32-sym); merged inside the mask `lora` would "
            "leave the grid, and kept beside it the mask; use delta `full`, which holds both",
        ),
        (
            Tune(delta=Full()),
            dataclasses.replace(MODEL, numbers="fp8-channel"),
            ROWS,
            "`delta`: weights in fp8-channel cannot be trained and written back; use delta `lora`, which stays beside them",
        ),
    ],
)
def test_chains_that_would_lose_something_are_refused(spec: Tune, model: Passport, data: Passport, message: str):
    with pytest.raises(Problem) as caught:
        passport(spec, {"model": model, "data": data})
    assert str(caught.value) == message


def test_nothing_supervised_is_refused(tuned: Tuned):
    with pytest.raises(Problem, match="rows: none of its 57 completion rows holds a supervised token") as caught:
        tuned("nothing", short(max_length=4))
    assert str(caught.value).endswith("raise max_length, or give completions that are not empty")


def test_examples_end_where_the_model_does(tuned: Tuned, given):
    rows = [{"prompt": "copy =", "completion": " a" * length} for length in (3, 100)]
    assert "2 rows -> 2 examples of 71 tokens" in (notes := tuned("long", short(), data=given(rows)).name)
    assert "1 rows cut on the right" in notes


def test_no_held_out_rows_are_a_note(tuned: Tuned, copies):
    class NoneHeldOut(type(copies)):
        def load(self, split: str):
            if split == "test":
                raise Problem("rows: holdout 0.05 of its 5 rows leaves none for `test`")
            return self.train

    made = tuned("lora", short(evaluate_every=1), data=NoneHeldOut(copies.train, copies.test))
    assert "no held-out loss: rows: holdout 0.05 of its 5 rows leaves none for `test`" in made.name
    assert "heldout_loss" not in made.figures


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"updates": 5, "epochs": 2.0}, "updates 5 and epochs 2: a run's length is given once; leave one out"),
        ({"updates": 5, "keep": [3, 6]}, "keep 6: the run ends after update 5; keep an earlier one, or train longer"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message: str):
    with pytest.raises(Problem) as caught:
        parts.build(Tune, settings)
    assert str(caught.value) == message


def test_a_recipe_is_checked_without_torch():
    """Specs, methods and passports of the learning engines are read before anything heavy is imported."""
    code = (
        "import sys; from temper import parts; from temper.passport import Passport\n"
        "for engine in ('pretrain', 'tune'):\n"
        "    module = parts.engine(engine)\n"
        "    for name, spec in parts.methods(engine).items():\n"
        "        model = Passport('model', tokenizer='t', numbers='float32', architecture='LlamaForCausalLM')\n"
        "        parents = {'model': model, 'data': Passport('text' if engine == 'pretrain' else 'completion')}\n"
        "        parents |= {'general': Passport('text')} if name == 'ewc-lora' else {}\n"
        "        assert module.passport(spec, parents).kind in ('model', 'adapter'); parts.describe(spec, module.PROVIDES)\n"
        "loaded = {'torch', 'transformers', 'peft', 'tokenizers', 'numpy', 'datasets'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
