"""Rows of every shape -> tokens and what is learnt of them."""

from __future__ import annotations

import pytest

from temper.parts import Problem
from temper.tasks.rows import Rows
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
    from tokenizers.processors import TemplateProcessing

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
