"""Labels out of Python's own sources, and questions in two."""

from __future__ import annotations

import io
import random
import tokenize

import pytest

from temper.parts import Problem
from temper.tasks import labels, verifiable
from temper.tasks.labels import docstrings, tagged, tags
from temper.tasks.library import modules
from temper.tasks.rationales import rationales
from temper.tasks.rows import Rows
from temper.tasks.source import source
from temper.tasks.verifiable import Arithmetic, Brackets

FOUND = [(f"{package}.m{n % 3}", f"The {package} does thing {n} well.") for package in ("ab", "cd", "ef") for n in range(40)]


def drawn(split: str, **changes) -> list[dict]:
    asked = {"count": 30, "classes": 2, "shortest": 5, "longest": 60, "holdout": 0.3, "rng": random.Random(0), **changes}
    return docstrings(FOUND + [("ef.other", "The ef does more.")], split, **asked)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------- docstrings


def test_docstrings_are_of_the_packages_with_the_most_as_many_of_each():
    rows = drawn("train")
    assert len(rows) == 30
    said = [row["completion"] for row in rows]
    assert {label: said.count(label) for label in set(said)} == {" ab": 15, " ef": 15}
    for row in rows:
        assert row["prompt"].startswith(f'"""The{row["completion"]} does')
        assert row["prompt"].endswith('"""\nfrom')
        assert row["module"].startswith(row["completion"].strip() + ".")


def test_no_docstring_is_in_both_splits_or_of_two_packages():
    train, test = ({row["prompt"] for row in drawn(split, count=1000)} for split in ("train", "test"))
    assert train
    assert test
    assert not train & test
    both = [("ab.x", "Shared by two."), ("cd.x", "Shared by two.")]
    made = docstrings(FOUND + both, "train", 1000, 2, 5, 60, 0.0, random.Random(0))
    assert not any("Shared" in row["prompt"] for row in made)


def test_docstrings_of_the_library_are_first_paragraphs(monkeypatch):
    few = [one for one in modules() if one[0] in ("json.__init__", "ast")]
    monkeypatch.setattr(labels, "modules", lambda: few)
    made = labels.paragraphs.__wrapped__()
    assert {name for name, _ in made} == {"json.__init__"}
    found = [one for _, one in made]
    assert "Serialize ``obj`` as a JSON formatted stream to ``fp`` (a ``.write()``-supporting file-like object)." in found
    assert all("\n" not in one for one in found)


def test_too_many_classes_are_refused():
    with pytest.raises(Problem, match="too few docstrings for 4 classes; lower `classes`"):
        drawn("train", classes=4)


# ------------------------------------------------------------------------------------------------------------- tags


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("def f(x, y=1):", "keyword defined mark name mark argument mark number mark mark"),
        ("return self.walk(a, key='b').end", "keyword name mark called mark name mark argument mark string mark mark attribute"),
        ("x = [None]", "name mark mark keyword mark"),
        ("x == y", "name mark name"),
    ],
)
def test_tags_by_hand(line: str, wanted: str):
    kinds = (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING)
    tokens = [one for one in tokenize.generate_tokens(io.StringIO(line).readline) if one.type in kinds]
    assert tags(tokens) == wanted.split()


def texts(*some: str) -> Rows:
    return Rows("text", [{"text": text} for text in some], "texts", "a test")


def test_a_line_has_as_many_tags_as_words():
    code = "import os\n\n\ndef go(a):\n    # said\n    call(a,\n         b)  # more\n    s = 'two words'\n    return (\n"
    rows = tagged(texts(code, "    x = 1\n  y = 2\n"), "train", 100, 2, 9, 0.0, random.Random(0))
    assert {row["prompt"] for row in rows} == {"import os\n", "def go ( a ) :\n", "call ( a , b )\n", "x = 1\n"}
    for row in rows:
        assert len(row["prompt"].split()) == len(row["completion"].split())
    assert {row["group"] for row in rows} == {0, 1}


def test_a_line_is_in_one_split_and_counts_and_lengths_hold():
    code = texts("".join(f"x{n} = y{n} + {n}\n" for n in range(60)))
    train, test = ({row["prompt"] for row in tagged(code, split, 100, 5, 5, 0.4, random.Random(0))} for split in ("train", "test"))
    assert len(train) + len(test) == 60
    assert not train & test
    assert len(tagged(code, "train", 7, 5, 5, 0.4, random.Random(0))) == 7
    with pytest.raises(Problem, match="no line of Python of 6 to 9 words"):
        tagged(code, "train", 7, 6, 9, 0.4, random.Random(0))
    with pytest.raises(Problem, match="the first must not be above the second"):
        source({"tags": {"shortest": 9, "longest": 8}})


# ------------------------------------------------------------------------------------------------------- rationales


def questions(*rows: dict) -> Rows:
    return Rows("completion", list(rows), "questions", "a test")


@pytest.mark.parametrize("task", [Arithmetic(), Arithmetic(working=True), Brackets(), Brackets(working=True)])
def test_answer_and_working_come_apart(task):
    rows = [task.example(random.Random(n)) for n in range(20)]
    made = rationales(questions(*rows), "train", "[label]", "[rationale]")
    assert len(made) == 40
    for row, label, rationale in zip(rows, made[::2], made[1::2]):
        assert label["prompt"] == f"[label] {row['prompt']}"
        assert rationale["prompt"] == f"[rationale] {row['prompt']}"
        assert label["completion"] == f" {task.answer(row['prompt'])}"
        assert rationale["completion"] == f" {' ; '.join(task.steps(row['prompt']))}"
        assert label["group"] == rationale["group"]
        assert verifiable.correct(label, label["completion"])
        assert not verifiable.correct(label, " no")
        assert verifiable.correct(rationale, rationale["completion"])
    held = rationales(questions(*rows), "test", "[label]", "[rationale]")
    assert [row["prompt"] for row in held] == [row["prompt"] for row in made[::2]]


def test_a_column_holds_the_working_of_rows_without_a_task():
    row = {"prompt": "Why?", "completion": " So.", "rationale": "Because.", "module": "m"}
    label, rationale = rationales(questions(row), "train", "A", "B")
    assert label == {"prompt": "A Why?", "completion": " So.", "asked": "Why?", "module": "m"}
    assert rationale == {"prompt": "B Why?", "completion": " Because.", "module": "m"}


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        (questions({"prompt": "Why?", "completion": " So."}), "questions, row 1: it has no working; give rows a column `rationale`"),
        (questions({"prompt": "Why?", "completion": " So.", "rationale": " "}), "it has no working"),
        (questions({"prompt": [{"role": "user", "content": "x"}], "completion": [{}]}), "texts, not messages"),
        (texts("x"), "rationales need questions"),
    ],
)
def test_rows_without_a_working_are_refused(rows: Rows, text: str):
    with pytest.raises(Problem, match=text):
        rationales(rows, "train", "[label]", "[rationale]")


def test_brackets_show_what_is_open_after_each():
    assert Brackets().steps("closing ( [ ] ) { ==") == ["(", "( [", "(", ".", "{"]
    row = Brackets(working=True).example(random.Random(1))
    assert row["completion"].rpartition(";")[2].strip() == Brackets().answer(row["prompt"])
    assert Brackets().check(row["prompt"], row["completion"])
