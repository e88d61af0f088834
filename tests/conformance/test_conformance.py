"""The conformance table against the checks that hold for every part, every engine and every method."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import pkgutil
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Union

import jsonschema
import pytest
import torch
from experiments import Tried, descend, drawn
from table import ENGINES, SLOTS, Change
from world import World, difference, run

import temper
from temper import parts
from temper.context import Track
from temper.parts import Problem, Question
from temper.train.learning import Learning

ROUNDING = 1e-4
"""What a setting that costs only time or memory may change, relative to an outcome's largest number."""


def questions() -> dict[str, Question]:
    """Module -> the slot that it asks, for every module of the package."""
    found = {}
    for info in pkgutil.walk_packages(temper.__path__, "temper."):
        if info.name != "temper.__main__":
            module = importlib.import_module(info.name)
            owned = [one for one in vars(module).values() if isinstance(one, type) and one.__module__ == info.name]
            for one in owned:
                if "__slot__" in vars(one):
                    found[info.name] = vars(one)["__slot__"]
    return found


QUESTIONS = questions()


def change_of(second: Any) -> Change:
    return second if isinstance(second, Change) else Change(second)


def listed(kind: str = "") -> list[Any]:
    """The table's parts as parameters; their settings with `kind` `settings`."""
    found = []
    for slot, held in SLOTS.items():
        for name, row in held.parts.items():
            short = f"{slot.removeprefix('temper.')} {name}"
            if kind != "settings":
                found.append(pytest.param(slot, name, id=short))
            else:
                found += [pytest.param(slot, name, setting, id=f"{short} {setting}") for setting in row.settings]
    return found


EVERY_PART, EVERY_SETTING = listed(), listed("settings")
EVERY_FIELD = [pytest.param(engine, name, id=f"{engine} {name}") for engine, held in ENGINES.items() for name in held.fields]
EVERY_METHOD = [pytest.param(engine, name, id=f"{engine} {name}") for engine, held in ENGINES.items() for name in held.methods]


# ------------------------------------------------------------------------------------------------- the table is whole


def test_every_slot_and_every_part_has_a_row():
    assert set(SLOTS) == set(QUESTIONS)
    assert {slot: set(held.parts) for slot, held in SLOTS.items()} == {slot: set(one.parts()) for slot, one in QUESTIONS.items()}


def test_every_setting_of_every_part_has_a_second_value():
    wanted = {(slot, name): set(parts.settings(cls)) for slot, one in QUESTIONS.items() for name, cls in one.parts().items()}
    assert {(slot, name): set(row.settings) for slot, held in SLOTS.items() for name, row in held.parts.items()} == wanted


def test_every_engine_field_and_method_has_a_row():
    assert set(ENGINES) == set(parts.engines())
    for engine, held in ENGINES.items():
        fields = parts.settings(parts.spec_of(parts.engine(engine)))
        assert {*held.fields, *held.alone, "paper"} == set(fields)
        assert not set(held.fields) & set(held.alone)
        assert set(held.methods) == set(parts.methods(engine))
        for name in held.alone:
            question = fields[name].question
            assert question
            assert [parts.settings(cls) for cls in question.parts().values()] == [{}], f"`{name}` can be exchanged now: give it a row"


# ----------------------------------------------------------------------------------------------------- parts in words


def placed(raw: Any, world: World) -> Any:
    """Settings with their paths inside the world's folder."""
    if isinstance(raw, dict):
        return {key: placed(value, world) for key, value in raw.items()}
    if isinstance(raw, list):
        return [placed(value, world) for value in raw]
    return str(world.folder / raw) if isinstance(raw, str) and (raw.endswith((".jsonl", ".yaml")) or raw == "splits") else raw


def made(slot: str, name: str, world: World, settings: Mapping[str, Any] = {}) -> Any:
    """A part as a recipe would write it."""
    _ = world.sources  # the files that settings name
    raw = {**SLOTS[slot].parts[name].small, **settings}
    return parts.fill(QUESTIONS[slot], {name: placed(raw, world)})


def variants(slot: str, name: str, world: World) -> list[Any]:
    """A part with its first values, and with each setting's second value in turn."""
    found = [made(slot, name, world)]
    for setting, second in SLOTS[slot].parts[name].settings.items():
        change = change_of(second)
        found.append(made(slot, name, world, {**change.beside, setting: change.value}))
    return found


def loudly(raw: dict[str, Any], name: str) -> dict[str, Any]:
    """A part's and its settings' names as somebody else would write them."""
    return {name.replace("-", "_").upper(): {key.replace("_", "-").upper(): value for key, value in raw[name].items()}}


@pytest.mark.parametrize(("slot", "name"), EVERY_PART)
def test_a_part_is_written_and_read_back(slot, name, world):
    definitions: dict[str, Any] = {}
    schema = parts.schema(QUESTIONS[slot].parts()[name], definitions)
    checker = jsonschema.Draft202012Validator({**schema, "$defs": definitions})
    for one in variants(slot, name, world):
        text = json.dumps(parts.dump(one), allow_nan=False)
        assert parts.fill(QUESTIONS[slot], json.loads(text)) == one
        assert parts.fill(QUESTIONS[slot], loudly(json.loads(text), name)) == one
        assert not list(checker.iter_errors(json.loads(text)[name]))
        assert parts.mark_of(one).name == name


@pytest.mark.parametrize(("slot", "name"), EVERY_PART)
def test_a_part_refuses_unknown_settings_and_is_frozen(slot, name, world):
    one = made(slot, name, world)
    for word in ("nonesuch", "__class__", *(f"{setting}s" for setting in parts.settings(type(one)))):
        with pytest.raises(Problem, match=f"has no setting `{word}`"):
            made(slot, name, world, {word: 1})
        with pytest.raises((TypeError, ValueError)):
            type(one)(**{word: 1})
    for setting in parts.settings(type(one)):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(one, setting, getattr(one, setting))


PROBES = (True, 3, 0.5, -1, math.nan, math.inf, -math.inf, "nonesuch", [["nonesuch"]], {"nonesuch": {}}, None)


def takes(hint: Any, value: Any) -> bool:
    """Whether a value of this type may be legal for a setting: what its type alone says, ranges left aside."""
    origin, arms = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return takes(arms[0], value)
    if origin in (Union, types.UnionType):
        return any(takes(arm, value) for arm in arms)
    if hint in (None, type(None)):
        return value is None
    if origin is Literal:
        return value in arms
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if hint in (int, bool, str):
        return type(value) is hint
    return False  # none of the probes is a legal tuple, mapping or part


def beyond(entry: dict[str, Any]) -> Iterator[Any]:
    """Values just outside the bounds that a setting's schema states."""
    for arm in (entry, *entry.get("anyOf", ())):
        past = {"minimum": -1, "maximum": 1, "exclusiveMinimum": 0, "exclusiveMaximum": 0}
        yield from (arm[bound] + step for bound, step in past.items() if bound in arm)
        yield from ("" for bound in ("minLength",) if bound in arm)


def refusals(cls: type) -> Iterator[tuple[str, Any]]:
    """Setting and value, for every value that the setting's type or its bounds forbid."""
    entries = parts.schema(cls, {})["properties"]
    for name, setting in parts.settings(cls).items():
        if name == "paper":
            continue
        for value in PROBES:
            empties = setting.question is not None and setting.optional and value is None
            if not empties and not (setting.question is None and takes(setting.type, value)):
                yield name, value
        if setting.question is None:
            yield from ((name, value) for value in beyond(entries[name]))


@pytest.mark.parametrize(("slot", "name", "setting"), EVERY_SETTING)
def test_a_setting_refuses_values_of_another_type_or_out_of_bounds(slot, name, setting, world):
    cls = QUESTIONS[slot].parts()[name]
    for value in [value for one, value in refusals(cls) if one == setting]:
        with pytest.raises(Problem) as caught:
            made(slot, name, world, {setting: value})
        assert setting in str(caught.value), f"{value!r}: where it stands is not said"
        with pytest.raises(ValueError):
            dataclasses.replace(made(slot, name, world), **{setting: value})


# ------------------------------------------------------------------------------------------------------ parts at work


def outcome(slot: str, part: Any, world: World) -> Any:
    """What the slot's experiment finds of a part."""
    return world.once([slot, parts.dump(part)], lambda: SLOTS[slot].experiment(Tried(QUESTIONS[slot], part, world), world))


@pytest.mark.parametrize(("slot", "name", "setting"), EVERY_SETTING)
def test_a_setting_changes_what_it_must(slot, name, setting, world):
    change = change_of(SLOTS[slot].parts[name].settings[setting])
    one = made(slot, name, world, change.beside)
    two = made(slot, name, world, {**change.beside, setting: change.value})
    assert one != two, "the second value is the first one"
    found = [outcome(slot, part, world) for part in (one, two)]
    if setting in parts.mark_of(one).cost or change.differs == ():
        assert not difference(*found, tolerance=ROUNDING)
        return
    for aspect in change.differs or SLOTS[slot].differs or ("",):
        both = [each[aspect] if aspect else each for each in found]
        assert difference(*both), f"`{setting}` changes nothing{f' of `{aspect}`' if aspect else ''}"


@pytest.mark.parametrize("slot", [slot for slot, held in SLOTS.items() if len(held.parts) > 1])
def test_parts_of_a_slot_are_not_the_same(slot, world):
    found = {name: outcome(slot, made(slot, name, world), world) for name in SLOTS[slot].parts}
    for index, one in enumerate(found):
        for other in list(found)[:index]:
            assert difference(found[one], found[other]), f"`{one}` does what `{other}` does"


def keeps_its_state(start: Callable[[], parts.LiveSlot], experiment: Callable[[Any], Any]) -> None:
    """A part does the same from the start, and one that keeps state goes on from it as if nothing had been between."""
    first, fresh = start(), start()
    assert not difference(experiment(first), experiment(fresh))
    again = start()
    again.load_state_dict(first.state_dict())
    assert not difference(again.state_dict(), first.state_dict())
    if first.state_dict()["live"]:
        assert not difference(experiment(again), experiment(first))
    assert all(one.requires_grad for one in again.parameters())
    again.close()


@pytest.mark.parametrize(("slot", "name"), EVERY_PART)
def test_a_part_does_the_same_again_and_from_a_state_that_was_saved(slot, name, world):
    part = made(slot, name, world)
    keeps_its_state(lambda: Tried(QUESTIONS[slot], part, world), lambda live: SLOTS[slot].experiment(live, world))


class Counter:
    """Counts how often it was asked; `keeps`: which of its two counts it saves."""

    def __init__(self, *keeps: str):
        self.keeps, self.calls, self.sum = keeps, 0, 0

    def __call__(self) -> int:
        self.calls += 1
        self.sum += self.calls
        return self.sum

    def state_dict(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in self.keeps}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        vars(self).update(state)


def test_a_state_that_is_not_whole_is_seen():
    def started(*keeps: str) -> Callable[[], parts.LiveSlot]:
        return lambda: parts.LiveSlot("counter", Counter(*keeps), Question(Counter, False, None), None)

    keeps_its_state(started("calls", "sum"), lambda live: [live() for _ in range(3)])
    with pytest.raises(AssertionError):
        keeps_its_state(started("calls"), lambda live: [live() for _ in range(3)])


@pytest.mark.parametrize("name", SLOTS["temper.train.optimizers"].parts)
def test_an_optimizer_goes_on_from_its_state(name, world):
    slot = "temper.train.optimizers"
    part = Tried(QUESTIONS[slot], made(slot, name, world), world)
    held = [[torch.nn.Parameter(drawn(3, 4)), torch.nn.Parameter(drawn(4, seed=1))] for _ in range(2)]
    built = [part.build(each) for each in held]
    descend(built[0], held[0], 6)
    descend(built[1], held[1], 3)
    state = built[1].state_dict()
    built[1] = part.build(held[1])
    built[1].load_state_dict(state)
    descend(built[1], held[1], 3)
    assert not difference([one.detach() for one in held[0]], [one.detach() for one in held[1]])


# ------------------------------------------------------------------------------------------------------------ engines


def spec_of(engine: str, world: World, settings: dict[str, Any], method: str = "") -> Any:
    base = parts.method(engine, method) if method else None
    return parts.build(parts.spec_of(parts.engine(engine)), settings, base=base, scope=world.scope)


def ran(world: World, engine: str, spec: Any, inputs: Mapping[str, str], seed: int = 0) -> Any:
    """What a run left."""
    return world.once([engine, parts.dump(spec), inputs, seed], lambda: run(world, engine, spec, inputs, seed))


@pytest.mark.parametrize(("engine", "name"), EVERY_FIELD)
def test_a_field_of_a_spec_changes_what_it_must(engine, name, world):
    held = ENGINES[engine]
    change = change_of(held.fields[name])
    inputs = {**held.inputs, **change.inputs}
    first = {**held.small, **change.beside}
    specs = [spec_of(engine, world, first), spec_of(engine, world, {**first, name: change.value})]
    assert specs[0] != specs[1], "the second value is the first one"
    one, two = (ran(world, engine, spec, inputs) for spec in specs)
    differs = held.differs if change.differs is None else change.differs
    for aspect in differs:
        assert difference(one[aspect], two[aspect]), f"`{name}` changes nothing of {aspect}"
    for aspect in change.same:
        assert not difference(one[aspect], two[aspect])
    if not differs:
        for aspect in ("weights", "figures", "curve"):
            assert not difference(one[aspect], two[aspect], tolerance=ROUNDING)
        assert one["files"].keys() == two["files"].keys()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_spec_refuses_unknown_fields_and_values_of_another_type_or_out_of_bounds(engine):
    cls = parts.spec_of(parts.engine(engine))
    with pytest.raises(Problem, match="has no setting `nonesuch`"):
        parts.build(cls, {"nonesuch": 1})
    for name, value in refusals(cls):
        with pytest.raises(Problem) as caught:
            parts.build(cls, {name: value})
        assert name in str(caught.value)
        with pytest.raises(ValueError):
            cls(**{name: value})


# ------------------------------------------------------------------------------------------------------------ methods


class Crash(Exception):
    """The power fails."""


def interrupted(world: World, engine: str, spec: Any, inputs: Mapping[str, str]) -> Any:
    """A run that breaks off, if it trains in its second update, and is taken up again in the same folder."""
    context = world.scratch()

    def crash(track: Track) -> None:
        if track.done == 2 if track.unit == "update" else track.done and not isinstance(spec, Learning):
            raise Crash

    with pytest.raises(Crash):
        run(world, engine, spec, inputs, context=dataclasses.replace(context, show=crash))
    return run(world, engine, spec, inputs, context=context)


@pytest.mark.parametrize(("engine", "name"), EVERY_METHOD)
def test_a_method_gives_the_same_files_for_a_seed_and_others_for_another(engine, name, world):
    held, row = ENGINES[engine], ENGINES[engine].methods[name]
    inputs = {**held.inputs, **row.inputs}
    spec = spec_of(engine, world, {**held.small, **row.small}, name)
    one = ran(world, engine, spec, inputs)
    assert one["files"]
    assert not difference(one, interrupted(world, engine, spec, inputs)), "the same seed again, with a crash on the way"
    other = ran(world, engine, spec, inputs, seed=1)
    assert bool(difference(one["files"], other["files"])) == row.random


@pytest.mark.parametrize("engine", ENGINES)
def test_methods_of_an_engine_are_not_the_same(engine, world):
    held = ENGINES[engine]
    found = {}
    for name, row in held.methods.items():
        found[name] = ran(world, engine, spec_of(engine, world, {**held.small, **row.small}, name), {**held.inputs, **row.inputs})
    for index, one in enumerate(found):
        for other in list(found)[:index]:
            assert difference(found[one]["files"], found[other]["files"]), f"`{one}` does what `{other}` does"


@pytest.mark.parametrize(("engine", "name"), EVERY_METHOD)
def test_a_method_is_written_and_read_back(engine, name):
    spec = parts.method(engine, name)
    text = json.dumps(parts.dump(spec), allow_nan=False)
    assert parts.build(type(spec), json.loads(text)) == spec
    definitions: dict[str, Any] = {}
    schema = {**parts.schema(type(spec), definitions), "$defs": definitions}
    assert not list(jsonschema.Draft202012Validator(schema).iter_errors(json.loads(text)))
