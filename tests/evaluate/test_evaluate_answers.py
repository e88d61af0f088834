"""Answers, choices and comparisons with a reference, on models whose probabilities are known."""

from __future__ import annotations

import itertools
import math

import numpy
import pytest
from bigrams import WORDS, Given, bigram, drawn_table, saved, texts, tokenizer
from pyarrow import parquet

from temper.context import Context
from temper.evaluate.engine import INPUTS, Evaluate, passport, run
from temper.evaluate.metric import Agreement, Calibration, Choice, ExactMatch, Forgetting, LmEval, PassUntil, Perplexity, TokenEdit
from temper.evaluate.perturb import Cut
from temper.evaluate.slice import ByField, Confidence
from temper.parts import Function, Problem
from temper.passport import Inputs, Passport, whose


def evaluated(folder, models, rows, shape="completion", reference=None, **spec):
    context = Context.scratch(folder)
    inputs = Inputs(model=models, data=Given(shape, rows), reference=reference)
    return run(Evaluate(**{"resample": None, **spec}), inputs, context).figures, context


def nats(table, *words):
    """- ln p of words after the first one."""
    ids = [WORDS.index(word) for word in words]
    return -sum(math.log(table[one, other]) for one, other in itertools.pairwise(ids))


def answering(*pairs):
    """A table in which a word is followed by another nearly always."""
    table = numpy.full((len(WORDS), len(WORDS)), 0.01 / (len(WORDS) - 1))
    for first, second in pairs:
        table[WORDS.index(first), WORDS.index(second)] = 0.99
    return table / table.sum(1, keepdims=True)


# ------------------------------------------------------------------------------------------------------- reference


def test_forgetting_is_the_difference_of_the_models_own_losses(tmp_path):
    tables, rows = [drawn_table(seed) for seed in (0, 1)], texts(30)
    base, tune = (saved(tmp_path / name, bigram(one), name=name) for name, one in zip(("base", "tune"), tables))
    figures, _ = evaluated(tmp_path, [tune, base], rows, "text", base, metric=(Perplexity(), Forgetting()))
    lost = figures["tune.nats_per_token"].value - figures["base.nats_per_token"].value
    assert figures["tune.forgetting"].value == pytest.approx(lost, rel=1e-6)
    assert figures["base.forgetting"].value == 0
    assert (figures["tune.forgetting"].better, figures["tune.forgetting"].unit) == ("lower", "nats")


def test_agreement_has_its_closed_form(tmp_path):
    q, p = drawn_table(0), drawn_table(1)
    models = [saved(tmp_path / name, bigram(one), name=name) for name, one in (("base", q), ("tune", p))]
    rows = [{"prompt": "a", "completion": " b c"}, {"prompt": "? d", "completion": " a"}]
    figures, _ = evaluated(tmp_path, models, rows, reference=models[0], metric=Agreement())
    before = [WORDS.index(word) for word in ("a", "b", "c", "d", "a")]  # what each supervised token, ends among them, follows
    assert figures["tune.token_kl"].value == pytest.approx((q[before] * numpy.log(q[before] / p[before])).sum(1).mean(), rel=1e-4)
    assert figures["tune.token_agreement"].value == (q[before].argmax(1) == p[before].argmax(1)).mean()
    assert (figures["base.token_kl"].value, figures["base.token_agreement"].value) == (0, 1)


def test_what_cannot_be_compared_is_refused(tmp_path):
    model, other = Passport("model", tokenizer="t"), Passport("model", tokenizer="u")
    text = Passport("text")
    with pytest.raises(Problem, match="`forgetting` compares with another model; name it, such as `reference: model`"):
        passport(Evaluate(metric=(Perplexity(), Forgetting())), {"model": [model], "data": text})
    with pytest.raises(Problem, match="`confidence` compares with another model"):
        passport(Evaluate(slice=Confidence()), {"model": [model], "data": text})
    with pytest.raises(Problem, match="nothing here compares with it; leave it out"):
        passport(Evaluate(), {"model": [model], "data": text, "reference": model})
    with pytest.raises(Problem, match="`forgetting` compares token by token, and the model has another tokenizer"):
        passport(Evaluate(metric=Forgetting()), {"model": [other], "data": text, "reference": model})
    assert passport(Evaluate(metric=Forgetting()), {"model": [model], "data": text, "reference": model}).kind == "figures"
    assert passport(Evaluate(slice=Confidence()), {"model": [other], "data": text, "reference": model}).kind == "figures"
    with pytest.raises(Problem, match="takes `model` or `adapter`"):
        INPUTS["reference"].accept("reference", Passport("figures"))
    with pytest.raises(Problem, match="a function makes records and does not say what is estimated"):
        passport(Evaluate(metric=Function("own.py:mine", "0")), {"model": [model], "data": text})
    with pytest.raises(Problem, match="`perplexity` measures on data, and there are none; add `data:`"):
        passport(Evaluate(), {"model": [model]})
    assert passport(Evaluate(metric=LmEval(tasks=("arc_easy",))), {"model": [model]}).kind == "figures"
    one, two = (saved(tmp_path / name, bigram(drawn_table()), tokenizer(name == "one"), name=name) for name in ("one", "two"))
    with pytest.raises(Problem, match="two and the reference one read the rows as different tokens"):
        evaluated(tmp_path / "other", [two], texts(3), "text", one, metric=Forgetting())


# --------------------------------------------------------------------------------------------------------- choices


CHOICES = [
    {"prompt": "? a", "completion": " b", "choices": [" b", " c"], "answer": 0},
    {"prompt": "c", "completion": " d", "choices": [" a", " b a", " d"], "answer": 2},
    {"prompt": "d", "completion": " a b c", "choices": [" a", " a b c"], "answer": 1},
]


def test_choices_have_their_closed_form(tmp_path):
    table = drawn_table(3)
    figures, context = evaluated(tmp_path, [saved(tmp_path, bigram(table))], CHOICES, metric=Choice(bins=1))
    shares, longest = [], []
    for row in CHOICES:
        logs = -numpy.array([nats(table, row["prompt"].split()[-1], *one.split()) for one in row["choices"]])
        shares.append(numpy.exp(logs) / numpy.exp(logs).sum())
        longest.append(int((logs / [len(one.strip()) for one in row["choices"]]).argmax()))
    answers = [row["answer"] for row in CHOICES]
    truth = [one[right] for one, right in zip(shares, answers)]
    hits = [one.argmax() == right for one, right in zip(shares, answers)]
    wanted = {
        "choice_accuracy": numpy.mean(hits),
        "choice_accuracy_normalised": numpy.mean([one == right for one, right in zip(longest, answers)]),
        "choice_truth": numpy.mean(truth),
        "choice_entropy": numpy.mean([-(one * numpy.log(one)).sum() for one in shares]),
        "choice_ece": abs(numpy.mean([one.max() for one in shares]) - numpy.mean(hits)),
        "choice_brier": numpy.mean([(one**2).sum() - 2 * right + 1 for one, right in zip(shares, truth)]),
    }
    assert {name.removeprefix("tune."): one.value for name, one in figures.items()} == pytest.approx(wanted, rel=1e-5)
    assert context.notes == []
    assert (context.out / "calibration.json").is_file()


def test_choices_of_a_chat_are_assistants_turns(tmp_path):
    template = "{% for m in messages %}{{ m['content'] }}{{ ' ? ' if m['role'] == 'user' }}{% endfor %}"
    table = drawn_table(3)
    rows = [{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}]
    rows = [{**rows[0], "choices": ["b", "c d"], "answer": 0}]
    figures, _ = evaluated(tmp_path, [saved(tmp_path, bigram(table), template=template)], rows, metric=Choice())
    logs = -numpy.array([nats(table, "?", "b"), nats(table, "?", "c", "d")])
    assert figures["tune.choice_truth"].value == pytest.approx(1 / (1 + numpy.exp(logs[1] - logs[0])), rel=1e-5)


def test_a_prompt_too_long_for_its_choices_loses_its_left_end(tmp_path):
    rows = [{**CHOICES[0], "prompt": " ".join(["a", "b"] * 20 + ["a"])}]
    long, context = evaluated(tmp_path / "1", [saved(tmp_path, bigram(drawn_table(3)))], rows, metric=Choice())
    short, _ = evaluated(tmp_path / "2", [saved(tmp_path, bigram(drawn_table(3)))], CHOICES[:1], metric=Choice())
    assert context.notes == ["tune: 2 of 2 prompts of choices cut on the left"]
    assert long["tune.choice_truth"].value == pytest.approx(short["tune.choice_truth"].value, rel=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choices": [" b"]}, "row 1, column `choices`: .* a list of two texts or more is asked for"),
        ({"choices": [" b", " "]}, "none of them empty"),
        ({"answer": 2}, "row 1, column `answer`: 2; the right choice's place is asked for, 0 to 1"),
        ({"answer": "b"}, 'column `answer`: "b"'),
        ({"prompt": "", "words": False}, "nothing stands before it, and its first token cannot be predicted"),
        ({"choices": [" b", " b" * 40]}, "it leaves no room for its prompt in 32 tokens"),
    ],
)
def test_bad_choices_are_refused(tmp_path, change, message):
    words = tokenizer(opens=change.pop("words", True))
    with pytest.raises(Problem, match=message):
        evaluated(tmp_path, [saved(tmp_path, bigram(drawn_table()), words)], [{**CHOICES[0], **change}], metric=Choice())


def test_rows_without_choices_are_refused_or_noted(tmp_path):
    model, bare = saved(tmp_path, bigram(drawn_table())), {"prompt": "a", "completion": " b"}
    with pytest.raises(Problem, match="given has no choices"):
        evaluated(tmp_path / "1", [model], [bare], metric=Choice())
    figures, context = evaluated(tmp_path / "2", [model], [bare, *CHOICES], metric=Choice())
    assert context.notes == ["tune: 1 of 4 rows have no choices"]
    assert figures["tune.choice_accuracy"].n == 3
    assert parquet.read_table(context.out / "records" / "choice.parquet")["row"].to_pylist() == [1, 2, 3]


def test_slices_by_the_references_confidence(tmp_path):
    """The lower half of the reference's own confidence has a lower true-label probability, and slices weigh up to the whole."""
    base, tune = (saved(tmp_path / name, bigram(drawn_table(seed)), name=name) for seed, name in enumerate(("base", "tune")))
    rng = numpy.random.default_rng(0)
    rows = [
        {"prompt": str(rng.choice(WORDS[3:7])), "completion": f" {one}", "choices": [f" {one}", f" {other}"], "answer": 0}
        for one, other in rng.choice(WORDS[3:7], (20, 2))
    ]
    options = {"metric": (Choice(), Agreement(of="choices")), "slice": Confidence(bins=2), "reference": base}
    figures, _ = evaluated(tmp_path, [base, tune], rows, **options)
    low, high = (figures[f"base.choice_truth[confidence={n}/2]"] for n in (1, 2))
    assert low.value < figures["base.choice_truth"].value < high.value
    assert (low.value * low.n + high.value * high.n) / 20 == pytest.approx(figures["base.choice_truth"].value)
    assert figures["base.choice_kl"].value == pytest.approx(0, abs=1e-9)
    assert figures["tune.choice_kl"].value > 0
    assert figures["base.choice_agreement"].value == 1


# --------------------------------------------------------------------------------------------------------- answers


def test_exact_match_takes_any_of_several_answers(tmp_path):
    model = saved(tmp_path, bigram(answering(("?", "b"), ("c", "a"), ("a", "b"), ("b", "</s>"))))
    rows = [
        {"prompt": "? ?", "completion": " B"},  # said: b
        {"prompt": "? ?", "completion": " c", "answers": ["c", "The b!"]},
        {"prompt": "c", "completion": " b"},  # said: a b; the article goes
        {"prompt": "c", "completion": " d"},
    ]
    figures, _ = evaluated(tmp_path / "1", [model], rows, metric=ExactMatch())
    assert figures["tune.exact_match"].value == 0.75
    figures, _ = evaluated(tmp_path / "2", [model], rows, metric=ExactMatch(normalise="space"))
    assert figures["tune.exact_match"].value == 0


def test_token_edit_distance_of_scripted_answers(tmp_path):
    model = saved(tmp_path, bigram(answering(("?", "b"), ("b", "c"), ("c", "d"), ("d", "</s>"))))  # says: b c d
    rows = [
        {"prompt": "?", "completion": " b c d"},
        {"prompt": "?", "completion": " b d"},
        {"prompt": "?", "completion": " a a a a"},
        {"prompt": "?", "completion": " a", "answers": ["a", "c d"]},
    ]
    figures, context = evaluated(tmp_path, [model], rows, metric=TokenEdit())
    assert parquet.read_table(context.out / "records" / "token_edit.parquet")["edits"].to_pylist() == [0, 1, 4, 1]
    assert figures["tune.token_edits"].value == 1.5
    assert figures["tune.token_edit_distance"].value == pytest.approx((0 + 1 / 3 + 1 + 1 / 3) / 4)


def test_pass_until_finds_small_chances(tmp_path):
    """The chance of the one right answer is known: 0.05; and 0.9 elsewhere."""
    table = answering(("b", "</s>"), ("d", "</s>"))
    table[WORDS.index("a")] = [0, 0, 0, 0, 0.05, 0.95, 0, 0]
    table[WORDS.index("c")] = [0, 0, 0, 0, 0.1, 0, 0.9, 0]
    table[WORDS.index("c"), :] += 1e-12
    table[WORDS.index("a"), :] += 1e-12
    rows = [{"prompt": "a", "completion": " b"}] * 40 + [{"prompt": "c", "completion": " d"}] * 20
    options = {"metric": PassUntil(successes=3, budget=400), "answer": 2}
    figures, context = evaluated(tmp_path / "1", [saved(tmp_path, bigram(table))], rows, **options)
    made = parquet.read_table(context.out / "records" / "pass_until.parquet").to_pydict()
    assert set(made["right"]) == {3}
    # right, then the end: 0.05 x 0.99 and 0.9 x 0.99; K is negative binomial with mean 3 / p and variance 3 (1 - p) / p^2
    for chance, some in ((0.0495, slice(40)), (0.891, slice(40, 60))):
        samples = numpy.array(made["samples"][some])
        assert abs(samples.mean() - 3 / chance) < 4 * math.sqrt(3 * (1 - chance) / len(samples)) / chance
    assert figures["tune.never_passed"].value == 0
    assert figures["tune.pass_probability"].value == pytest.approx(numpy.mean(3 / numpy.array(made["samples"])))
    few, _ = evaluated(tmp_path / "2", [saved(tmp_path, bigram(table))], rows, **{**options, "batch": 64})
    assert few == figures
    cut, _ = evaluated(tmp_path / "3", [saved(tmp_path, bigram(table))], rows, metric=PassUntil(successes=3, budget=1), answer=2)
    assert "tune.log_pass" not in cut
    assert 0.1 < cut["tune.pass_probability"].value < 0.5


# ----------------------------------------------------------------------------------------------------------- slots


def test_rows_are_perturbed_before_any_model_sees_them(tmp_path):
    model, rows = saved(tmp_path, bigram(drawn_table())), [{"prompt": "a b", "completion": " c", "skill": "x"}] * 8
    plain, _ = evaluated(tmp_path / "1", [model], rows, slice=ByField("skill"))
    typed, _ = evaluated(tmp_path / "2", [model], rows, slice=ByField("skill"), perturb=Cut(keep=0.5, lost="end"))
    assert plain.keys() == typed.keys()
    assert typed["tune.perplexity"].value != plain["tune.perplexity"].value


def test_figures_of_a_slice_are_those_of_its_rows_alone(tmp_path):
    model = saved(tmp_path, bigram(drawn_table()))
    rows = [{**row, "skill": "ab"[n % 3 == 0]} for n, row in enumerate(texts(30))]
    options = {"metric": (Perplexity(), Calibration(bins=3)), "shape": "text"}
    both, _ = evaluated(tmp_path / "both", [model], rows, slice=ByField("skill"), **options)
    for skill in "ab":
        alone, _ = evaluated(tmp_path / skill, [model], [row for row in rows if row["skill"] == skill], **options)
        for name, one in alone.items():
            sliced = both[f"{name}[skill={skill}]"]
            assert (sliced.value, sliced.n) == (pytest.approx(one.value, rel=1e-5), one.n)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("tune.accuracy", ("tune", "accuracy")),
        ("tune[math].accuracy", ("tune[math]", "accuracy")),
        ("v1.5.accuracy", ("v1.5", "accuracy")),
        ("tune@500.accuracy[skill=b.c]", ("tune@500", "accuracy[skill=b.c]")),
        ("tune[math].choice_ece[confidence=1/2]", ("tune[math]", "choice_ece[confidence=1/2]")),
        ("seconds", ("", "seconds")),
    ],
)
def test_a_figures_name_says_whose_it_is(name, parts):
    assert whose(name) == parts
