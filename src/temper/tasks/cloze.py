"""Multiple choice out of any text: which of these words stands next?"""

from __future__ import annotations

import keyword
import random
import re
from collections import defaultdict
from typing import Any

from temper.parts import Problem
from temper.tasks.rows import Rows

_WORD = re.compile(r"(?<=\S) [A-Za-z_]\w*")
"""A word after a space, with the space: then prompt and choice join to what stands in the text, whichever the tokenizer."""


def cloze(rows: Rows, count: int, choices: int, context: int, rng: random.Random) -> list[dict[str, Any]]:
    """Up to `count` rows `{prompt, completion, choices, answer}` of text rows, each about one place of a text drawn at random.

    prompt: about `context` characters before the place, from the beginning of a word on. choices: the word that stands there and
    words of other places, all different, of its kind (a keyword of Python, lower case, or with capitals) and as frequent among
    distractors as in the texts, so that frequency alone tells nothing. answer: the index of the true one, which is the completion.
    The source row's other columns are kept; where none names its `group` or `module`, `group` tells which text a row is from.
    Raises a `Problem` where no text is long enough, or no kind has as many words.
    """
    texts = [row["text"] for row in rows.rows]
    places = [(number, found.start(), found[0]) for number, text in enumerate(texts) for found in _WORD.finditer(text, context)]
    pools: dict[str, list[str]] = defaultdict(list)
    for _, _, word in places:
        pools[_kind(word)].append(word)
    enough = {kind for kind, pool in pools.items() if len(set(pool)) >= choices}
    made: dict[str, dict[str, Any]] = {}
    for number, at, word in rng.sample(places, len(places)):
        prompt = _before(texts[number], at, context)
        if len(made) < count and prompt not in made and _kind(word) in enough:
            options = _options(word, pools[_kind(word)], choices, rng)
            rest = {"group": number} if not rows.rows[number].keys() & {"group", "module"} else {}
            rest |= {key: value for key, value in rows.rows[number].items() if key != "text"}
            made[prompt] = {"prompt": prompt, "completion": word, "choices": options, "answer": options.index(word), **rest}
    if not made:
        raise Problem(
            f"{rows.name} has {len(places)} words with {context} characters before them, and {choices} choices of one kind for none of "
            "them; lower `context` or `choices`, or give more text"
        )
    return list(made.values())


def _kind(word: str) -> str:
    return "keyword" if keyword.iskeyword(word[1:]) else "lower" if word.islower() else "capitals"


def _before(text: str, at: int, context: int) -> str:
    """What stands before a place; a word that the cut went through is left out."""
    return text[:at] if at == context else text[at - context : at].split(None, 1)[-1]


def _options(word: str, pool: list[str], choices: int, rng: random.Random) -> list[str]:
    options = {word: None}
    while len(options) < choices:
        options[rng.choice(pool)] = None
    return rng.sample(list(options), choices)
