from __future__ import annotations

import dataclasses

import pytest
from align_toys import Data

from temper.align.reward import Reward, Verifier
from temper.align.source import Attempts, Given, best_against_worst
from temper.context import Context
from temper.parts import Problem, Scope, fill


def started(settings, folder, model, tokenizer, seed=0):
    context = Context.scratch(folder, seed)
    context.give("model", model)
    context.give("tokenizer", tokenizer)
    return settings.start(context.at("source")), context


def written(pairs):
    return [(one.tokens.tolist(), one.supervised.tolist(), one.source, one.side) for one in pairs.examples]


def texts(pairs, tokenizer):
    """(prompt, response) of each example."""
    sides = [(one.tokens[~one.supervised], one.tokens[one.supervised]) for one in pairs.examples]
    return [tuple(tokenizer.decode(tokens, skip_special_tokens=True) for tokens in side) for side in sides]


# --------------------------------------------------------------------------------------------------- choosing pairs


def test_best_against_worst():
    rewards, names = [0.0, 1.0, 0.0, 1.0, 0.0], ["a", "b", "c", "d", "e"]
    assert best_against_worst(rewards, names, 1) == [(1, 4)]
    assert best_against_worst(rewards, names, 9) == [(1, 4), (3, 2)]
    assert best_against_worst([0.2, 0.9, 0.5, 0.4], names[:4], 9) == [(1, 0), (2, 3)]


def test_no_pair_of_equal_rewards_or_equal_texts():
    assert best_against_worst([1.0, 1.0, 1.0], ["a", "b", "c"], 3) == []
    assert best_against_worst([1.0, 1.0, 0.0, 0.0], ["a", "a", "b", "b"], 3) == [(0, 2)]
    assert best_against_worst([1.0], ["a"], 3) == []
    assert best_against_worst([1.0, 0.0, 0.0, 0.0], ["a", "b", "c", "d"], 3) == [(0, 3)]


# ---------------------------------------------------------------------------------------------------------- rewards


def test_verifier_asks_the_task_or_compares():
    row = {"prompt": "sorted( b a ) ==", "completion": " a b", "task": "sort-letters"}
    assert Verifier()(row, [" a b", "a b\n", "b a", ""]) == [1.0, 1.0, 0.0, 0.0]
    worked = {"prompt": "4 7 + 3 8 ==", "completion": "8 5", "task": "arithmetic"}
    assert Verifier()(worked, ["7 + 8 = 1 5 ; 8 5", "8 6"]) == [1.0, 0.0]
    assert Verifier()({"prompt": "x", "completion": " a"}, ["a ", "b"]) == [1.0, 0.0]
    chat = {"prompt": [{"role": "user", "content": "x"}], "completion": [{"role": "assistant", "content": "a"}]}
    assert Verifier()(chat, ["a", "b"]) == [1.0, 0.0]


def test_a_users_function_is_a_reward(tmp_path, llama, tokenizer, questions_data):
    (tmp_path / "mine.py").write_text("def short(row, responses):\n    return [-len(one) for one in responses]\n")
    (tmp_path / "bad.py").write_text("def one(row, responses):\n    return [float('nan')] * len(responses)\n")
    reward = fill(Reward.__slot__, "mine.py:short", scope=Scope(tmp_path))
    source, _ = started(Attempts(count=4, max_new_tokens=3), tmp_path / "a", llama, tokenizer)
    pairs = source(questions_data.load("train"), "train", reward, 64)
    lengths = [len(text) for _, text in texts(pairs, tokenizer)]
    assert len(lengths) > 10
    assert all(chosen < rejected for chosen, rejected in zip(lengths[0::2], lengths[1::2]))
    source, _ = started(Attempts(count=4, max_new_tokens=3), tmp_path / "b", llama, tokenizer)
    with pytest.raises(Problem, match="one finite number for each"):
        source(questions_data.load("train"), "train", fill(Reward.__slot__, "bad.py:one", scope=Scope(tmp_path)), 64)


# --------------------------------------------------------------------------------------------------------- sources


def test_given_pairs(tmp_path, llama, tokenizer, pairs_data):
    source, _ = started(Given(), tmp_path, llama, tokenizer)
    pairs = source(pairs_data.load("train"), "train", None, 64)
    assert [one.side for one in pairs.examples[:4]] == ["chosen", "rejected"] * 2
    assert texts(pairs, tokenizer)[:2] == [("ask a b c d e f g h :", "a b"), ("ask a b c d e f g h :", "b a")]
    assert pairs.examples.cut == 0


ATTEMPTS = Attempts(count=32, max_new_tokens=2, pairs_per_prompt=2)


def test_a_right_one_against_a_wrong_one(tmp_path, llama, tokenizer, questions_data):
    source, _ = started(ATTEMPTS, tmp_path, llama, tokenizer)
    rows = questions_data.load("train")
    pairs = source(rows, "train", Verifier(), 64)
    answers = {row["prompt"]: row["completion"] for row in rows.rows}
    found = texts(pairs, tokenizer)
    assert len(found) >= 8
    for (prompt, chosen), (same, rejected) in zip(found[0::2], found[1::2]):
        assert prompt == same
        assert chosen == answers[prompt]
        assert rejected != answers[prompt]
    # what was sampled stands in the example token by token: an attempt that did not end carries no end
    assert any(one.tokens[-1] != tokenizer.eos_token_id for one in pairs.examples)
    paired = pairs.figures["prompts_paired"]
    assert paired.n == 16
    assert paired.value == len({prompt for prompt, _ in found}) / 16
    assert 0 < pairs.figures["reward_before"].value < 0.5
    assert [one.source for one in pairs.examples] == [index // 2 for index in range(len(found))]


def test_attempts_depend_on_the_seed_alone(tmp_path, llama, tokenizer, questions_data):
    made = {}
    for name, seed, batch in (("one", 0, 64), ("again", 0, 64), ("small", 0, 5), ("other", 1, 64)):
        settings = Attempts(count=12, max_new_tokens=2, batch_size=batch)
        source, _ = started(settings, tmp_path / name, llama, tokenizer, seed)
        made[name] = written(source(questions_data.load("train"), "train", Verifier(), 64))
    assert made["one"] == made["again"] == made["small"] != made["other"]


def test_a_prompt_is_answered_alike_whatever_stands_beside_it(tmp_path, llama, tokenizer, questions_data):
    whole = questions_data.load("train")
    responses = {}
    for count in (16, 3):
        source, context = started(Attempts(count=4, max_new_tokens=4, prompts=count), tmp_path / str(count), llama, tokenizer)
        source(whole, "train", lambda row, texts: [float(len(text)) for text in texts], 64)
        (file,) = (context.work / "attempts").glob("train-0000000-*.json")
        responses[count] = file.read_text()
    assert responses[16].startswith(responses[3][:-1])


def test_a_resumed_run_samples_no_more(tmp_path, llama, tokenizer, questions_data):
    rows = questions_data.load("train")
    source, _ = started(ATTEMPTS, tmp_path, llama, tokenizer)
    made = written(source(rows, "train", Verifier(), 64))

    def unasked(*_, **__):
        raise AssertionError("asked again")

    llama.forward = unasked
    again, _ = started(ATTEMPTS, tmp_path, llama, tokenizer)
    assert written(again(rows, "train", unasked, 64)) == made
    others = dataclasses.replace(rows, rows=rows.rows[::-1])
    for unsampled in (rows, "test"), (others, "train"):
        with pytest.raises(AssertionError, match="asked again"):
            again(*unsampled, Verifier(), 64)


def test_the_rows_own_answer_where_no_attempt_is_right(tmp_path, llama, tokenizer):
    rows = Data("completion", [{"prompt": "ask :", "completion": "a b c d e f g h"}], 1).load("train")
    lost, _ = started(Attempts(count=4, max_new_tokens=4), tmp_path / "lost", llama, tokenizer)
    pairs = lost(rows, "train", Verifier(), 64)
    assert not pairs.examples
    assert "set `gold: true`" in pairs.report
    gold, _ = started(Attempts(count=4, max_new_tokens=4, gold=True), tmp_path / "gold", llama, tokenizer)
    pairs = gold(rows, "train", Verifier(), 64)
    (_, chosen), (_, rejected) = texts(pairs, tokenizer)
    assert chosen == "a b c d e f g h"
    assert rejected != chosen
    assert pairs.examples[0].tokens[-1] == tokenizer.eos_token_id
    assert pairs.figures["reward_before"].value == 0  # the row's own answer is no attempt


def test_chats(tmp_path, llama, tokenizer, questions_data):
    rows = [
        {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}
        for row in questions_data.rows
    ]
    source, _ = started(Attempts(count=12, max_new_tokens=1), tmp_path, llama, tokenizer)
    pairs = source(Data("chat", rows, 16).load("train"), "train", Verifier(), 64)
    assert pairs.examples
    words = [tokenizer.convert_ids_to_tokens(one.tokens.tolist()) for one in pairs.examples]
    assert all(line[0] == "<u>" and line[-2] == "<a>" for line in words)
    answers = {row["prompt"]: row["completion"] for row in questions_data.rows}
    assert all(line[-1] == answers[" ".join(line[1:-3])] for line in words[0::2])


def test_prompts_that_leave_no_room(tmp_path, llama, tokenizer, questions_data):
    source, context = started(Attempts(count=2, max_new_tokens=4, gold=True), tmp_path, llama, tokenizer)
    rows = questions_data.load("train")
    source(rows, "train", Verifier(), 12)
    lengths = [len(row["prompt"].split()) for row in rows.rows]
    assert context.notes == [f"train: {sum(length > 8 for length in lengths)} prompts left out, longer than 8 tokens"]
    with pytest.raises(Problem, match="no prompt leaves room for 4 new tokens within 6"):
        source(rows, "train", Verifier(), 6)


def test_one_attempt_is_refused():
    with pytest.raises(ValueError, match="at least 2, or `gold: true`"):
        Attempts(count=1)
    assert Attempts(count=1, gold=True).count == 1
