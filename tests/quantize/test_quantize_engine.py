"""The engine from folder to folder: what it writes, what it refuses, what survives it."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from temper.context import Context, Stream
from temper.models import compressed, folders, io
from temper.models.constraints import OnGrid, Stack, load_constraints, magnitude_mask
from temper.models.deltas.where import Names
from temper.models.grids import NF4, Integer
from temper.models.parametrizations import attach, constraints, fold
from temper.parts import Problem, methods
from temper.passport import Inputs
from temper.quantize import methods as named
from temper.quantize.calibrate import Samples, cut
from temper.quantize.engine import INPUTS, Quantize, met, passport, run
from temper.quantize.objective import LayerOutput
from temper.quantize.solver import GPTQ
from temper.quantize.store import Dequantised
from temper.tasks.rows import Rows

IDS = torch.randint(4, 64, (3, 10), generator=torch.Generator().manual_seed(9))
SMALL = Samples(count=6, length=16, batch=2)
QUICK = dataclasses.replace(named.GPTQ, calibrate=SMALL)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def test_methods() -> None:
    assert set(methods("quantize")) == {"rtn", "gptq"}
    assert methods("quantize")["gptq"].paper.startswith("GPTQ: Accurate")
    assert list(INPUTS) == ["model", "data"]


def test_rounding_to_nearest_is_compressed_tensors_own(artefact: Any, llama: Any, tmp_path: Path) -> None:
    context, model = Context.scratch(tmp_path), llama()
    output = run(Quantize(), Inputs(model=artefact(model)), context)
    folder = context.out / "model"
    theirs = QuantizationArgs(num_bits=4, symmetric=True, strategy="group", group_size=32)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            groups = module.weight.detach().unflatten(1, (-1, 32))
            scale, zero = calculate_qparams(groups.amin(2), groups.amax(2), theirs)
            module.weight.data = fake_quantize(module.weight.data, scale, zero, theirs)
    made = loaded(folder)
    assert torch.equal(logits(made), logits(model))
    assert torch.equal(made.lm_head.weight, model.lm_head.weight)

    figures = output.figures
    assert figures["bytes"].value == (folder / "model.safetensors").stat().st_size
    header = int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
    assert figures["packed_bytes"].value == figures["bytes"].value - 8 - header
    assert figures["bits_per_weight"].value == 4 + 32 / 32  # one float32 scale for 32 weights
    quantised = 2 * (32 * 32 * 2 + 16 * 32 * 2 + 3 * 32 * 64)
    assert figures["bits_per_weight"].n == quantised
    assert figures["quantised_share"].value == pytest.approx(quantised / sum(p.numel() for p in model.parameters()))
    assert "output_error" not in figures
    assert 0 < figures["weight_error"].value < 0.02
    table = json.loads((context.out / "layers.json").read_text())
    assert [one["name"] for one in table][:2] == ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"]
    assert table[0] == table[0] | {"rows": 32, "columns": 32, "numbers": "int4-g32-sym", "bits": 5.0, "output_error": None}
    assert folders.passport(folder, "").numbers == "int4-g32-sym"
    assert io.load_tokenizer(folder).get_vocab() == io.load_tokenizer(tmp_path / "start" / "model").get_vocab()


def test_loads_without_this_package(artefact: Any, texts: Any, tmp_path: Path) -> None:
    """transformers and compressed-tensors alone, in a process of their own, compute our outputs."""
    context = Context.scratch(tmp_path)
    run(QUICK, Inputs(model=artefact(), data=texts), context)
    model = io.load_model(context.out / "model", dtype="auto", constraints=False)
    torch.save({"ids": IDS, "logits": logits(model)}, tmp_path / "ours.pt")
    code = f"""
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
ours = torch.load({str(tmp_path / "ours.pt")!r}, weights_only=True)
model = AutoModelForCausalLM.from_pretrained({str(context.out / "model")!r}).eval()
AutoTokenizer.from_pretrained({str(context.out / "model")!r})
with torch.no_grad():
    assert torch.equal(model(ours["ids"]).logits, ours["logits"])
assert not [name for name in sys.modules if name.split(".")[0] == "temper"]
print("same")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.stdout.strip().endswith("same"), done.stderr[-2000:]


def test_gptq_errs_less_on_outputs_and_predictions(artefact: Any, llama: Any, texts: Any, tmp_path: Path) -> None:
    grid = Integer(bits=3, group=16)
    nearest = Quantize(grid=grid, objective=LayerOutput(), calibrate=SMALL)
    found = {}
    for name, spec in {"rtn": nearest, "gptq": dataclasses.replace(nearest, solver=GPTQ())}.items():
        context = Context.scratch(tmp_path / name)
        output = run(spec, Inputs(model=artefact(), data=texts), context)
        off = (logits(loaded(context.out / "model")) - logits(llama())).square().mean().item()
        found[name] = (output.figures["output_error"].value, output.figures["weight_error"].value, off)
    assert found["gptq"][0] < 0.8 * found["rtn"][0]
    assert found["gptq"][1] > found["rtn"][1]  # it moves weights further, to the outputs' good


def test_inputs_come_from_the_blocks_as_quantised(llama: Any) -> None:
    """Each block's curvature is measured with what stands before it; layers outside the blocks see the end."""
    model = llama()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    batches = [{"input_ids": IDS}, {"input_ids": IDS[:1, :4]}]
    seen = []
    for layer, module in met(model, layers, LayerOutput(), batches, {}):
        seen.append(layer.name)
        inputs: list[torch.Tensor] = []
        if layer.name in ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj", "lm_head"):
            twin = llama()
            block = layer.name[: len("model.layers.0.")]  # while a block is met, its own earlier layers still count as they were
            state = model.state_dict()
            if not layer.name.startswith("lm_head"):
                state |= {key: value for key, value in llama().state_dict().items() if key.startswith(block)}
            twin.load_state_dict(state)
            twin.get_submodule(layer.name).register_forward_pre_hook(lambda _m, args, keep=inputs: keep.append(args[0].flatten(0, -2)))
            with torch.no_grad():
                for batch in batches:
                    twin(**batch)
            flat = torch.cat(inputs)
            assert torch.allclose(layer.curvature, flat.T @ flat / len(flat), rtol=1e-4, atol=1e-5)
        module.weight.data = module.weight.data * 0.7  # "quantised"
    assert seen == list(layers)


def test_the_same_seed_gives_the_same_codes(artefact: Any, texts: Any, tmp_path: Path) -> None:
    start = artefact()

    def weights(seed: int, spec: Quantize = QUICK) -> dict[str, torch.Tensor]:
        context = Context.scratch(tmp_path / f"{seed}{spec.calibrate}", seed)
        run(spec, Inputs(model=start, data=texts), context)
        return compressed.read(context.out / "model")[0]

    first, again, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    batched = weights(0, dataclasses.replace(QUICK, calibrate=dataclasses.replace(SMALL, batch=5)))
    far = [~torch.isclose(first[name], batched[name], rtol=1e-3, atol=1e-6) for name in first]
    apart = torch.cat([one.flatten() for one in far]).float().mean()
    assert apart < 0.01  # another order of summing may flip a tie


def test_an_adapter_is_merged_first(artefact: Any, llama: Any, tmp_path: Path) -> None:
    base = artefact(name="base")
    torch.manual_seed(4)
    wrapped = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)).eval()
    adapter = artefact(wrapped, base=base, name="adapter")
    one, two = Context.scratch(tmp_path / "one"), Context.scratch(tmp_path / "two")
    run(Quantize(), Inputs(model=adapter), one)
    run(Quantize(), Inputs(model=artefact(wrapped.merge_and_unload(), name="merged")), two)
    assert torch.equal(logits(loaded(one.out / "model")), logits(loaded(two.out / "model")))
    assert any("merged" in note for note in one.notes)


@pytest.mark.parametrize("grid", [Integer(group=16), Integer(group=16, symmetric=False), NF4(group=16)], ids=lambda grid: grid.label)
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_mask_survives(method: str, grid: Any, artefact: Any, llama: Any, texts: Any, tmp_path: Path) -> None:
    model = llama()
    names = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")
    parts = {name: magnitude_mask(model.get_submodule(name).weight, 0.5) for name in names}
    pruned = artefact(attach(model, parts))
    assert pruned.passport.mask == 0.5
    context = Context.scratch(tmp_path)
    spec = dataclasses.replace(named.RTN if method == "rtn" else QUICK, grid=grid)
    spec = dataclasses.replace(spec, store=Dequantised()) if isinstance(grid, NF4) else spec
    assert passport(spec, {"model": pruned.passport, "data": passport_of(texts)}).mask == 0.5
    run(spec, Inputs(model=pruned, data=texts), context)
    folder = context.out / "model"
    made = loaded(folder)
    logits(made)  # compressed-tensors unpacks at the first call
    for name, part in parts.items():
        weight = made.get_submodule(name).weight
        assert weight[~part.keep].eq(0).all()
        assert weight[part.keep].ne(0).float().mean() > 0.5
    read = folders.passport(folder, "")
    assert (read.mask, read.numbers) == (0.5, grid.label)
    held = io.held(folder)
    assert isinstance(held[names[0]], Stack)
    assert isinstance(held["model.layers.0.self_attn.k_proj"], OnGrid)


def passport_of(data: Any) -> Any:
    from temper.passport import Passport

    return Passport(kind=data.shape)


def test_dequantised(artefact: Any, llama: Any, texts: Any, tmp_path: Path) -> None:
    context = Context.scratch(tmp_path)
    start = artefact(llama(intermediate_size=60))
    spec = dataclasses.replace(QUICK, grid=NF4(group=16), store=Dequantised())
    output = run(spec, Inputs(model=start, data=texts), context)
    folder = context.out / "model"
    made, held = loaded(folder), load_constraints(folder)
    assert len(held) == 14
    for name, one in held.items():
        weight = made.get_submodule(name).weight
        assert torch.equal(one.fold(weight), weight)
        assert len((weight[0, :16] / one.scale[0, 0]).round(decimals=4).unique()) <= 16
    assert output.figures["bytes"].value > output.figures["packed_bytes"].value > 0
    assert output.figures["bits_per_weight"].value == pytest.approx(4 + 32 / 16, rel=0.01)  # 60 columns make a short fourth group


def test_a_quantised_model_is_tuned_on_its_grid(artefact: Any, texts: Any, tmp_path: Path) -> None:
    """quantize -> a few SGD steps with the grid held -> stored again: the same scales, other codes, a lower loss."""
    context = Context.scratch(tmp_path)
    run(dataclasses.replace(named.RTN, grid=Integer(group=16)), Inputs(model=artefact()), context)
    model, held = io.load_model(context.out / "model", dtype="auto"), io.held(context.out / "model")
    assert set(constraints(model)) == set(held)
    before = {name: part.codes(model.get_submodule(name).weight) for name, part in held.items()}
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    tuned = logits(model.eval())
    held = fold(model)
    assert torch.equal(logits(model), tuned)
    compressed.write(tmp_path / "again", model, held)
    _, again = compressed.read(tmp_path / "again")
    assert all(torch.equal(again[name].scale, part.scale) for name, part in held.items())
    assert any(not torch.equal(held[name].codes(model.get_submodule(name).weight), codes) for name, codes in before.items())
    assert torch.equal(logits(loaded(tmp_path / "again")), tuned)


def test_the_head_by_name(artefact: Any, llama: Any, texts: Any, tmp_path: Path) -> None:
    context = Context.scratch(tmp_path)
    run(dataclasses.replace(QUICK, where=Names(("lm_head", "layers.1.*.v_proj"))), Inputs(model=artefact(), data=texts), context)
    _, held = compressed.read(context.out / "model")
    assert set(held) == {"lm_head", "model.layers.1.self_attn.v_proj"}
    assert torch.isfinite(logits(loaded(context.out / "model"))).all()
    tied = artefact(llama(tie_word_embeddings=True), name="tied")
    with pytest.raises(Problem, match=r"`lm_head` shares its weight with `model.embed_tokens`"):
        run(Quantize(where=Names(("lm_head",))), Inputs(model=tied), Context.scratch(tmp_path / "tied"))


def test_bfloat16(artefact: Any, llama: Any, texts: Any, tmp_path: Path) -> None:
    start = artefact(llama().to(torch.bfloat16))
    context = Context.scratch(tmp_path)
    output = run(QUICK, Inputs(model=start, data=texts), context)
    assert output.figures["bits_per_weight"].value == 4 + 16 / 32
    made = loaded(context.out / "model")
    assert made.dtype == torch.bfloat16
    state, held = compressed.read(context.out / "model")
    logits(made)
    assert all(torch.equal(made.get_submodule(name).weight, state[f"{name}.weight"]) for name in held)
    with pytest.raises(Problem, match=r"torch.bfloat16 cannot hold the values of int8-g32-asym apart"):
        run(Quantize(grid=Integer(bits=8, symmetric=False)), Inputs(model=start), Context.scratch(tmp_path / "coarse"))


# -------------------------------------------------------------------------------------------------------- refusals


def test_passports(artefact: Any, texts: Any, llama: Any) -> None:
    start, text = artefact().passport, passport_of(texts)
    made = passport(QUICK, {"model": start, "data": text})
    assert (made.kind, made.numbers, made.tokenizer, made.architecture) == ("model", "int4-g32-sym", start.tokenizer, "LlamaForCausalLM")
    adapter = dataclasses.replace(start, kind="adapter", base="b" * 64)
    assert passport(Quantize(), {"model": adapter}).kind == "model"
    assert passport(Quantize(), {"model": dataclasses.replace(adapter, numbers="nf4-g64")}).numbers == "int4-g32-sym"  # merged, then anew

    def refused(pattern: str, spec: Quantize, **parents: Any) -> None:
        with pytest.raises(Problem, match=pattern):
            passport(spec, {"model": start, **parents})

    refused(r"is int4-g32-sym already; quantise the model that it was made from", Quantize(), model=made)
    refused(r"is nf4-g64 already", Quantize(), model=dataclasses.replace(start, numbers="nf4-g64"))
    refused(r"not known what the adapter sits on", Quantize(), model=dataclasses.replace(adapter, base=None))
    refused(r"calibrate `samples` needs data", QUICK)
    refused(r"slot `objective` needs `inputs`", dataclasses.replace(QUICK, calibrate=None))
    refused(r"no chat template", QUICK, model=dataclasses.replace(start, template=None), data=dataclasses.replace(text, kind="chat"))
    refused(r"integer grids, not nf4-g64; write `store: dequantised`", Quantize(grid=NF4()))


def test_refusals_before_compute(artefact: Any, llama: Any, tmp_path: Path) -> None:
    narrow = artefact(llama(intermediate_size=40), name="narrow")
    with pytest.raises(Problem, match=r"down_proj` has 40 columns, which groups of 32 do not divide.*take group 20"):
        run(Quantize(), Inputs(model=narrow), Context.scratch(tmp_path / "a"))
    with pytest.raises(Problem, match=r"names no linear layer"):
        run(Quantize(where=Names(("norm",))), Inputs(model=narrow), Context.scratch(tmp_path / "b"))
    done = Context.scratch(tmp_path / "c")
    run(Quantize(store=Dequantised()), Inputs(model=narrow), done)
    on_grid = dataclasses.replace(narrow, path=done.out)
    with pytest.raises(Problem, match=r"on a grid already .*int4-g32-sym"):
        run(Quantize(store=Dequantised()), Inputs(model=on_grid), Context.scratch(tmp_path / "d"))


# ------------------------------------------------------------------------------------------------------- calibrate


def test_windows(tokenizer: Any, texts: Any) -> None:
    stream = Stream("0|step|calibrate")
    rows = texts.load("train")
    windows = cut(rows, tokenizer, 5, 16, stream)
    assert windows.shape == (5, 16)
    assert torch.equal(windows, cut(rows, tokenizer, 5, 16, stream))
    assert not torch.equal(windows, cut(rows, tokenizer, 5, 16, Stream("1|step|calibrate")))
    assert torch.equal(windows[:3], cut(rows, tokenizer, 3, 16, stream))  # more windows, the same first ones
    flat = windows.flatten().tolist()
    first = flat[: flat.index(tokenizer.eos_token_id)]
    assert " ".join(tokenizer.convert_ids_to_tokens(first)) in {row["text"] for row in rows.rows}  # whole rows, with their end
    everything = cut(rows, tokenizer, 10**6, 16, stream)
    assert everything.numel() > 0.95 * sum(len(row["text"].split()) + 1 for row in rows.rows)
    short = Rows("text", [{"text": "w1 w2"}], "short", "memory")
    assert cut(short, tokenizer, 4, 16, stream).tolist() == [tokenizer("w1 w2")["input_ids"] + [tokenizer.eos_token_id]]


@pytest.mark.parametrize("changed", [Samples(count=5, length=16, batch=2), Samples(count=6, length=15, batch=2)], ids=["count", "length"])
def test_settings_of_samples_count(changed: Samples, artefact: Any, texts: Any, tmp_path: Path) -> None:
    def errors(calibrate: Samples, name: str) -> float:
        context = Context.scratch(tmp_path / name)
        spec = dataclasses.replace(QUICK, calibrate=calibrate, where=Names(("layers.0.*.q_proj",)))
        return run(spec, Inputs(model=start, data=texts), context).figures["output_error"].value

    start = artefact()
    assert errors(SMALL, "as before") != errors(changed, "changed")


def test_chats_go_through_the_template(tokenizer: Any) -> None:
    talk = [{"messages": [{"role": "user", "content": "w3"}, {"role": "assistant", "content": "w4"}]}]
    windows = cut(Rows("chat", talk, "chats", "memory"), tokenizer, 1, 3, Stream("0"))
    assert tokenizer.convert_ids_to_tokens(windows[0].tolist()) == ["<unk>", "w3", "<unk>"]  # "u", "w3", "a"


def test_fewer_or_shorter_windows_are_told(artefact: Any, texts: Any, tmp_path: Path) -> None:
    context, start = Context.scratch(tmp_path / "few"), artefact()
    run(dataclasses.replace(QUICK, calibrate=Samples(count=1000, length=32)), Inputs(model=start, data=texts), context)
    assert any("windows of 32 tokens; 1000 of 32 were asked for, the data held no more" in note for note in context.notes)
    context = Context.scratch(tmp_path / "short")
    run(dataclasses.replace(QUICK, calibrate=Samples(count=2, length=100)), Inputs(model=start, data=texts), context)
    assert context.notes == ["calibrated on 2 windows of 64 tokens; 2 of 100 were asked for, the model's context is 64 tokens"]
    context = Context.scratch(tmp_path / "as asked")
    run(QUICK, Inputs(model=start, data=texts), context)
    assert context.notes == []
