"""Folders: what is read from bytes alone, and models that come back as they were, with libraries alone too."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from temper.models import compressed, folders, io
from temper.models.constraints import Mask, OnGrid, magnitude_mask, save_constraints
from temper.models.deltas import attach, merge, prepare, trainable_parameters
from temper.models.deltas.base import Merged
from temper.models.deltas.delta import Full, Lora
from temper.models.deltas.init import Default, Olora, Pissa
from temper.models.deltas.where import Attention, Mlp
from temper.models.grids import Integer, ranges
from temper.models.parametrizations import attach as constrain
from temper.models.parametrizations import constraints, fold
from temper.parts import Problem
from temper.passport import Artefact, Passport

TOKENS = torch.randint(3, 64, (2, 11), generator=torch.Generator().manual_seed(1))


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits.float()


def train(model):
    """Moves every trained number."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def close(a, b, atol=2e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-4)


ALONE = """
import sys, torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
found = {}
for pair in sys.argv[2:]:
    base, _, adapter = pair.partition(":")
    model = AutoModelForCausalLM.from_pretrained(base)
    model = (PeftModel.from_pretrained(model, adapter) if adapter else model).eval()
    with torch.no_grad():
        found[pair] = model(input_ids=torch.tensor(TOKENS)).logits
assert "temper" not in sys.modules
save_file(found, sys.argv[1])
"""


def alone(folder: Path, *pairs: str) -> list[torch.Tensor]:
    """Logits of `model` or `base:adapter` folders, by a process that never imports this package."""
    script = ALONE.replace("TOKENS", str(TOKENS.tolist()))
    subprocess.run([sys.executable, "-c", script, "found", *pairs], check=True, capture_output=True, text=True, cwd=folder)
    made = load_file(folder / "found")
    return [made[pair] for pair in pairs]


def grid(weight):
    made = Integer(bits=4, group=16)
    return OnGrid(made, **made.fit(*ranges(weight.detach(), 16), torch.float32))


# ------------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard", ["5GB", "9KB"])
def test_a_model_comes_back_as_it_was(tiny, tokenizer, tmp_path, tied, shard):
    model = tiny(tie_word_embeddings=tied)
    io.save_model(model, tokenizer, tmp_path / "m", shard=shard)
    assert (len(list((tmp_path / "m").glob("*.safetensors"))) > 1) == (shard == "9KB")
    back = io.load_model(tmp_path / "m")
    assert not back.training
    assert torch.equal(logits(back), logits(model))
    assert (back.lm_head.weight is back.model.embed_tokens.weight) == tied
    assert io.load_tokenizer(tmp_path / "m")("w1 w5 nonsense").input_ids == [5, 9, 3]
    assert str(tmp_path) not in "".join(file.read_text() for file in (tmp_path / "m").glob("*.json"))


def test_equal_models_give_equal_files(tiny, tokenizer, tmp_path):
    for name in ("a", "b"):
        io.save_model(tiny(), tokenizer, tmp_path / name)
    assert folders.content(tmp_path / "a") == folders.content(tmp_path / "b")
    io.save_model(tiny(seed=1), tokenizer, tmp_path / "c")
    assert folders.content(tmp_path / "a") != folders.content(tmp_path / "c")


@pytest.mark.parametrize("tied", [False, True])
def test_saved_in_half_precision(tiny, tmp_path, tied):
    model = tiny(tie_word_embeddings=tied)
    io.save_model(model, None, tmp_path, dtype="bfloat16")
    assert model.dtype == torch.float32
    assert folders.describe(tmp_path).numbers == "bfloat16"
    assert folders.describe(tmp_path).parameters == sum(one.numel() for one in model.parameters())
    assert io.load_model(tmp_path, dtype="auto").dtype == torch.bfloat16
    assert torch.equal(io.load_model(tmp_path).lm_head.weight, model.lm_head.weight.bfloat16().float())


def test_a_constrained_model_leaves_and_returns(tiny, tmp_path):
    model = tiny()
    parts = {name: magnitude_mask(model.get_submodule(name).weight, 0.25) for name in Mlp()(model)}
    parts |= {name: grid(model.get_submodule(name).weight) for name in Attention()(model)}
    constrain(model, parts)
    before = logits(model)
    raw = model.model.layers[0].mlp.up_proj.weight.clone()
    io.save_model(model, None, tmp_path)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, raw)  # it may go on training
    stored = load_file(tmp_path / "model.safetensors")
    assert set(stored) == set(tiny().state_dict())
    assert (stored["model.layers.0.mlp.up_proj.weight"] == 0).float().mean() == 0.75
    close(logits(io.load_model(tmp_path)), before)
    close(logits(io.load_model(tmp_path, constraints=False)), before)
    assert set(constraints(io.load_model(tmp_path))) == set(parts) == set(io.held(tmp_path))
    assert not constraints(io.load_model(tmp_path, constraints=False))
    found = folders.describe(tmp_path)
    assert (found.mask, found.numbers) == (0.25, "int4-g16-sym")


@pytest.mark.parametrize("grid_of", [Integer(bits=4, group=16), Integer(bits=3, group=None, symmetric=False)])
def test_a_quantised_folder(tiny, tmp_path, grid_of):
    model = tiny()
    held = {}
    for name in Mlp()(model):
        weight = model.get_submodule(name).weight
        held[name] = OnGrid(grid_of, **grid_of.fit(*ranges(weight.detach(), grid_of.group), torch.float32))
    fold(constrain(model, held))
    compressed.write(tmp_path, model, held)
    found = folders.describe(tmp_path)
    assert found.parameters == sum(one.numel() for one in model.parameters())
    assert found.numbers == grid_of.label
    for with_constraints in (True, False):
        back = io.load_model(tmp_path, constraints=with_constraints)
        assert set(constraints(back)) == (set(held) if with_constraints else set())
        close(logits(back), logits(model))
    assert set(io.held(tmp_path)) == set(held)


def test_saving_refuses_what_is_no_plain_model(tiny, tmp_path):
    adapted = attach(tiny(), None, Lora(), Default(), seed=0)
    with pytest.raises(Problem, match="the model carries an adapter; save it with `save_adapter`, or `merge` it first"):
        io.save_model(adapted, None, tmp_path)
    with pytest.raises(Problem, match="the model carries no adapter; save it with `save_model`"):
        io.save_adapter(tiny(), None, tmp_path, "base")
    with pytest.raises(Problem, match=r'base_name "/home/me/base" is a path of this machine'):
        io.save_adapter(adapted, None, tmp_path, "/home/me/base")
    model = tiny()
    torch.nn.utils.parametrize.register_parametrization(model.lm_head, "weight", torch.nn.ReLU())
    with pytest.raises(Problem, match="LlamaForCausalLM would be saved with weights that the architecture does not have"):
        io.save_model(model, None, tmp_path)
    masked = constrain(tiny(), {name: Mask(torch.ones(48, 32).bool()) for name in ("model.layers.0.mlp.up_proj",)})
    inside = attach(masked, None, Lora(), Default(), seed=0)
    with pytest.raises(Problem, match="works inside a mask or grid, which a PEFT folder cannot hold"):
        io.save_adapter(inside, None, tmp_path, "base")
    io.save_model(merge(inside), None, tmp_path / "merged")
    with pytest.raises(Problem, match="no number format `int4` for a model"):
        io.save_model(tiny(), None, tmp_path, dtype="int4")


# ----------------------------------------------------------------------------------------------------------- adapters


DELTAS = [
    (Lora(rank=3), Default()),
    (Lora(rank=3, rank_stabilized=True), Olora()),
    (Lora(rank=3, dora=True), Pissa()),
]


def test_folders_load_with_the_libraries_alone(tiny, tokenizer, tmp_path):
    io.save_model(tiny(), tokenizer, tmp_path / "base")
    masked = tiny()
    constrain(masked, {name: magnitude_mask(masked.get_submodule(name).weight, 0.25) for name in Mlp()(masked)})
    io.save_model(masked, tokenizer, tmp_path / "masked")
    wanted = [logits(tiny()), logits(masked)]
    for index, (delta, init) in enumerate(DELTAS):
        model = train(attach(io.load_model(tmp_path / "base"), None, delta, init, seed=0))
        io.save_adapter(model, tokenizer, tmp_path / str(index), "me/base")
        wanted.append(logits(model))
    for one, two in zip(alone(tmp_path, "base", "masked", "base:0", "base:1", "base:2"), wanted):
        close(one, two, atol=1e-4)


@pytest.mark.parametrize(("delta", "init"), DELTAS)
def test_an_adapter_comes_back_as_it_was(tiny, tokenizer, tmp_path, delta, init):
    io.save_model(tiny(), tokenizer, tmp_path / "base")
    model = train(attach(io.load_model(tmp_path / "base"), None, delta, init, seed=0))
    before = logits(model)
    io.save_adapter(model, tokenizer, tmp_path / "adapter", "me/base")
    close(logits(model), before)
    ours = io.load_model(artefact(tmp_path / "adapter", "adapter", artefact(tmp_path / "base", "model")))
    close(logits(ours), before, atol=1e-4)
    io.save_model(merge(ours), tokenizer, tmp_path / "merged")
    close(logits(io.load_model(tmp_path / "merged")), before, atol=1e-4)
    settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "me/base"
    assert settings["target_modules"] == sorted(settings["target_modules"])
    assert str(tmp_path) not in json.dumps(settings)


def artefact(folder, kind, base=None):
    return Artefact(folder.name, folder, Passport(kind), base)


def test_an_adapter_on_an_adapter(tiny, tokenizer, tmp_path):
    io.save_model(tiny(), tokenizer, tmp_path / "base")
    base = artefact(tmp_path / "base", "model")
    first = train(attach(io.load_model(base), Attention(), Lora(rank=2), Pissa(), seed=0))
    io.save_adapter(first, None, tmp_path / "first", "base")
    one = artefact(tmp_path / "first", "adapter", base)
    second = train(prepare(io.load_model(one), None, Lora(rank=4), Default(), Merged(), seed=1))
    io.save(second, None, tmp_path / "second", base_name="first")
    two = artefact(tmp_path / "second", "adapter", one)
    close(logits(io.load_model(two)), logits(second))
    assert (logits(second) - logits(first)).abs().max() > 1e-2
    assert io.load_tokenizer(two)("w1").input_ids == [5]  # the base's
    plain = train(prepare(io.load_model(two), None, Full(), Default(), Merged(), seed=1))
    io.save(plain, tokenizer, tmp_path / "full")
    assert torch.equal(logits(io.load_model(tmp_path / "full")), logits(plain))


def test_an_adapter_without_its_artefact_names_its_base(tiny, tokenizer, tmp_path):
    io.save_model(tiny(), tokenizer, tmp_path / "adapter/base")
    model = train(attach(tiny(), None, Lora(rank=2), Default(), seed=0))
    io.save_adapter(model, None, tmp_path / "adapter", "base")
    assert folders.base_name(tmp_path / "adapter") == str(tmp_path / "adapter/base")
    close(logits(io.load_model(tmp_path / "adapter")), logits(model))
    found = folders.describe(tmp_path / "adapter")
    assert (found.kind, found.architecture, found.tokenizer) == ("adapter", None, None)
    assert found.parameters == sum(one.numel() for one in trainable_parameters(model).values())
    io.save_adapter(model, None, tmp_path / "orphan", "")
    with pytest.raises(Problem, match=r"does not say what it sits on; write base_model_name_or_path into its adapter_config.json"):
        io.load_model(tmp_path / "orphan")


def test_an_adapter_that_does_not_fit_is_refused(tiny, tmp_path):
    io.save_model(tiny(), None, tmp_path / "adapter/base")
    io.save_adapter(attach(tiny(), None, Lora(rank=2), Default(), seed=0), None, tmp_path / "adapter", "base")
    file = tmp_path / "adapter/adapter_model.safetensors"
    stored = load_file(file)
    gone = sorted(stored)[0]
    save_file({name: one for name, one in stored.items() if name != gone}, file)
    with pytest.raises(Problem, match=f"does not fit its base: 1 weights stand on one side alone \\(`{gone}`\\)"):
        io.load_model(tmp_path / "adapter")


# -------------------------------------------------------------------------------------------------- what is refused


def test_weights_and_configuration_must_belong_together(tiny, tmp_path):
    io.save_model(tiny(), None, tmp_path)
    file = tmp_path / "model.safetensors"
    stored = load_file(file)
    save_file({name: one for name, one in stored.items() if name != "model.norm.weight"}, file, {"format": "pt"})
    with pytest.raises(Problem, match=r"lacks 1 weights \(`model.norm.weight`\); its config.json and its weights do not belong together"):
        io.load_model(tmp_path)
    save_file({**stored, "model.more": torch.ones(2)}, file, {"format": "pt"})
    with pytest.raises(Problem, match=r"holds, and the architecture has no place for, 1 weights \(`model.more`\)"):
        io.load_model(tmp_path)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"model_type": "bert", "architectures": ["BertModel"], "vocab_size": 8}, "lacks .* weights"),
        ({"model_type": "t5", "architectures": ["T5Model"]}, r"is no causal language model \(T5Model\)"),
        (
            {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}},
            "has no architecture of transformers: it brings its own code, which is not run",
        ),
        ({"model_type": "lama"}, "has no architecture of transformers: "),
    ],
)
def test_architectures_that_do_not_load(tmp_path, config, told):
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise SystemExit('ran')")
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(Problem, match=told):
        io.load_model(tmp_path)


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return folder


def tensors(folder, name="model.safetensors", **made):
    save_file(made or {"w": torch.ones(2, 3)}, folder / name)


def test_folders_that_are_refused(tmp_path):
    def told(folder):
        with pytest.raises(Problem) as caught:
            folders.describe(folder)
        return str(caught.value)

    assert told(tmp_path / "no") == f"no folder {tmp_path / 'no'}; give a folder with `config.json`, or a hub name such as `owner/model`"
    empty = write(tmp_path / "a", confg__json={})
    assert told(empty) == f"{empty} holds neither `config.json` nor `adapter_config.json`; did you mean `confg.json`?"
    pickled = write(tmp_path / "b", config__json={}, pytorch_model__bin=b"x")
    assert told(pickled) == (
        f"{pickled} holds pickled weights alone (pytorch_model.bin), and reading a pickle can run any code; choose a revision with "
        "safetensors, or convert it where that is safe: load it with transformers and `save_pretrained`"
    )
    bare = write(tmp_path / "c", config__json={})
    assert told(bare) == f"{bare} has no model.safetensors; there is `config.json`"
    (bare / "model.safetensors").write_bytes(b"\xff" * 40)
    assert "is no safetensors file: its header would be" in told(bare)
    tensors(bare)
    whole = (bare / "model.safetensors").read_bytes()
    (bare / "model.safetensors").write_bytes(whole[:-4])
    assert told(bare).endswith(f"is not whole: {len(whole) - 4} bytes where its header says {len(whole)}; download or save it again")
    torn = write(tmp_path / "d", config__json=b"{")
    assert "is not JSON" in told(torn)
    outside = write(tmp_path / "e", config__json={}, **{"model.safetensors.index__json": {"weight_map": {"w": "../c/model.safetensors"}}})
    assert 'names the file "../c/model.safetensors", outside its folder; only files beside it are read' in told(outside)
    short = write(tmp_path / "f", config__json={}, **{"model.safetensors.index__json": {"weight_map": {"w": "model-1.safetensors"}}})
    assert told(short) == f"{short} lacks model-1.safetensors, which its index names; download it again"


# ------------------------------------------------------------------------------------------------------- what is read


def test_describe(tiny, tokenizer, tmp_path):
    model = tiny(tie_word_embeddings=True)
    io.save_model(model, tokenizer, tmp_path / "one")
    io.save_model(model, tokenizer, tmp_path / "many", shard="9KB")
    found = folders.describe(tmp_path / "one")
    assert (found.kind, found.architecture, found.numbers, found.mask, found.base) == ("model", "LlamaForCausalLM", "float32", None, None)
    assert found.parameters == sum(one.numel() for one in model.parameters())
    assert folders.describe(tmp_path / "many").parameters == found.parameters
    assert found.template == hashlib.sha256(tokenizer.chat_template.encode()).hexdigest()
    (tmp_path / "one/README.md").write_text("---\ntags: [x]\nlicense: apache-2.0\n---\n# Model\n")
    passport = folders.passport(tmp_path / "one", "./one")
    assert passport == Passport(
        kind="model", base=found.weights, tokenizer=found.tokenizer, template=found.template, numbers="float32",
        architecture="LlamaForCausalLM", parameters=found.parameters, origin="./one", licences=("apache-2.0",),
    )  # fmt: skip


def test_the_tokenizers_hash_is_what_it_does(tokenizer, tmp_path):
    def hash_of(name):
        tokenizer.save_pretrained(tmp_path / name)
        return folders.tokenizer_hash(tmp_path / name)

    first = hash_of("a")
    assert first is not None
    tokenizer(["w1 w2", "w3"], padding=True, truncation=True, max_length=2)  # leaves its state in tokenizer.json
    assert (tmp_path / "a/tokenizer.json").read_bytes() != (hash_of("b"), (tmp_path / "b/tokenizer.json").read_bytes())[1]
    assert hash_of("b") == first
    tokenizer.pad_token = "w9"
    tokenizer.chat_template = None
    assert hash_of("c") == first
    assert folders.template_hash(tmp_path / "c") is None
    tokenizer.eos_token = "w9"
    other = hash_of("d")
    assert other != first
    tokenizer.add_tokens(["more"])
    assert hash_of("e") not in (first, other)
    AutoTokenizer.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "again")
    assert folders.tokenizer_hash(tmp_path / "again") == first
    assert folders.tokenizer_hash(write(tmp_path / "none")) is None
    old = write(tmp_path / "old", vocab__json={"a": 0}, merges__txt=b"a b")
    assert folders.tokenizer_hash(old) not in (None, folders.tokenizer_hash(write(tmp_path / "older", vocab__json={"a": 0})))


def test_templates_in_their_older_places(tmp_path):
    wanted = hashlib.sha256(b"{{ x }}").hexdigest()
    places = [
        {"tokenizer_config__json": {"chat_template": "{{ x }}"}},
        {"tokenizer_config__json": {"chat_template": [{"name": "tools", "template": "no"}, {"name": "default", "template": "{{ x }}"}]}},
        {"chat_template__json": {"chat_template": "{{ x }}"}},
        {"chat_template__jinja": b"{{ x }}", "tokenizer_config__json": {"chat_template": "older"}},
    ]
    for index, files in enumerate(places):
        assert folders.template_hash(write(tmp_path / str(index), **files)) == wanted


@pytest.mark.parametrize(
    ("config", "label"),
    [
        (
            {"config_groups": {"g": {"weights": {"num_bits": 4, "group_size": 128, "symmetric": False, "strategy": "group"}}}},
            "int4-g128-asym",
        ),
        ({"config_groups": {"g": {"weights": {"num_bits": 8, "strategy": "channel", "symmetric": True}}}}, "int8-channel-sym"),
        ({"config_groups": {"g": {"weights": {"num_bits": 8, "type": "float", "strategy": "tensor"}}}}, "fp8-tensor"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}, "int4-g128-sym"),
        ({"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True}, "int4-g64-asym"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "nf4-g64"),
        ({"quant_method": "hqq"}, "hqq"),
    ],
)
def test_number_formats_of_others(tmp_path, config, label):
    write(tmp_path, config__json={"quantization_config": config})
    tensors(tmp_path)
    assert folders.describe(tmp_path).numbers == label


def test_parameters_of_packed_weights(tmp_path):
    gptq = {"qweight": torch.ones(4, 16, dtype=torch.int32), "qzeros": torch.ones(1, 2, dtype=torch.int32), "scales": torch.ones(1, 16)}
    write(tmp_path / "a", config__json={"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32}})
    tensors(tmp_path / "a", **{f"q_proj.{name}": one for name, one in gptq.items()}, norm=torch.ones(7))
    assert folders.describe(tmp_path / "a").parameters == 32 * 16 + 7
    write(tmp_path / "b", config__json={"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}})
    nf4 = {"weight": torch.ones(256, 1, dtype=torch.uint8), "weight.absmax": torch.ones(8), "weight.quant_map": torch.ones(16)}
    tensors(tmp_path / "b", **{f"q_proj.{name}": one for name, one in nf4.items()}, norm=torch.ones(7))
    assert folders.describe(tmp_path / "b").parameters == 32 * 16 + 7
    write(tmp_path / "c", config__json={})
    tensors(tmp_path / "c", logit_scale=torch.ones(1), w=torch.ones(2, 2))
    assert folders.describe(tmp_path / "c").parameters == 5


def test_mask_density_counts_every_masked_weight(tmp_path):
    write(tmp_path, config__json={})
    tensors(tmp_path)
    keep = torch.zeros(3, 5).bool()
    keep[0, :2] = True
    save_constraints(tmp_path, {"a": Mask(keep), "b": Mask(torch.ones(2, 2).bool())})
    assert folders.describe(tmp_path).mask == 6 / 19


def test_half_precision_by_its_weight(tmp_path):
    write(tmp_path, config__json={})
    tensors(tmp_path, a=torch.ones(9).half(), b=torch.ones(3), c=torch.ones(5))
    assert folders.describe(tmp_path).numbers == "float16"


def test_folders_need_no_torch():
    code = "import sys, temper.models.folders, temper.models.memory, temper.models.io, temper.models.deltas.init\n"
    code += "print([name for name in ('torch', 'transformers', 'peft', 'numpy', 'huggingface_hub') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ------------------------------------------------------------------------------------------------------------ the hub


def test_resolve(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = write(tmp_path / "model", config__json={})
    assert folders.resolve("model") == Path("model")
    assert folders.resolve(made) == made
    with pytest.raises(Problem, match=r'is a folder on this machine, and folders have no revision "main"; leave it out'):
        folders.resolve(made, "main")
    with pytest.raises(Problem, match=r"config.json is a file; give the folder that it lies in"):
        folders.resolve(made / "config.json")
    with pytest.raises(Problem, match=r"no folder modle; did you mean `model`\?; give a folder, or a hub name such as `owner/model`"):
        folders.resolve("modle")
    for bad in ("../x/y", "/nowhere/at/all", "owner/..", "a/b/c"):
        with pytest.raises(Problem, match="no folder"):
            folders.resolve(bad)


def test_the_hub(tmp_path, monkeypatch):
    asked = {}
    commit = "0123456789" * 4
    snapshot = write(tmp_path / "snapshots" / commit, config__json={})

    def download(name, **kwargs):
        asked.update(kwargs, name=name)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert folders.resolve("owner/model", "v1") == snapshot
    assert folders.revision_of(snapshot) == commit
    assert folders.revision_of(tmp_path) is None
    assert (asked["name"], asked["revision"]) == ("owner/model", "v1")
    assert not any("bin" in pattern or ".py" in pattern for pattern in asked["allow_patterns"])
    assert asked["ignore_patterns"] == ["*/*"]
    http = sys.modules[errors.Response.__module__.partition(".")[0]]  # httpx or its successor, as the hub's library has it
    answer = http.Response(403, request=http.Request("GET", "https://hub"))
    cases = [
        (
            errors.GatedRepoError("no", response=answer),
            "owner/model is gated: accept its terms on https://huggingface.co/owner/model, then log in",
        ),
        (errors.RepositoryNotFoundError("no", response=answer), "owner/model is neither a folder here nor a repository that you can see"),
        (errors.RevisionNotFoundError("no", response=answer), "owner/model has no revision"),
        (errors.LocalEntryNotFoundError("no"), "and the hub is out of reach"),
        (errors.HfHubHTTPError("busy", response=answer), "the hub refused owner/model: busy"),
    ]
    for error, told in cases:

        def fail(*_args, error=error, **_kwargs):
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        with pytest.raises(Problem, match=told):
            folders.resolve("owner/model")


def test_offline_is_obeyed(tmp_path):
    code = "from temper.models.folders import resolve\nfrom temper.parts import Problem\n"
    code += "try:\n    resolve('owner/model')\nexcept Problem as problem:\n    print(problem)"
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("owner/model is neither a folder here nor in the hub's cache, and the hub is out of reach")


def test_files_of_the_hubs_cache_are_known_by_name(tmp_path):
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    (blobs / ("ab" * 32)).write_bytes(b"never read")
    (tmp_path / "model.safetensors").symlink_to(blobs / ("ab" * 32))
    assert folders.file_hash(tmp_path / "model.safetensors") == "ab" * 32
    (tmp_path / "config.json").write_bytes(b"{}")
    assert folders.file_hash(tmp_path / "config.json") == hashlib.sha256(b"{}").hexdigest()
