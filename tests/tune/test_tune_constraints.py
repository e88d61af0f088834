"""Masks and grids that come in hold during tuning and in what leaves; what leaves loads without this package."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from temper.models import compressed, folders, io
from temper.models.constraints import Mask, OnGrid, Stack, magnitude_mask, part_of, save_constraints
from temper.models.deltas.delta import Delta, Full, Lora
from temper.models.deltas.where import free_linears
from temper.models.grids import Integer, ranges
from temper.models.parametrizations import attach, fold
from temper.parts import Problem
from temper.passport import Artefact
from temper.train.batching import Bucketed
from temper.train.optimizers import AdamW
from temper.tune.engine import Tune

Tuned = Callable[..., Artefact]
SHORT = Tune(updates=6, batching=Bucketed(size=16), optimizer=AdamW(lr=1e-2), precision="float32", keep=(3,))
GRID = Integer(bits=4, group=32)


def with_delta(delta: Delta) -> Tune:
    return dataclasses.replace(SHORT, delta=delta)


@pytest.fixture
def held(base: Artefact, tmp_path: Path) -> Callable[[str], Artefact]:
    """`held("mask")`, `"grid"`, `"mask grid"` and `"loose grid"` (not in the packed format): the tiny model, constrained."""

    def make(kinds: str) -> Artefact:
        model, folder = io.load_model(base), tmp_path / kinds.replace(" ", "-") / "model"
        found = {}
        for name in free_linears(model):
            weight = model.get_submodule(name).weight.detach()
            mask = magnitude_mask(weight, 0.5)
            grid = OnGrid(GRID, **GRID.fit(*ranges(mask.fold(weight) if "mask" in kinds else weight, 32), torch.float32))
            chosen = [part for part, kind in ((mask, "mask"), (grid, "grid")) if kind in kinds]
            found[name] = chosen[0] if len(chosen) == 1 else Stack(*chosen)
        tokenizer = io.load_tokenizer(base)
        if "grid" in kinds and "loose" not in kinds:
            fold(attach(model, found))
            compressed.write(folder, model, {name: part_of(one, OnGrid) for name, one in found.items()})
            save_constraints(folder, {name: mask for name, one in found.items() if (mask := part_of(one, Mask))})
            tokenizer.save_pretrained(folder)
        else:
            io.save_model(attach(model, found), tokenizer, folder)
        return Artefact(kinds, folder.parent, folders.passport(folder), name=kinds)

    return make


def dense(made: Artefact) -> dict[str, torch.Tensor]:
    return io.load_model(made, constraints=False).state_dict()


def outputs(made: Artefact) -> torch.Tensor:
    with torch.no_grad():
        return io.load_model(made, constraints=False)(torch.arange(20, 44).view(2, 12)).logits


@pytest.mark.parametrize("delta", [Full(), Lora()], ids=["full", "lora"])
def test_a_mask_holds(delta: Delta, held, tuned: Tuned):
    pruned = held("mask")
    made = tuned("tuned", with_delta(delta), model=pruned)
    assert made.passport.kind == "model"
    assert made.passport.mask == pruned.passport.mask == pytest.approx(0.5, abs=0.01)
    assert ("merged, since a PEFT folder holds no mask" in made.name) == isinstance(delta, Lora)
    before, after = dense(pruned), dense(made)
    kept = dense(dataclasses.replace(made, path=made.path / "checkpoints" / "3"))
    for name, one in io.held(made).items():
        assert isinstance(one, Mask)
        assert torch.equal(one.keep, io.held(pruned)[name].keep)
        for state in (after, kept):
            assert not state[f"{name}.weight"][~one.keep].any()
        assert not torch.equal(before[f"{name}.weight"], after[f"{name}.weight"])
        assert not torch.equal(kept[f"{name}.weight"], after[f"{name}.weight"])


def test_an_adapter_stays_beside_a_grid(held, tuned: Tuned):
    packed = held("grid")
    made = tuned("tuned", with_delta(Lora()), model=packed)
    assert (made.passport.kind, made.passport.numbers, made.base) == ("adapter", "int4-g32-sym", packed)
    assert made.figures["heldout_loss"].value < 5
    further = tuned("further", with_delta(Lora()), model=made)
    assert further.base is packed


@pytest.mark.parametrize("kinds", ["grid", "mask grid", "loose grid"])
def test_full_tuning_keeps_the_grid(kinds: str, held, tuned: Tuned):
    given = held(kinds)
    made = tuned("tuned", with_delta(Full()), model=given)
    assert made.passport.numbers == "int4-g32-sym"
    assert made.passport.mask == given.passport.mask
    assert compressed.is_compressed(made.model) == compressed.is_compressed(given.model) == ("loose" not in kinds)
    before, after, was, now = dense(given), dense(made), io.held(given), io.held(made)
    assert was.keys() == now.keys()
    for name in was:
        one, two = part_of(was[name], OnGrid), part_of(now[name], OnGrid)
        assert torch.equal(one.scale, two.scale)
        assert torch.equal(now[name].fold(after[f"{name}.weight"]), after[f"{name}.weight"])
    moved = [name for name in was if not torch.equal(before[f"{name}.weight"], after[f"{name}.weight"])]
    assert len(moved) > len(was) // 2


def test_an_adapter_on_a_mask_and_a_grid_is_refused(held, tuned: Tuned):
    with pytest.raises(Problem, match="both pruned"):
        tuned("tuned", with_delta(Lora()), model=held("mask grid"))


def test_what_is_left_loads_without_this_package(held, base: Artefact, tuned: Tuned, tmp_path: Path):
    """transformers, peft and compressed-tensors alone give our outputs, in a process that never imports `temper`."""
    packed = held("grid")
    made = {
        "adapter": tuned("adapter", with_delta(Lora(dora=True))),
        "beside": tuned("beside", with_delta(Lora()), model=packed),
        "whole": tuned("whole", with_delta(Full())),
        "packed": tuned("packed", with_delta(Full()), model=packed),
        "masked": tuned("masked", with_delta(Lora()), model=held("mask")),
    }
    code = (
        "import sys, torch, peft\n"
        "from safetensors.torch import save_file\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig\n"
        "torch.set_num_threads(1); found = {}\n"
        "for line in sys.argv[2:]:\n"
        "    name, folder, base = line.split('|')\n"
        "    unpacked = {'quantization_config': CompressedTensorsConfig(run_compressed=False)} if name == 'beside' else {}\n"
        "    model = AutoModelForCausalLM.from_pretrained(base or folder, **unpacked)\n"
        "    model = peft.PeftModel.from_pretrained(model, folder) if base else model\n"
        "    assert AutoTokenizer.from_pretrained(folder).chat_template\n"
        "    with torch.no_grad(): found[name] = model.eval()(torch.arange(20, 44).view(2, 12)).logits\n"
        "assert not [name for name in sys.modules if name.startswith('temper')]\n"
        "save_file(found, sys.argv[1])\n"
    )
    lines = [f"{name}|{one.model}|{one.base.model if one.base else ''}" for name, one in made.items()]
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "theirs"), *lines], check=True, timeout=120)
    theirs = load_file(tmp_path / "theirs")
    for name, one in made.items():
        assert torch.allclose(theirs[name], outputs(one), atol=1e-5), name
    assert not torch.allclose(theirs["adapter"], theirs["whole"], atol=1e-2)
