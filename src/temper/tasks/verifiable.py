"""Slot `task`: questions with one right answer that a program can work out, for tuning, rewards and accuracy.

Prompts read like Python, so that a model of code starts with half the idea. Every item stands between spaces and
every digit alone: whichever tokenizer, the same item is the same token wherever it stands.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Protocol, TypeVar

from pydantic import Field

from temper.parts import Count, Problem, fill, mark_of, part, shown, slot

T = TypeVar("T")

_WORDS = """
all and any args base body bytes call class close code context count data def default dict else end error except false
file filter first float for format from function get global group hash head if import in index input int is item join key
lambda last len line list load lock loop match max message method min name next none not number object open or order
output parent pass path print raise range read result return self set size sort start state str sum table test text time
true try tuple type value while with word write yield zero
"""

COMMON = tuple(_WORDS.split())
"""Words that code is full of: what the word tasks draw from where no other words are given."""

_OPEN, _CLOSE = "([{<", ")]}>"


@slot(phased=False)
class Verifiable(Protocol):
    """What is asked, and what is right?

    `question(rng) -> str` draws a prompt; `answer(prompt) -> str` works out its completion from the prompt alone, so
    that any text can be judged. A task with a setting `words` can be asked about the words of a text; one with a setting `working` can
    show its `steps(prompt)` before the answer.
    """

    def question(self, rng: random.Random) -> str: ...

    def answer(self, prompt: str) -> str: ...

    def steps(self, prompt: str) -> list[str]:
        """The working that leads to the answer, a text a step; none where a task has none to show."""
        return []

    def example(self, rng: random.Random) -> dict[str, str]:
        """A row: `{"prompt", "completion", "task"}`. The completion opens with a space."""
        prompt = self.question(rng)
        lines = [*(self.steps(prompt) if getattr(self, "working", False) else []), self.answer(prompt)]
        return {"prompt": prompt, "completion": f" {' ; '.join(lines)}", "task": mark_of(self).name}

    def check(self, prompt: str, completion: str) -> bool:
        """Whether a completion is right: exactly the answer, give or take white space around it."""
        return completion.strip() == self.answer(prompt)

    def formed(self, prompt: str, completion: str) -> bool:
        """Whether a completion, right or wrong, has the form that is asked for. Any has, where none is."""
        return True


@part
class SortLetters(Verifiable):
    """Letters in order, or, where the question says so, from the last to the first.  `sorted( d b a ) ==` -> ` a b d`,
    `sorted( d b a , reverse ) ==` -> ` d b a`
    """

    shortest: Count = 3
    """Letters to sort, at least."""
    longest: Count = 6
    """Letters to sort, at most."""
    alphabet: Annotated[str, Field(min_length=1)] = "abcdefghijklmnopqrstuvwxyz"
    """Letters to draw from."""
    words: tuple[str, ...] = ()
    """Words whose letters are asked for instead of drawn letters."""
    descending: bool = False
    """Whether they are asked for from the last to the first."""

    def __post_init__(self) -> None:
        _range(self.shortest, self.longest)
        _items(self.alphabet, "alphabet")
        _items(self.words, "words")

    def question(self, rng: random.Random) -> str:
        return _ask("sorted", [*_letters(self, rng), *((",", "reverse") if self.descending else ())])

    def answer(self, prompt: str) -> str:
        letters = _asked("sorted", prompt)
        descending = letters[-2:] == [",", "reverse"]
        return " ".join(sorted(letters[:-2] if descending else letters, reverse=descending))


@part
class SortWords(Verifiable):
    """Words in the order of their letters.  `sorted( self def import ) ==` -> ` def import self`"""

    shortest: Count = 2
    """Words to sort, at least."""
    longest: Count = 4
    """Words to sort, at most."""
    words: tuple[str, ...] = ()
    """Words to draw from; empty: common words of code."""

    def __post_init__(self) -> None:
        _range(self.shortest, self.longest)
        _items(self.words, "words", self.longest)

    def question(self, rng: random.Random) -> str:
        return _ask("sorted", rng.sample(self.words or COMMON, rng.randint(self.shortest, self.longest)))

    def answer(self, prompt: str) -> str:
        return " ".join(sorted(_asked("sorted", prompt)))


@part
class SortNumbers(Verifiable):
    """Whole numbers from small to large, digits apart.  `sorted( 4 1 , 7 , 1 2 ) ==` -> ` 7 , 1 2 , 4 1`"""

    shortest: Count = 3
    """Numbers to sort, at least."""
    longest: Count = 4
    """Numbers to sort, at most."""
    digits: Count = 1
    """Digits of a number, at most."""

    def __post_init__(self) -> None:
        _range(self.shortest, self.longest)

    def question(self, rng: random.Random) -> str:
        drawn = [rng.randrange(10**self.digits) for _ in range(rng.randint(self.shortest, self.longest))]
        return _ask("sorted", [" , ".join(map(_spell, drawn))])

    def answer(self, prompt: str) -> str:
        numbers = " ".join(_asked("sorted", prompt)).split(" , ")
        return " , ".join(map(_spell, sorted(_read(number, prompt) for number in numbers)))


@part
class ReverseLetters(Verifiable):
    """Letters from the last to the first.  `reversed( d b a ) ==` -> ` a b d`"""

    shortest: Count = 3
    """Letters to reverse, at least."""
    longest: Count = 4
    """Letters to reverse, at most."""
    alphabet: Annotated[str, Field(min_length=1)] = "abcdefghij"
    """Letters to draw from."""
    words: tuple[str, ...] = ()
    """Words whose letters are asked for instead of drawn letters."""

    def __post_init__(self) -> None:
        _range(self.shortest, self.longest)
        _items(self.alphabet, "alphabet")
        _items(self.words, "words")

    def question(self, rng: random.Random) -> str:
        return _ask("reversed", _letters(self, rng))

    def answer(self, prompt: str) -> str:
        return " ".join(reversed(_asked("reversed", prompt)))


@part
class ReverseWords(Verifiable):
    """Words from the last to the first.  `reversed( self def import ) ==` -> ` import def self`"""

    shortest: Count = 2
    """Words to reverse, at least."""
    longest: Count = 4
    """Words to reverse, at most."""
    words: tuple[str, ...] = ()
    """Words to draw from; empty: common words of code."""

    def __post_init__(self) -> None:
        _range(self.shortest, self.longest)
        _items(self.words, "words", self.longest)

    def question(self, rng: random.Random) -> str:
        return _ask("reversed", rng.sample(self.words or COMMON, rng.randint(self.shortest, self.longest)))

    def answer(self, prompt: str) -> str:
        return " ".join(reversed(_asked("reversed", prompt)))


@part
class Arithmetic(Verifiable):
    """Sums and differences of whole numbers, none below 0, digits apart.  `4 7 + 3 8 ==` -> ` 8 5`

    With working, digit by digit from the right, each with what was carried or borrowed; the answer stands last:
    ` 7 + 8 = 1 5 ; 4 + 3 + 1 = 8 ; 8 5`. Only the answer is judged.
    """

    digits: Count = 2
    """Digits of a number, at most."""
    operation: Literal["+", "-", "both"] = "both"
    """What is asked."""
    working: bool = False
    """Whether the completion shows its working before the answer."""

    def question(self, rng: random.Random) -> str:
        a, b = rng.randrange(10**self.digits), rng.randrange(10**self.digits)
        operation = rng.choice("+-") if self.operation == "both" else self.operation
        if operation == "-" and b > a:
            a, b = b, a
        return f"{_spell(a)} {operation} {_spell(b)} =="

    def answer(self, prompt: str) -> str:
        a, operation, b = self._terms(prompt)
        return _spell(a + b if operation == "+" else a - b)

    def check(self, prompt: str, completion: str) -> bool:
        return completion.rpartition(";")[2].strip() == self.answer(prompt)

    def _terms(self, prompt: str) -> tuple[int, str, int]:
        found = re.fullmatch(r"\s*(\d(?: \d)*) ([+-]) (\d(?: \d)*) ==\s*", prompt)
        if not found:
            raise Problem(f"{shown(prompt)} is no question of this task, which are written such as `4 7 + 3 8 ==`")
        return int(found[1].replace(" ", "")), found[2], int(found[3].replace(" ", ""))

    def steps(self, prompt: str) -> list[str]:
        a, operation, b = self._terms(prompt)
        lines, carried = [], 0
        for place in range(max(len(str(a)), len(str(b)))):
            x, y = a // 10**place % 10, b // 10**place % 10
            value = x + y + carried if operation == "+" else x - y - carried
            borrowed = 10 if value < 0 else 0
            left = f"{_spell(x + borrowed)} {operation} {y}" + (f" {operation} {carried}" if carried else "")
            lines.append(f"{left} = {_spell(value + borrowed)}")
            carried = value // 10 if operation == "+" else borrowed // 10
        return lines


@part
class Brackets(Verifiable):
    """The brackets that close what is open, the innermost first.  `closing ( [ ] { ==` -> ` } )`

    With working, what is open after each bracket, `.` where nothing is; the answer stands last: ` ( ; ( [ ; ( ; ( { ; } )`. Only the
    answer is judged.
    """

    shortest: Count = 4
    """Brackets shown, at least."""
    longest: Count = 12
    """Brackets shown, at most."""
    kinds: Annotated[int, Field(ge=1, le=4)] = 3
    """Kinds of brackets, of ( [ { <."""
    depth: Annotated[int, Field(ge=2)] = 6
    """Brackets open at once, at most."""
    working: bool = False
    """Whether the completion shows its working before the answer."""

    def __post_init__(self) -> None:
        _range(self.shortest, self.longest)

    def question(self, rng: random.Random) -> str:
        marks, open_, length = [], [], rng.randint(self.shortest, self.longest)
        for left in reversed(range(length)):
            # the last mark must leave something open; a full stack can only close, an empty one only open
            must = not open_ or (left == 0 and len(open_) == 1)
            if must or (len(open_) < self.depth and rng.random() < 0.6):
                open_.append(rng.choice(_OPEN[: self.kinds]))
                marks.append(open_[-1])
            else:
                marks.append(_CLOSE[_OPEN.index(open_.pop())])
        return f"closing {' '.join(marks)} =="

    def answer(self, prompt: str) -> str:
        return " ".join(_CLOSE[_OPEN.index(mark)] for mark in reversed(self._open(prompt)[-1]))

    def steps(self, prompt: str) -> list[str]:
        return [" ".join(open_) or "." for open_ in self._open(prompt)]

    def check(self, prompt: str, completion: str) -> bool:
        return completion.rpartition(";")[2].strip() == self.answer(prompt)

    def _open(self, prompt: str) -> list[list[str]]:
        """What is open after each bracket."""
        found = re.fullmatch(r"\s*closing ([][(){}<>](?: [][(){}<>])*) ==\s*", prompt)
        if not found:
            raise Problem(f"{shown(prompt)} is no question of this task, which are written such as `closing ( [ ==`")
        open_, states = list[str](), list[list[str]]()
        for mark in found[1].split(" "):
            if mark in _OPEN:
                open_.append(mark)
            elif not open_ or _CLOSE.index(mark) != _OPEN.index(open_.pop()):
                raise Problem(f"{shown(prompt)}: `{mark}` closes nothing that is open")
            states.append([*open_])
        return states


@part
class Instructions(Verifiable):
    """One of several skills, and the marks that the answer must stand in.  `reverse d b a , answer in < > ==` -> ` < a b d >`

    An answer in other marks, or in none, is ill-formed; one in the right marks with wrong content is wrong: two errors that can
    be told apart. `last` asks for the last letter, `count` how often a letter is there (`count a in b a a`), `add` for the sum of digits.
    Rows have a further column, `skill`.
    """

    skills: Annotated[tuple[Literal["sort", "reverse", "last", "count", "add"], ...], Field(min_length=1)] = (
        "sort",
        "reverse",
        "last",
        "count",
        "add",
    )
    """What may be asked for, each as often as the others."""
    marks: Annotated[int, Field(ge=1, le=4)] = 3
    """Kinds of marks that an answer may have to stand in, of ( [ { <."""
    shortest: Count = 3
    """Letters or digits shown, at least."""
    longest: Count = 5
    """Letters or digits shown, at most."""
    alphabet: Annotated[str, Field(min_length=1)] = "abcdefghij"
    """Letters to draw from."""

    def __post_init__(self) -> None:
        _range(self.shortest, self.longest)
        _items(self.skills, "skills")
        _items(self.alphabet, "alphabet")
        if marks := set(self.alphabet) & set(_OPEN + _CLOSE):
            raise Problem(f"`alphabet` holds {shown(min(marks))}, which marks answers; leave it out")

    def question(self, rng: random.Random) -> str:
        skill, kind = rng.choice(self.skills), rng.randrange(self.marks)
        items = rng.choices("0123456789" if skill == "add" else self.alphabet, k=rng.randint(self.shortest, self.longest))
        if skill == "count":
            items = [rng.choice(items), "in", *items]
        return f"{skill} {' '.join(items)} , answer in {_OPEN[kind]} {_CLOSE[kind]} =="

    def answer(self, prompt: str) -> str:
        skill, items, left, right = self._read(prompt)
        return f"{left} {' '.join(_SKILLS[skill](items))} {right}"

    def example(self, rng: random.Random) -> dict[str, str]:
        row = Verifiable.example(self, rng)
        return {**row, "skill": self._read(row["prompt"])[0]}

    def formed(self, prompt: str, completion: str) -> bool:
        _, _, left, right = self._read(prompt)
        return re.fullmatch(rf"\{left} [^][(){{}}<>]*[^][(){{}}<>\s] \{right}", completion.strip()) is not None

    def _read(self, prompt: str) -> tuple[str, list[str], str, str]:
        """Skill, items, and the two marks."""
        found = re.fullmatch(
            r"\s*(sort|reverse|last|count(?= \S in )|add(?=(?: \d)+ ,)) (\S.*) , answer in ([(\[{<]) ([)\]}>]) ==\s*", prompt
        )
        if not found:
            raise Problem(f"{shown(prompt)} is no question of this task, which are written such as `sort b a , answer in [ ] ==`")
        return found[1], found[2].split(" "), found[3], found[4]


_SKILLS: Mapping[str, Callable[[list[str]], list[str]]] = {
    "sort": sorted,
    "reverse": lambda items: items[::-1],
    "last": lambda items: items[-1:],
    "count": lambda items: list(str(items[2:].count(items[0]))),
    "add": lambda items: list(str(sum(map(int, items)))),
}


def verifiable(name: str) -> Verifiable:
    """The task of that name in its default settings."""
    return fill(Verifiable.__slot__, name, field="task")


def correct(row: Mapping[str, Any], completion: str) -> bool:
    """Whether a completion is right for a row.

    By the checker of the task that the row's column `task` names, where the prompt is one of its questions (data may have a
    `task` column of their own); else if it equals the row's own completion, give or take white space around it.
    """
    made = _judged(row, lambda task, prompt: task.check(prompt, completion))
    return completion.strip() == row["completion"].strip() if made is None else made


def formed(row: Mapping[str, Any], completion: str) -> bool:
    """Whether a completion, right or wrong, has the form that a row asks for.

    By the regular expression in the row's column `format`, which must match all of it but white space around it; else by the row's
    task, as in `correct`. Where neither asks for a form, any has it.
    """
    if isinstance(row.get("format"), str):
        try:
            return re.fullmatch(row["format"], completion.strip()) is not None
        except re.error as error:
            raise Problem(f"column `format`: {shown(row['format'])} is no regular expression: {error}") from error
    made = _judged(row, lambda task, prompt: task.formed(prompt, completion))
    return True if made is None else made


def worked(row: Mapping[str, Any]) -> tuple[list[str], str] | None:
    """The steps of a row's task and its answer, apart; None where the row has no task that shows any."""
    made = _judged(row, lambda task, prompt: (task.steps(prompt), task.answer(prompt)))
    return made if made and made[0] else None


def _judged(row: Mapping[str, Any], judge: Callable[[Verifiable, str], T]) -> T | None:
    """What a row's task says, by the prompt that it asked (`asked`, where the prompt was changed since); None where it has no say."""
    task = _checker(row["task"]) if isinstance(row.get("task"), str) else None
    if task is None:
        return None
    try:
        return judge(task, row["asked"] if isinstance(row.get("asked"), str) else row["prompt"])
    except Problem:
        return None


@functools.cache
def _checker(name: str) -> Verifiable | None:
    for cls in Verifiable.__subclasses__():  # also those of a recipe's own files, which no name reaches from here
        if "__part__" in vars(cls) and mark_of(cls).name == name:
            return cls()
    try:
        return verifiable(name)
    except Problem:
        return None


def _range(shortest: int, longest: int) -> None:
    if shortest > longest:
        raise Problem(f"`shortest` is {shortest} and `longest` is {longest}; the first must not be above the second")


def _items(items: Sequence[str], name: str, least: int = 1) -> None:
    """What a prompt may list: distinct, and without the white space that parts its items."""
    bad = next((item for item in items if not item or set(item) & set(" \t\n\r()")), None)
    if bad is not None:
        raise Problem(f"`{name}` holds {shown(bad)}; white space and ( ) cannot be listed")
    if len(set(items)) < len(items):
        raise Problem(f"`{name}` holds {shown(next(item for item in items if list(items).count(item) > 1))} twice; name each once")
    if items and len(items) < least:
        raise Problem(f"`{name}` holds {len(items)}, fewer than the {least} that `longest` asks for; give more, or lower `longest`")


def _ask(what: str, items: Sequence[str]) -> str:
    return f"{what}( {' '.join(items)} ) =="


def _asked(what: str, prompt: str) -> list[str]:
    found = re.fullmatch(rf"\s*{what}\( (\S.*?) \) ==\s*", prompt)
    if not found:
        raise Problem(f"{shown(prompt)} is no question of this task, which are written `{what}( ... ) ==`")
    return found[1].split(" ")


def _letters(task: SortLetters | ReverseLetters, rng: random.Random) -> list[str]:
    if task.words:
        return list(rng.choice(task.words))
    return rng.choices(task.alphabet, k=rng.randint(task.shortest, task.longest))


def _spell(number: int) -> str:
    return " ".join(str(number))


def _read(number: str, prompt: str) -> int:
    digits = number.replace(" ", "")
    if not digits.isdigit():
        raise Problem(f"{shown(prompt)}: {shown(number)} is no whole number")
    return int(digits)
