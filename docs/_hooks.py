"""Pages that are made when the documentation is built: methods by slots, slots and parts, papers, each from the mechanism itself;
CONTRIBUTING, CHANGELOG and the benchmarks' RESULTS from the repository.

Also fills the navigation's `Guarantees` with the pages of docs/guarantees, in the order of their names.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from temper import methods, parts
from temper.papers import cards, papers
from temper.report import plots


def on_config(config: Any) -> Any:
    """Replaces a folder in the navigation by its pages."""
    home = Path(config.docs_dir)
    for entry in config.nav:
        for title, value in entry.items():
            if isinstance(value, str) and (home / value).is_dir():
                entry[title] = [page.relative_to(home).as_posix() for page in sorted((home / value).glob("*.md"))]
    return config


def on_files(files: Files, config: Any) -> Files:
    pages = {f"reference/{name}.md": made() for name, made in {"methods": _methods, "parts": _parts, "papers": _papers}.items()}
    for name in ("CONTRIBUTING", "CHANGELOG", "benchmarks/RESULTS"):
        file = Path(config.docs_dir).parent / f"{name}.md"
        pages[f"{file.stem.lower()}.md"] = file.read_text(encoding="utf8")
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Puts the cards where a page asks for them: `<!-- cards -->` all in a table, `<!-- card tune.lora -->` one with its arms."""
    markdown = markdown.replace("<!-- cards -->", _cards()) if "<!-- cards -->" in markdown else markdown
    return re.sub(r"<!-- card ([\w-]+)\.([\w-]+) -->", lambda found: _card(*found.groups()), markdown)


def _card(engine: str, method: str) -> str:
    """A card: its question and finding, the arms by its main figure as a chart, and all their figures as a table."""
    found = next((one for one in cards() if (one["engine"], one["method"]) == (engine, method)), None)
    if found is None:
        raise ValueError(f"no card {engine}.{method}; a page asks for it")
    figures = {name: one["figures"] for name, one in found["arms"].items()}
    main, *_ = names = list(figures[found["baselines"][0]])
    first = figures[found["baselines"][0]][main]
    arms = sorted(figures, key=lambda name: figures[name][main]["value"] * (-1 if first["better"] == "higher" else 1))
    spans = [plots.Span(arm, _told(one := figures[arm][main]), one["value"], one["low"], one["high"]) for arm in arms]
    chart = str(plots.spans(f"{main} of every arm, with its interval", spans, first["unit"]))
    tuned = sorted({key for one in found["arms"].values() for key in one["tuned"]})
    rows = [
        [arm, *(_told(figures[arm][name]) for name in names), *(parts.shown(found["arms"][arm]["tuned"].get(key, "")) for key in tuned)]
        for arm in arms
    ]
    table = _table(["arm", *names, *(key.rpartition(".")[2] for key in tuned)], rows)
    verdict = found["verdict"].capitalize()
    told = f"**{verdict}.** {_cell(found['finding'].removeprefix(f'{verdict}: '))}"
    return f'{_cell(found["experiment"])}\n\n{told}\n\n<div class="arms">{chart}</div>\n\n{table}'


def _told(figure: dict[str, Any]) -> str:
    """A value with its interval; counts as whole numbers, without."""
    if figure["value"] >= 10_000:
        return f"{figure['value']:,.0f}"
    ends = f" [{figure['low']:.3g}, {figure['high']:.3g}]" if figure["low"] is not None else ""
    return f"{figure['value']:.3g}{ends}"


def _cards() -> str:
    told = ("claim", "verdict", "finding")
    rows = [[f"{one['engine']}.{one['method']}", *(one[key] for key in told), len(one["attempts"])] for one in cards()]
    return _table(["card", "the paper's claim", "verdict", "finding", "attempts"], rows)


def _cell(text: object) -> str:
    """Text that Markdown's tables leave alone."""
    return html.escape(str(text)).replace("|", "&#124;").replace("\n", " ").replace("*", "&#42;").replace("_", "&#95;")


def _table(headings: list[str], rows: list[list[object]]) -> str:
    lines = ["| " + " | ".join(map(_cell, headings)) + " |", "|" + " --- |" * len(headings)]
    return "\n".join([*lines, *("| " + " | ".join(map(_cell, row)) + " |" for row in rows)])


def _methods() -> str:
    lines = ["# Methods by slots", "", "A row is a method; a dot means that the engine's default stands in the slot.", ""]
    for engine in parts.engines():
        headings, rows = methods.table(engine)
        lines += [f"## {engine}", "", _cell(methods.summary(engine)), "", _table(headings, rows), ""]
    return "\n".join(lines)


def _parts() -> str:
    lines = [
        "# Slots and parts",
        "",
        "Every slot of every engine, the question that it asks, and the parts that answer it with their settings.",
        "",
    ]
    for engine in parts.engines():
        spec = parts.spec_of(parts.engine(engine))
        meanings = parts.documented(spec)
        lines += [f"## {engine}", ""]
        plain = {name: one for name, one in parts.settings(spec).items() if not one.question and name != "paper"}
        if plain:
            rows = [[name, parts.shown(parts.dump(one.default)), meanings.get(name, "")] for name, one in plain.items()]
            lines += [_table(["setting", "default", "meaning"], rows), ""]
        for name, one in parts.slots(spec).items():
            assert one.question
            empty = " May be `none`." if one.optional else ""
            lines += [f"### {engine} · {name}", "", _cell(parts.summary(one.question.protocol)) + empty, ""]
            for title, part in one.question.parts().items():
                lines += [f"**`{title}`** {_cell(parts.summary(part))}", ""]
                told = parts.documented(part)
                rows = [
                    [
                        key,
                        "needed" if repr(two.default).endswith("MISSING_TYPE object>") else parts.shown(parts.dump(two.default)),
                        told.get(key, ""),
                    ]
                    for key, two in parts.settings(part).items()
                ]
                if rows:
                    lines += [_table(["setting", "default", "meaning"], rows), ""]
    return "\n".join(lines)


def _papers() -> str:
    found = papers()
    built = sum(bool(paper.built) for paper in found)
    lines = ["# Papers", "", f"{len(found)} papers and the engine where each lives; {built} of them are built today, in bold.", ""]
    for engine in sorted({paper.engine for paper in found}):
        lines += [f"## {engine}", ""]
        rows = []
        for paper in found:
            if paper.engine == engine:
                mark = "**" if paper.built else ""
                rows.append(f"| {paper.id} | {mark}{_cell(paper.name)}{mark} | {_cell(paper.unit)} | {mark}{_cell(paper.title)}{mark} |")
        lines += ["| id | name | becomes | title |", "| --- | --- | --- | --- |", *rows, ""]
    return "\n".join(lines)
