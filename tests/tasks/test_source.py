"""Sources are named in words; tasks and derived tasks never share a prompt between splits."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from temper.parts import Problem, Scope, dump, load_file
from temper.tasks import source as module
from temper.tasks.files import File
from temper.tasks.library import Library
from temper.tasks.rows import Rows
from temper.tasks.source import Cloze, Derive, Halves, Joined, Source, Task, draw, joined, source, words
from temper.tasks.verifiable import Arithmetic, Brackets, ReverseLetters, ReverseWords, SortLetters, SortWords, Verifiable, correct


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(50)))
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "a"}]}) + "\n")
    return tmp_path


def prompts(rows):
    return {row["prompt"] for row in rows.rows}


# --------------------------------------------------------------------------------------------------------- names


def test_names(folder):
    assert source("house:library") == Library()
    assert source("task:sort-words") == source("task:SortWords") == Task(task=SortWords())
    assert source("train.jsonl", folder) == File(path=str(folder / "train.jsonl"))
    assert source("org/name", folder) == source("hub:org/name", folder) == File(path="hub:org/name")
    assert source({"task": {"task": {"brackets": {"kinds": 1}}, "count": 5}}) == Task(task=Brackets(kinds=1), count=5)
    assert source({"library": None}) == Library()
    mixed = source(["task:sort-words", {"file": {"path": "train.jsonl", "test": "notes.txt"}}], folder)
    assert mixed == Joined((Task(), File(path=str(folder / "train.jsonl"), test=str(folder / "notes.txt"))))
    assert source(mixed, folder) == mixed
    assert source({"file": {"path": "hub:org/name", "test": "validation"}}, folder) == File(path="hub:org/name", test="validation")


def test_a_source_within_a_source(folder):
    assert source({"derive": {"source": "train.jsonl", "task": "reverse-words"}}, folder) == Derive(
        task=ReverseWords(), source=File(path=str(folder / "train.jsonl"))
    )
    inner = ["house:library", {"file": {"path": "train.jsonl"}}]
    assert source({"derive": {"source": inner}}, folder).source == (Library(), File(path=str(folder / "train.jsonl")))
    assert source(Derive(source=File(path="train.jsonl")), folder) == Derive(source=File(path=str(folder / "train.jsonl")))


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        (
            "trian.jsonl",
            'no file or folder "trian.jsonl"; did you mean `train.jsonl`?; data are a path (relative to the recipe), '
            "`hub:owner/name`, `house:NAME` or `task:NAME`",
        ),
        (
            "nothing/like.jsonl",
            'no file or folder "nothing/like.jsonl"; data are a path (relative to the recipe), '
            "`hub:owner/name`, `house:NAME` or `task:NAME`",
        ),
        (
            "houselibrary",
            'no file or folder "houselibrary"; did you mean `house:library`?; data are a path (relative to the recipe), '
            "`hub:owner/name`, `house:NAME` or `task:NAME`",
        ),
        ("house:libary", "no house data `libary`; did you mean `library`?"),
        ("task:sortwords2", "slot `task` has no part `sortwords2`; did you mean `sort-words`?"),
        (
            {"file": {"path": "notes.text"}},
            '`file.path`: no file or folder "notes.text"; did you mean `notes.txt`?; give a path relative to the recipe',
        ),
        (
            {"file": {"path": "notes.txt", "test": "trains.jsonl"}},
            '`file.test`: no file or folder "trains.jsonl"; did you mean `train.jsonl`?; give a path relative to the recipe',
        ),
        ({"file": {}}, "`file`: part `file` needs `path`, which is missing"),
        ({"file": {"path": "notes.txt", "hold_out": 0.1, "x": 1}}, None),
        ({"file": {"path": "notes.txt", "holdout": 2.0}}, "`file.holdout`: 2.0: must be at most 1"),
        (
            {"file": {"path": "a", "columns": {"txt": "b"}}},
            "`file`: `columns` gives a name to `txt`, which no shape of data reads; did you mean `text`?",
        ),
        ({"fiel": {"path": "a"}}, "slot `data` has no part `fiel`; did you mean `file`?"),
        ({"derive": {"source": "house:libary"}}, "`derive.source`: no house data `libary`; did you mean `library`?"),
        (
            {"derive": {"task": "arithmetic"}},
            "`derive`: task `arithmetic` asks nothing about words; there is "
            "`reverse-letters` · `reverse-words` · `sort-letters` · `sort-words`",
        ),
        (["task:sort-words", "house:x"], "`1`: no house data `x`; there is `library`"),
        ([], "an empty list names no data; name a source"),
        (
            3,
            "3: slot `data` takes the name of a part; there is `cloze` · `derive` · `docstrings` · `file` · `halves` · `library` · "
            "`rationales` · `tags` · `task`",
        ),
    ],
)
def test_bad_names(folder, ref, message):
    with pytest.raises(Problem) as caught:
        source(ref, folder)
    if message is None:
        message = (
            "`file.x`: part `file` has no setting `x`; there is `buffer` · `columns` · `holdout` · `name` · "
            "`path` · `revision` · `split` · `streaming` · `test` · `test_count`"
        )
    assert str(caught.value) == message


def test_a_recipes_own_source(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from temper.parts import part\nfrom temper.tasks.source import Source\n\n\n"
        "@part\nclass Mine(Source):\n    size: int = 1\n\n    def load(self, split): ...\n\n    def digest(self): return 'x'\n"
    )
    scope = Scope.of(tmp_path, ["mine.py"])
    assert source({"mine": {"size": 2}}, tmp_path, scope) == load_file(tmp_path / "mine.py").Mine(size=2)


def test_the_slot_holds_sources_alone():
    assert set(Source.__slot__.parts()) == {"cloze", "derive", "docstrings", "file", "halves", "library", "rationales", "tags", "task"}


# --------------------------------------------------------------------------------------------------------- tasks


@pytest.mark.parametrize("name", Verifiable.__slot__.parts())
def test_tasks_are_deterministic_and_apart(name):
    task = Verifiable.__slot__.parts()[name]()
    one, two = Task(task=task, count=300, test_count=60, seed=1), Task(task=task, count=400, test_count=80, seed=2)
    train, test = one.load("train"), one.load("test")
    assert (train.shape, train.name, train.origin) == ("completion", f"task:{name}", f"task {name}, seed 1")
    assert (len(train), len(test)) == (300, 60)
    assert train == one.load("train")
    assert all(correct(row, row["completion"]) for row in train.rows)
    assert len(prompts(train)) == 300
    assert prompts(train) != prompts(two.load("train"))
    # no prompt of either split is in the other, under any seed
    assert not (prompts(train) | prompts(two.load("train"))) & (prompts(test) | prompts(two.load("test")))


def test_more_rows_keep_the_first():
    few, many = Task(count=50), Task(count=80)
    assert many.load("train").rows[:50] == few.load("train").rows


def test_different_seeds_and_settings_have_different_digests():
    variants = [
        Task(),
        Task(seed=1),
        Task(count=7),
        Task(task=SortLetters()),
        Task(task=SortWords(longest=5)),
        Derive(),
        Derive(source=Task()),
    ]
    assert len({one.digest() for one in variants}) == len(variants)
    assert Task().digest() == Task().digest()


def test_too_few_prompts():
    with pytest.raises(Problem) as caught:
        draw(Arithmetic(digits=1, operation="+"), "train", 200, 0, 0.5)
    assert str(caught.value).startswith("task `arithmetic` has too few different prompts: ")
    assert "for `train` after" in str(caught.value)
    assert str(caught.value).endswith("draws, where 200 are asked for; lower the count, or widen the task's settings")
    with pytest.raises(Problem, match=r"^task `sort-words` has too few different prompts: 0 for `test`"):
        Task(holdout=0.0).load("test")


# -------------------------------------------------------------------------------------------------------- derive

TEXT = ["def alpha(beta): return gamma", "alpha beta gamma delta_x epsilon9 Zeta eta eta eta eta", "alpha and beta or gamma in Theta"]


def test_words_by_frequency():
    rows = Rows("text", [{"text": text} for text in TEXT], "d", "here")
    assert words(rows, 20) == ("alpha", "beta", "gamma", "and", "def", "eta", "in", "or", "return")
    assert words(rows, limit=2) == ("alpha", "beta")
    assert words(rows, 20, shortest=4, longest=5) == ("alpha", "beta", "gamma")
    assert words(Rows("completion", [{"prompt": "a bc", "completion": " bc de"}], "d", "here"), 20) == ("bc", "de")


def test_derived_questions_are_about_each_splits_own_words(tmp_path):
    greek, numbers = "alpha beta gamma delta epsilon zeta", "one two three four five six"
    for name, text in (("train", greek), ("test", numbers)):
        (tmp_path / f"{name}.txt").write_text(text)
    file = File(str(tmp_path / "train.txt"), test=str(tmp_path / "test.txt"))
    made = Derive(source=file, count=100, test_count=20, holdout=0.3)
    train, test = made.load("train"), made.load("test")
    assert {word for row in train.rows for word in row["completion"].split()} == set(greek.split())
    assert {word for row in test.rows for word in row["completion"].split()} <= set(numbers.split())
    assert all(correct(row, row["completion"]) for row in [*train.rows, *test.rows])
    assert train.name == "task:sort-words of train.txt"
    assert train.origin == "task sort-words about 6 words of file train.txt"


def test_derived_questions_share_no_prompt_where_words_are_the_same():
    class Same:
        def load(self, split):
            return Rows("text", [{"text": "one two three four five six seven"}], "same", "here")

        def digest(self):
            return "same"

    made = Derive(task=ReverseWords(longest=4), count=200, test_count=50)
    object.__setattr__(made, "source", Same())
    train, test = made.load("train"), made.load("test")
    assert not prompts(train) & prompts(test)
    assert train == made.load("train")


def test_letters_of_words_are_asked_for(tmp_path):
    (tmp_path / "a.txt").write_text(" ".join(f"w{chr(97 + i)}{chr(97 + j)}" for i in range(20) for j in range(20)))
    file = File(str(tmp_path / "a.txt"), test=str(tmp_path / "a.txt"))
    rows = Derive(task=ReverseLetters(), source=file, vocabulary=400, count=100, test_count=10).load("train").rows
    assert all(len(row["completion"].split()) == 3 and row["completion"].endswith(" w") for row in rows)


def test_rows_that_ask_something_pass_as_they_are(folder):
    chat = Derive(source=File(str(folder / "chat.jsonl"), test=str(folder / "chat.jsonl")))
    rows = chat.load("train")
    assert rows.shape == "chat"
    assert rows.rows == [{"messages": [{"role": "user", "content": "a"}]}]
    assert rows.origin == "file chat.jsonl; chat rows as they are, nothing derived"


def test_a_text_with_too_few_words(tmp_path):
    (tmp_path / "a.txt").write_text("ONE 2 three")
    (tmp_path / "b.txt").write_text("ONE 2")
    both = [str(tmp_path / name) for name in ("a.txt", "b.txt")]
    with pytest.raises(Problem) as caught:
        Derive(source=File(both[0], test=both[1])).load("train")
    assert str(caught.value) == (
        "a.txt has 1 lower-case words of 2 to 10 letters that stand alone, too few for task `sort-words`: "
        "`words` holds 1, fewer than the 4 that `longest` asks for; give more, or lower `longest`"
    )
    with pytest.raises(Problem, match=r"^b\.txt has 0 lower-case words"):
        Derive(task=SortLetters(), source=File(both[0], test=both[1])).load("test")


def test_derive_digest_follows_the_text_and_not_its_path(folder):
    made = Derive(source=File(str(folder / "train.jsonl")))
    before = made.digest()
    (folder / "sub").mkdir()
    moved = Path(made.source.path).rename(folder / "sub" / "other.jsonl")
    assert Derive(source=File(str(moved))).digest() == before
    moved.write_text(moved.read_text() + "\n")
    assert Derive(source=File(str(moved))).digest() != before
    assert Derive(source=File(str(moved)), seed=3).digest() != Derive(source=File(str(moved))).digest()


# -------------------------------------------------------------------------------------------------------- cloze

SENTENCES = [f"Now {chr(97 + n)}x is {chr(97 + n)}y if not {chr(97 + n)}z and Up{n} or Down{n} but never {chr(97 + n)}w" for n in range(12)]


@pytest.fixture
def sentences(tmp_path):
    file = tmp_path / "sentences.jsonl"
    file.write_text("".join(json.dumps({"text": text, "mood": n % 2}) + "\n" for n, text in enumerate(SENTENCES)))
    return File(str(file), test=str(file))


def test_the_true_choice_of_a_cloze_is_the_next_word_of_its_text(sentences):
    rows = Cloze(source=sentences, choices=3, context=12, count=500).load("train")
    assert (rows.shape, rows.name) == ("completion", "cloze of sentences.jsonl")
    assert len(rows) > 100
    for row in rows.rows:
        text = SENTENCES[row["group"]]
        assert f"{row['prompt']}{row['completion']}" in text
        assert row["choices"][row["answer"]] == row["completion"]
        assert len(set(row["choices"])) == 3
        assert row["mood"] == row["group"] % 2
        assert text[text.index(row["prompt"]) - 1] == " " if not text.startswith(row["prompt"]) else len(row["prompt"]) == 12
        kinds = {"keyword" if word[1:] in ("is", "if", "not", "and", "or") else word.islower() for word in row["choices"]}
        assert len(kinds) == 1, "a word's kind would give the answer away"


def test_every_word_with_enough_before_it_is_asked_about_once(sentences):
    rows = Cloze(source=sentences, choices=2, context=14, count=10_000).load("train").rows
    wanted = sum(found.start() >= 14 for text in SENTENCES for found in re.finditer(r" \w+", text))
    assert len(rows) == len({row["prompt"] for row in rows}) == wanted - 11  # all but one of the prompts `but never`
    few = Cloze(source=sentences, choices=2, context=14, count=7).load("train").rows
    assert few == rows[:7]


def test_words_alone_do_not_tell_the_answer(tmp_path):
    """A distractor is as often a frequent word as the true one: who always takes the most frequent choice is right as often as chance."""
    rng = random.Random(0)
    words_, weights = [f"w{n}" for n in range(40)], [1 / (1 + n) for n in range(40)]
    texts = [" ".join(rng.choices(words_, weights, k=60)) for _ in range(400)]
    (tmp_path / "drawn.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    file = File(str(tmp_path / "drawn.jsonl"), test=str(tmp_path / "drawn.jsonl"))
    rows = Cloze(source=file, count=4000, context=20, choices=2).load("train").rows
    right = sum(min(row["choices"], key=lambda word: int(word[2:])) == row["completion"] for row in rows)
    assert right / len(rows) == pytest.approx(0.5, abs=4 * 0.5 / len(rows) ** 0.5)
    assert sum(row["answer"] for row in rows) / len(rows) == pytest.approx(0.5, abs=4 * 0.5 / len(rows) ** 0.5)


def test_a_cloze_is_the_same_for_a_seed_and_keeps_modules(sentences):
    assert Cloze(source=sentences, context=12).load("train") == Cloze(source=sentences, context=12).load("train")
    assert Cloze(source=sentences, context=12).load("train") != Cloze(source=sentences, context=12, seed=1).load("train")
    made = Cloze(source=Library(limit=100_000, holdout=0.2), test_count=20).load("test").rows
    assert all(row["module"] and "group" not in row and correct(row, row["completion"]) for row in made)


def test_a_cloze_of_too_short_texts_is_refused(sentences):
    with pytest.raises(Problem) as caught:
        Cloze(source=sentences, context=500).load("train")
    assert str(caught.value) == (
        "sentences.jsonl has 0 words with 500 characters before them, and 4 choices of one kind for none of them; "
        "lower `context` or `choices`, or give more text"
    )


# ------------------------------------------------------------------------------------------------------- halves


def test_halves_are_all_rows_once_and_change_places():
    inner = Task(count=21, test_count=10)
    every = [row["prompt"] for split in ("train", "test") for row in inner.load(split).rows]
    made = Halves(source=inner, split=3)
    one, two = made.load("train"), made.load("test")
    assert sorted([row["prompt"] for row in [*one.rows, *two.rows]]) == sorted(every)
    assert (len(one), len(two)) == (15, 16)
    swapped = Halves(source=inner, split=3, swapped=True)
    assert (swapped.load("train").rows, swapped.load("test").rows) == (two.rows, one.rows)
    assert made.load("train") == one


def test_halves_of_different_splits_share_about_half():
    inner = Task(count=400, test_count=100)
    first, other = (prompts(Halves(source=inner, split=split).load("train")) for split in (0, 1))
    assert len(first) == len(other) == 250
    assert 125 - 40 < len(first & other) < 125 + 40  # hypergeometric, standard deviation 5.6


def test_what_belongs_together_stays_on_one_side(tmp_path):
    rows = [{"text": f"text {n}", "module": f"m{n % 7}"} for n in range(70)] + [{"text": "the same"}] * 10
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for split in range(5):
        made = Halves(source=File(str(tmp_path / "a.jsonl")), split=split)
        one, two = ({row.get("module") for row in made.load(side).rows} for side in ("train", "test"))
        assert one | two == {*(f"m{n}" for n in range(7)), None}
        assert not one & two
    (tmp_path / "b.jsonl").write_text('{"text": "the same"}\n' * 9)
    with pytest.raises(Problem, match="its 18 rows are of 1 groups, which make no two halves"):
        Halves(source=File(str(tmp_path / "b.jsonl"), test=str(tmp_path / "b.jsonl"))).load("train")


def test_sources_within_halves_and_cloze_are_found_beside_the_recipe(folder):
    made = source({"halves": {"source": "train.jsonl", "split": 1}}, folder)
    assert made == Halves(source=File(path=str(folder / "train.jsonl")), split=1)
    assert source({"cloze": {"source": ["train.jsonl", "house:library"]}}, folder).source[0].path == str(folder / "train.jsonl")
    digests = {
        one.digest() for one in (made, Halves(source=made.source), Halves(source=made.source, swapped=True), Cloze(source=made.source))
    }
    assert len(digests) == 4


# -------------------------------------------------------------------------------------------------------- lists


def test_a_list_of_sources_is_their_rows_one_after_another(folder):
    one, two = Task(task=Brackets(), count=5, test_count=2), Task(task=SortWords(), count=4, test_count=2)
    rows = joined([one, two]).load("train")
    assert rows.rows == [*one.load("train").rows, *two.load("train").rows]
    assert rows.name == "task:brackets + task:sort-words"
    assert joined([one, two]).digest() != joined([two, one]).digest()
    with pytest.raises(Problem) as caught:
        joined([one, File(str(folder / "train.jsonl"))]).load("train")
    assert str(caught.value) == "train.jsonl holds text rows and task:brackets completion rows; give data of one shape"


def test_derive_from_a_list(folder):
    made = Derive(
        source=(File(str(folder / "train.jsonl")), File(str(folder / "train.jsonl"), holdout=0.2)), task=SortLetters(), count=1, holdout=0.1
    )
    assert made.load("train").origin.startswith("task sort-letters about 1 words of file train.jsonl")


# ------------------------------------------------------------------------------------------------------- imports


def test_dump_is_plain_json():
    made = Derive(source=(Library(), File(path="a.jsonl", columns={"text": "body"})), task=ReverseWords())
    assert json.loads(json.dumps(dump(made))) == dump(made)
    assert module.source(dump(Task(count=3))) == Task(count=3)


def test_import_leaves_the_heavy_libraries_unloaded():
    code = (
        "import sys, temper.tasks.source, temper.tasks.verifiable\n"
        "rows = temper.tasks.source.source('task:sort-words').load('test')\n"
        "temper.tasks.source.source('house:library').digest()\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'numpy', 'pyarrow', 'peft', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
