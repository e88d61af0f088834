"""Heads for labels: what they are, that they learn, that a plain folder says the same, what is refused."""

from __future__ import annotations

import dataclasses
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from temper.context import Context
from temper.models import folders, io
from temper.models.classifiers import Words, names, of_words, scores
from temper.models.deltas import attach, merge
from temper.models.deltas.base import AsLoaded, Merged
from temper.models.deltas.delta import Lora
from temper.models.deltas.init import Default
from temper.parts import Problem
from temper.passport import Artefact, Passport, family
from temper.tasks.rows import Rows
from temper.train.batching import Bucketed, Packed, collate, planned
from temper.train.examples import Encoded, encode
from temper.train.faster import faster
from temper.train.objectives import Causal
from temper.tune.head import Linear, TokenLinear, headed, let_head_learn
from temper.tune.loss import Label
from temper.tune.surgery import Bidirectional

WORDS = [f"{a} {b}{'' if a < b else ' c'} d" for a in "abcd" for b in "abcd"]
TEXTS = [{"prompt": f"copy {words} =", "completion": f" {'up' if words[0] < words[2] else 'not up'}"} for words in WORDS]
TAGS = [{"prompt": f"{words}\n", "completion": " ".join("low" if one < "c" else "high" for one in words.split())} for words in WORDS]


def examples(rows: list[dict[str, Any]], tokenizer: Any, length: int | None = None) -> Encoded:
    return encode(Rows("completion", rows, "rows", "a test"), tokenizer, max_length=length)


@pytest.fixture
def tokenizer(base: Artefact) -> Any:
    return io.load_tokenizer(base)


def put(
    head: Any, base: Artefact, rows: list[dict[str, Any]], folder: Path, surgery: Any = None, seed: int = 0
) -> tuple[Any, Any, Encoded]:
    """A model under a head, its loss, and the examples."""
    context, tokenizer = Context.scratch(folder, seed, "tune"), io.load_tokenizer(base)
    given = examples(rows, tokenizer)
    model = head.start(context.at("head"))(io.load_model(base), given, tokenizer)
    model = surgery(model) if surgery else model
    context.give("model", model)
    context.give("tokenizer", tokenizer)
    return model, Label().start(context.at("loss")), given


HEADS = [
    (Linear(), TEXTS, None),
    (Linear(pool="max"), TEXTS, Bidirectional()),
    (Linear(pool="mean"), TEXTS, None),
    (TokenLinear(), TAGS, Bidirectional()),
    (TokenLinear(dropout=0.0), TAGS, None),
]


# ----------------------------------------------------------------------------------------------------- what they are


def test_the_last_token_says_what_transformers_own_class_says(base: Artefact, tokenizer: Any, tmp_path: Path):
    model, loss, given = put(Linear(), base, TEXTS, tmp_path)
    folder = tmp_path / "model"
    io.save_model(model, tokenizer, folder)
    theirs = transformers.LlamaForSequenceClassification.from_pretrained(folder).eval()
    batch = transformers.AutoTokenizer.from_pretrained(folder)([row["prompt"] for row in TEXTS], padding=True, return_tensors="pt")
    wanted = [theirs.config.label2id[row["completion"].strip()] for row in TEXTS]
    with torch.no_grad():
        out = theirs(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=torch.tensor(wanted))
        prompts = [one.tokens[: int(one.supervised.argmax())].tolist() for one in given]
        assert torch.allclose(scores(model, prompts, [[]] * len(prompts)), out.logits, atol=1e-6)
        found = loss(model, collate(given))
    assert found.count == len(TEXTS)
    assert found.mean.item() == pytest.approx(out.loss.item(), abs=1e-6)
    assert names(theirs) == ["not up", "up"]


def test_pooling_and_words_by_hand(base: Artefact, tmp_path: Path):
    prompts = [[20, 21, 22, 23], [24, 25]]
    for pool in ("max", "mean"):
        model, _, _ = put(Linear(pool=pool), base, TEXTS, tmp_path / pool)
        with torch.no_grad():
            each = [model(torch.tensor([one])).logits[0] for one in prompts]
            hidden = [model.model(torch.tensor([one])).last_hidden_state[0] @ model.score.weight.T for one in prompts]
            assert torch.allclose(each[0], hidden[0])
            wanted = torch.stack([one.amax(0) if pool == "max" else one.mean(0) for one in each])
            assert torch.allclose(scores(model, prompts, [[], []]), wanted, atol=1e-6)
        assert not of_words(model)
    model, _, _ = put(TokenLinear(), base, TAGS, tmp_path / "words")
    with torch.no_grad():
        each = [model(torch.tensor([one])).logits[0] for one in prompts]
        assert torch.allclose(scores(model, prompts, [[0, 3], [1]]), torch.stack([each[0][0], each[0][3], each[1][1]]), atol=1e-6)
    assert of_words(model)


@pytest.mark.parametrize("text", ["ab  cd\nef ", " one", "x", "", "é — ü\tz", "copy a b ="])
def test_a_word_ends_at_its_last_token(text: str, tokenizer: Any):
    ends = Words(tokenizer).ends(tokenizer(text)["input_ids"])
    read = [tokenizer.decode(tokenizer(text)["input_ids"][: place + 1], skip_special_tokens=True).split() for place in ends]
    assert [some[-1] for some in read] == text.split()
    assert [len(some) for some in read] == list(range(1, len(text.split()) + 1))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mask", [None, [[1, 1, 1, 1, 1, 0]]])
def test_bidirectional_sees_the_next_token_and_its_folder_says_so(
    attention: str, mask: Any, base: Artefact, tokenizer: Any, tmp_path: Path
):
    one, two = torch.tensor([[20, 21, 22, 23, 24, 25]]), torch.tensor([[20, 21, 22, 40, 24, 25]])
    seen = torch.tensor(mask) if mask else None
    for surgery, changes in ((None, False), (Bidirectional(), True)):
        model, _, _ = put(TokenLinear(), base, TAGS, tmp_path / f"{changes}", surgery)
        io.save_model(model, tokenizer, tmp_path / f"{changes}" / "model")
        again = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / f"{changes}" / "model").eval()
        for each in (model, again):
            each.config._attn_implementation = attention
            with torch.no_grad():
                before, after = each(one, attention_mask=seen).logits[0], each(two, attention_mask=seen).logits[0]
            assert (before[2] - after[2]).abs().max().item() > 1e-4 if changes else torch.equal(before[:3], after[:3])
            with faster(each, device="cpu"), torch.no_grad():
                assert torch.allclose(each(one, attention_mask=seen).logits[0][:5], before[:5], atol=1e-5)


def test_surgery_on_what_cannot_see_ahead_is_refused():
    config = transformers.MambaConfig(hidden_size=8, num_hidden_layers=1, vocab_size=16, state_size=2)
    with pytest.raises(Problem, match="sees nothing of what comes next"):
        Bidirectional()(transformers.MambaForCausalLM(config))


# --------------------------------------------------------------------------------------------------------- learning


@pytest.mark.parametrize(("head", "rows", "surgery"), HEADS)
def test_a_head_learns_beside_lora_and_its_folder_says_the_same(head, rows, surgery, base: Artefact, tokenizer: Any, tmp_path: Path):
    model, loss, given = put(head, base, rows, tmp_path, surgery)
    model = attach(model, None, Lora(), Default(), seed=0)
    let_head_learn(model)
    trained = {name for name, one in model.named_parameters() if one.requires_grad}
    assert {name for name in trained if "lora" not in name} == {
        f"base_model.model.score.{one}" for one in (["weight"] if isinstance(head, Linear) else ["weight", "bias"])
    }
    assert not any("score" in name for name in trained if "lora" in name)
    batch, optimizer = collate(given), torch.optim.Adam([one for one in model.parameters() if one.requires_grad], lr=0.01)
    torch.manual_seed(0)
    model.train()
    for _ in range(25):
        optimizer.zero_grad()
        loss(model, batch).mean.backward()
        optimizer.step()
    with torch.no_grad():
        after = loss(model.eval(), batch).mean.item()
        assert after < 0.35
        io.save_model(merge(model), tokenizer, tmp_path / "model")
        again = io.load_model(tmp_path / "model")
        assert loss(again, batch).mean.item() == pytest.approx(after, abs=1e-5)
    told = folders.passport(tmp_path / "model").architecture
    assert told == head.architecture("LlamaForCausalLM")
    assert family(told) == "classifier"


@pytest.mark.parametrize(("rows", "head"), [(TEXTS, Linear()), (TAGS, TokenLinear(dropout=0.0))])
def test_labels_are_the_same_however_rows_are_batched(rows, head, base: Artefact, tmp_path: Path):
    model, loss, given = put(head, base, rows, tmp_path)
    context = Context.scratch(tmp_path / "plan", 0, "tune")
    with torch.no_grad():
        whole = loss(model, collate(given))
        for batching in (
            Bucketed(size=5),
            Bucketed(size=16, layout="packed"),
            Packed(length=600, size=1, documents="separate"),
            Packed(length=600, size=1),
        ):
            plan = planned(batching, given, context.stream("batching"))
            sums = [loss(model, one) for update in range(plan.updates_per_epoch) for one in plan.update(update)]
            assert sum(one.count for one in sums) == whole.count
            assert sum(one.total.item() for one in sums) == pytest.approx(whole.total.item(), rel=1e-5)


def test_another_seed_draws_another_head(base: Artefact, tmp_path: Path):
    drawn = [put(Linear(), base, TEXTS, tmp_path / f"{n}", seed=seed)[0].score.weight for n, seed in enumerate((0, 0, 1))]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("head", "rows", "text"),
    [
        (Linear(), [{**row, "completion": " up"} for row in TEXTS], r'1 different labels \("up"\); a head takes 2 to 1,000'),
        (Linear(), [{**TEXTS[0], "completion": f" {n}"} for n in range(1001)], "1,001 different labels"),
        (Linear(), [TEXTS[0], {**TEXTS[1], "completion": "  "}], "a completion is empty"),
        (TokenLinear(), TEXTS, 'row 1: "copy a a c d =" has 6 words and "not up" as many labels as 2'),
    ],
)
def test_rows_without_labels_are_refused(head, rows, text, base: Artefact, tmp_path: Path):
    with pytest.raises(Problem, match=text):
        put(head, base, rows, tmp_path)


def test_labels_that_were_cut_or_are_unknown_are_refused(base: Artefact, tokenizer: Any, tmp_path: Path):
    model, loss, given = put(Linear(), base, TEXTS, tmp_path)
    longest = max(map(len, given))
    with pytest.raises(Problem, match="lost the end of their label"):
        Linear().start(Context.scratch(tmp_path / "cut", 0, "tune").at("head"))(
            io.load_model(base), examples(TEXTS, tokenizer, longest - 1), tokenizer
        )
    with pytest.raises(Problem, match='"down" is no label of the model'):
        loss(model, collate(examples([{**TEXTS[0], "completion": " down"}], tokenizer)))


def asked(**changes: Any) -> types.SimpleNamespace:
    """What `headed` reads of a spec."""
    return types.SimpleNamespace(**{"head": Linear(), "surgery": None, "loss": Label(), "base": AsLoaded(), **changes})


CAUSAL = Passport("model", architecture="LlamaForCausalLM")
CLASSIFIER = Passport("model", architecture="LlamaForSequenceClassification")


@pytest.mark.parametrize(
    ("spec", "model", "data", "text"),
    [
        (asked(head=None), CAUSAL, "completion", "`label` trains a model with a head"),
        (
            asked(head=None, loss=Causal(), surgery=Bidirectional()),
            CAUSAL,
            "completion",
            "`bidirectional` changes what a model sees; give it a head",
        ),
        (asked(loss=Causal()), CAUSAL, "completion", "`causal` learns text, and a model with a head gives labels; write `loss: label`"),
        (asked(loss=(Label(), Causal())), CAUSAL, "completion", "`causal` learns text"),
        (asked(), CAUSAL, "chat", "`label` reads labels off completions"),
        (asked(), CLASSIFIER, "completion", "it has one already; leave `head` out"),
        (asked(), dataclasses.replace(CAUSAL, architecture="BertForMaskedLM"), "completion", "give a causal one"),
        (asked(), dataclasses.replace(CAUSAL, kind="adapter"), "completion", "write `base: merged`"),
        (asked(), dataclasses.replace(CAUSAL, numbers="int4-g32-sym"), "completion", "put the head on before quantising"),
    ],
)
def test_what_does_not_go_together_is_refused(spec, model, data, text):
    with pytest.raises(Problem) as caught:
        headed(spec, model, model, Passport(data))
    assert text in str(caught.value)


def test_what_leaves_with_a_head_is_a_whole_model():
    adapter = dataclasses.replace(CAUSAL, kind="adapter", base="b", tokenizer="t")
    made = headed(asked(base=Merged()), adapter, adapter, Passport("completion"))
    assert (made.kind, made.architecture, made.tokenizer) == ("model", "LlamaForSequenceClassification", "t")
    assert headed(asked(head=TokenLinear()), adapter, CAUSAL, Passport("completion")).architecture == "LlamaForTokenClassification"
    assert headed(asked(head=None), adapter, CLASSIFIER, Passport("completion")) is adapter
    assert headed(asked(head=None, loss=Causal()), adapter, CAUSAL, Passport("completion")) is adapter
