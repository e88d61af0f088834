"""Engines and methods in words: tables by slots, one method's page, a ready recipe. All from the dataclasses."""

from __future__ import annotations

import textwrap
from typing import Any

from temper import parts
from temper.parts import Problem, describe, dump, mark_of
from temper.passport import UNKNOWN, Passport


def summary(engine: str) -> str:
    """What an engine does, in a line."""
    return parts.summary(parts.spec_of(parts.engine(engine))) or parts.summary(parts.engine(engine))


def table(engine: str) -> tuple[list[str], list[list[str]]]:
    """Methods in rows, slots in columns; a dot where the default stands."""
    module = parts.engine(engine)
    spec = parts.spec_of(module)
    found = parts.methods(engine)
    questions = parts.slots(spec)
    changed = [name for name in questions if any(getattr(one, name) != questions[name].default for one in found.values())]
    rows = [["(default)", *(names(questions[name].default) for name in changed), ""]]
    for name, one in found.items():
        cells = ["·" if getattr(one, slot) == questions[slot].default else names(getattr(one, slot)) for slot in changed]
        rows.append([name, *cells, one.paper])
    return ["method", *changed, "paper"], rows


def narrow(headings: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """The same for a terminal that the slots do not fit beside one another: a method, and what stands in its slots besides defaults."""
    *slots, _ = headings[1:]
    made = []
    for name, *cells, paper in rows:
        differs = [f"{slot}: {cell}" for slot, cell in zip(slots, cells, strict=True) if cell != "·"]
        made.append([name, "\n".join([*(differs if name != "(default)" else [", ".join(differs)]), *([paper] if paper else [])])])
    return ["method", "in its slots besides the defaults; paper"], made


def names(value: Any) -> str:
    """`lora(rank=8)`: a slot's parts with the settings that differ from their defaults."""
    if value is None:
        return "none"
    words = []
    for one in parts.held(value):
        known = parts.settings(type(one))
        given = [
            f"{k}={parts.shown(dump(getattr(one, k)))}"
            for k, setting in known.items()
            if getattr(one, k) != setting.default and not setting.question
        ]
        words.append(mark_of(one).name + (f"({', '.join(given)})" if given else ""))
    return " + ".join(words)


def page(engine: str, name: str) -> str:
    """One method: parts, settings and formulas in the order in which they start, and a ready recipe."""
    module, spec = parts.engine(engine), parts.method(engine, name)
    lines = [f"{engine}.{name}", f"  {summary(engine)}"]
    if spec.paper:
        lines.append(f"  paper: {spec.paper}")
    for row in describe(spec, getattr(module, "PROVIDES", ())):
        lines += ["", f"{row.slot}: {row.part}{'  (not the default)' if row.changed else ''}", f"  {row.question}"]
        lines += textwrap.indent(row.doc, "    ").splitlines()
        for key, value in row.settings.items():
            meaning = f"  {row.meanings[key]}" if key in row.meanings else ""
            lines.append(f"      {key} = {parts.shown(value)}{meaning}")
    lines += ["", "a recipe:", textwrap.indent(ready(engine, name), "  ")]
    return "\n".join(lines)


def ready(engine: str, name: str) -> str:
    """A recipe that runs one method."""
    module, (shapes, others) = parts.engine(engine), _takes(engine, name)
    lines = ["name: mine"]
    if "model" in module.INPUTS:
        first = "new" if module.INPUTS["model"].optional else "house:lm"
        lines.append(f"model: {first:<15} # or a folder, or a Hugging Face name")
    if "data" in module.INPUTS:
        lines.append(
            "data: house:library    # or a file" if "text" in shapes else f"data: rows.jsonl       # rows of shape {' or '.join(shapes)}"
        )
    inputs = "".join(f", {role}: {'house:library' if module.INPUTS[role].is_data else 'model'}" for role in others)
    return "\n".join([*lines, "steps:", f"  - {engine}: {{method: {name}, model: model, data: data{inputs}}}"])


def _takes(engine: str, name: str) -> tuple[list[str], list[str]]:
    """The shapes of data that a method takes, with a plain model; and the optional inputs without which it takes none."""
    module, spec = parts.engine(engine), parts.method(engine, name)
    model = Passport("model", base=UNKNOWN, tokenizer=UNKNOWN, template=UNKNOWN, numbers="float32", architecture=UNKNOWN)
    given: dict[str, Any] = {role: [model] if takes.many else model for role, takes in module.INPUTS.items() if not takes.is_data}
    given |= {role: Passport(takes.kinds[0]) for role, takes in module.INPUTS.items() if takes.is_data and role != "data"}
    others = [role for role in given if role != "model" and module.INPUTS[role].optional]
    found: list[str] = []
    for left_out in (others, []):
        inputs = {role: one for role, one in given.items() if role not in left_out}
        for shape in module.INPUTS["data"].kinds if "data" in module.INPUTS else ():
            try:
                module.passport(spec, {**inputs, "data": Passport(shape)})
            except Problem:
                continue
            found.append(shape)
        if found:
            return found, [role for role in others if role not in left_out]
    return found, []


def all_methods(engine: str | None = None) -> dict[str, Any]:
    """Engine -> method -> its resolved settings, as JSON."""
    chosen = [parts.engine(engine).__name__.split(".")[1]] if engine else parts.engines()
    return {one: {name: dump(spec) for name, spec in parts.methods(one).items()} for one in chosen}


def one(engine: str, name: str) -> dict[str, Any]:
    """One method as JSON: settings, and every slot as a reader sees it."""
    import dataclasses

    spec = parts.method(engine, name)
    rows = describe(spec, getattr(parts.engine(engine), "PROVIDES", ()))
    return {
        "engine": engine,
        "method": name,
        "settings": dump(spec),
        "slots": [dataclasses.asdict(row) for row in rows],
        "recipe": ready(engine, name),
    }
