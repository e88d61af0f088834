"""Pre-training: new models and given ones, their tokenizer and shape, and what a run leaves."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from temper import parts
from temper.context import Context
from temper.models import folders, io
from temper.models.constraints import magnitude_mask
from temper.models.parametrizations import attach
from temper.parts import Problem
from temper.passport import Artefact, Inputs, Passport
from temper.pretrain.engine import Pretrain, passport, run
from temper.pretrain.shape import Llama
from temper.pretrain.tokenizer import ByteBPE
from temper.tasks.rows import Rows, detect_shape
from temper.train.batching import Packed, Padded
from temper.train.optimizers import AdamW
from temper.train.schedules import Constant

CORPUS = [
    {"text": f"def {name}({first}, {last}):\n    return {first} {sign} {last}\n"}
    for name in ("add", "sub", "mul")
    for first in "abx"
    for last in "cdy"
    for sign in "+-*"
]
SHORT = Pretrain(
    tokenizer=ByteBPE(vocabulary=290),
    shape=Llama(hidden=32, layers=2, heads=2, feed_forward=64, positions=128),
    batching=Packed(length=32, size=4),
    updates=5,
    precision="float32",
    evaluate_every=None,
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclasses.dataclass(frozen=True)
class Given:
    """A source of rows that are there already; every tenth is held out."""

    rows: list[dict[str, Any]]

    def load(self, split: str) -> Rows:
        chosen = [row for index, row in enumerate(self.rows) if (index % 10 == 0) == (split == "test")]
        return Rows(detect_shape(chosen), chosen, "rows", "a test")

    def digest(self) -> str:
        return "given"


@dataclasses.dataclass
class Made:
    context: Context
    figures: dict[str, Any]

    @property
    def folder(self) -> Path:
        return self.context.out / "model"

    def weights(self, kept: str = "") -> dict[str, torch.Tensor]:
        return load_file((self.context.out / "checkpoints" / kept / "model" if kept else self.folder) / "model.safetensors")

    @property
    def artefact(self) -> Artefact:
        return Artefact("made", self.context.out, folders.passport(self.folder, ""), name="made")


def pretrained(folder: Path, spec: Pretrain = SHORT, rows=CORPUS, model: Artefact | None = None, seed: int = 0, show=None) -> Made:
    context = Context.scratch(folder, seed, "pretrain")
    context.show = show or context.show
    return Made(context, dict(run(spec, Inputs(model=model, data=Given(rows)), context).figures))


def short(**changes) -> Pretrain:
    return dataclasses.replace(SHORT, **changes)


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(tensor, two[name]) for name, tensor in one.items())


# ------------------------------------------------------------------------------------------------------- a new model


def test_learns_the_corpus(tmp_path: Path):
    made = pretrained(tmp_path, short(updates=90, evaluate_every=30, optimizer=AdamW(lr=1e-2), keep=(60,)))
    rows = [row for row in made.context.curve() if "heldout_loss" in row]
    assert [row["step"] for row in rows] == [30, 60, 90]
    assert made.figures["heldout_loss"].value == rows[-1]["heldout_loss"] < 0.6
    assert made.context.curve()[0]["loss"] > 3
    assert not same(made.weights("60"), made.weights())
    model, tokenizer = AutoModelForCausalLM.from_pretrained(made.folder), AutoTokenizer.from_pretrained(made.folder)
    ids = tokenizer("def add(a, c):", return_tensors="pt")["input_ids"]
    written = tokenizer.decode(model.generate(ids, do_sample=False, max_new_tokens=20)[0], skip_special_tokens=True)
    assert re.fullmatch(r"def add\(a, c\):\n    return [abx] [-+*] [cdy]\n", written)


def test_a_seed_is_a_run(tmp_path: Path):
    one, two, other = (pretrained(tmp_path / name, seed=seed) for name, seed in (("one", 0), ("two", 0), ("other", 1)))
    files = [{path.name: path.read_bytes() for path in made.folder.iterdir()} for made in (one, two)]
    assert files[0] == files[1]
    assert not same(one.weights(), other.weights())
    assert (one.folder / "tokenizer.json").read_bytes() == (other.folder / "tokenizer.json").read_bytes()


class Stop(Exception):
    pass


def test_going_on_gives_the_same_weights(tmp_path: Path):
    spec = short(updates=9, checkpoint_every=2, keep=(3, 8), evaluate_every=3)

    def stop(track) -> None:
        if track.done == 7:
            raise Stop

    whole = pretrained(tmp_path / "whole", spec)
    with pytest.raises(Stop):
        pretrained(tmp_path / "broken", spec, show=stop)
    again = pretrained(tmp_path / "broken", spec)
    for kept in ("", "3", "8"):
        assert same(whole.weights(kept), again.weights(kept))
    curves = [[{**row, "seconds": 0} for row in made.context.curve()] for made in (whole, again)]
    assert curves[0] == curves[1]


def test_length_in_tokens(tmp_path: Path):
    """Tokens count up to whole updates of 4 x 32, of which an epoch's last one is smaller."""
    made = pretrained(tmp_path, short(updates=None, tokens=1000, schedule=Constant()))
    assert 1000 <= made.figures["tokens"].value < 1000 + 2 * 4 * 32


def test_narrow_folder(tmp_path: Path):
    made = pretrained(tmp_path, short(dtype="bfloat16"))
    assert made.artefact.passport.numbers == "bfloat16"
    assert passport(short(dtype="bfloat16"), {}).numbers == "bfloat16"


def test_chats_and_completions_are_read_as_text(tmp_path: Path):
    rows = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": str(index)}]} for index in range(40)]
    made = pretrained(tmp_path, rows=rows)
    tokenizer = io.load_tokenizer(made.folder)
    assert "36 rows -> 36 examples" in made.context.notes[-1]
    assert tokenizer.tokenize("assistant: 1")[0].startswith("ass")  # `role: content` lines were its text


def test_a_small_text_gives_a_small_vocabulary(tmp_path: Path):
    made = pretrained(tmp_path, short(tokenizer=ByteBPE(vocabulary=4000)))
    held = len(io.load_tokenizer(made.folder))
    assert f"the text gave a vocabulary of {held} tokens, fewer than the 4000 asked for" in made.context.notes
    assert made.weights()["model.embed_tokens.weight"].shape == (held, 32)


# ------------------------------------------------------------------------------------------------------ a given model


def test_a_given_model_goes_on(tmp_path: Path):
    first = pretrained(tmp_path / "first")
    spec = short(tokenizer=ByteBPE(vocabulary=400), shape=Llama(hidden=64), optimizer=AdamW(lr=1e-30, weight_decay=0.0))
    second = pretrained(tmp_path / "second", spec, model=first.artefact)
    for name, tensor in first.weights().items():
        assert torch.allclose(tensor, second.weights()[name], atol=1e-9)
    assert (first.folder / "tokenizer.json").read_bytes() == (second.folder / "tokenizer.json").read_bytes()
    assert "goes on from `made`, with its tokenizer and shape; the slots `tokenizer` and `shape` stand aside" in second.context.notes
    third = pretrained(tmp_path / "third", short(), model=first.artefact)
    assert not same(first.weights(), third.weights())


def test_a_mask_holds(tmp_path: Path):
    first = pretrained(tmp_path / "first")
    model = io.load_model(first.folder)
    name = "model.layers.0.mlp.up_proj"
    attach(model, {name: magnitude_mask(model.get_submodule(name).weight, 0.25)})
    io.save_model(model, io.load_tokenizer(first.folder), first.folder)
    made = pretrained(tmp_path / "second", short(keep=(2,)), model=first.artefact)
    mask = io.held(first.folder)[name].keep
    assert made.artefact.passport.mask == 0.25
    for kept in ("", "2"):
        assert not made.weights(kept)[f"{name}.weight"][~mask].any()
    assert not same(first.weights(), made.weights())


def test_passports():
    new = passport(Pretrain(), {"data": Passport("text")})
    assert (new.kind, new.architecture, new.numbers, new.parameters) == ("model", "LlamaForCausalLM", "float32", 3_737_856)
    given = Passport("model", tokenizer="t", numbers="int4-g32-sym", mask=0.5, architecture="GPT2LMHeadModel", base="old")
    further = passport(Pretrain(), {"model": given, "data": Passport("text")})
    assert (further.numbers, further.mask, further.architecture, further.base) == ("int4-g32-sym", 0.5, "GPT2LMHeadModel", "?")
    with pytest.raises(Problem) as caught:
        passport(Pretrain(), {"model": dataclasses.replace(given, tokenizer=None)})
    text = "`model`: the model has no tokenizer, which training needs; put `tokenizer.json` into its folder"
    assert str(caught.value) == text


def test_rows_beyond_the_positions_are_refused(tmp_path: Path):
    with pytest.raises(Problem) as caught:
        pretrained(tmp_path, short(batching=Packed(length=129, size=1)))
    text = "the model takes 128 tokens and a batch is 129 long; give a smaller max_length, or shorter packed rows"
    assert str(caught.value) == text
    pretrained(tmp_path / "cut", short(batching=Padded(size=2), max_length=16))


# -------------------------------------------------------------------------------------------------- tokenizer, shape


def test_bytes_come_back():
    tokenizer = ByteBPE(vocabulary=270)(["aé  b"])
    text = "unseen: \x00\t\n  ü 漢字 🙂 <b>12.5</b>"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id


@pytest.mark.parametrize(("digits", "count"), [(True, 4), (False, 1)])
def test_digits_stand_alone(digits: bool, count: int):
    tokenizer = ByteBPE(vocabulary=280, digits=digits)(["2024 2024 2024"])
    assert len(tokenizer.tokenize("2024")) == count


@pytest.mark.parametrize(("frequency", "merged"), [(3, True), (4, False)])
def test_rare_pairs_are_not_merged(frequency: int, merged: bool):
    tokenizer = ByteBPE(vocabulary=280, frequency=frequency)(["qz qz", "qz"])
    assert (len(tokenizer.tokenize("qz")) == 1) == merged


def test_template_marks_what_the_assistant_says():
    tokenizer = ByteBPE(vocabulary=264)(["x"])
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    made = tokenizer.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True)
    assert tokenizer.decode(made["input_ids"]) == "<|begin|><|system|>s<|user|>u<|assistant|>a<|end|>"
    assert made["assistant_masks"] == [0, 0, 0, 0, 0, 0, 1, 1]
    asked = tokenizer.apply_chat_template(talk[:2], add_generation_prompt=True, tokenize=False)
    assert asked == "<|begin|><|system|>s<|user|>u<|assistant|>"


@pytest.mark.parametrize("shape", [Llama(hidden=32, layers=1, heads=2), Llama(hidden=48, layers=2, heads=4, kv_heads=2, tie=False)])
def test_parameters_are_counted_beforehand(shape: Llama):
    tokenizer = ByteBPE(vocabulary=264)(["x"])
    model = shape(tokenizer, 0)
    assert sum(one.numel() for one in model.parameters()) == shape.count(len(tokenizer))
    assert type(model).__name__ == shape.architecture


def test_first_weights_are_the_seeds():
    tokenizer = ByteBPE(vocabulary=264)(["x"])
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    one, two, other = (Llama(hidden=32, layers=1)(tokenizer, seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert same(one, two)
    assert not same(one, other)


@pytest.mark.parametrize(("deviation", "expected"), [(None, 64**-0.5), (0.02, 0.02)])
def test_first_weights_spread(deviation: float | None, expected: float):
    model = Llama(hidden=64, layers=1, deviation=deviation)(ByteBPE(vocabulary=264)(["x"]), 0)
    assert model.model.embed_tokens.weight[3:].std().item() == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(
    ("slot", "settings", "message"),
    [
        ("shape", {"hidden": 30}, "hidden 30 over 4 heads: rotary positions need an even whole width; change one of them"),
        ("shape", {"kv_heads": 3}, "4 heads do not share 3 key-value heads evenly; give a divisor of 4"),
        ("tokenizer", {"vocabulary": 100}, "`tokenizer.byte-bpe.vocabulary`: 100: must be at least 264"),
    ],
)
def test_settings_are_refused(slot: str, settings, message: str):
    with pytest.raises(Problem) as caught:
        parts.build(Pretrain, {slot: {"llama" if slot == "shape" else "byte-bpe": settings}})
    assert message in str(caught.value)
