"""Soft prompts and prefixes: what peft computes with them, sampled with a cache, read by the loss, started from words, evaluated."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, MistralConfig

from temper.context import Context
from temper.evaluate import engine as evaluate
from temper.models import folders, io
from temper.models.deltas import attach, trainable_parameters
from temper.models.deltas.delta import Delta, Lora
from temper.models.deltas.init import Default, Vocabulary
from temper.models.sample import sample, virtual_tokens
from temper.parts import Problem, build, fill
from temper.passport import Artefact, Inputs
from temper.pretrain.shape import Llama
from temper.pretrain.tokenizer import ByteBPE
from temper.tasks.rows import Rows
from temper.train.batching import can_separate, collate
from temper.train.examples import encode
from temper.train.logprobs import causal_loss, supervised_logprobs
from temper.tune import engine as tune

SOFT = [
    {"prompt-tuning": {"num_virtual_tokens": 5}},
    {"p-tuning": {"num_virtual_tokens": 3, "encoder_hidden_size": 16}},
    {"prefix-tuning": {"num_virtual_tokens": 4}},
    {"prefix-tuning": {"num_virtual_tokens": 4, "prefix_projection": True, "encoder_hidden_size": 16}},
    {"cartridge": {"num_virtual_tokens": 4}},
]
EACH = pytest.mark.parametrize("raw", SOFT, ids=lambda raw: "-".join(next(iter(raw)).split()))


def others():
    """Models with learned positions, and with a window shorter than the text."""
    torch.manual_seed(0)
    common = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
    yield GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **common)
    yield MistralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, sliding_window=6, **common
    )


def softly(model, raw):
    return attach(model, None, fill(Delta.__slot__, raw), Default(), seed=3).eval()


def prompts(count: int = 7) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 14, (count,), generator=generator).tolist()
    return [torch.randint(3, 64, (length,), generator=generator).tolist() for length in lengths]


def full_pass(model, prompt, tokens):
    """Log-probabilities of `tokens` after `prompt` from one pass of peft's, without cache or batch."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *tokens]]), use_cache=False).logits[0, -len(prompt) - len(tokens) :].float()
    return logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(-1, torch.tensor(tokens)[:, None])[:, 0]


@EACH
def test_sampled_logprobs_are_those_of_a_full_pass(tiny, raw):
    model = softly(tiny(), raw)
    given = prompts()
    assert virtual_tokens(model) == next(iter(raw.values()))["num_virtual_tokens"]
    for temperature in (0.0, 1.0):
        for prompt, one in zip(
            given, sample(model, given, max_new_tokens=9, temperature=temperature, seeds=range(7), batch_size=4, stop=())
        ):
            torch.testing.assert_close(torch.tensor(one.logprobs), full_pass(model, prompt, list(one.tokens)), atol=1e-5, rtol=0)
    alone = [sample(model, [prompt], max_new_tokens=9, seeds=[seed], stop=())[0].tokens for seed, prompt in enumerate(given)]
    assert [one.tokens for one in sample(model, given, max_new_tokens=9, seeds=range(7), stop=())] == alone


@EACH
@pytest.mark.parametrize("index", [0, 1])
def test_other_architectures(raw, index):
    model = softly(AutoModelForCausalLM.from_config(list(others())[index]).eval(), raw)
    given = prompts()
    for prompt, one in zip(given, sample(model, given, max_new_tokens=12, seeds=range(7), stop=(), batch_size=7)):
        torch.testing.assert_close(torch.tensor(one.logprobs), full_pass(model, prompt, list(one.tokens)), atol=1e-5, rtol=0)


@EACH
def test_greedy_is_generate_by_peft(tiny, raw):
    model = softly(tiny(), raw)
    given = prompts()
    for prompt, one in zip(given, sample(model, given, max_new_tokens=8, temperature=0, stop=())):
        ids = torch.tensor([prompt])
        wanted = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8, eos_token_id=None)
        assert list(one.tokens) == wanted[0, len(prompt) :].tolist()


def test_positions_end_with_the_virtual_tokens(tiny):
    model = softly(tiny(), SOFT[0])
    sample(model, [[4] * 56], max_new_tokens=3, temperature=0)
    with pytest.raises(
        Problem, match=r"5 virtual tokens, a prompt of 56 and 4 new ones do not fit the model's 64 positions; .* at most 3 to"
    ):
        sample(model, [[4] * 56], max_new_tokens=4, temperature=0)


@EACH
def test_the_loss_is_that_of_peft(tiny, batch, raw):
    model = softly(tiny(), raw)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        whole = model(**batch, use_cache=False).logits[:, -12:].log_softmax(-1)
    wanted = whole[:, :-1].gather(-1, ids[:, 1:, None])[..., 0][mask[:, 1:].bool()]

    class Given:
        inputs, input_ids = batch, ids
        supervised = torch.nn.functional.pad(mask[:, 1:].bool(), (1, 0))

    torch.testing.assert_close(supervised_logprobs(model, Given).detach(), wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(causal_loss(model, Given).detach(), -wanted.sum(), atol=1e-3, rtol=1e-5)
    assert not can_separate(model), "documents side by side would see one prompt"


def test_logits_and_parameters_are_those_of_peft(tiny, batch, tokenizer):
    base = tiny()
    model = start(base, tokenizer, Vocabulary(words=("w7", "w1 w2"), most=40), tokens=5)
    held = trainable_parameters(model)
    assert [one.shape for one in held.values()] == [(5, 32)]
    (table,) = held.values()
    theirs = get_peft_model(tiny(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)).eval()
    with torch.no_grad():
        theirs.prompt_encoder["default"].embedding.weight.copy_(table)
        torch.testing.assert_close(model(**batch).logits, theirs(**batch).logits, atol=0, rtol=0)
    before = copy.deepcopy(model.state_dict())
    model(**batch, labels=batch["input_ids"]).loss.backward()
    torch.optim.SGD(held.values(), lr=0.1).step()
    changed = [name for name, one in model.state_dict().items() if not torch.equal(one, before[name])]
    assert changed == ["prompt_encoder.default.embedding.weight"]


def start(model, tokenizer, init, tokens, seed=0):
    live = init.start(type("Given", (), {"want": staticmethod(lambda name: tokenizer)}))
    return attach(model, None, fill(Delta.__slot__, {"prompt-tuning": {"num_virtual_tokens": tokens}}), live, seed=seed).eval()


def test_vocabulary(tiny, tokenizer):
    base = tiny()
    words = base.get_input_embeddings().weight.detach().clone()
    first = start(base, tokenizer, Vocabulary(words=("w7", "w1 w2"), most=40), tokens=12)
    (table,) = trainable_parameters(first).values()
    torch.testing.assert_close(table[0], words[4 + 7])
    torch.testing.assert_close(table[1], (words[4 + 1] + words[4 + 2]) / 2)
    drawn = [int((words == row).all(1).nonzero()) for row in table[2:]]
    assert len(set(drawn)) == 10
    assert all(4 <= one < 40 for one in drawn)  # the first four are special
    again, other = (start(tiny(), tokenizer, Vocabulary(most=40), tokens=12, seed=seed) for seed in (3, 4))
    assert not torch.equal(*(next(iter(trainable_parameters(one).values())) for one in (again, other)))
    with pytest.raises(Problem, match="3 words for 2 virtual tokens"):
        start(tiny(), tokenizer, Vocabulary(words=("w1", "w2", "w3")), tokens=2)
    with pytest.raises(Problem, match="12 tokens to draw, and 6 to draw from"):
        start(tiny(), tokenizer, Vocabulary(most=10), tokens=12)
    with pytest.raises(Problem, match="init `vocabulary` starts soft prompts, and the delta has none"):
        attach(tiny(), None, Lora(), Vocabulary().start(type("Given", (), {"want": staticmethod(lambda name: tokenizer)})), seed=0)


# ------------------------------------------------------------------------------------------------------------ engines


class Copies:
    """Prompts of a letter whose completion is the letter."""

    rows = [{"prompt": f"copy {a} {b} =", "completion": f" {a} {b}"} for a in "abcd" for b in "abcd"]

    def load(self, split):
        return Rows("completion", self.rows, "rows", "a test")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tokenizer = ByteBPE(vocabulary=300)([f"copy {letter} =" for letter in "abcd"] * 5)
    io.save_model(
        Llama(hidden=32, layers=2, heads=2, feed_forward=64, positions=32, deviation=0.2)(tokenizer, 1), tokenizer, folder / "model"
    )
    return Artefact("base", folder, folders.passport(folder / "model", "base"), name="base")


@pytest.mark.parametrize("raw", [SOFT[0], SOFT[2]], ids=["prompt-tuning", "prefix-tuning"])
def test_tuned_and_evaluated(base, raw, tmp_path):
    settings = {
        "delta": raw,
        "updates": 8,
        "optimizer": {"adamw": {"lr": 0.3}},
        "batching": {"bucketed": {"size": 8}},
        "precision": "float32",
    }
    if "prompt-tuning" in raw:
        settings["init"] = {"vocabulary": {"words": [" a", " b"]}}
    spec = build(tune.Tune, settings)
    context = Context.scratch(tmp_path / "tune")
    output = tune.run(spec, Inputs(model=base, data=Copies()), context)
    curve = [row["loss"] for row in context.curve() if "loss" in row]
    assert curve[-1] < curve[0] - 0.2
    assert output.base == base
    made = Artefact("soft", context.out, folders.passport(context.out / "model", "soft"), output.base, name="soft")
    loaded = io.load_model(made)
    assert virtual_tokens(loaded) == next(iter(raw.values()))["num_virtual_tokens"]
    tokenizer = io.load_tokenizer(made)
    rows = collate(encode(Copies().load("train"), tokenizer, max_length=None))
    alone = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.model), made.model).eval()  # peft's own eyes
    with torch.no_grad():
        torch.testing.assert_close(loaded(**rows.inputs).logits, alone(**rows.inputs).logits, atol=1e-5, rtol=1e-4)
        heldout = causal_loss(alone, rows) / rows.targets
    torch.testing.assert_close(output.figures["heldout_loss"].value, float(heldout), atol=1e-4, rtol=1e-4)
    for method in ("perplexity", "exact-match"):
        context = Context.scratch(tmp_path / method)
        found = evaluate.run(build(evaluate.Evaluate, {"metric": method, "answer": 4}), Inputs(model=[made], data=Copies()), context)
        assert found.figures


def test_rows_of_several_examples_are_refused(base, tmp_path):
    for batching in ({"packed": {"length": 24}}, {"best-fit": {"length": 24}}, {"bucketed": {"layout": "flat"}}):
        spec = build(tune.Tune, {"delta": SOFT[0], "updates": 2, "batching": batching})
        with pytest.raises(Problem, match="virtual tokens stand before a row, and these rows hold several examples"):
            tune.run(spec, Inputs(model=base, data=Copies()), Context.scratch(tmp_path / next(iter(batching))))
