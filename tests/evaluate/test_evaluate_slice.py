"""Which rows a slice puts together."""

from __future__ import annotations

import types

import numpy
import pytest
from bigrams import Given, bigram, drawn_table, saved
from bigrams import texts as texts_of_words
from scipy.stats import gmean

from temper.context import Context
from temper.evaluate.engine import Evaluate, run
from temper.evaluate.slice import ByField, Confidence, Length, beside
from temper.parts import Problem, build
from temper.passport import Inputs
from temper.tasks.rows import Rows


def texts(*lengths, **columns):
    return Rows("text", [{"text": "x" * length, **columns} for length in lengths], "given", "here")


def confidence(tmp_path, reference, rows, bins):
    context = Context.scratch(tmp_path)
    context.give("reference", reference)
    return Confidence(bins=bins).start(context)(rows)["confidence"]


def test_rows_by_the_most_frequent_values_of_a_column():
    rows = Rows(
        "text", [{"text": "a", "kind": kind} for kind in ("b", "a", 3, "a", None, "c", "b", True)] + [{"text": "a"}], "given", "here"
    )
    assert ByField(key="kind")(rows) == {"kind": ["b", "a", "3", "a", None, "c", "b", "True", None]}
    assert ByField(key="kind", most=2)(rows) == {"kind": ["b", "a", None, "a", None, None, "b", None, None]}
    assert ByField(key="kind", most=3)(rows)["kind"][2] == "3"  # of values as frequent, the first in the order of letters
    with pytest.raises(Problem, match="no row of given has a column `task` to slice by; name another column"):
        ByField()(rows)


def test_rows_by_length_in_groups_of_equal_size():
    rows = texts(5, 90, 7, 30, 2, 60, 8, 40)
    assert Length(bins=4)(rows) == {"length": ["1/4", "4/4", "2/4", "3/4", "1/4", "4/4", "2/4", "3/4"]}
    assert Length(bins=2)(texts(3, 3, 3, 9))["length"] == ["1/2", "1/2", "1/2", "2/2"]  # equal lengths share a group


def test_rows_by_length_between_edges():
    made = Length(edges=(10, 100))(texts(0, 9, 10, 99, 100, 5000))["length"]
    assert made == ["0-9", "0-9", "10-99", "10-99", "100-", "100-"]
    with pytest.raises(Problem, match=r"`edges` are \[100, 10\]; give them from small to large, each once"):
        build(Length, {"edges": [100, 10]})


def test_the_length_of_a_question_is_that_of_prompt_and_answer():
    rows = Rows("completion", [{"prompt": "abc", "completion": " de"}, {"prompt": "a", "completion": ""}], "given", "here")
    assert Length(edges=(5,))(rows)["length"] == ["5-", "0-4"]


def test_rows_by_the_references_mean_probability_of_their_tokens(tmp_path):
    shares = [[0.9, 0.1], [0.5], [0.2, 0.2, 0.2], [0.99]]
    nats = numpy.array([-numpy.log(one).sum() for one in shares])
    tokens = numpy.array([len(one) for one in shares])
    reference = types.SimpleNamespace(nats=(numpy.array([0, 1, 3, 4]), nats, tokens))  # nothing is predicted in row 2
    rank = numpy.argsort(numpy.argsort([gmean(one) for one in shares]))
    wanted = [f"{place + 1}/4" for place in rank]
    assert confidence(tmp_path, reference, texts(1, 1, 1, 1, 1), 4) == [*wanted[:2], None, *wanted[2:]]


def test_rows_with_choices_go_by_the_probability_of_the_true_one(tmp_path):
    rows = Rows("completion", [{"prompt": f"{n}", "completion": " a", "choices": [" a", " b"], "answer": 0} for n in range(6)], "given", "")
    choices = types.SimpleNamespace(row=numpy.arange(6), truth=numpy.array([0.9, 0.1, 0.5, 0.6, 0.2, 0.8]))
    made = confidence(tmp_path, types.SimpleNamespace(choices=choices), rows, 3)
    assert made == ["3/3", "1/3", "2/3", "2/3", "1/3", "3/3"]


def test_without_a_reference_nothing_can_be_compared(tmp_path):
    with pytest.raises(Problem, match="nothing gave `reference`"):
        Confidence().start(Context.scratch(tmp_path))


def test_slices_side_by_side():
    rows = texts(1, 50, kind="a")
    assert beside([Length(bins=2), ByField(key="kind")])(rows) == {"length": ["1/2", "2/2"], "kind": ["a", "a"]}
    with pytest.raises(Problem, match="two slices are called `length`"):
        beside([Length(), Length(bins=2)])(rows)


def test_figures_of_a_group_are_those_of_its_rows_alone(tmp_path):
    rows = [{**row, "kind": "even" if index % 2 == 0 else "odd"} for index, row in enumerate(texts_of_words(30))]
    model = saved(tmp_path, bigram(drawn_table()))

    def evaluated(name, given, **spec):
        inputs = Inputs(model=[model], data=Given("text", given), reference=model)
        return run(Evaluate(**spec), inputs, Context.scratch(tmp_path / name)).figures

    whole = evaluated("1", rows, slice=(ByField(key="kind"), Confidence(bins=3)))
    alone = evaluated("2", rows[::2])
    one, other = whole["tune.perplexity[kind=even]"], alone["tune.perplexity"]
    assert (one.value, one.low, one.high, one.n) == (pytest.approx(other.value), pytest.approx(other.low), pytest.approx(other.high), 15)
    sure = [whole[f"tune.nats_per_token[confidence={place}/3]"].value for place in (1, 2, 3)]
    assert sure[0] > whole["tune.nats_per_token"].value > sure[2], "the reference is the model itself"
    assert sure == sorted(sure, reverse=True)
