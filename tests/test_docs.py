"""What the documentation shows works: recipes load, commands and their options exist, Python compiles, pages are reachable."""

from __future__ import annotations

import ast
import importlib.util
import io
import os
import re
import shlex
from pathlib import Path

import pytest
import typer
from ruamel.yaml import YAML

from temper import recipe
from temper.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [page for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))] if page.exists()]


def blocks(language: str) -> list:
    """Code blocks of a language as parameters, named by page and line."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf8")
        for match in re.finditer(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            line = text.count("\n", 0, match.start()) + 2
            found.append(pytest.param(match[1], id=f"{page.relative_to(ROOT)}:{line}"))
    return found


@pytest.mark.parametrize("text", blocks("yaml"))
def test_recipes_in_the_docs_load(text, tmp_path, monkeypatch):
    raw = YAML(typ="safe").load(text)
    if not (isinstance(raw, dict) and "steps" in raw):
        if not isinstance(raw, dict) or not set(raw) <= {"data"}:
            return  # a comment, or one slot of a step
        text += "model: house:lm\nsteps:\n  - evaluate: {model: model}\n"
    elif "model" not in raw:
        text = "model: house:lm\ndata: house:library\n" + text
    (tmp_path / "my-model").mkdir()
    (tmp_path / "rows.jsonl").write_text('{"text": "x"}\n')
    for name in raw.get("use", ()):
        (tmp_path / name).write_text(next(block.values[0] for block in blocks("python") if "class Focal(" in block.values[0]))
    assert recipe.read(text, "shown.yaml", tmp_path).steps


@pytest.mark.parametrize("text", blocks("bash"))
def test_commands_in_the_docs_exist(text):
    command = typer.main.get_command(app)
    targets = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["make"]:
            assert words[1] in targets
        if words[:1] != ["temper"] or words[1:] == ["--help"]:
            continue
        name, *rest = words[1:]
        assert name in command.commands, line  # type: ignore[attr-defined]
        known = {option for parameter in command.commands[name].params for option in parameter.opts}  # type: ignore[attr-defined]
        for word in rest:
            assert not word.startswith("-") or word in known, line


@pytest.mark.parametrize("text", blocks("python"))
def test_python_in_the_docs_compiles(text):
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("temper"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                inside = importlib.util.find_spec(f"{node.module}.{alias.name}") if hasattr(module, "__path__") else None
                assert inside or hasattr(module, alias.name), f"{node.module} has no {alias.name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_between_pages_lead_somewhere(page):
    made = {
        ROOT / "docs" / name
        for name in ("reference/methods.md", "reference/parts.md", "reference/papers.md", "contributing.md", "changelog.md", "results.md")
    }
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf8")):
        if not re.match(r"[a-z]+:", target):
            path = Path(os.path.normpath(page.parent / target))
            assert path.exists() or path in made, f"{target} is not there"


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf8")
    shown = set(re.findall(r": ([\w/.-]+\.md)$", text, re.MULTILINE))
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs")
        assert name.as_posix() in shown or name.parts[0] == "guarantees", f"{name} is in no menu"


def test_make_help_lists_every_target():
    text = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    assert phony
    assert re.findall(r"^([a-z-]+):.*## ", text, re.MULTILINE) == phony[1].split()


def test_constraints_pin_what_the_project_needs():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = ("dev", "docs", "lm-eval", "ray")
    asked = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    wanted = [line.split(",")[0] for line in asked if not line.startswith("temper-ml[")]
    pins = dict(line.split("==") for line in io.StringIO((ROOT / "constraints.txt").read_text()) if not line.startswith("#"))
    for line in wanted:
        name, lowest = re.fullmatch(r"([\w.-]+)(?:\[\w+\])?>=([\d.]+)", line).groups()  # type: ignore[union-attr]
        pinned = pins[re.sub(r"[-_.]+", "-", name).lower()].strip()
        assert [int(part) for part in re.findall(r"\d+", pinned)] >= [int(part) for part in lowest.split(".")], line
    assert all("+" not in version for version in pins.values())
