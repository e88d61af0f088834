"""JSON Schema of a recipe, for editors."""

from __future__ import annotations

import json
from typing import Any

from temper import parts


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
            one: dict[str, Any] = {"type": ["string", "object"]} if takes.is_data else model
            entry = {"anyOf": [one, {"type": "array", "items": one}]} if takes.many else dict(one)
            made["properties"][role] = {**entry, "description": takes.about or one.get("description", "")}
        made["properties"]["name"] = {"type": "string"}
        made["properties"]["seed"] = {"type": "integer", "minimum": 0}
        made["properties"]["method"] = {"enum": methods}
        definitions[f"engine.{name}"] = made
        settled = {"anyOf": [{"$ref": f"#/$defs/engine.{name}"}, {"type": "null"}]}
        variants.append({"type": "object", "properties": {name: settled}, "required": [name], "additionalProperties": False})
    steps = {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/step"}}
    repeat = {"type": "object", "properties": {"times": {"type": "integer", "minimum": 1}, "until": {"type": "string"}, "steps": steps}}
    each = {"type": "object", "properties": {"over": {"type": ["array", "object"]}, "as": {"type": "string"}, "steps": steps}}
    for block, made in (("repeat", repeat), ("each", each)):
        made.update(additionalProperties=False, required=["times" if block == "repeat" else "over", "steps"])
        variants.append({"type": "object", "properties": {block: made}, "required": [block], "additionalProperties": False})
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
            "data": {"type": ["string", "object"], "description": "a file, a folder, a hub name, house:library, or a source with settings"},
            "seed": {"type": "integer", "minimum": 0},
            "use": {"type": "array", "items": {"type": "string"}, "description": "Python files with parts of your own"},
            "env": {"type": "array", "items": {"type": "string"}, "description": "environment variables that ${env:NAME} may read"},
            "export": {"anyOf": [{"enum": ["last", "all", "none"]}, {"type": "array", "items": {"type": "string"}}]},
            "steps": steps,
        },
        "$defs": definitions,
    }


def schema_text() -> str:
    return json.dumps(schema(), indent=1) + "\n"
