"""Texts with a label out of Python's own library: which module a docstring is from, what each word of a line of code is."""

from __future__ import annotations

import ast
import functools
import io
import keyword
import random
import tokenize
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from temper.parts import Problem
from temper.tasks.library import modules
from temper.tasks.rows import Rows, held_out

# ----------------------------------------------------------------------------------------------------- docstrings


@functools.lru_cache(maxsize=1)
def paragraphs() -> tuple[tuple[str, str], ...]:
    """Dotted name and paragraph, for the first paragraph of every docstring in the packages of Python's own library."""
    return tuple((name, one) for name, text in modules() if "." in name for one in _paragraphs(text))


def docstrings(
    found: Iterable[tuple[str, str]],
    split: Literal["train", "test"],
    count: int,
    classes: int,
    shortest: int,
    longest: int,
    holdout: float,
    rng: random.Random,
) -> list[dict[str, Any]]:
    """Up to `count` rows: the first paragraph of a docstring as prompt, the package at the top that it is from as completion.

    found: of modules, dotted name and paragraph. The labels are the `classes` packages with the most different paragraphs of `shortest`
    to `longest` characters, as many rows of each. A paragraph that several packages have is left out. Its hash says of which split it
    is. Raises a `Problem` where there are fewer packages.
    """
    owners: dict[str, dict[str, str]] = defaultdict(dict)
    for name, paragraph in found:
        if shortest <= len(paragraph) <= longest:
            owners[paragraph].setdefault(name.partition(".")[0], name)
    of: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for paragraph, known in owners.items():
        if len(known) == 1:
            ((package, module),) = known.items()
            of[package].append((paragraph, module))
    labels = sorted(of, key=lambda package: (-len(of[package]), package))[:classes]
    mine = {label: [one for one in of[label] if held_out(one[0], holdout) == (split == "test")] for label in labels}
    each = min(-(-count // classes), *map(len, mine.values())) if len(labels) == classes else 0
    if not each:
        raise Problem(f"this Python's library has too few docstrings for {classes} classes; lower `classes`, or change `holdout`")
    drawn = [(label, *one) for label in labels for one in rng.sample(mine[label], each)]
    rows = [{"prompt": f'"""{paragraph}"""\nfrom', "completion": f" {label}", "module": module} for label, paragraph, module in drawn]
    return rng.sample(rows, len(rows))[:count]


def _paragraphs(source: str) -> Iterator[str]:
    """The first paragraph of every docstring of a source, white space as single spaces."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())


# ----------------------------------------------------------------------------------------------------------- tags


def tagged(
    rows: Rows, split: Literal["train", "test"], count: int, shortest: int, longest: int, holdout: float, rng: random.Random
) -> list[dict[str, Any]]:
    """Up to `count` rows: a line of code as words, and a tag of each word.

    rows: texts of Python. A prompt is the tokens of a statement's line between spaces, and a line feed; a completion their tags, see
    `tags`. Lines of `shortest` to `longest` words, each once; its hash says of which split it is. Texts that Python's tokenizer refuses
    are read as far as it goes. Raises a `Problem` where there is no such line.
    """
    lines: dict[str, dict[str, Any]] = {}
    for number, row in enumerate(rows.rows):
        rest = {key: value for key, value in row.items() if key != "text"}
        rest = rest if rest.keys() & {"group", "module"} else {**rest, "group": number}
        for line in _lines(row["text"]):
            words = [token.string for token in line]
            prompt = f"{' '.join(words)}\n"
            plain = not any(set(word) & set(" \t\f\r\n") for word in words)
            if plain and shortest <= len(words) <= longest and held_out(prompt, holdout) == (split == "test"):
                lines.setdefault(prompt, {"prompt": prompt, "completion": " ".join(tags(line)), **rest})
    if not lines:
        raise Problem(f"{rows.name} has no line of Python of {shortest} to {longest} words; give sources, or other lengths")
    return rng.sample(list(lines.values()), min(count, len(lines)))


def _lines(text: str) -> Iterator[list[tokenize.TokenInfo]]:
    """The tokens of each line that is one statement, or its head, comments left out."""
    line: list[tokenize.TokenInfo] = []
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type in (tokenize.NAME, tokenize.NUMBER, tokenize.STRING, tokenize.OP):
                line.append(token)
            elif token.type == tokenize.NEWLINE:
                yield line
                line = []
            elif token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER):
                line = []  # of a kind that other versions of Python have
    except (tokenize.TokenError, SyntaxError):
        return


_TYPES: Mapping[int, str] = {tokenize.NUMBER: "number", tokenize.STRING: "string", tokenize.OP: "mark"}


def tags(line: list[tokenize.TokenInfo]) -> list[str]:
    """What each token of a line is: keyword, number, string, mark; of names defined (after `def`, `class`), attribute (after a dot),
    called (before a bracket), argument (within brackets before `=`), name. What a called name or an argument is shows in the next token."""
    made, depth = [], 0
    words = ["", *(token.string for token in line), ""]
    for before, token, after in zip(words, line, words[2:]):
        if token.type == tokenize.OP:
            depth += (token.string in "([{") - (token.string in ")]}")
        if token.type != tokenize.NAME:
            made.append(_TYPES[token.type])
        elif keyword.iskeyword(token.string):
            made.append("keyword")
        elif before in ("def", "class"):
            made.append("defined")
        elif after == "(":
            made.append("called")
        elif before == ".":
            made.append("attribute")
        else:
            made.append("argument" if depth and after == "=" else "name")
    return made
