"""Ranks that fall during a run of the engine, and penalties beside its loss: exact over an interruption, and what leaves."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from temper.context import Context
from temper.models import io
from temper.models.deltas.budget import SensitivityCubic
from temper.models.deltas.delta import Lora, SvdTriplet
from temper.parts import Problem
from temper.passport import Inputs, Passport
from temper.train.anchors import Fisher, Orthogonal
from temper.train.batching import Bucketed
from temper.train.optimizers import AdamW
from temper.tune import engine
from temper.tune.engine import Tune

SHORT = Tune(updates=10, batching=Bucketed(size=8), optimizer=AdamW(lr=2e-2), precision="float32", evaluate_every=None, checkpoint_every=1)
ADALORA = dataclasses.replace(SHORT, delta=SvdTriplet(rank=4), budget=SensitivityCubic(target=1, interval=2), penalty=Orthogonal())


def run(folder: Any, spec: Tune, model: Any, data: Any, general: Any = None, stop: int | None = None) -> Context:
    """One step in a folder, which an interruption after `stop` updates leaves unfinished."""
    context = Context.scratch(folder, 0, "tune")

    def show(track: Any) -> None:
        if stop is not None and track.done == stop and not track.finished:
            raise KeyboardInterrupt

    context.show = show
    inputs = Inputs(model=model, data=data, **({"general": general} if general else {}))
    engine.run(spec, inputs, context)
    return context


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = (folder / "model").glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize("stop", [3, 9])
def test_a_run_whose_ranks_fall_goes_on_to_the_same_bits(stop, tmp_path, base, copies):
    whole = run(tmp_path / "whole", ADALORA, base, copies)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "torn", ADALORA, base, copies, stop=stop)
    torn = run(tmp_path / "torn", ADALORA, base, copies)
    one, two = tensors(whole.out), tensors(torn.out)
    assert one.keys() == two.keys()
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_what_leaves_has_the_ranks_that_are_left_and_goes_on_with_them(tuned, base):
    made = tuned("first", ADALORA)
    ranks = [tensor.shape[0] for name, tensor in tensors(made.path).items() if "lora_E" in name]
    assert sum(ranks) == len(ranks) == 14
    assert len(set(ranks)) > 1
    tokens = torch.arange(20, 44).view(2, 12)
    with torch.no_grad():
        said = PeftModel.from_pretrained(io.load_model(base), made.model).eval()(tokens).logits
        assert torch.equal(said, io.load_model(made)(tokens).logits)
        assert not torch.allclose(said, io.load_model(base)(tokens).logits, atol=1e-2)
    again = tuned("second", dataclasses.replace(SHORT, updates=2), model=made)
    assert [tensor.shape[0] for name, tensor in tensors(again.path).items() if "lora_E" in name] == ranks
    with pytest.raises(Problem, match="goes on with its own"):
        tuned("third", dataclasses.replace(ADALORA, delta=Lora(), penalty=None), model=made)


def test_consolidation_on_general_text_holds_the_weights_and_is_exact_over_an_interruption(tmp_path, base, copies, given):
    general = given([{"text": f"copy {letter} = {letter}"} for letter in "abcd" * 3])
    spec = dataclasses.replace(SHORT, delta=Lora(rank=4), penalty=Fisher(strength=1.0, samples=8))
    whole = run(tmp_path / "whole", spec, base, copies, general)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "torn", spec, base, copies, general, stop=4)
    one, two = tensors(whole.out), tensors(run(tmp_path / "torn", spec, base, copies, general).out)
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    cut = dataclasses.replace(spec, batching=Bucketed(size=8, tokens=40))
    for name, tensor in tensors(run(tmp_path / "cut", cut, base, copies, general).out).items():
        torch.testing.assert_close(tensor, one[name], rtol=1e-3, atol=1e-4)
    free = tensors(run(tmp_path / "free", dataclasses.replace(spec, penalty=None), base, copies).out)
    far, near = (sum(float(some[name].norm()) for name in one if "lora_B" in name) for some in (free, one))
    assert near < 0.9 * far
    with pytest.raises(Problem, match="asks what is not to be forgotten"):
        engine.passport(spec, {"model": base.passport, "data": Passport("completion")})
