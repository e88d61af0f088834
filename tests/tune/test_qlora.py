"""QLoRA in the engine: what leaves, what it costs to merge it, what is refused, and the recipe that quantises it again."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from ruamel.yaml import YAML
from transformers import AutoModelForCausalLM

from temper.models import io, nf4
from temper.models.deltas.base import NF4
from temper.models.deltas.delta import Full, Lora
from temper.parts import Problem
from temper.passport import Artefact, Passport
from temper.recipe import SHIPPED, load
from temper.run import run
from temper.store import Store
from temper.train.batching import Bucketed
from temper.train.optimizers import AdamW
from temper.tune.engine import Tune, passport

Tuned = Callable[..., Artefact]
QLORA = Tune(
    delta=Lora(rank=4), base=NF4(), updates=6, batching=Bucketed(size=8), optimizer=AdamW(lr=2e-2), precision="float32", evaluate_every=2
)
TOKENS = torch.arange(20, 44).view(2, 12)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def test_what_leaves(tuned: Tuned, base: Artefact):
    """The adapter, which goes on where it was; what merging it would cost; the merged model."""
    made = tuned("qlora", QLORA)
    assert (made.passport.kind, made.passport.numbers) == ("adapter", "nf4-g64")
    assert made.base == base
    assert (made.model / "temper_base.json").exists()
    loaded = io.load_model(made)
    assert len(list(nf4.layers(loaded))) == 14
    float_base, rounded = (AutoModelForCausalLM.from_pretrained(base.model) for _ in range(2))
    for name, _ in nf4.layers(loaded):
        rounded.get_submodule(name).weight.data = nf4.nearest(rounded.get_submodule(name).weight)
    alone = PeftModel.from_pretrained(rounded, made.model).eval()  # peft's own eyes
    torch.testing.assert_close(logits(loaded), logits(alone), atol=2e-5, rtol=1e-4)
    assert (logits(loaded) - logits(PeftModel.from_pretrained(float_base, made.model).eval())).abs().max() > 1e-2

    figures = made.figures
    exact, mistaken, again = (figures[f"kl_{name}"] for name in ("merged_dequantised", "merged_float", "requantised"))
    assert exact.value < 1e-8 < 1e-4 < mistaken.value
    assert again.value > 1e-4
    assert exact.n == again.n > 0
    assert 0 < figures["logit_gap_merged_dequantised"].value < 1e-3 < figures["logit_gap_requantised"].value

    on = tuned("on", dataclasses.replace(QLORA, base=Tune().base, delta=Lora()), model=made)
    assert (on.passport.kind, on.passport.numbers, on.base) == ("adapter", "nf4-g64", base)
    assert "goes on training" in on.name
    assert len(list(nf4.layers(io.load_model(on)))) == 14
    assert not any(name.startswith("kl_") for name in on.figures)

    whole = tuned("whole", dataclasses.replace(QLORA, base=NF4(merge="dequantised", compared=None)))
    assert (whole.passport.kind, whole.passport.numbers) == ("model", "float32")
    assert "merged into the values of its base" in whole.name
    torch.testing.assert_close(logits(io.load_model(whole)), logits(loaded), atol=2e-5, rtol=1e-4)
    assert not any(name.startswith("kl_") for name in whole.figures)


def test_a_run_that_was_killed_goes_on_to_the_same_bits(tuned: Tuned):
    spec = dataclasses.replace(QLORA, checkpoint_every=2, evaluate_every=None, base=NF4(compared=None))
    whole = tuned("whole", spec)

    def stop(track: Any) -> None:
        if track.done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tuned("killed", spec, show=stop)
    again = tuned("killed", spec)
    assert torch.equal(logits(io.load_model(again)), logits(io.load_model(whole)))


@pytest.mark.parametrize(
    ("spec", "numbers", "mask", "told"),
    [
        (Tune(delta=Full(), base=NF4()), "float32", None, "weights held in nf4-g64 stand still, and delta `full` trains them"),
        (Tune(base=NF4()), "int4-g32-sym", None, "nf4-g64 is made of dense floats, and the model is in int4-g32-sym"),
        (Tune(base=NF4()), "float32", 0.5, r"nf4-g64 is made of dense floats, and the model is pruned \(density 0.5\)"),
    ],
)
def test_refusals(spec: Tune, numbers: str, mask: float | None, told: str):
    model = Passport("model", tokenizer="t", numbers=numbers, mask=mask, architecture="LlamaForCausalLM")
    with pytest.raises(Problem, match=told):
        passport(spec, {"model": model, "data": Passport("completion")})


def test_the_recipe_that_quantises_again(tiny: Path, tmp_path: Path):
    """Rounded to nearest or by GPTQ on the tuning data; the divergences of both from the model that was trained."""
    raw = YAML(typ="safe").load((SHIPPED / "qlora-requantised.yaml").read_text(encoding="utf8"))
    rows = [{"prompt": f"copy {' '.join(one)} =", "completion": f" {' '.join(one)}"} for one in itertools.product("abcd", repeat=3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"file": {"path": str(tmp_path / "rows.jsonl"), "holdout": 0.2}}
    raw |= {"model": str(tiny), "data": given}
    for step in raw["steps"]:
        (settings,) = step.values()
        settings.pop("data", None)
        if "tune" in step:
            settings |= {"updates": 10, "batching": {"bucketed": {"size": 8}}, "optimizer": {"adamw": {"lr": 0.02}}}
        if settings.get("method") == "gptq":
            settings["calibrate"] = {"samples": {"count": 8, "length": 32}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(raw))
    made = run(load(tmp_path / "recipe.yaml"), Store(tmp_path / "store"), out=tmp_path / "out")
    assert [made[name].passport.numbers for name in ("tune", "nearest", "gptq")] == ["float32", "nf4-g64", "nf4-g64"]
    assert made["tune"].figures["kl_requantised"].value > 1e3 * made["tune"].figures["kl_merged_dequantised"].value
    apart = made["apart"].figures
    assert {f"{name}.token_kl" for name in ("nearest", "gptq", "gptq-int4")} <= apart.keys()
    assert all(apart[f"{name}.token_kl"].value > 0 for name in ("nearest", "gptq", "gptq-int4"))
