"""Remembered words give the tokenizer's own ids, for every way of cutting that is known, and leave to it what they cannot know."""

from __future__ import annotations

import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, trainers
from tokenizers import pre_tokenizers as before

from temper.train import recall as module
from temper.train.recall import ascii_of, recall, threads

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace("{1,3}", "")
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split(pattern):
    return before.Sequence([before.Split(Regex(pattern), "isolated"), before.ByteLevel(add_prefix_space=False, use_regex=False)])


CUTS = {
    "gpt2": before.ByteLevel(add_prefix_space=False),
    "digits": before.Sequence([before.Digits(individual_digits=True), before.ByteLevel(add_prefix_space=False)]),
    "llama3": split(LLAMA3),
    "qwen2": split(QWEN2),
    "o200k": split(O200K),
}
LEARNT = ["It's the forecast of 1234 cats;\n\n    def f(x):  # They'LL go\n\treturn x + 10\n"] * 3
TEXTS = [
    *LEARNT,
    "",
    "a",
    "  ",
    "\n\n  \n",
    "a  1",
    "x;\r\n\r\ny",
    "it's IT'S 'twas ''s",
    "tab\t\tend ",
    "\x1c\x1d a",
    "caf\u00e9 na\u00efve \u4e2d",
]


def tokenizer(cut, special=("<|end|>",)):
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = CUTS[cut]
    made.train_from_iterator(
        LEARNT, trainers.BpeTrainer(vocab_size=400, special_tokens=list(special), initial_alphabet=before.ByteLevel.alphabet())
    )
    return made


@pytest.fixture(scope="module", params=CUTS)
def both(request):
    made = tokenizer(request.param)
    return made, recall(made)


@pytest.fixture(autouse=True, scope="module")
def few_cores():
    patch = pytest.MonkeyPatch()
    patch.setattr(module, "threads", lambda: 1)
    yield
    patch.undo()


def own(made, texts):
    return [array.array("i", one.ids).tobytes() for one in made.encode_batch_fast(texts, add_special_tokens=False)]


def test_known_texts_have_the_tokenizer_s_ids(both):
    made, remembered = both
    for _ in range(2):
        assert remembered(TEXTS) == own(made, TEXTS)
        assert remembered._right
    assert len(remembered._known) > 20


@given(st.lists(st.text(alphabet=" \t\r\n\x0b\x1f'sStTdDlLaZ09_./-(é", max_size=30), max_size=8))
@settings(max_examples=150, deadline=None)
def test_any_text_has_the_tokenizer_s_ids(both, texts):
    made, remembered = both
    assert remembered(texts) == own(made, texts)
    assert remembered._right is not False


def test_words_are_asked_for_once(both, monkeypatch):
    made, remembered = both
    remembered(["the cats of the forecast"])
    asked = []
    monkeypatch.setattr(remembered, "_asked", lambda texts: asked.extend(texts) or own(made, texts))
    assert remembered(["forecast of the cats", "of the cats"]) == own(made, ["forecast of the cats", "of the cats"])
    assert sorted(asked) == ["forecast", "of"]  # a word without the space before it is another word


def test_an_added_token_is_left_to_the_tokenizer():
    made = tokenizer("gpt2", ["<|end|>", "<|pad|>"])
    made.add_tokens([AddedToken("the cat", lstrip=True)])
    texts = ["a<|end|>b", "<| end", "see the cat", "see   the cat go", "the dog"]
    remembered = recall(made)
    assert remembered(texts) == own(made, texts)
    assert not remembered._known.keys() & {" cat", " go"}


def test_a_tokenizer_that_turns_out_to_be_another_is_asked_itself(monkeypatch):
    monkeypatch.setattr(module, "_GPT2", module._GPT2_DIGITS)  # which is wrong: it cuts numbers
    made = tokenizer("gpt2")
    made.train_from_iterator(["1234 1234"] * 9, trainers.BpeTrainer(vocab_size=300, initial_alphabet=before.ByteLevel.alphabet()))
    remembered = recall(made)
    assert remembered(["a 1234"]) == own(made, ["a 1234"])
    assert remembered._right is False


def test_the_memory_has_an_end(monkeypatch):
    monkeypatch.setattr(module, "_MOST", 4)
    made = tokenizer("gpt2")
    remembered = recall(made)
    for texts in (["a b c d e f"], ["g h"], ["a g"]):
        assert remembered(texts) == own(made, texts)
    assert len(remembered._known) <= 4


def test_what_is_cut_otherwise_is_not_remembered(monkeypatch):
    made = tokenizer("gpt2")
    assert recall(made)
    made.pre_tokenizer = before.ByteLevel(add_prefix_space=True)
    assert recall(made) is None
    made.pre_tokenizer = before.Whitespace()
    assert recall(made) is None
    made.pre_tokenizer = split(r"\p{Han}+|\s+")
    assert recall(made) is None
    made.pre_tokenizer = before.Sequence([split(LLAMA3), before.ByteLevel(use_regex=False)])
    assert recall(made) is None
    made.pre_tokenizer = before.ByteLevel(add_prefix_space=False)
    made.normalizer = normalizers.NFC()
    assert recall(made)
    made.normalizer = normalizers.Lowercase()
    assert recall(made) is None
    dropping = Tokenizer(models.BPE(dropout=0.5))
    dropping.pre_tokenizer = before.ByteLevel(add_prefix_space=False)
    assert recall(dropping) is None
    monkeypatch.setattr(module, "threads", lambda: 16)
    assert recall(tokenizer("gpt2")) is None


@pytest.mark.parametrize(("parallel", "rayon", "expected"), [(None, "5", 5), ("false", "5", 1), ("true", "2", 2)])
def test_threads_are_those_of_the_tokenizers_library(parallel, rayon, expected, monkeypatch):
    for name, value in (("TOKENIZERS_PARALLELISM", parallel), ("RAYON_NUM_THREADS", rayon)):
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    assert threads() == expected
    monkeypatch.delenv("RAYON_NUM_THREADS")
    assert threads() >= 1


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (r"\p{L}+", "[A-Za-z]+"),
        (r"[^\s\p{L}]", r"[^\sA-Za-z]"),
        (r"\[\p{N}", r"\[[0-9]"),
        (r"\p{M}", None),
        (r"\P{L}", None),
        ("[a[b]]", None),
    ],
)
def test_classes_of_unicode_in_ascii(pattern, expected):
    assert ascii_of(pattern) == expected
