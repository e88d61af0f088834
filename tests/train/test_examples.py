"""Rows of every shape -> tokens and what is learnt of them."""

from __future__ import annotations

import itertools

import numpy
import pytest
from tokenizers.processors import TemplateProcessing

from temper.context import Context
from temper.parts import Problem
from temper.tasks.rows import Rows
from temper.train import examples, recall
from temper.train.examples import encode, preview


def rows(shape, *given):
    return Rows(shape, list(given), "data.jsonl", "a test")


def learnt(tokenizer, example):
    """The supervised text, and the rest."""
    ids, flags = example.tokens.tolist(), example.supervised.tolist()
    return tuple(tokenizer.decode([token for token, flag in zip(ids, flags) if flag is wanted]) for wanted in (True, False))


def test_text_is_learnt_whole_and_ends(tokenizer):
    words = tokenizer(opening=True)
    (one,) = made = encode(rows("text", {"text": "the forecast"}), words, max_length=32)
    assert learnt(words, one) == ("<s>the forecast</s>", "")
    assert one.targets == len(one) - 1 == made.supervised
    assert (made.rows, made.cut, made.dropped) == (1, 0, 0)


def test_text_without_special_tokens(tokenizer):
    words = tokenizer(end=None)
    (one,) = encode(rows("text", {"text": "the forecast"}), words, max_length=32)
    assert words.decode(one.tokens) == "the forecast"


def test_long_text_is_cut_into_examples_that_predict_every_token_once(tokenizer):
    words = tokenizer()
    data = rows("text", {"text": "abcdefghijklm"}, {"text": "ab"})
    whole, short = encode(data, words, max_length=None)
    made = encode(data, words, max_length=5)
    assert [len(one) for one in made] == [5, 5, 5, 2, 3]
    assert [one.source for one in made] == [0, 0, 0, 0, 1]
    predicted = [token for one in made[:4] for token, flag in list(zip(one.tokens.tolist(), one.supervised.tolist()))[1:] if flag]
    assert predicted == whole.tokens.tolist()[1:]
    assert made.supervised == whole.targets + short.targets
    assert made.cut == 0


def test_completion_learns_the_answer_and_its_end(tokenizer):
    words = tokenizer(opening=True)
    (one,) = encode(rows("completion", {"prompt": "the ", "completion": "cat"}), words, max_length=32)
    assert learnt(words, one) == ("cat</s>", "<s>the ")


def test_completion_keeps_the_prompt_s_own_tokens_where_a_token_would_cross_the_seam(tokenizer):
    words = tokenizer()
    prompt, whole = (words(text)["input_ids"] for text in ("fore", "forecast"))
    assert whole[: len(prompt)] != prompt  # the premise: the tokenizer joins them
    (one,) = encode(rows("completion", {"prompt": "fore", "completion": "cast"}), words, max_length=32)
    assert one.tokens[: len(prompt)].tolist() == prompt
    assert learnt(words, one) == ("cast</s>", "fore")


def test_a_tokenizer_that_closes_texts_itself_does_not_close_the_prompt(tokenizer):
    words = tokenizer()
    words.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", pair="$A $B </s>", special_tokens=[("</s>", words.eos_token_id)]
    )
    assert words("the")["input_ids"][-1] == words.eos_token_id
    (one,) = encode(rows("completion", {"prompt": "the ", "completion": "cat"}), words, max_length=32)
    assert learnt(words, one) == ("cat</s>", "the ")


def test_cut_on_the_right_is_counted_and_rows_without_an_answer_are_dropped(tokenizer):
    words = tokenizer()
    data = rows("completion", *({"prompt": "x" * n, "completion": "yz"} for n in (3, 7, 9)))
    made = encode(data, words, max_length=8)
    assert [(one.source, one.targets) for one in made] == [(0, 3), (1, 1)]
    assert (made.rows, made.cut, made.dropped) == (3, 2, 1)
    assert "2 rows cut" in made.report
    assert "1 rows left out" in made.report


@pytest.mark.parametrize("marked", [False, True])
def test_chat_learns_the_assistant_s_turns(tokenizer, marked):
    turn = "{{ m['content'] }}<|end|>"
    if marked:
        turn = f"{{% if m['role'] == 'assistant' %}}{{% generation %}}{turn}{{% endgeneration %}}{{% else %}}{turn}{{% endif %}}"
    template = "{% for m in messages %}<|{{ m['role'] }}|>" + turn + "{{ '\\n' }}{% endfor %}"
    template += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    words = tokenizer(template=template)
    turns = [("system", "s"), ("user", "hi"), ("assistant", "ho"), ("user", "more"), ("assistant", "less")]
    (one,) = encode(rows("chat", {"messages": [{"role": role, "content": text} for role, text in turns]}), words, max_length=64)
    tail = "" if marked else "\n"
    assert learnt(words, one)[0] == f"ho<|end|>{tail}less<|end|>{tail}"
    assert words.decode(one.tokens) == "".join(f"<|{role}|>{text}<|end|>\n" for role, text in turns)


def test_a_turn_that_the_template_rewrites_in_hindsight_is_not_learnt(tokenizer):
    template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' and loop.last %}think {% endif %}"
        "{{ m['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    words = tokenizer(template=template)
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    made = encode(rows("chat", {"messages": [{"role": role, "content": text} for role, text in turns]}), words, max_length=64)
    assert learnt(words, made[0])[0] == "think d<|end|>"
    assert made.hindsight == 1


def test_messages_without_a_template_name_the_remedy(tokenizer):
    data = rows("chat", {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    with pytest.raises(Problem) as caught:
        encode(data, tokenizer(template=None), max_length=64)
    assert str(caught.value) == (
        "data.jsonl, row 1: messages need a chat template and the tokenizer has none; "
        "put a chat_template.jinja into the model's folder, or give rows with `prompt` and `completion` as texts"
    )


def test_a_template_s_refusal_names_the_row(tokenizer):
    words = tokenizer(template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(Problem, match=r"data.jsonl, row 1: the chat template refuses it: roles must alternate"):
        encode(rows("chat", {"messages": [{"role": "assistant", "content": "b"}]}), words, max_length=64)


@pytest.mark.parametrize("messages", [False, True])
def test_a_preference_gives_two_examples_of_one_prompt(tokenizer, messages):
    words = tokenizer()
    row = {"prompt": "the ", "chosen": "cat", "rejected": "dog"}
    if messages:
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        row = {name: [{"role": roles[name], "content": text}] for name, text in row.items()}
    one, two = encode(rows("preference", row), words, max_length=64)
    assert (one.side, two.side, one.source, two.source) == ("chosen", "rejected", 0, 0)
    end = "<|end|>\n" if messages else "</s>"
    assert (learnt(words, one)[0], learnt(words, two)[0]) == (f"cat{end}", f"dog{end}")
    assert learnt(words, one)[1] == learnt(words, two)[1]


def test_a_preference_is_dropped_with_both_its_sides(tokenizer):
    data = rows("preference", {"prompt": "p", "chosen": "c", "rejected": "r"}, {"prompt": "p" * 9, "chosen": "c", "rejected": "r"})
    made = encode(data, tokenizer(), max_length=8)
    assert [one.source for one in made] == [0, 0]
    assert made.dropped == 1


def test_only_the_answer_of_a_prompt_in_messages_is_learnt(tokenizer):
    words = tokenizer()
    prompt = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    (one,) = encode(rows("completion", {"prompt": prompt, "completion": [{"role": "assistant", "content": "d"}]}), words, max_length=64)
    assert learnt(words, one)[0] == "d<|end|>\n"


@pytest.mark.parametrize(
    ("shape", "row", "remedy"),
    [
        ("completion", {"prompt": "long prompt", "completion": "x"}, "1 are longer than max_length 4.*raise max_length"),
        ("chat", {"messages": [{"role": "user", "content": "a"}]}, "assistant turns"),
        ("preference", {"prompt": "long prompt", "chosen": "x", "rejected": "y"}, "raise max_length"),
    ],
)
def test_nothing_supervised_is_an_error(tokenizer, shape, row, remedy):
    with pytest.raises(Problem, match=rf"data.jsonl: none of its 1 {shape} rows holds a supervised token.*{remedy}"):
        encode(rows(shape, row), tokenizer(), max_length=4 if shape != "chat" else 64)


def test_a_single_token_predicts_nothing(tokenizer):
    with pytest.raises(Problem, match="none of its 2 text rows holds a supervised token; give rows with more than one token"):
        encode(rows("text", {"text": "a"}, {"text": ""}), tokenizer(end=None), max_length=8)


def test_a_missing_column_names_row_column_and_the_nearest(tokenizer):
    data = rows("completion", {"prompt": "a", "completion": "b"}, {"prompt": "a", "completions": "b"})
    with pytest.raises(Problem, match=r"row 2.*`completion`.*did you mean.*`completions`"):
        encode(data, tokenizer(), max_length=8)


def test_max_length_leaves_room_for_a_prediction(tokenizer):
    with pytest.raises(Problem, match="max_length 1"):
        encode(rows("text", {"text": "a"}), tokenizer(), max_length=1)


def test_preview_gives_text_in_whole_characters(tokenizer):
    words = tokenizer()
    made = encode(rows("completion", {"prompt": "né ", "completion": "→a"}, {"prompt": "b", "completion": "c"}), words, max_length=32)
    (shown,) = preview(made, words, 1)
    assert "".join(text for text, _ in shown) == "né →a</s>"
    assert [text for text, flag in shown if flag] == ["→", "a", "</s>"]


# --------------------------------------------------------------------------------------------- the tokenizer's Rust side

TEXTS = ["the forecast", "", "a", " né →", "it ends </s> and goes on<|end|>", "x" * 300, "of\n\n a"]


def closing(words):
    words.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A $B </s>", special_tokens=[("<s>", words.bos_token_id), ("</s>", words.eos_token_id)]
    )
    return words


def left_padding(words):
    words.pad_token = "<s>"
    words(TEXTS, padding=True, truncation=True, max_length=3)  # leaves the Rust side with both
    return words


def split_special(words):
    words.split_special_tokens = True
    return words


KINDS = {
    "plain": lambda make: make(),
    "opening": lambda make: make(opening=True),
    "no end": lambda make: make(end=None),
    "closing": lambda make: closing(make()),
    "padding left on": lambda make: left_padding(make(opening=True)),
    "split special": lambda make: split_special(make(opening=True)),
}


@pytest.mark.parametrize("cores", [1, 64])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_rust_side_gives_the_ids_of_the_tokenizer(kind, cores, tokenizer, monkeypatch):
    """With words remembered, which few cores are for, and without."""
    monkeypatch.setattr(recall, "threads", lambda: cores)
    assert (recall.recall(kind(tokenizer).backend_tokenizer) is None) == (cores == 64)
    text = rows("text", *({"text": one} for one in TEXTS))
    completion = rows("completion", *({"prompt": one, "completion": two} for one, two in itertools.pairwise(TEXTS)))
    fast = [encode(data, kind(tokenizer), max_length=50) for data in (text, completion)]
    assert examples._backend(tokenizer()) is not None
    monkeypatch.setattr(examples, "_backend", lambda tokenizer: None)
    slow = [encode(data, kind(tokenizer), max_length=50) for data in (text, completion)]
    for one, two in zip(fast, slow, strict=True):
        assert (one.report, len(one)) == (two.report, len(two))
        for a, b in zip(one, two, strict=True):
            assert (a.tokens.tolist(), a.supervised.tolist(), a.source) == (b.tokens.tolist(), b.supervised.tolist(), b.source)


def test_a_tokenizer_that_does_more_is_asked_itself(tokenizer):
    words = tokenizer()

    class Marking(type(words)):
        def _encode_plus(self, text, **settings):
            return super()._encode_plus([f"the {one}" for one in text], **settings)

    words.__class__ = Marking
    assert examples._backend(words) is None
    (one,) = encode(rows("text", {"text": "cat"}), words, max_length=32)
    assert words.decode(one.tokens) == "the cat</s>"


def test_a_tokenizer_without_a_rust_side_is_asked_itself(tokenizer):
    words = tokenizer()

    class Slow:
        is_fast, eos_token_id = False, words.eos_token_id
        _encode_plus = None

        def __call__(self, texts, **settings):
            return words(texts, **settings)

    data = rows("text", {"text": "the forecast"}, {"text": "cat"})
    one, two = (encode(data, each, max_length=32) for each in (Slow(), words))
    assert [a.tokens.tolist() for a in one] == [b.tokens.tolist() for b in two]


def test_long_rows_go_to_the_tokenizer_a_few_at_a_time():
    data = rows("text", *({"text": "x" * size} for size in (10, 2**23 - 10, 1, 2**24, 5, 5)))
    assert list(examples._batches(data)) == [range(2), range(2, 3), range(3, 4), range(4, 6)]
    short = rows("text", *({"text": "x"} for _ in range(2100)))
    assert list(examples._batches(short)) == [range(1024), range(1024, 2048), range(2048, 2100)]


def test_a_track_is_told_of_every_row(tokenizer, tmp_path):
    told = []
    context = Context.scratch(tmp_path)
    context.show = lambda track: told.append((track.done, track.total))
    data = rows("completion", *({"prompt": "a", "completion": str(n)} for n in range(2100)))
    with context.track(len(data), "tokenise", "row") as track:
        encode(data, tokenizer(), max_length=32, track=track)
    assert told == [(0, 2100), (1024, 2100), (2048, 2100), (2100, 2100), (2100, 2100)]


def test_parts_of_an_example(tokenizer):
    (one,) = encode(rows("completion", {"prompt": "a" * 5, "completion": "b" * 6}), tokenizer(), max_length=32)
    pieces = one.pieces(5)
    assert [len(piece) for piece in pieces] == [5, 5, 2]
    assert numpy.concatenate([piece.tokens for piece in pieces]).tolist() == one.tokens.tolist()
    assert numpy.concatenate([piece.supervised for piece in pieces]).tolist() == one.supervised.tolist()
