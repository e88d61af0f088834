"""What happens to prompts, and to nothing else."""

from __future__ import annotations

import random
import string
from collections import Counter

import pytest
from bigrams import Given, bigram, drawn_table, saved
from hypothesis import given
from hypothesis import strategies as st

from temper.context import Context
from temper.evaluate.engine import Evaluate, run
from temper.evaluate.perturb import Cut, Typos, in_turn, mistyped, shortened
from temper.parts import Problem, build
from temper.passport import Inputs
from temper.tasks.rows import Rows
from temper.tasks.source import Task
from temper.tasks.verifiable import SortLetters, correct

TEXT = "The quick brown fox, 27 years old, jumps over (what else?) the lazy dog.\n\tTwice."


def typos(tmp_path, seed=0, **settings):
    return Typos(**settings).start(Context.scratch(tmp_path, seed=seed).at("perturb"))


def asking(*prompts):
    return Rows(
        "completion",
        [{"prompt": one, "completion": " yes", "module": "m", "choices": [" yes", " no"], "answer": 0} for one in prompts],
        "given",
        "here",
    )


@given(st.text(), st.integers(0, 99))
def test_no_mistakes_at_rate_0(text, seed):
    assert mistyped(text, 0.0, ("swap", "drop", "replace"), random.Random(seed)) == text


@given(st.text(alphabet=string.printable), st.integers(0, 99))
def test_each_letter_has_a_mistake_at_rate_1(text, seed):
    rng = random.Random(seed)
    letters = set(string.ascii_letters)
    assert mistyped(text, 1.0, ("drop",), rng) == "".join(one for one in text if one not in letters)
    replaced = mistyped(text, 1.0, ("replace",), rng)
    assert len(replaced) == len(text)
    for before, after in zip(text, replaced):
        assert (before == after) == (before not in letters)
        assert before.isupper() == after.isupper()
    swapped = mistyped(text, 1.0, ("swap",), rng)
    assert len(swapped) == len(text)
    assert [one for one in swapped if one not in letters] == [one for one in text if one not in letters]


def test_letters_are_exchanged_in_pairs():
    assert mistyped("abcd ef, 12", 1.0, ("swap",), random.Random(0)) == "badc fe, 12"


def test_the_share_and_kinds_of_mistakes():
    """Dropped letters and replaced ones, counted apart: each as often as the rate over the kinds says."""
    text, rate = "x" * 30_000, 0.1
    made = mistyped(text, rate, ("drop", "replace"), random.Random(0))
    dropped, replaced = len(text) - len(made), len(made) - made.count("x")
    for found in (dropped, replaced):
        assert found == pytest.approx(1500, abs=4 * (30_000 * 0.05 * 0.95) ** 0.5)
    assert len(Counter(made)) == 26


def test_a_prompts_typos_depend_on_seed_and_prompt_alone(tmp_path):
    one = typos(tmp_path, rate=0.3)(asking("a first question", "another question")).rows
    other = typos(tmp_path, rate=0.3)(asking("another question")).rows
    assert other[0] == one[1]
    assert typos(tmp_path, seed=1, rate=0.3)(asking("another question")).rows[0]["prompt"] != other[0]["prompt"]
    assert {key: value for key, value in one[0].items() if key != "prompt"} == {
        key: value for key, value in asking("").rows[0].items() if key != "prompt"
    }


def test_a_changed_question_of_a_task_is_judged_by_what_it_asked(tmp_path):
    rows = Task(task=SortLetters(), count=40).load("train")
    made = typos(tmp_path, rate=1.0, kinds=("replace",))(rows)
    for before, after in zip(rows.rows, made.rows):
        assert after["prompt"] != before["prompt"]
        assert after["asked"] == before["prompt"]
        assert correct(after, before["completion"])
    again = Cut(keep=0.3)(made)
    assert [row["asked"] for row in again.rows] == [row["prompt"] for row in rows.rows]


@pytest.mark.parametrize(
    ("keep", "lost", "wanted"),
    [
        (1.0, "start", " one  two\nthree four \n"),
        (0.5, "start", "three four \n"),
        (0.51, "start", "two\nthree four \n"),
        (0.5, "end", "one  two"),
        (0.0, "start", "four \n"),
        (0.0, "end", "one"),
    ],
)
def test_prompts_lose_words(keep, lost, wanted):
    assert shortened(" one  two\nthree four \n", keep, lost) == wanted
    assert shortened("", keep, lost) == ""


def test_of_chats_the_users_turns_change():
    turns = [{"role": role, "content": "one two three four"} for role in ("system", "user", "assistant", "user", "assistant")]
    made = Cut(keep=0.25)(Rows("chat", [{"messages": turns}], "given", "here")).rows[0]["messages"]
    assert [one["content"] for one in made] == ["one two three four", "four", "one two three four", "four", "one two three four"]
    asked = Rows("completion", [{"prompt": turns[:2], "completion": turns[2:3]}], "given", "here")
    made = Cut(keep=0.25)(asked).rows[0]
    assert [one["content"] for one in made["prompt"]] == ["one two three four", "four"]
    assert made["completion"] == turns[2:3]


def test_texts_have_no_prompt():
    with pytest.raises(Problem, match="given holds text rows, which have no prompt to change; give completion or chat rows"):
        Cut()(Rows("text", [{"text": "a"}], "given", "here"))


def test_one_after_the_other(tmp_path):
    rows, mistype = asking(TEXT), typos(tmp_path, rate=0.5)
    assert in_turn([Cut(), mistype])(rows) == mistype(Cut()(rows))
    assert in_turn([mistype, Cut()])(rows) == Cut()(mistype(rows))


def test_bad_settings_are_refused():
    with pytest.raises(Problem, match="must be at most 1"):
        build(Typos, {"rate": 5.0})
    with pytest.raises(Problem, match="must have at least 1 items"):
        build(Typos, {"kinds": []})


def test_models_are_asked_what_is_left(tmp_path):
    """A bigram model sees the last word alone: without it the answer is another, without the others the same."""
    rows = [{"prompt": "a b c d", "completion": " a"}, {"prompt": "b b d c", "completion": " b"}]
    model = saved(tmp_path, bigram(drawn_table()))

    def evaluated(name, given, **spec):
        return run(Evaluate(**spec), Inputs(model=[model], data=Given("completion", given)), Context.scratch(tmp_path / name)).figures

    plain = evaluated("1", rows)["tune.nats_per_token"]
    assert evaluated("2", rows, perturb=Cut(keep=0.5))["tune.nats_per_token"] == plain
    cut = evaluated("3", rows, perturb=Cut(keep=0.5, lost="end"))["tune.nats_per_token"]
    assert cut == evaluated("4", [{**row, "prompt": row["prompt"][:3]} for row in rows])["tune.nats_per_token"]
    assert cut.value != plain.value
