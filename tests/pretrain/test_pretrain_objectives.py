"""Every objective from a corpus to a folder that transformers loads, on models of every family; and what other engines make of these."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_pretrain_engine import CORPUS, Given, pretrained, same, short
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, AutoTokenizer

from temper import preflight
from temper.context import Context
from temper.models import folders, io
from temper.models.export import export
from temper.parts import Problem, mark_of, method
from temper.passport import Artefact, Input, Inputs, Passport, family
from temper.pretrain.engine import passport
from temper.pretrain.shape import T5, Bert, Llama
from temper.pretrain.tokenizer import ByteBPE
from temper.recipe import read
from temper.store import Store
from temper.train.batching import Packed, Padded
from temper.train.objectives import Causal, FillMiddle, Masked, Prefix, SpanMixture
from temper.train.optimizers import AdamW
from temper.tune.engine import Tune
from temper.tune.engine import run as tune

ALL = ByteBPE(vocabulary=330, reserve=("mask", "spans", "middle"), sentinels=20)
LLAMA = Llama(hidden=32, layers=1, heads=2, feed_forward=64, positions=128)
BERT = Bert(hidden=32, layers=1, heads=2, positions=128)
TRANSLATOR = T5(hidden=32, layers=1, heads=2)
LOADS = {"masked": AutoModelForMaskedLM, "encoder-decoder": AutoModelForSeq2SeqLM, "causal": AutoModelForCausalLM}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("objective", "shape"),
    [
        (Masked(), BERT),
        (Masked(), LLAMA),
        (Prefix(), LLAMA),
        (Prefix(), TRANSLATOR),
        (SpanMixture(), LLAMA),
        (SpanMixture(), TRANSLATOR),
        (FillMiddle(), LLAMA),
        ((Causal(), FillMiddle()), LLAMA),
    ],
    ids=lambda one: type(one).__name__,
)
def test_from_a_corpus_to_a_folder(objective: Any, shape: Any, tmp_path: Path):
    spec = short(objective=objective, shape=shape, tokenizer=ALL, updates=4, evaluate_every=2, keep=(2,))
    made = pretrained(tmp_path, spec)
    assert all(0 < row["loss"] < 20 for row in made.context.curve() if "loss" in row)
    found = folders.passport(made.folder)
    kind = family(found.architecture)
    assert found.architecture == passport(spec, {}).architecture == shape.architecture
    assert found.parameters == shape.count(len(io.load_tokenizer(made.folder)))
    ours, theirs = io.load_model(made.folder), LOADS[kind].from_pretrained(made.folder)
    assert type(ours).__name__ == type(theirs).__name__ == shape.architecture
    assert same(ours.state_dict(), theirs.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(made.folder)
    assert tokenizer.mask_token == "<|mask|>"
    ids = tokenizer("def add(a, c):", return_tensors="pt")["input_ids"]
    more = {"decoder_input_ids": ids} if kind == "encoder-decoder" else {}
    with torch.no_grad():
        assert torch.equal(ours(ids, **more).logits, theirs(ids, **more).logits)


def test_an_encoder_learns_from_both_sides(tmp_path: Path):
    """The first word can be told from the last alone."""
    rows = [{"text": f"{one} goes {'on and ' * (n % 2)}to {one.upper()}"} for n in range(30) for one in "xyz"]
    spec = short(objective=Masked(rate=0.3), shape=BERT, tokenizer=ALL, updates=90, batching=Padded(size=16), optimizer=AdamW(lr=1e-2))
    made = pretrained(tmp_path, spec, rows=rows)
    assert made.context.curve()[0]["loss"] > 4
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(made.folder), AutoTokenizer.from_pretrained(made.folder)
    for row in rows[:6]:
        ids = tokenizer(row["text"], return_tensors="pt")["input_ids"]
        hidden = ids.clone()
        hidden[0, 1] = tokenizer.mask_token_id
        assert model(hidden).logits[0, 1].argmax() == ids[0, 1]


@pytest.mark.parametrize("documents", ["joined", "separate"])
def test_going_on_gives_the_same_weights(documents: Any, tmp_path: Path):
    batching = Packed(length=40, size=2, accumulate=2, documents=documents)
    spec = short(objective=(FillMiddle(), Masked()), tokenizer=ALL, updates=6, checkpoint_every=2, batching=batching)

    class Stop(Exception):
        pass

    def stop(track: Any) -> None:
        if track.done == 3:
            raise Stop

    whole = pretrained(tmp_path / "whole", spec)
    with pytest.raises(Stop):
        pretrained(tmp_path / "broken", spec, show=stop)
    assert same(whole.weights(), pretrained(tmp_path / "broken", spec).weights())


@pytest.mark.parametrize(("objective", "shape"), [(Masked(), BERT), (SpanMixture(), TRANSLATOR)], ids=["masked", "encoder-decoder"])
def test_a_given_model_of_another_family_goes_on(objective: Any, shape: Any, tmp_path: Path):
    first = pretrained(tmp_path / "first", short(objective=objective, shape=shape, tokenizer=ALL))
    spec = short(objective=objective, optimizer=AdamW(lr=1e-30, weight_decay=0.0), updates=2)
    second = pretrained(tmp_path / "second", spec, model=first.artefact)
    for name, tensor in first.weights().items():
        assert torch.allclose(tensor, second.weights()[name], atol=1e-9)
    assert passport(spec, {"model": first.artefact.passport}).architecture == shape.architecture


@pytest.mark.parametrize(
    ("loss", "objective", "shape"),
    [(Masked(rate=0.5), Masked(), BERT), (Prefix(), SpanMixture(), TRANSLATOR)],
    ids=["masked", "encoder-decoder"],
)
def test_a_model_of_another_family_is_tuned(loss: Any, objective: Any, shape: Any, tmp_path: Path):
    """An adapter on it learns, and comes back from its folder."""
    first = pretrained(tmp_path / "first", short(objective=objective, shape=shape, tokenizer=ALL))
    context = Context.scratch(tmp_path / "tuned", 0, "tune")
    spec = Tune(loss=(loss,), updates=3, optimizer=AdamW(lr=1e-2), precision="float32", evaluate_every=None)
    output = tune(spec, Inputs(model=first.artefact, data=Given(CORPUS)), context)
    found = folders.passport(context.out / "model")
    assert (found.kind, output.base) == ("adapter", first.artefact)
    adapter = Artefact("tuned", context.out, found, base=first.artefact)
    loaded, ids = io.load_model(adapter), torch.arange(45, 60)[None]
    more = {"decoder_input_ids": ids} if shape is TRANSLATOR else {}
    with torch.no_grad():
        assert not torch.equal(loaded(input_ids=ids, **more).logits, io.load_model(first.folder)(input_ids=ids, **more).logits)
    assert [row[mark_of(loss).name] for row in context.curve()] == [row["loss"] for row in context.curve()]


def test_the_methods_spec():
    spec = method("pretrain", "ul2")
    assert passport(spec, {}).architecture == "T5ForConditionalGeneration"
    assert [len(some) for some in (spec.objective.r, spec.objective.x)] == [2, 4]


# ---------------------------------------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": BERT}, "`objective`: `causal` does not train masked models such as BertForMaskedLM; use `masked`"),
        (
            {"shape": TRANSLATOR, "objective": FillMiddle()},
            "`objective`: `fill-middle` does not train encoder-decoder models such as T5ForConditionalGeneration; "
            "use `prefix` or `span-mixture`",
        ),
        (
            {"objective": Masked(), "tokenizer": ByteBPE(reserve=("middle",))},
            "`objective`: `masked` needs tokens of its own; write `tokenizer: {byte-bpe: {reserve: [middle, mask]}}`",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(changes: Any, message: str):
    with pytest.raises(Problem) as caught:
        passport(short(**changes), {})
    assert str(caught.value) == message


RECIPE = """
data: rows.jsonl
steps:
  - pretrain:
      objective: masked
      shape: {bert: {hidden: 32, layers: 1, heads: 2}}
      tokenizer: {byte-bpe: {vocabulary: 300, reserve: [mask]}}
      updates: 2
"""


@pytest.mark.parametrize("engine", ["evaluate", "align", "quantize"])
def test_engines_that_need_a_causal_model_refuse_an_encoder(engine: str, tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CORPUS))
    text = f"{RECIPE}  - {engine}: {{model: pretrain}}\n".replace("\ndata", "\nmodel: new\ndata")
    with pytest.raises(Problem) as caught:
        preflight.check(read(text, "r.yaml", tmp_path), Store(tmp_path / "store"))
    takes = "causal or classifier" if engine == "evaluate" else "causal"
    assert f"takes {takes} models; what is given is masked (BertForMaskedLM) and does not write from left to right" in str(caught.value)
    assert "train it with `pretrain` or `tune`, or give a causal one" in str(caught.value)


def test_tune_takes_an_encoder_for_masked_alone(tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CORPUS))
    text = RECIPE.replace("\ndata", "\nmodel: new\ndata")
    found = preflight.check(read(f"{text}  - tune: {{model: pretrain, loss: masked}}\n", "r.yaml", tmp_path), Store(tmp_path / "store"))
    assert [one.gives for one in found.steps] == ["model float32", "adapter float32"]
    with pytest.raises(Problem, match="`causal` does not train masked models such as BertForMaskedLM; use `masked`"):
        preflight.check(read(f"{text}  - tune: {{model: pretrain}}\n", "r.yaml", tmp_path), Store(tmp_path / "store"))


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        ("BertForMaskedLM", "masked"),
        ("ModernBertForMaskedLM", "masked"),
        ("T5ForConditionalGeneration", "encoder-decoder"),
        ("MBartForConditionalGeneration", "encoder-decoder"),
        ("T5GemmaForConditionalGeneration", "encoder-decoder"),
        ("MarianMTModel", "encoder-decoder"),
        ("LlamaForCausalLM", "causal"),
        ("GPT2LMHeadModel", "causal"),
        ("Gemma3ForConditionalGeneration", "causal"),  # text and images in, text out, by the causal mapping of transformers
        (None, "causal"),
    ],
)
def test_families(architecture: str | None, kind: str):
    assert family(architecture) == kind


def test_an_exported_encoder_says_how_it_is_loaded(tmp_path: Path):
    made = pretrained(tmp_path / "made", short(objective=Masked(), shape=BERT, tokenizer=ALL, updates=1))
    folder = export(made.artefact, tmp_path / "out", Store(tmp_path / "store"))
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: fill-mask" in card
    assert "Load it with `transformers.AutoModelForMaskedLM.from_pretrained(folder)`." in card
    assert same(AutoModelForMaskedLM.from_pretrained(folder).state_dict(), io.load_model(made.folder).state_dict())


# ------------------------------------------------------------------------------------------------ tokenizer, shapes


def test_reserved_tokens_stand_after_the_others():
    texts = [row["text"] for row in CORPUS]
    plain = ByteBPE(vocabulary=290)(texts)
    made = ByteBPE(vocabulary=290 + 1 + 20 + 3 + 3, reserve=("middle", "mask", "spans"), sentinels=20)(texts)
    names = ["<|mask|>", *(f"<extra_id_{n}>" for n in range(20)), "[R]", "[S]", "[X]", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]
    assert made.convert_tokens_to_ids(names) == list(range(8, 8 + len(names)))
    for text in texts:
        assert [one if one < 8 else one - len(names) for one in made(text)["input_ids"]] == plain(text)["input_ids"]
    assert plain.mask_token is None
    assert made("<extra_id_3>[S]", add_special_tokens=False)["input_ids"] == made.convert_tokens_to_ids(["<extra_id_3>", "[S]"])
    assert made.decode([8, *made("a")["input_ids"]], skip_special_tokens=True) == "a"


def test_a_vocabulary_too_small_for_what_is_reserved_is_refused():
    with pytest.raises(ValueError, match="vocabulary 300: bytes and special tokens are 367; give at least as many, or reserve fewer"):
        ByteBPE(vocabulary=300, reserve=("spans",))


@pytest.mark.parametrize(
    "shape",
    [
        Bert(hidden=32, layers=1, heads=2),
        Bert(hidden=48, layers=3, heads=4, feed_forward=64, positions=40),
        T5(hidden=32, layers=1, heads=2),
        T5(hidden=48, layers=3, heads=4, feed_forward=64),
    ],
)
def test_parameters_are_counted_beforehand(shape: Any):
    tokenizer = ByteBPE(vocabulary=264)(["x"])
    model = shape(tokenizer, 0)
    assert sum(one.numel() for one in model.parameters()) == shape.count(len(tokenizer))
    assert type(model).__name__ == shape.architecture
    again, other = shape(tokenizer, 0), shape(tokenizer, 1)
    assert same(model.state_dict(), again.state_dict())
    assert not same(model.state_dict(), other.state_dict())


@pytest.mark.parametrize("shape", [Bert, T5])
def test_widths_must_divide(shape: Any):
    with pytest.raises(ValueError, match="hidden 30 over 4 heads is no whole width; change one of them"):
        shape(hidden=30)


def test_accepting_by_kind_comes_first():
    with pytest.raises(Problem, match="`model`: takes `model`; what is given is `figures`"):
        Input(("model",)).accept("model", Passport("figures"))
