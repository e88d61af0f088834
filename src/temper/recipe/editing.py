"""A recipe's mapping before it is read: YAML tags refused, `--set` applied, variables put in."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from temper.parts import Problem, nearest, plain, shown
from temper.recipe.places import BLOCKS, Located

TOP = ("name", "model", "data", "seed", "use", "env", "export", "track", "steps", "about")
"""A recipe's own keys."""
_VARIABLE = re.compile(r"\$\{([\w.:-]+)\}")


def no_tags(node: Any, path: tuple[str | int, ...] = ()) -> None:
    """YAML tags (`!!python/object`) have no place in a recipe."""
    tag = getattr(getattr(node, "tag", None), "value", None)
    if tag and str(tag).removeprefix("tag:yaml.org,2002:") not in ("map", "seq", "str", "int", "float", "bool", "null", "timestamp"):
        raise Problem(f"the tag {shown(str(tag))} is not allowed; write plain values", path)
    if isinstance(node, Mapping):
        for key, value in node.items():
            no_tags(value, (*path, key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            no_tags(value, (*path, index))


def change(raw: Any, one: str) -> tuple[str | int, ...]:
    """Applies `step.key.more=value`. Returns the path that it changed."""
    from ruamel.yaml import YAML

    key, equals, value = one.partition("=")
    if not equals or not all(key.strip().split(".")):
        raise Located(f"--set: {shown(one)}: write step.key=value, or key=value for the recipe's own keys")
    try:
        return assign(raw, key.strip(), YAML(typ="safe").load(value))
    except Problem as problem:
        raise Located(f"--set: {problem}") from problem


def assign(raw: Any, key: str, value: Any) -> tuple[str | int, ...]:
    """Puts a value where `key` says: `step.setting.more`, or a key of the recipe. Returns its path. Raises `Problem`."""
    words = key.split(".")
    node: Any = raw
    path: list[str | int] = []
    if len(words) == 1 or words[0] in TOP:
        if words[0] not in TOP:
            raise Problem(f"no key `{words[0]}` in a recipe{nearest(words[0], TOP)}")
    else:
        names: dict[str, Any] = {}
        for where, entry in entries(raw.get("steps") or [], ("steps",)):
            engine = next(iter(entry)) if isinstance(entry, Mapping) else entry
            body = entry[engine] if isinstance(entry, Mapping) else None
            names[str(body.get("name", engine)) if isinstance(body, Mapping) else str(engine)] = (where, engine)
        found = next((name for name in names if plain(name) == plain(words[0])), None)
        if found is None:
            raise Problem(f"no step `{words[0]}`{nearest(words[0], names)}")
        where, engine = names[found]
        parent: Any = raw
        for step in where[:-1]:
            parent = parent[step]
        if not isinstance(parent[where[-1]], Mapping) or not isinstance(parent[where[-1]][engine], Mapping):
            parent[where[-1]] = {engine: {}}
        node, path, words = parent[where[-1]][engine], [*where, engine], words[1:]
    for word in words[:-1]:
        if isinstance(node.get(word), str):
            node[word] = {node[word]: {}} if node[word] == words[words.index(word) + 1] else {}
        if not isinstance(node.get(word), Mapping):
            node[word] = {}
        node, path = node[word], [*path, word]
    node[words[-1]] = value
    return (*path, words[-1])


def entries(steps: Any, path: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Every step that is written, blocks opened."""
    for index, entry in enumerate(steps if isinstance(steps, list) else []):
        block = next((one for one in BLOCKS if isinstance(entry, Mapping) and one in entry), None)
        if block and isinstance(entry[block], Mapping):
            yield from entries(entry[block].get("steps"), (*path, index, block, "steps"))
        else:
            yield (*path, index), entry


def substituted(value: Any, names: Mapping[str, Any], path: tuple[str | int, ...] = ()) -> Any:
    """`${name}` replaced in every text; a text that is one `${name}` alone becomes its value."""
    if isinstance(value, str):
        try:
            if whole := re.fullmatch(_VARIABLE, value):
                return _value(whole[1], names)
            return re.sub(_VARIABLE, lambda found: str(_value(found[1], names)), value)
        except Problem as problem:
            raise problem.under(*path) from problem
    if isinstance(value, Mapping):
        return {key: substituted(one, names, (*path, key)) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [substituted(one, names, (*path, index)) for index, one in enumerate(value)]
    return value


def _value(name: str, names: Mapping[str, Any]) -> Any:
    if name not in names:
        if name.startswith("env:"):
            raise Problem(f"the variable {name[4:]} is not named under `env:`; add `env: [{name[4:]}]` to the recipe")
        raise Problem(f"nothing is called `${{{name}}}`{nearest(name, names)}")
    return names[name]
