"""Ids of texts by their words, each asked of the tokenizer once: the fastest way where there are few cores.

A byte-level BPE cuts a text into words by a regular expression and makes ids of each word alone. A text's words are few compared with
its length, so remembering their ids saves most of the work; but cutting is Python's, on one core, where the tokenizer itself uses all.
"""

from __future__ import annotations

import array
import json
import os
import re
from collections.abc import Sequence
from typing import Any

from temper.lazy import tokenizers

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_GPT2_DIGITS = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
"""How `ByteLevel` cuts, and how it does after every digit has been set apart: a digit ends what it looks ahead to."""
_ASCII = {"L": "A-Za-z", "Lu": "A-Z", "Ll": "a-z", "N": "0-9", "Lt": "", "Lm": "", "Lo": "", "M": ""}
"""What the classes of Unicode hold of ASCII."""
_FEW = 3  # cores up to which this is faster: one core's cutting takes a quarter of the time that the whole takes one core
_MOST = 2**18  # words remembered
_TRIED = 32  # texts by which the first call is compared with the tokenizer's own


class Recall:
    """`(texts) -> their ids` without special tokens, each text's as the bytes of an int32 array; the ids are the tokenizer's own.

    Texts that are not ASCII alone, or hold an added token, are left to the tokenizer. So is everything, should the first texts' ids not
    be the same.
    """

    def __init__(self, backend: Any, pattern: re.Pattern[str]):
        self._backend, self._pattern = backend, pattern
        self._added = [one.content for one in backend.get_added_tokens_decoder().values()]
        self._opening = os.path.commonprefix(self._added)  # noqa: RUF071 (these are no paths): what is not in a text spares the rest
        self._known: dict[str, bytes] = {}
        self._right: bool | None = None

    def __call__(self, texts: Sequence[str]) -> list[bytes]:
        if self._right is None:
            some = texts[:_TRIED]
            self._right = self._recalled(some) == self._asked(some)
        return self._recalled(texts) if self._right else self._asked(texts)

    def _recalled(self, texts: Sequence[str]) -> list[bytes]:
        cut = [self._pattern.findall(text) if self._plain(text) else [] for text in texts]
        if len(self._known) > _MOST:
            self._known.clear()
        new = list(set().union(*cut).difference(self._known))
        self._known.update(zip(new, self._asked(new), strict=True))
        # A word that is more than one when it stands alone, or a text of which something is in no word, cannot be put together.
        strange = {word for word in new if self._pattern.findall(word) != [word]}
        rest = [
            index
            for index, (text, words) in enumerate(zip(texts, cut, strict=True))
            if len("".join(words)) != len(text) or (strange and not strange.isdisjoint(words))
        ]
        for word in strange:
            del self._known[word]
        asked = dict(zip(rest, self._asked([texts[index] for index in rest]), strict=True))
        return [asked[index] if index in asked else b"".join(map(self._known.__getitem__, words)) for index, words in enumerate(cut)]

    def _plain(self, text: str) -> bool:
        return text.isascii() and not (self._opening in text and any(one in text for one in self._added))

    def _asked(self, texts: Sequence[str]) -> list[bytes]:
        return [array.array("i", one.ids).tobytes() for one in self._backend.encode_batch_fast(texts, add_special_tokens=False)]


def recall(backend: Any) -> Recall | None:
    """A tokenizer's Rust side with a memory; None where it would not be faster, or it is not known how words are cut."""
    pattern = None if threads() > _FEW else _pattern(backend)
    return None if pattern is None else Recall(backend, re.compile(pattern, re.ASCII))


def threads() -> int:
    """Threads that the tokenizers library uses: as its environment says, or one a core."""
    if os.environ.get("TOKENIZERS_PARALLELISM", "").lower() in ("off", "false", "f", "no", "n", "0"):
        return 1
    asked = os.environ.get("RAYON_NUM_THREADS", "")
    return (
        int(asked)
        if asked.isdigit() and int(asked)
        else len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1
    )


def _pattern(backend: Any) -> str | None:
    """The expression that cuts ASCII text into words as a byte-level BPE does; None for any other tokenizer."""
    normal, model, before = backend.normalizer, backend.model, backend.pre_tokenizer
    if before is None or not isinstance(model, tokenizers.models.BPE) or model.dropout:
        return None
    if normal is not None and type(normal).__name__ not in ("NFC", "NFD", "NFKC", "NFKD"):  # which leave ASCII as it is
        return None
    told = json.loads(before.__getstate__())
    *first, last = told["pretokenizers"] if told["type"] == "Sequence" else [told]
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    if not first and last["use_regex"]:
        return ascii_of(_GPT2)
    if first == [{"type": "Digits", "individual_digits": True}] and last["use_regex"]:
        return ascii_of(_GPT2_DIGITS)
    if len(first) == 1 and first[0]["type"] == "Split" and not last["use_regex"]:
        (split,) = first
        if split["behavior"] == "Isolated" and not split["invert"] and "Regex" in split["pattern"]:
            return ascii_of(split["pattern"]["Regex"])
    return None


def ascii_of(pattern: str) -> str | None:
    """An expression with classes of Unicode (`\\p{L}`) as one that finds the same in ASCII text; None where it has others."""
    made, inside = [], False
    for part in re.findall(r"\\p\{\w+\}|\\.|.", pattern, re.DOTALL):
        if part.startswith("\\p{"):
            held = _ASCII.get(part[3:-1])
            if held is None or not (held or inside):
                return None
            part = held if inside else f"[{held}]"
        elif part.startswith("\\P"):
            return None
        elif part == "[":
            if inside:  # classes within classes are Oniguruma's
                return None
            inside = True
        elif part == "]":
            inside = False
        made.append(part)
    try:
        re.compile("".join(made), re.ASCII)
    except re.error:
        return None
    return "".join(made)
