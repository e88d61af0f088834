"""Shapes are told by columns; a bad row is named with its place, column, value and rule."""

from __future__ import annotations

import pytest

from temper.parts import Problem
from temper.tasks.rows import Rows, detect_shape, held_out, key_of

ASK = [{"role": "user", "content": "2 + 2?"}]
TELL = [{"role": "assistant", "content": "4"}]


@pytest.mark.parametrize(
    ("row", "shape"),
    [
        ({"text": "a"}, "text"),
        ({"prompt": "a", "completion": "b"}, "completion"),
        ({"prompt": ASK, "completion": TELL}, "completion"),
        ({"messages": ASK + TELL}, "chat"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference"),
        ({"prompt": ASK, "chosen": TELL, "rejected": TELL}, "preference"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "completion": "b", "text": "ab"}, "preference"),
        ({"text": "a", "prompt": "only"}, "text"),
    ],
)
def test_shape_is_told_by_columns(row, shape):
    assert detect_shape([row]) == shape
    Rows(shape, [row], "d", "here").validate()


def test_columns_that_make_no_shape():
    with pytest.raises(Problem) as caught:
        detect_shape([{"promt": "a", "completion": "b"}], "d.jsonl")
    assert str(caught.value) == (
        "d.jsonl has the columns `promt`, `completion`, which make no shape (text: text · completion: prompt, completion · "
        "chat: messages · preference: prompt, chosen, rejected); did you mean `prompt`?; rename with `columns: {wanted: present}`"
    )
    with pytest.raises(Problem, match=r"^d has no rows; at least one is needed$"):
        detect_shape([], "d")


@pytest.mark.parametrize(
    ("shape", "row", "message"),
    [
        ("text", {"text": 3}, "d, row 2, column `text`: 3; a text is asked for"),
        ("text", {"text": None}, "d, row 2, column `text`: null; a text is asked for"),
        ("text", {"txt": "a"}, "d, row 2: no column `text`, which text rows need; it has the columns `txt`; did you mean `txt`?"),
        ("text", {}, "d, row 2: no column `text`, which text rows need; it has no columns"),
        (
            "completion",
            {"prompt": "a", "completions": "b"},
            "d, row 2: no column `completion`, which completion rows need; it has the columns `prompt`, `completions`; "
            "did you mean `completions`?",
        ),
        (
            "completion",
            {"prompt": "a", "completion": ["b"]},
            'd, row 2, column `completion`, message 1: "b"; a mapping with `role` and `content` is asked for',
        ),
        ("completion", {"prompt": "a", "completion": 4.5}, "d, row 2, column `completion`: 4.5; a text or a list of messages is asked for"),
        (
            "completion",
            {"prompt": "a", "completion": TELL},
            "d, row 2: `completion` is a list of messages and `prompt` a text; give both the same way",
        ),
        ("chat", {"messages": "hi"}, 'd, row 2, column `messages`: "hi"; a list of messages is asked for'),
        ("chat", {"messages": []}, "d, row 2, column `messages`: []; a list of messages is asked for"),
        (
            "chat",
            {"messages": [{"role": "asistant", "content": "a"}]},
            'd, row 2, column `messages`, message 1: "asistant" is no role; did you mean `assistant`?',
        ),
        (
            "chat",
            {"messages": [*ASK, {"role": "assistant", "content": None}]},
            "d, row 2, column `messages`, message 2: `content` is null; a text is asked for",
        ),
        (
            "preference",
            {"prompt": "a", "chosen": "b", "rejected": False},
            "d, row 2, column `rejected`: false; a text or a list of messages is asked for",
        ),
    ],
)
def test_bad_rows_are_named(shape, row, message):
    good = {
        "text": {"text": "a"},
        "completion": {"prompt": "a", "completion": "b"},
        "chat": {"messages": ASK + TELL},
        "preference": {"prompt": "a", "chosen": "b", "rejected": "c"},
    }[shape]
    with pytest.raises(Problem) as caught:
        Rows(shape, [good, row], "d", "here").validate()
    assert str(caught.value) == message


def test_places_stand_for_row_numbers():
    with pytest.raises(Problem, match=r"^d, line 7, column `text`: 1;"):
        Rows("text", [{"text": "a"}, {"text": 1}], "d", "here").validate(["line 4", "line 7"])


def test_a_call_of_a_tool_needs_no_content():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    Rows("chat", [{"messages": [*ASK, call]}], "d", "here").validate()


def test_as_text():
    text = Rows("text", [{"text": "a"}], "d", "here")
    assert text.as_text() is text
    made = Rows("completion", [{"prompt": "2 + 2 ==", "completion": " 4", "task": "sum"}], "d", "here").as_text()
    assert made == Rows("text", [{"text": "2 + 2 == 4", "task": "sum"}], "d", "here, completion rows written as text")
    assert Rows("chat", [{"messages": ASK + TELL}], "d", "here").as_text().rows == [{"text": "user: 2 + 2?\nassistant: 4\n"}]
    preference = Rows("preference", [{"prompt": "a", "chosen": "b", "rejected": "c"}], "d", "here")
    assert preference.as_text().rows == [{"text": "ab"}]
    assert (
        Rows("completion", [{"prompt": ASK, "completion": TELL}], "d", "here").as_text().rows[0]["text"] == "user: 2 + 2?\nassistant: 4\n"
    )


def test_rows_that_share_a_prompt_share_a_key():
    assert key_of({"prompt": "a", "completion": "b"}, "completion") == key_of({"prompt": "a", "completion": "c"}, "completion")
    assert key_of({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference") == "a"
    assert key_of({"messages": ASK + TELL}, "chat") == key_of({"messages": [*ASK, {"role": "assistant", "content": "5"}]}, "chat")
    assert key_of({"messages": ASK + TELL}, "chat") != key_of({"messages": [{"role": "user", "content": "3 + 3?"}, *TELL]}, "chat")
    assert key_of({"messages": TELL}, "chat") != key_of({"messages": [{"role": "assistant", "content": "5"}]}, "chat")


def test_held_out_share():
    out = [key for key in map(str, range(4000)) if held_out(key, 0.25)]
    assert 900 < len(out) < 1100
    assert set(out) < {key for key in map(str, range(4000)) if held_out(key, 0.5)}  # a larger share keeps what was held out
    assert not any(held_out(str(key), 0.0) for key in range(100))
    assert all(held_out(str(key), 1.0) for key in range(100))
