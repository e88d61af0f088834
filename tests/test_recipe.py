"""Recipes that are right: references, blocks, variables, changes from the command line, Python lists, the schema."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from temper import parts
from temper.parts import Problem
from temper.recipe import Condition, FromStep, Outside, house, load, read, recipe, schema

DATA = "data: rows.jsonl\nmodel: tiny\n"


@pytest.fixture
def folder(tmp_path: Path, tiny: Path) -> Path:
    (tmp_path / "tiny").symlink_to(tiny)
    for name in ("rows", "math", "code"):
        rows = [{"prompt": f"{name} {i} =", "completion": f" {i}"} for i in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def steps(text: str, folder: Path, *sets: str):
    return {step.name: step for step in read(DATA + "steps:\n" + text, "recipe.yaml", folder, sets).steps}


def test_a_step_takes_the_recipes_model_then_the_last_one(folder):
    found = steps(
        "  - tune\n  - align: {method: checked-dpo}\n  - quantize: {data: none}\n  - evaluate: {model: [model, tune, last]}\n", folder
    )
    assert isinstance(found["tune"].inputs["model"], Outside)
    assert found["align"].inputs["model"] == FromStep(0)
    assert found["quantize"].inputs["model"] == FromStep(1)
    assert found["quantize"].inputs["data"] is None
    assert [type(one).__name__ for one in found["evaluate"].inputs["model"]] == ["Outside", "FromStep", "FromStep"]
    assert found["evaluate"].inputs["model"][2] == FromStep(2)


def test_an_evaluation_is_not_the_last_model(folder):
    found = steps("  - tune\n  - evaluate\n  - align: {method: checked-dpo}\n", folder)
    assert found["align"].inputs["model"] == FromStep(0)


def test_new_means_no_model(folder):
    found = read("model: new\ndata: rows.jsonl\nsteps:\n  - pretrain\n  - tune\n", "r.yaml", folder).steps
    assert found[0].inputs["model"] is None
    assert found[1].inputs["model"] == FromStep(0)


def test_kept_checkpoints_are_addressed(folder):
    found = steps("  - tune: {updates: 10, keep: [5]}\n  - align: {model: tune@5, method: checked-dpo}\n", folder)
    assert found["align"].inputs["model"] == FromStep(0, 5)


def test_each_makes_a_branch_per_item(folder):
    text = (
        "  - each:\n      over: [math, code]\n      as: topic\n      steps:\n"
        "        - tune: {data: '${topic}.jsonl'}\n        - align: {method: checked-dpo, data: '${topic}.jsonl'}\n"
        "  - evaluate: {model: 'align[*]'}\n  - evaluate: {name: one, model: 'tune[code]'}\n"
    )
    found = steps(text, folder)
    assert list(found) == ["tune[math]", "align[math]", "tune[code]", "align[code]", "evaluate", "one"]
    assert found["align[code]"].inputs["model"] == FromStep(2)
    assert found["tune[math]"].inputs["data"].digest() != found["tune[code]"].inputs["data"].digest()
    assert found["evaluate"].inputs["model"] == (FromStep(1), FromStep(3))
    assert found["one"].inputs["model"] == (FromStep(2),)


def test_each_over_a_mapping_puts_in_values(folder):
    found = steps("  - each: {over: {low: 4, high: 16}, as: rank, steps: [{tune: {delta: {lora: {rank: '${rank}'}}}}]}\n", folder)
    assert found["tune[low]"].spec.delta.rank == 4
    assert found["tune[high]"].spec.delta.rank == 16


def test_repeat_unrolls_and_refers_to_the_turn_before(folder):
    text = (
        "  - tune\n  - repeat:\n      times: 3\n      until: figs.accuracy >= 0.9\n      steps:\n"
        "        - align: {method: checked-dpo}\n        - evaluate: {name: figs, method: answers}\n"
    )
    found = steps(text, folder)
    assert list(found) == ["tune", "align", "figs", "align#2", "figs#2", "align#3", "figs#3"]
    assert found["align"].inputs["model"] == FromStep(0)
    assert found["align#2"].inputs["model"] == FromStep(1)
    assert found["align#3"].inputs["model"] == FromStep(3)
    assert found["figs#2"].inputs["model"] == (FromStep(3),)
    assert found["figs#2"].until == Condition(4, "accuracy", True, False, 0.9)
    assert found["align#2"].earlier == 1


def test_until_is_a_plain_comparison():
    from temper.passport import Figure

    figures = {"align.accuracy": Figure(0.9)}
    assert Condition(0, "accuracy", True, False, 0.9).holds(figures)
    assert not Condition(0, "accuracy", True, True, 0.9).holds(figures)
    assert Condition(0, "align.accuracy", False, False, 0.9).holds(figures)
    with pytest.raises(Problem, match="did you mean"):
        Condition(0, "acuracy", True, False, 0.9).holds(figures)


def test_variables_come_from_the_environment_only_where_named(folder, monkeypatch):
    monkeypatch.setenv("TOPIC", "math")
    text = "env: [TOPIC]\nmodel: tiny\nsteps:\n  - tune: {data: '${env:TOPIC}.jsonl'}\n"
    assert read(text, "r.yaml", folder).steps[0].inputs["data"].load("train").rows[0]["prompt"].startswith("math")


def test_set_changes_steps_parts_and_the_top(folder):
    found = steps("  - tune: {delta: lora, epochs: 3}\n", folder, "tune.delta.lora.rank=4", "tune.epochs=2", "seed=7")
    assert found["tune"].spec.delta.rank == 4
    assert found["tune"].spec.epochs == 2
    assert found["tune"].seed == 7
    assert steps("  - tune\n", folder, "tune.precision=float32")["tune"].spec.precision == "float32"
    assert steps("  - tune: {method: dora}\n", folder, "tune.delta.lora.rank=2")["tune"].spec.delta == parts.build(
        type(parts.method("tune", "dora").delta), {"rank": 2, "dora": True}
    )


def test_a_python_list_is_the_same_recipe(folder):
    text = DATA + "steps:\n  - tune: {method: lora, epochs: 2}\n  - evaluate: {method: answers}\n"
    from_yaml = read(text, "r.yaml", folder)
    given = [{"tune": {"method": "lora", "epochs": 2}}, {"evaluate": {"method": "answers"}}]
    from_python = recipe(given, folder=folder, model="tiny", data="rows.jsonl")
    assert [(one.name, one.spec, one.seed) for one in from_yaml.steps] == [(one.name, one.spec, one.seed) for one in from_python.steps]
    with pytest.raises(Problem, match=r"^recipe: step `tune`, `epoch`: .* did you mean `epochs`\?$"):
        recipe([{"tune": {"epoch": 2}}], folder=folder, model="tiny", data="rows.jsonl")


def test_a_house_model_comes_first_and_once(folder):
    found = read("model: house:lm\ndata: rows.jsonl\nsteps:\n  - tune\n  - tune: {name: again, model: house:lm}\n", "r.yaml", folder).steps
    assert [one.name for one in found] == ["house:lm", "tune", "again"]
    assert found[1].inputs["model"] == found[2].inputs["model"] == FromStep(0)
    assert house("house:lm").steps[-1].spec == found[0].spec


def test_a_users_parts_are_used_and_part_of_the_step(folder):
    (folder / "mine.py").write_text("def flat(progress):\n    return 1.0\n")
    found = steps("  - tune: {schedule: 'mine.py:flat'}\n", folder)
    assert found["tune"].spec.schedule(0.5) == 1.0
    assert [file.name for file in found["tune"].files] == ["mine.py"]


def test_the_quickstart_takes_another_model_and_data_by_two_lines(folder):
    plan = load("quickstart")
    assert plan.steps[0].inputs["model"] is None
    text = (Path(parts.__file__).parents[1] / "recipes" / "quickstart.yaml").read_text()
    for line in ("model: new", "data: house:library"):
        assert f"\n{line}\n" in text
    own = text.replace("\nmodel: new\n", "\nmodel: tiny\n").replace("\ndata: house:library\n", "\ndata: rows.jsonl\n")
    changed = read(own, "mine.yaml", folder)
    assert [one.name for one in changed.steps] == [one.name for one in plan.steps]
    assert isinstance(changed.steps[0].inputs["model"], Outside)


def test_the_schema_knows_every_engine_and_its_methods():
    made = schema()
    for engine in parts.engines():
        known = made["$defs"][f"engine.{engine}"]["properties"]
        assert set(known["method"]["anyOf"][0]["enum"]) == set(parts.methods(engine))
        assert set(parts.engine(engine).INPUTS) <= set(known)


def test_a_users_source_is_found_through_use(folder):
    (folder / "mine.py").write_text(
        "from temper.parts import part\nfrom temper.tasks.rows import Rows\nfrom temper.tasks.source import Source\n\n\n"
        "@part\nclass Twice(Source):\n    '''The same row twice.'''\n    text: str = 'a'\n\n"
        "    def load(self, split):\n        return Rows('text', [{'text': self.text}] * 2, 'twice', 'here')\n\n"
        "    def digest(self):\n        return self.text\n"
    )
    found = read("use: [mine.py]\nmodel: tiny\ndata: {twice: {text: b}}\nsteps:\n  - tune\n", "r.yaml", folder).steps
    assert found[0].inputs["data"].load("train").rows == [{"text": "b"}] * 2
    assert [file.name for file in found[0].files] == ["mine.py"]
