"""The catalogue: which paper lives where, and which of them are built today.

`catalogue.json` has a row per paper. What is built is not written there: it is read off the engines' `methods.py`, whose entries
name their paper by title or id.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from temper import parts
from temper.parts import Problem


@dataclass(frozen=True)
class Paper:
    """A row of the catalogue, with what is built of it and what was found."""

    id: str
    title: str
    short: str
    """What its authors call it; may be empty."""
    engine: str
    """Where it lives: an engine, or `models`, `train`, `tasks`, `docs`."""
    name: str
    """The name that its method, recipe or study has there; empty for references."""
    unit: str
    """What it becomes: method, recipe, study, metric, format, system, reference."""
    wave: int
    """When it is taken up: 1 first, 0 for foundations."""
    built: tuple[str, ...] = ()
    """Methods and studies that exist today: `quantize gptq`, `study evaluate.sft-power-law`."""
    verdict: str = ""
    """What its card found; empty where there is none."""


def papers(query: str | None = None, engine: str | None = None, built: bool | None = None) -> list[Paper]:
    """Papers that match, best first; without a query in the catalogue's order.

    query: words that all occur in id, short name, name or title, in any case. engine: only what lives there. built: only what
    exists today (True) or does not yet (False). Raises `Problem` where no paper lives in such an engine.
    """
    methods, verdicts = _built(), _verdicts()
    found = [dataclasses.replace(paper, built=methods.get(paper.id, ()), verdict=verdicts.get(paper.id, "")) for paper in catalogue()]
    if engine is not None:
        places = {parts.plain(paper.engine): paper.engine for paper in found}
        if parts.plain(engine) not in places:
            raise Problem(f"no paper lives in `{engine}`{parts.nearest(engine, places.values())}")
        found = [paper for paper in found if paper.engine == places[parts.plain(engine)]]
    if built is not None:
        found = [paper for paper in found if bool(paper.built) == built]
    words = (query or "").lower().split()
    scored = [(_score(paper, words), paper) for paper in found]
    return [paper for score, paper in sorted(scored, key=lambda pair: -pair[0]) if score > 0]


def nearest(query: str, most: int = 5) -> list[Paper]:
    """Papers whose names or words of the title resemble a query that found nothing, best first."""
    wanted = query.lower().split()

    def likeness(paper: Paper) -> float:
        known = {paper.id.lower(), paper.name, paper.short.lower(), *re.findall(r"\w+", paper.title.lower())}
        return sum(max(difflib.SequenceMatcher(None, word, other).ratio() for other in known) for word in wanted) / max(1, len(wanted))

    rated = sorted(((likeness(paper), paper) for paper in papers()), key=lambda pair: -pair[0])
    return [paper for rate, paper in rated[:most] if rate > 0.6]


def resolve(pointer: str) -> Paper:
    """The paper that a method's `paper=` names, by id or title. Raises `Problem` with the nearest title."""
    rows, titles = catalogue(), _titles()
    for paper in rows:
        if paper.id == pointer:
            return paper
    if _bare(pointer) in titles:
        return titles[_bare(pointer)]
    close = difflib.get_close_matches(_bare(pointer), titles, n=1)
    hint = f"; did you mean {titles[close[0]].id}, “{titles[close[0]].title}”?" if close else "; give its id or its title in catalogue.json"
    raise Problem(f"no paper “{pointer}” in the catalogue{hint}")


@functools.cache
def catalogue() -> tuple[Paper, ...]:
    """All rows, in the order of their ids, without what is built."""
    text = Path(__file__).with_name("catalogue.json").read_text(encoding="utf8")
    return tuple(Paper(**row) for row in json.loads(text))


@functools.cache
def _titles() -> dict[str, Paper]:
    return {_bare(paper.title): paper for paper in catalogue()}


def _bare(title: str) -> str:
    """A title reduced to letters and digits, so that case, punctuation and raised figures do not matter."""
    return re.sub(r"[\W_]+", "", unicodedata.normalize("NFKD", title)).lower()


def _built() -> dict[str, tuple[str, ...]]:
    """Paper id -> the methods and studies that name it. A pointer that resolves to nothing is an error: the catalogue keeps its word."""
    pointers = [(f"{engine} {name}", spec.paper) for engine in parts.engines() for name, spec in parts.methods(engine).items()]
    pointers += [(f"study {path.parent.name}.{path.stem}", _paper(path)) for path in sorted(shipped("studies").glob("*/*.yaml"))]
    found: dict[str, tuple[str, ...]] = {}
    for name, pointer in pointers:
        if pointer:
            paper = resolve(pointer)
            found[paper.id] = (*found.get(paper.id, ()), name)
    return found


@functools.cache
def _paper(study: Path) -> str:
    """The paper that a study file names."""
    from ruamel.yaml import YAML

    return str(YAML(typ="safe").load(study.read_text(encoding="utf8")).get("paper", ""))


def shipped(name: str) -> Path:
    """The folder `studies` or `cards` that comes with Temper: in the package, or in a checkout beside `src`."""
    inside = Path(__file__).parent / name
    return inside if inside.is_dir() else Path(__file__).parents[2] / name


def cards(folder: Path | None = None) -> Iterator[dict[str, Any]]:
    """All cards of a folder, by default those that come with Temper."""
    for path in sorted((folder or shipped("cards")).glob("*/*.json")):
        yield json.loads(path.read_text(encoding="utf8"))


def _verdicts() -> dict[str, str]:
    """Paper id -> its cards' verdicts."""
    found: dict[str, list[str]] = {}
    for card in cards():
        if card["paper"]:
            found.setdefault(resolve(card["paper"]).id, []).append(card["verdict"])
    return {paper: ", ".join(dict.fromkeys(verdicts)) for paper, verdicts in found.items()}


def _score(paper: Paper, words: Iterable[str]) -> float:
    """0 where a word occurs nowhere; more for whole names than for parts of names, and more for these than for words of the title."""
    names = [paper.id.lower(), paper.name.lower(), paper.short.lower()]
    title = paper.title.lower()
    total = 1.0
    for word in words:
        if word in names:
            total += 8
        elif any(name.startswith(word) for name in names):
            total += 4
        elif any(word in name for name in names):
            total += 3
        elif re.search(rf"\b{re.escape(word)}", title):
            total += 2
        elif word in title:
            total += 1
        else:
            return 0
    return total
