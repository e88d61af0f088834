"""JSON Schema of a recipe, for editors."""

from __future__ import annotations

import json
from typing import Any

from temper import parts, tracking

_DATA = {"anyOf": [{"type": ["string", "object"]}, {"type": "array", "items": {"type": ["string", "object"]}, "minItems": 1}]}


def schema() -> dict[str, Any]:
    """JSON Schema of a recipe, for editors: `# yaml-language-server: $schema=temper.schema.json`."""
    definitions: dict[str, Any] = {}
    variants = []
    for name in parts.engines():
        module = parts.engine(name)
        made = parts.schema(parts.spec_of(module), definitions)
        made["properties"].pop("paper", None)
        methods = list(parts.methods(name))
        model = {"type": "string", "description": "a step, tune@500, last, model, a folder, a hub name, or house:lm"}
        for role, takes in module.INPUTS.items():
            one: dict[str, Any] = _DATA if takes.is_data else model
            entry = {"anyOf": [one, {"type": "array", "items": one}]} if takes.many else dict(one)
            made["properties"][role] = {**entry, "description": takes.about or one.get("description", "")}
        made["properties"]["name"] = {"type": "string"}
        made["properties"]["seed"] = {"type": "integer", "minimum": 0}
        made["properties"]["method"] = {"enum": methods}
        made["properties"]["about"] = {"type": "string", "description": "a sentence for the report"}
        figures = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
        made["properties"]["aim"] = {**figures, "description": "the figures that the step is meant to better"}
        definitions[f"engine.{name}"] = made
        settled = {"anyOf": [{"$ref": f"#/$defs/engine.{name}"}, {"type": "null"}]}
        variants.append({"type": "object", "properties": {name: settled}, "required": [name], "additionalProperties": False})
    steps = {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/step"}}
    repeat = {"type": "object", "properties": {"times": {"type": "integer", "minimum": 1}, "until": {"type": "string"}, "steps": steps}}
    each = {"type": "object", "properties": {"over": {"type": ["array", "object"]}, "as": {"type": "string"}, "steps": steps}}
    for block, made in (("repeat", repeat), ("each", each)):
        made.update(additionalProperties=False, required=["times" if block == "repeat" else "over", "steps"])
        variants.append({"type": "object", "properties": {block: made}, "required": [block], "additionalProperties": False})
    _variables(definitions)
    definitions["variable"] = {"type": "string", "pattern": r"^\$\{[\w.:-]+\}$", "description": "the value of a variable"}
    definitions["step"] = {"anyOf": [{"enum": parts.engines()}, *variants]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Temper recipe",
        "type": "object",
        "additionalProperties": False,
        "required": ["steps"],
        "properties": {
            "name": {"type": "string", "description": "what the run and its folder are called"},
            "about": {"type": "string", "description": "a sentence for the report"},
            "model": {"type": "string", "description": "new, a folder, a hub name, or house:lm"},
            "data": {**_DATA, "description": "a file, a folder, a hub name, house:library, or a source with settings"},
            "seed": {"type": "integer", "minimum": 0},
            "use": {"type": "array", "items": {"type": "string"}, "description": "Python files with parts of your own"},
            "env": {"type": "array", "items": {"type": "string"}, "description": "environment variables that ${env:NAME} may read"},
            "export": {"anyOf": [{"enum": ["last", "all", "none"]}, {"type": "array", "items": {"type": "string"}}]},
            "track": {"anyOf": [{"enum": ["none", *tracking.NAMES]}, {"type": "array", "items": {"enum": list(tracking.NAMES)}}]},
            "steps": steps,
        },
        "$defs": definitions,
    }


def _variables(node: Any) -> None:
    """Wherever a setting may stand, `${name}` may stand in its place."""
    if isinstance(node, dict):
        for value in node.values():
            _variables(value)
        for name, entry in node.get("properties", {}).items() if node.get("type") == "object" else ():
            told = {key: entry[key] for key in ("description", "default") if key in entry}
            node["properties"][name] = {"anyOf": [entry, {"$ref": "#/$defs/variable"}], **told}
    elif isinstance(node, list):
        for value in node:
            _variables(value)


def schema_text() -> str:
    """The schema as an editor reads it from a file."""
    return json.dumps(schema(), indent=1) + "\n"
