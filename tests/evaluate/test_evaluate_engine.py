"""The engine whole, on models whose probabilities are known, saved to folders and loaded again."""

from __future__ import annotations

import itertools
import json
import math

import numpy
import pytest
from bigrams import BEGIN, END, WORDS, Given, bigram, drawn_table, saved, texts, tokenizer
from pyarrow import parquet

from temper import parts
from temper.context import Context
from temper.evaluate.engine import INPUTS, Evaluate, named, passport, run
from temper.evaluate.metric import (
    Accuracy,
    Agreement,
    Calibration,
    Choice,
    ExactMatch,
    Forgetting,
    Format,
    PassUntil,
    Perplexity,
    TokenEdit,
)
from temper.evaluate.probe import Linear
from temper.evaluate.records import read
from temper.evaluate.resample import Bootstrap
from temper.evaluate.slice import ByField
from temper.evaluate.subject import questions
from temper.parts import Problem
from temper.passport import Artefact, Inputs, Passport
from temper.tasks.rows import Rows
from temper.train.logprobs import supervised_logits

CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ ' ? ' if m['role'] == 'assistant' else ' ' }}{{ m['content'] }}"
    "{{ ' ' + eos_token if m['role'] == 'assistant' }}{% endfor %}{{ ' ?' if add_generation_prompt }}"
)
"""An assistant's turn opens with `?` and ends with `</s>`."""


def evaluated(folder, models, data, seed=0, reference=None, **spec):
    context = Context.scratch(folder, seed=seed)
    return run(Evaluate(**spec), Inputs(model=models, data=data, reference=reference), context).figures, context


def chosen(*pairs):
    """A table in which word `a` is followed by word `b` with probability `p` for each (a, p, b) given; the rest is spread evenly."""
    table = numpy.full((len(WORDS), len(WORDS)), 1 / len(WORDS))
    for first, share, second in pairs:
        row = table[WORDS.index(first)]
        row[:] = (1 - share) / (len(WORDS) - 1)
        row[WORDS.index(second)] = share
    return table


# --------------------------------------------------------------------------------------------------- perplexity


def closed_form(rows, table, opens=True):
    """Sum of nats, tokens and bytes of texts under a bigram table."""
    nats, tokens, size = 0.0, 0, 0
    for row in rows:
        ids = ([BEGIN] if opens else []) + [WORDS.index(word) for word in row["text"].split()] + [END]
        nats -= sum(math.log(table[a, b]) for a, b in itertools.pairwise(ids))
        tokens += len(ids) - 1
        size += len(row["text"]) - (0 if opens else 2)  # without an opening mark: not the first word and its space
    return nats, tokens, size


def test_perplexity_has_its_closed_form(tmp_path):
    table, rows = drawn_table(), texts(40)
    figures, _ = evaluated(tmp_path, [saved(tmp_path, bigram(table))], Given("text", rows))
    nats, tokens, size = closed_form(rows, table)
    assert figures["tune.perplexity"].value == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert figures["tune.nats_per_token"].value == pytest.approx(nats / tokens, rel=1e-5)
    assert figures["tune.bits_per_byte"].value == pytest.approx(nats / size / math.log(2), rel=1e-5)
    one = figures["tune.perplexity"]
    assert (one.n, one.better, one.unit) == (40, "lower", "")
    assert one.low < one.value < one.high


def test_windows_of_long_texts_predict_every_token_once(tmp_path):
    """A bigram model needs one token of context, and windows share one, so cutting changes nothing."""
    table, rows = drawn_table(), texts(20)
    model = saved(tmp_path, bigram(table))
    whole, _ = evaluated(tmp_path / "1", [model], Given("text", rows))
    for name, options in {"2": {"length": 4}, "3": {"length": 2}}.items():
        cut, _ = evaluated(tmp_path / name, [model], Given("text", rows), **options)
        assert cut["tune.perplexity"].value == pytest.approx(whole["tune.perplexity"].value, rel=1e-6)
        assert cut["tune.bits_per_byte"].value == pytest.approx(whole["tune.bits_per_byte"].value, rel=1e-6)


def test_bytes_are_those_of_predicted_tokens(tmp_path):
    """Without an opening mark nothing predicts the first word: neither its nats nor its bytes count."""
    table, rows = drawn_table(), [{"text": "a b c"}, {"text": "d c b a ?"}]
    figures, _ = evaluated(tmp_path, [saved(tmp_path, bigram(table), tokenizer(opens=False))], Given("text", rows))
    nats, tokens, size = closed_form(rows, table, opens=False)
    assert size == 3 + 7
    assert figures["tune.perplexity"].value == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert figures["tune.bits_per_byte"].value == pytest.approx(nats / size / math.log(2), rel=1e-5)


def test_of_completions_only_the_completion_counts(tmp_path):
    table = drawn_table()
    figures, context = evaluated(
        tmp_path, [saved(tmp_path, bigram(table))], Given("completion", [{"prompt": "a b", "completion": " c d"}]), resample=None
    )
    ids = [WORDS.index(word) for word in ("b", "c", "d", "</s>")]
    nats = -sum(math.log(table[a, b]) for a, b in itertools.pairwise(ids))
    assert figures["tune.nats_per_token"].value == pytest.approx(nats / 3, rel=1e-5)
    assert figures["tune.bits_per_byte"].value == pytest.approx(nats / 3 / math.log(2), rel=1e-5)
    assert figures["tune.perplexity"].low is None
    assert context.notes == []


def test_rows_that_lose_their_end_are_noted(tmp_path):
    data = Given("completion", [{"prompt": "a", "completion": " b c d"}, {"prompt": "a b c d", "completion": " a"}])
    _, context = evaluated(tmp_path, [saved(tmp_path, bigram(drawn_table()))], data, length=4)
    assert context.notes == [
        "tune: 2 rows -> 1 examples of 4 tokens, 2 supervised; 2 rows cut on the right; 1 rows left out, nothing supervised in them"
    ]


# ------------------------------------------------------------------------------------------ accuracy, calibration


def scripted():
    """After `a` comes `b` (0.9), after `c` `d` (0.6), then the end (0.8)."""
    return bigram(chosen(("a", 0.9, "b"), ("c", 0.6, "d"), ("b", 0.8, "</s>"), ("d", 0.8, "</s>")))


QUESTIONS = [
    {"prompt": "? a", "completion": " b"},
    {"prompt": "a", "completion": "b"},
    {"prompt": "? ? c", "completion": " d"},
    {"prompt": "c", "completion": " a"},
]


def test_accuracy_and_answer_calibration_of_a_scripted_model(tmp_path):
    figures, context = evaluated(
        tmp_path, [saved(tmp_path, scripted())], Given("completion", QUESTIONS), metric=(Accuracy(), Calibration(of="answers", bins=2))
    )
    assert figures["tune.accuracy"].value == 0.75
    assert (figures["tune.accuracy"].unit, figures["tune.accuracy"].better, figures["tune.accuracy"].n) == ("share", "higher", 4)
    # confidences 0.72, 0.72 (both right) and 0.48, 0.48 (one right)
    assert figures["tune.answer_ece"].value == pytest.approx((0.28 + 0.02) / 2, abs=1e-6)
    assert figures["tune.answer_brier"].value == pytest.approx((2 * 0.28**2 + 0.52**2 + 0.48**2) / 4, abs=1e-6)
    assert context.notes == []
    tables = json.loads((context.out / "calibration.json").read_text())
    assert [one["accuracy"] for one in tables["answer_calibration"]["tune"]["bins"]] == [0.5, 1.0]


def test_a_row_is_judged_by_its_own_checker(tmp_path):
    """`arithmetic` judges what follows the last `;`, not the reference's wording."""
    words = tokenizer()
    words.add_tokens(["1", "2", "3", "+", "==", ";"])
    size = len(words)
    table = numpy.full((size, size), 0.02 / (size - 1))
    for first, second in (("==", "2"), ("2", ";"), (";", "3"), ("3", "</s>")):
        table[words.convert_tokens_to_ids(first), words.convert_tokens_to_ids(second)] = 0.98
    table /= table.sum(1, keepdims=True)
    rows = [{"prompt": "1 + 2 ==", "completion": " 3", "task": "arithmetic"}, {"prompt": "1 + 2 ==", "completion": " 3"}]
    figures, context = evaluated(tmp_path, [saved(tmp_path, bigram(table), words)], Given("completion", rows), metric=Accuracy())
    assert parquet.read_table(context.out / "records" / "accuracy.parquet")["correct"].to_pylist() == [True, False]
    assert figures["tune.accuracy"].value == 0.5


def test_of_a_chat_the_last_assistant_turn_is_asked_for(tmp_path):
    user, right, wrong = ({"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("assistant", "c")))
    rows = [{"messages": [user, wrong, user, right]}, {"messages": [user]}, {"messages": [user, wrong]}, {"messages": [right, user]}]
    numbers, asked = questions(Rows("chat", rows, "given", ""))
    assert numbers == [0, 2]
    assert asked.rows[0] == {"prompt": [user, wrong, user], "completion": [right]}
    # `a` alone would go on with `c`: the turn must have been opened with `?`
    model = bigram(chosen(("a", 0.9, "c"), ("?", 0.9, "b"), ("b", 0.9, "</s>"), ("c", 0.9, "</s>")))
    figures, context = evaluated(tmp_path, [saved(tmp_path, model, template=CHAT)], Given("chat", rows), metric=Accuracy())
    found = parquet.read_table(context.out / "records" / "accuracy.parquet")
    assert (found["row"].to_pylist(), found["correct"].to_pylist()) == ([0, 2], [True, False])
    assert figures["tune.accuracy"].n == 2
    assert context.notes == ["tune: 2 of 4 rows not asked, they hold no answer to compare with"]


def test_answers_that_do_not_end_are_noted(tmp_path):
    model = saved(tmp_path, bigram(chosen(("a", 0.9, "b"), ("b", 0.9, "a"))))
    _, context = evaluated(tmp_path, [model], Given("completion", QUESTIONS[:2]), metric=Accuracy(), answer=5)
    assert context.notes == ["tune: 2 of 2 answers cut off before their end"]


def test_an_answer_takes_no_more_room_than_the_model_has(tmp_path):
    """Of nine positions a prompt has six: `answer: 6` gives it three tokens instead of a refusal, and the short prompt six all the same."""
    model = saved(tmp_path, bigram(chosen(("a", 0.9, "b"), ("b", 0.9, "a")), positions=9))
    rows = [{"prompt": "? ? ? ? a", "completion": " b a b"}, {"prompt": "? a", "completion": " b a b a b a"}]
    figures, _ = evaluated(tmp_path, [model], Given("completion", rows), metric=Accuracy(), answer=6)
    assert figures["tune.accuracy"].value == 1.0


def test_a_diverged_model_has_no_figures(tmp_path):
    model = bigram(drawn_table())
    model.lm_head.weight.data[3] = math.nan
    with pytest.raises(Problem, match="tune gives 25 of 25 probabilities that are no numbers"):
        evaluated(tmp_path, [saved(tmp_path, model)], Given("text", texts(3)))


def test_token_calibration_of_a_model_that_knows_its_source(tmp_path):
    """Texts drawn from the model's own table: its confidence is the chance of being right, and its Brier score has a closed form."""
    table, rng = drawn_table(5), numpy.random.default_rng(1)
    table[:, BEGIN] = table[:, 2] = 0
    table[:, END] += 0.4
    table[BEGIN, END] = 0  # no empty text
    table /= table.sum(1, keepdims=True)
    rows, expected = [], []
    for _ in range(1500):
        ids = [BEGIN]
        while ids[-1] != END:
            ids.append(int(rng.choice(len(WORDS), p=table[ids[-1]])))
        rows.append({"text": " ".join(WORDS[one] for one in ids[1:-1])})
        expected += [(1 - (table[one] ** 2).sum()) for one in ids[:-1]]
    smooth = table + 1e-9
    smooth /= smooth.sum(1, keepdims=True)
    figures, _ = evaluated(tmp_path, [saved(tmp_path, bigram(smooth))], Given("text", rows), metric=Calibration())
    found = figures["tune.token_ece"]
    assert found.value < 0.03
    assert figures["tune.token_brier"].value == pytest.approx(numpy.mean(expected), abs=0.02)
    assert figures["tune.token_brier"].low < numpy.mean(expected) < figures["tune.token_brier"].high
    sharp = table**3 + 1e-9
    sharp /= sharp.sum(1, keepdims=True)
    over, _ = evaluated(tmp_path / "over", [saved(tmp_path / "over", bigram(sharp))], Given("text", rows), metric=Calibration())
    assert over["tune.token_ece"].low > 3 * found.value
    assert over["tune.token_brier"].low > figures["tune.token_brier"].high


# ------------------------------------------------------------------------------------------------ laws of all figures


EVERYTHING = (
    Perplexity(),
    Forgetting(),
    Agreement(),
    Agreement(of="choices"),
    Accuracy(),
    ExactMatch(),
    TokenEdit(),
    Format(),
    Choice(),
    Calibration(of="tokens"),
    Calibration(of="answers"),
)


def asked(count):
    rng = numpy.random.default_rng(2)

    def words(least, most):
        return " ".join(rng.choice(WORDS[3:], rng.integers(least, most)))

    rows = [{"prompt": words(1, 9), "completion": f" {words(1, 4)}"} for _ in range(count)]
    others = [[f" {words(1, 6)}" for _ in range(rng.integers(1, 4))] for _ in rows]
    return [
        {**row, "choices": [*some, row["completion"]], "answer": len(some), "module": f"m{n // 2}", "skill": "ab"[n % 2]}
        for n, (row, some) in enumerate(zip(rows, others))
    ]


def real(seed=0):
    """A Llama that attends, so that padding could be seen."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        config = LlamaConfig(vocab_size=len(WORDS), max_position_embeddings=64, initializer_range=0.3, eos_token_id=END, **sizes)
        return LlamaForCausalLM(config)


def test_batch_size_and_padding_never_change_a_figure(tmp_path):
    model, data = saved(tmp_path / "model", real()), Given("completion", asked(16))
    options = {
        "metric": (*EVERYTHING, PassUntil(successes=1, budget=3)),
        "slice": ByField("skill"),
        "probe": Linear(key="skill", folds=2),
        "reference": saved(tmp_path / "other", real(1), name="other"),
        "answer": 4,
    }
    many, _ = evaluated(tmp_path / "many", [model], data, **options)
    alone, _ = evaluated(tmp_path / "alone", [model], data, **options, batch=1)
    some, _ = evaluated(tmp_path / "some", [model], data, **options, batch=70)
    assert len(many) >= 3 * 20
    assert many.keys() == alone.keys() == some.keys()
    for name, one in many.items():
        for other in (alone[name], some[name]):
            assert (other.value, other.low, other.high) == pytest.approx((one.value, one.low, one.high), abs=1e-6, rel=1e-5), name


def test_the_order_of_rows_does_not_change_a_value(tmp_path):
    model, other, rows = saved(tmp_path / "model", real()), saved(tmp_path / "other", real(1), name="other"), asked(40)
    options = {"metric": EVERYTHING, "reference": other, "answer": 6}
    one, _ = evaluated(tmp_path / "one", [model], Given("completion", rows), **options)
    two, _ = evaluated(tmp_path / "two", [model], Given("completion", rows[::-1]), **options)
    for name in one:
        assert two[name].value == pytest.approx(one[name].value, rel=1e-5), name


def test_same_seed_same_bits_another_seed_other_intervals(tmp_path):
    model, data = saved(tmp_path, bigram(drawn_table())), Given("text", texts(30))
    one, first = evaluated(tmp_path / "1", [model], data, metric=(Perplexity(), Calibration()))
    two, second = evaluated(tmp_path / "2", [model], data, metric=(Perplexity(), Calibration()))
    assert one == two
    for file in ("figures.json", "calibration.json", "records/perplexity.parquet", "records/token_calibration.parquet"):
        assert (first.out / file).read_bytes() == (second.out / file).read_bytes()
    other, _ = evaluated(tmp_path / "3", [model], data, seed=1)
    assert other["tune.perplexity"].value == one["tune.perplexity"].value
    assert other["tune.perplexity"].low != one["tune.perplexity"].low


def test_records_give_the_figures_again_and_hold_no_text(tmp_path):
    models = [saved(tmp_path / name, bigram(drawn_table(seed)), name=name) for seed, name in enumerate(("pretrain", "tune[math]"))]
    spec = {"metric": (*EVERYTHING, PassUntil(budget=5)), "slice": ByField("skill"), "probe": Linear(key="skill", folds=2)}
    figures, context = evaluated(tmp_path, models, Given("completion", asked(24)), reference=models[0], answer=4, **spec)
    for path in (context.out / "records").iterdir():
        table = parquet.read_table(path)
        assert all(table[column].to_numpy().dtype.kind in "ifb" for column in table.column_names if column not in ("model", "slice.skill"))
        assert set(table["slice.skill"].to_pylist()) <= {"a", "b"}
    again = read(context.out, Evaluate(**spec))
    assert again.keys() == figures.keys()
    assert {name.partition("[skill=")[0] for name in figures} < figures.keys()
    for name, one in again.items():
        assert (one.value, len(one.units)) == (figures[name].value, figures[name].n), name
    written = json.loads((context.out / "figures.json").read_text())
    assert written == {name: one.dump() for name, one in figures.items()}


def test_rows_of_one_module_are_one_unit(tmp_path):
    figures, _ = evaluated(tmp_path, [saved(tmp_path, bigram(drawn_table()))], Given("text", texts(30, modules=6)))
    assert figures["tune.perplexity"].n == 6


def test_an_interrupted_evaluation_keeps_its_passes(tmp_path, monkeypatch):
    models = [saved(tmp_path / name, bigram(drawn_table(seed)), name=name) for seed, name in enumerate(("one", "two"))]
    whole, _ = evaluated(tmp_path / "whole", models, Given("text", texts(20)))
    passes = []

    def counted(model, batch):
        passes.append(model)
        if len(passes) == 2:
            raise KeyboardInterrupt
        return supervised_logits(model, batch)

    monkeypatch.setattr("temper.evaluate.subject.supervised_logits", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluated(tmp_path / "cut", models, Given("text", texts(20)))
    resumed, _ = evaluated(tmp_path / "cut", models, Given("text", texts(20)))
    assert len(passes) == 3  # the first model's pass was not made again
    assert resumed == whole


def test_bfloat16_is_near_float32(tmp_path):
    model, data = saved(tmp_path, real()), Given("text", texts(30))
    full, _ = evaluated(tmp_path / "1", [model], data)
    half, _ = evaluated(tmp_path / "2", [model], data, precision="bfloat16")
    assert half["tune.perplexity"].value != full["tune.perplexity"].value
    assert half["tune.perplexity"].value == pytest.approx(full["tune.perplexity"].value, rel=0.03)


def test_limit_spreads_rows_evenly(tmp_path):
    table, rows = drawn_table(), texts(30)
    figures, _ = evaluated(tmp_path, [saved(tmp_path, bigram(table))], Given("text", rows), limit=4)
    nats, tokens, _ = closed_form([rows[index] for index in (0, 7, 15, 22)], table)
    assert figures["tune.nats_per_token"].value == pytest.approx(nats / tokens, rel=1e-5)
    assert figures["tune.nats_per_token"].n == 4


def test_an_adapter_is_measured_on_its_base(tmp_path):
    import peft
    import torch

    base = saved(tmp_path / "base", real(), name="base")
    inner = real()
    made = peft.get_peft_model(inner, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "lora_B" in name:
                weight.normal_(generator=torch.Generator().manual_seed(0))
    made.save_pretrained(tmp_path / "adapter" / "model")
    adapter = Artefact("a", tmp_path / "adapter", Passport("adapter", tokenizer="t"), base=base, name="tune")
    merged = saved(tmp_path / "merged", made.merge_and_unload(), name="merged")
    figures, _ = evaluated(tmp_path, [base, adapter, merged], Given("text", texts(20)))
    assert figures["tune.perplexity"].value == pytest.approx(figures["merged.perplexity"].value, rel=1e-5)
    assert figures["tune.perplexity"].value != pytest.approx(figures["base.perplexity"].value, rel=1e-3)


# ---------------------------------------------------------------------------------------------------- what is refused


def test_passport_says_figures_and_refuses_before_compute():
    model, bare = (Passport("model", tokenizer="t", template=template, origin="tune") for template in ("h", None))
    assert passport(Evaluate(), {"model": [model], "data": Passport("text")}).kind == "figures"
    assert passport(Evaluate(metric=Accuracy()), {"model": [bare], "data": Passport("completion")}).kind == "figures"
    with pytest.raises(Problem, match="tune has no chat template, and the data are chats"):
        passport(Evaluate(), {"model": [model, bare], "data": Passport("chat")})
    with pytest.raises(Problem, match="metric`: `accuracy` needs questions and `text` data ask nothing"):
        passport(Evaluate(metric=(Perplexity(), Accuracy())), {"model": [model], "data": Passport("text")})
    with pytest.raises(Problem, match="`calibration` needs questions"):
        passport(Evaluate(metric=Calibration(of="answers")), {"model": [model], "data": Passport("text")})
    with pytest.raises(Problem, match="takes `model` or `adapter`; what is given is `figures`"):
        INPUTS["model"].accept("model", Passport("figures"))
    with pytest.raises(Problem, match="what is given is `preference`"):
        INPUTS["data"].accept("data", Passport("preference"))


def test_two_metrics_of_one_figure_are_refused(tmp_path):
    with pytest.raises(Problem, match="two metrics give the figure `token_ece`"):
        evaluated(
            tmp_path, [saved(tmp_path, bigram(drawn_table()))], Given("text", texts(3)), metric=(Calibration(bins=5), Calibration(bins=10))
        )


def test_text_is_asked_nothing(tmp_path):
    with pytest.raises(Problem, match="given asks nothing"):
        evaluated(tmp_path, [saved(tmp_path, bigram(drawn_table()))], Given("text", texts(3)), metric=Accuracy())


def test_names_that_come_twice_are_numbered(tmp_path):
    one = Artefact("x", tmp_path / "mine", Passport("model"))
    assert list(named([one, one, Artefact("y", tmp_path, Passport("model"), name="tune")])) == ["mine", "mine-2", "tune"]


def test_as_a_recipe_says_it():
    made = parts.build(
        Evaluate,
        {"metric": ["perplexity", {"calibration": {"of": "tokens", "bins": 10}}], "resample": {"bootstrap": {"samples": 200}}, "limit": 50},
    )
    assert made == Evaluate(metric=(Perplexity(), Calibration(bins=10)), resample=Bootstrap(samples=200), limit=50)
    assert parts.build(Evaluate, {"resample": "none"}).resample is None
    with pytest.raises(Problem, match="did you mean `perplexity`"):
        parts.build(Evaluate, {"metric": "perplexty"})
    assert INPUTS["model"].many
    assert {"perplexity", "accuracy", "calibration", "language", "answers", "choice", "forgetting"} < set(parts.methods("evaluate"))
