"""Every task's own answers pass its checker, and nothing else does."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from temper.parts import Problem, Scope, fill
from temper.tasks import questions, verifiable
from temper.tasks.verifiable import (
    Arithmetic,
    Brackets,
    Instructions,
    ReverseLetters,
    ReverseWords,
    SortLetters,
    SortNumbers,
    SortWords,
    Verifiable,
    correct,
    formed,
)

TASKS = [cls() for cls in Verifiable.__slot__.parts().values()]
TASKS += [
    Arithmetic(digits=3, operation="-", working=True),
    Arithmetic(digits=1, operation="+", working=True),
    Brackets(kinds=1, depth=2, shortest=1),
    Brackets(kinds=4, shortest=20, longest=20),
    Instructions(skills=("count",), marks=4, shortest=1, longest=12, alphabet="in,"),
    ReverseLetters(words=("abc", "def", "aa")),
    SortLetters(alphabet="ab", shortest=1),
    SortLetters(descending=True),
    SortNumbers(digits=1),
    SortWords(words=("b", "a", "c"), shortest=3, longest=3),
]

seeds = st.integers(0, 2**32)
tasks = st.sampled_from(TASKS)


@given(tasks, seeds)
def test_own_answers_pass(task, seed):
    row = task.example(random.Random(seed))
    assert task.check(row["prompt"], row["completion"])
    assert task.check(row["prompt"], f"\n\t{row['completion']}  \n")
    assert correct(row, row["completion"])  # also by the settings-free checker that rows name
    assert row["completion"].startswith(" ")
    assert row == task.example(random.Random(seed))


@given(tasks, seeds, st.data())
def test_corrupted_answers_fail(task, seed, data):
    row = task.example(random.Random(seed))
    answer = task.answer(row["prompt"])
    at = data.draw(st.integers(0, len(answer) - 1))
    other = data.draw(st.sampled_from("abz019 )]x,"))
    changed = [
        answer[:at] + other + answer[at + 1 :],
        answer[:at] + answer[at + 1 :],
        answer[:at] + other + answer[at:],
        "",
        answer + answer,
    ]
    for text in changed:
        assert task.check(row["prompt"], text) == (text.strip() == answer)
    assert not task.check(row["prompt"], answer.replace(" ", "  ")) or " " not in answer
    assert not task.check(row["prompt"], answer + " .")


@given(seeds)
def test_answers_by_other_means(seed):
    """Each task's answer against an independent way to work it out."""
    rng = random.Random(seed)
    prompt = SortLetters().question(rng)
    letters = prompt.removeprefix("sorted( ").removesuffix(" ) ==").split()
    assert SortLetters().answer(prompt) == " ".join(letter for code in range(128) for letter in letters if ord(letter) == code)
    prompt = SortNumbers(digits=3).question(rng)
    numbers = [int(one.replace(" ", "")) for one in prompt.removeprefix("sorted( ").removesuffix(" ) ==").split(",")]
    told = [int(one.replace(" ", "")) for one in SortNumbers().answer(prompt).split(",")]
    assert sorted(numbers) == told
    prompt = Arithmetic(digits=4).question(rng)
    assert int(Arithmetic().answer(prompt).replace(" ", "")) == eval(prompt.removesuffix("==").replace(" ", ""))
    prompt = Brackets(kinds=4).question(rng)
    whole = prompt.removeprefix("closing ").removesuffix("==") + Brackets().answer(prompt)
    whole = whole.replace(" ", "")
    while (shorter := whole.replace("()", "").replace("[]", "").replace("{}", "").replace("<>", "")) != whole:
        whole = shorter
    assert whole == ""
    prompt = ReverseWords().question(rng)
    assert ReverseWords().answer("reversed( " + ReverseWords().answer(prompt) + " ) ==") == prompt[len("reversed( ") : -len(" ) ==")]


HAND_MADE = [
    (SortLetters(), "sorted( d b a b ) ==", "a b b d"),
    (SortLetters(), "sorted( d b a b , reverse ) ==", "d b b a"),
    (SortWords(), "sorted( self def import ) ==", "def import self"),
    (SortNumbers(), "sorted( 4 1 , 7 , 1 2 ) ==", "7 , 1 2 , 4 1"),
    (ReverseLetters(), "reversed( d b a ) ==", "a b d"),
    (ReverseWords(), "reversed( self def import ) ==", "import def self"),
    (Arithmetic(), "4 7 + 3 8 ==", "8 5"),
    (Arithmetic(), "1 0 - 1 0 ==", "0"),
    (Brackets(), "closing ( [ ] { ==", "} )"),
    (Instructions(), "sort d b a b , answer in [ ] ==", "[ a b b d ]"),
    (Instructions(), "reverse d b a , answer in < > ==", "< a b d >"),
    (Instructions(), "last d b a , answer in { } ==", "{ a }"),
    (Instructions(), "count b in b d b , answer in ( ) ==", "( 2 )"),
    (Instructions(), "add 7 0 8 , answer in ( ) ==", "( 1 5 )"),
]


@pytest.mark.parametrize(("task", "prompt", "answer"), HAND_MADE)
def test_hand_made(task, prompt, answer):
    assert task.answer(prompt) == answer
    assert task.check(prompt, f" {answer}\n")
    assert not task.check(prompt, answer[:-1])


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("4 7 + 3 8 ==", " 7 + 8 = 1 5 ; 4 + 3 + 1 = 8 ; 8 5"),
        ("9 6 - 1 4 ==", " 6 - 4 = 2 ; 9 - 1 = 8 ; 8 2"),
        ("7 0 - 6 2 ==", " 1 0 - 2 = 8 ; 7 - 6 - 1 = 0 ; 8"),
        ("1 0 0 - 1 ==", " 1 0 - 1 = 9 ; 1 0 - 0 - 1 = 9 ; 1 - 0 - 1 = 0 ; 9 9"),
        ("5 + 9 ==", " 5 + 9 = 1 4 ; 1 4"),
    ],
)
def test_working_by_hand(monkeypatch, prompt, completion):
    monkeypatch.setattr(Arithmetic, "question", lambda self, rng: prompt)
    assert Arithmetic(working=True).example(random.Random(0))["completion"] == completion
    assert Arithmetic().check(prompt, completion)
    assert not Arithmetic().check(prompt, completion + " ; 1")


@given(seeds)
def test_every_line_of_the_working_holds(seed):
    row = Arithmetic(digits=3, working=True).example(random.Random(seed))
    *lines, _ = row["completion"].split(";")
    for line in lines:
        left, right = line.replace(" ", "").split("=")
        assert eval(left) == int(right)


@given(st.integers(1, 5), st.integers(0, 6), st.integers(2, 5), st.integers(1, 4), seeds)
def test_brackets_keep_their_settings(shortest, more, depth, kinds, seed):
    task = Brackets(shortest=shortest, longest=shortest + more, depth=depth, kinds=kinds)
    marks = task.question(random.Random(seed)).removeprefix("closing ").removesuffix(" ==").split(" ")
    assert shortest <= len(marks) <= shortest + more
    assert set(marks) <= set("([{<"[:kinds] + ")]}>"[:kinds])
    open_ = [sum(1 if mark in "([{<" else -1 for mark in marks[: end + 1]) for end in range(len(marks))]
    assert max(open_) <= depth
    assert open_[-1] > 0


@given(seeds)
def test_lengths_are_kept(seed):
    for task in (SortLetters(shortest=2, longest=3), ReverseWords(shortest=2, longest=3)):
        prompt = task.question(random.Random(seed))
        assert 2 <= len(prompt[prompt.index("(") + 2 : prompt.index(" )")].split()) <= 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sort-letters": {"shortest": 9}}, "`sort-letters`: `shortest` is 9 and `longest` is 6; the first must not be above the second"),
        (
            {"sort-words": {"words": ["a", "b"]}},
            "`sort-words`: `words` holds 2, fewer than the 4 that `longest` asks for; give more, or lower `longest`",
        ),
        (
            {"reverse-words": {"words": ["a", "b c", "d", "e", "f", "g"]}},
            '`reverse-words`: `words` holds "b c"; white space and ( ) cannot be listed',
        ),
        ({"sort-letters": {"alphabet": "aba"}}, '`sort-letters`: `alphabet` holds "a" twice; name each once'),
        ({"sort-letters": {"alphabet": ""}}, '`sort-letters.alphabet`: "": must have at least 1 characters'),
        ({"arithmetic": {"operation": "*"}}, '`arithmetic.operation`: "*" is not a choice; there is `+` · `-` · `both`'),
        ({"brackets": {"depth": 1}}, "`brackets.depth`: 1: must be at least 2"),
        ({"brackets": {"kind": 1}}, "`brackets.kind`: part `brackets` has no setting `kind`; did you mean `kinds`?"),
        ({"instructions": {"skills": []}}, "`instructions.skills`: []: must have at least 1 items"),
        ({"instructions": {"skills": ["sort", "sort"]}}, '`instructions`: `skills` holds "sort" twice; name each once'),
        ({"instructions": {"alphabet": "ab[]"}}, '`instructions`: `alphabet` holds "[", which marks answers; leave it out'),
        ("sort-word", "slot `task` has no part `sort-word`; did you mean `sort-words`?"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(Problem) as caught:
        fill(Verifiable.__slot__, settings, field="task")
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("task", "prompt", "message"),
    [
        (SortWords(), "reversed( a b ) ==", '"reversed( a b ) ==" is no question of this task, which are written `sorted( ... ) ==`'),
        (SortNumbers(), "sorted( a , 1 ) ==", '"sorted( a , 1 ) ==": "a" is no whole number'),
        (Arithmetic(), "47 + 38 ==", '"47 + 38 ==" is no question of this task, which are written such as `4 7 + 3 8 ==`'),
        (
            Instructions(),
            "sort b a ==",
            '"sort b a ==" is no question of this task, which are written such as `sort b a , answer in [ ] ==`',
        ),
        (
            Instructions(),
            "add b 1 , answer in [ ] ==",
            '"add b 1 , answer in [ ] ==" is no question of this task, which are written such as `sort b a , answer in [ ] ==`',
        ),
        (Brackets(), "closing x ==", '"closing x ==" is no question of this task, which are written such as `closing ( [ ==`'),
        (Brackets(), "closing ( ] ==", '"closing ( ] ==": `]` closes nothing that is open'),
    ],
)
def test_a_strange_prompt_is_refused(task, prompt, message):
    with pytest.raises(Problem) as caught:
        task.check(prompt, "a")
    assert str(caught.value) == message


@given(seeds, st.data())
def test_form_and_content_of_an_instruction_are_apart(seed, data):
    task = Instructions(marks=4)
    row = task.example(random.Random(seed))
    left, *content, right = row["completion"].split()
    assert row["skill"] == row["prompt"].split()[0]
    other = data.draw(st.sampled_from([marks for marks in ("()", "[]", "{}", "<>") if marks != left + right]))
    ill = [" ".join(content), f"{other[0]} {' '.join(content)} {other[1]}", f"{left} {' '.join(content)}", f"{left} {right}", ""]
    ill += [f"{row['completion']} {row['completion']}", f"{row['completion']} .", f"{left}{' '.join(content)}{right}"]
    for text in ill:
        assert not task.formed(row["prompt"], text)
        assert not task.check(row["prompt"], text)
    wrong = f" {left} {' '.join([*content, 'z'])} {right}\n"
    assert task.formed(row["prompt"], wrong)
    assert not task.check(row["prompt"], wrong)
    assert formed(row, row["completion"])
    assert not formed(row, ill[0])


def test_the_form_that_a_row_asks_for():
    row = {"prompt": "1 + 1?", "completion": " so #### 2", "format": r".*#### \d+"}
    assert formed(row, " hence #### 3\n")
    assert not formed(row, "hence 2")
    assert formed({"prompt": "1 + 1?", "completion": " 2"}, "anything")
    assert formed({"prompt": "1 + 1 ==", "completion": " 2", "task": "arithmetic"}, "anything")
    with pytest.raises(Problem, match=r'^column `format`: "\(" is no regular expression: '):
        formed({**row, "format": "("}, "a")


def test_answers_in_messages_are_judged_by_their_text():
    row = {"prompt": [{"role": "user", "content": "1 + 1?"}], "completion": [{"role": "assistant", "content": "so 2"}], "format": "so .*"}
    assert questions.right(row, " so 2\n")
    assert not questions.right(row, "so 3")
    assert questions.formed(row, "so 3")
    assert not questions.formed(row, "2")
    assert questions.formed({**row, "format": None}, "2")


def test_a_changed_prompt_is_judged_by_what_was_asked():
    row = {"prompt": "sorted( b x ) ==", "completion": " a b", "task": "sort-letters"}
    assert correct(row, " b x")
    assert not correct({**row, "asked": "sorted( b a ) =="}, " b x")
    assert correct({**row, "asked": "sorted( b a ) =="}, " a b")


def test_rows_without_a_task_are_compared():
    row = {"prompt": "Capital of France?", "completion": " Paris"}
    assert correct(row, "Paris\n")
    assert not correct(row, "paris")


def test_rows_of_a_task_are_worked_out_and_not_compared():
    assert correct({"prompt": "1 + 1 ==", "completion": "stale", "task": "arithmetic"}, " 2")
    assert not correct({"prompt": "1 + 1 ==", "completion": "stale", "task": "arithmetic"}, "stale")


@pytest.mark.parametrize("task", ["summarise", "arithmetic", 3, None, ["a"]])
def test_a_task_column_of_the_datas_own_is_no_checker(task):
    row = {"prompt": "What is 1 + 1?", "completion": " two", "task": task}
    assert correct(row, "two")
    assert not correct(row, "2")


def test_a_recipes_own_task_checks_its_rows(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from temper.parts import part\nfrom temper.tasks.verifiable import Verifiable\n\n\n"
        "@part\nclass Doubled(Verifiable):\n    def question(self, rng): return f'2 * {rng.randrange(99)} =='\n\n"
        "    def answer(self, prompt): return str(2 * int(prompt[4:-3]))\n"
    )
    scope = Scope.of(tmp_path, ["mine.py"])
    row = fill(Verifiable.__slot__, "doubled", scope=scope, field="task").example(random.Random(0))
    assert row["task"] == "doubled"
    assert correct({**row, "completion": "stale"}, row["completion"])
    assert not correct({**row, "completion": "stale"}, "stale")


def test_every_task_has_a_hand_made_case():
    assert {type(task) for task, _, _ in HAND_MADE} == set(Verifiable.__slot__.parts().values())


def test_the_built_in_words_are_plain():
    assert all(word.isalpha() and word.islower() for word in verifiable.COMMON)
    assert len(set(verifiable.COMMON)) == len(verifiable.COMMON) == 100
