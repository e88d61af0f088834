"""What the house promises: who may import whom, what an import costs, what a reader finds documented, that presets and recipes load."""

from __future__ import annotations

import ast
import collections
import dataclasses
import functools
import importlib
import io
import json
import re
import resource
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from ruamel.yaml import YAML

import temper
from temper import methods, papers, parts, recipe
from temper.passport import DATA, UNKNOWN, Input, Passport

SRC = Path(temper.__file__).parent
FILES = sorted(SRC.rglob("*.py"))
RECIPES = sorted(SRC.glob("recipes/*.yaml"))
ENGINES = parts.engines()
METHODS = [pytest.param(engine, name, id=f"{engine} {name}") for engine in ENGINES for name in parts.methods(engine)]

LAYERS = (
    ("lazy", "parts", "statistics"),
    ("world",),
    ("context",),
    ("keys", "passport", "store"),
    ("models",),
    ("peft", "tasks", "train"),
    tuple(ENGINES),
    ("machine", "methods", "papers", "progress", "recipe", "report", "tracking"),
    ("explaining", "preflight", "preview", "reporting", "run"),
    ("study",),
    ("cli",),
    ("__main__",),
)
"""Inner ones first: a module imports from its own layer and from those before it. Of the engines, from itself alone."""


@functools.cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf8"), str(file))


def at(file: Path, node: ast.AST) -> str:
    return f"{file.relative_to(SRC)}:{getattr(node, 'lineno', 1)}"


def name_of(file: Path) -> str:
    words = file.relative_to(SRC).with_suffix("").parts
    return ".".join(["temper", *(words[:-1] if words[-1] == "__init__" else words)])


def calls() -> Iterator[tuple[Path, ast.Call]]:
    for file in FILES:
        yield from ((file, node) for node in ast.walk(tree(file)) if isinstance(node, ast.Call))


# ------------------------------------------------------------------------------------------------- import arrows


def place_of(file: Path) -> str:
    """`models` for models/io.py, `parts` for parts.py, and nothing for the package itself."""
    first = file.relative_to(SRC).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def imported(file: Path) -> Iterator[tuple[ast.AST, str]]:
    """The places that a file imports, wherever in it the import stands and whatever it is for."""
    package = ["temper", *file.relative_to(SRC).parent.parts]
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            inside = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*inside, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            words = name.split(".")
            if words[0] == "temper":
                yield node, words[1] if len(words) > 1 else ""


def outward(file: Path) -> Iterator[str]:
    """Where a file imports from further out than it stands, or from another engine."""
    layer = {place: index for index, places in enumerate(LAYERS) for place in places}
    own = place_of(file)
    for node, other in imported(file):
        if other not in layer:
            yield f"{at(file, node)}: `{other or 'temper'}` has no place in LAYERS; import a module that has one"
        elif layer[other] > layer.get(own, -1) or (other in ENGINES and own in ENGINES and other != own):
            yield f"{at(file, node)}: `{own or 'temper'}` imports `{other}`"


def test_every_module_has_its_layer():
    assert {place_of(file) for file in FILES} == {"", *(place for layer in LAYERS for place in layer)}


def test_imports_point_inward_and_no_engine_imports_another():
    assert not [one for file in FILES for one in outward(file)]


@pytest.mark.parametrize(
    ("home", "line"),
    [
        ("tune/loss.py", "from temper.align.loss import DPO"),
        ("models/io.py", "def f():\n    import temper.run"),
        ("train/loop.py", "from temper import recipe"),
        ("models/deltas/init.py", "from ...train import loop"),
        ("parts.py", "from temper.context import Context"),
    ],
)
def test_an_import_that_points_outward_is_seen(home, line, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "SRC", tmp_path)
    file = tmp_path / home
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(line)
    assert len(list(outward(file))) == 1


# ---------------------------------------------------------------------------------------------- what imports cost


def marked(file: Path) -> bool:
    """Whether a file holds parts, slots, specs, or is an engine's own."""
    names = {
        getattr(one.func if isinstance(one, ast.Call) else one, "id", "")
        for node in ast.walk(tree(file))
        if isinstance(node, ast.ClassDef)
        for one in node.decorator_list
    }
    return bool(names & {"part", "slot", "spec"}) or file.name in ("engine.py", "methods.py")


MARKED = [name_of(file) for file in FILES if marked(file)]


def python(code: str) -> Any:
    """What a fresh interpreter prints as JSON."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_modules_with_parts_and_engines_leave_heavy_libraries_unloaded():
    heavy = ["torch", "transformers", "peft", "datasets", "numpy", "tokenizers", "safetensors", "compressed_tensors", "pyarrow", "scipy"]
    assert len(MARKED) > 30
    imports = "\n".join(f"import {name}" for name in MARKED)
    found = python(f"import json, sys\n{imports}\nprint(json.dumps([one for one in {heavy} if one in sys.modules]))")
    assert found == []


def test_the_command_line_imports_little():
    """272 modules today, nearly all of them pydantic's, typer's and Python's; numpy alone would be 100 more, rich 60, torch 1500."""
    modules = python("import json, sys, temper.cli\nprint(json.dumps(sorted(sys.modules)))")
    assert not {"torch", "numpy", "rich", "transformers", "ruamel.yaml", "temper.recipe", "temper.run"} & set(modules)
    assert len(modules) < 300


def test_help_is_there_at_once():
    """1.6 times what importing its libraries takes today. Processor time, in turns, so that a busy or a slow machine does not count."""

    def seconds(*words: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *words], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    taken = [(seconds("-c", "import pydantic.dataclasses, typer.main"), seconds("-m", "temper", "--help")) for _ in range(5)]
    libraries, ours = map(min, zip(*taken))
    assert ours < 2.5 * libraries


# ------------------------------------------------------------------------------------------- what the code may not do


def test_nothing_unpickles_runs_text_as_code_or_trusts_code_from_afar():
    found = []
    for file, call in calls():
        name, given = ast.unparse(call.func), {one.arg: ast.unparse(one.value) for one in call.keywords}
        if name in ("eval", "exec", "compile", "__import__", "torch.load", "torch.save", "os.system", "os.popen", "yaml.unsafe_load"):
            found.append(f"{at(file, call)}: {name}")
        found += [
            f"{at(file, call)}: {key}" for key in ("trust_remote_code", "allow_pickle", "shell") if given.get(key, "False") != "False"
        ]
        if name.rpartition(".")[2] == "YAML" and given.get("typ") not in ("'rt'", "'safe'"):
            found.append(f"{at(file, call)}: YAML of type {given.get('typ')}")
    for file in FILES:
        for node in ast.walk(tree(file)):
            names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            banned = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "yaml"} & {
                one.split(".")[0] for one in names
            }
            found += [f"{at(file, node)}: import {one}" for one in banned]
    assert not found


def test_nothing_is_left_over():
    """No notes to oneself, no debugger, and no print but the command line's."""
    found = []
    for file in FILES:
        for token in tokenize.generate_tokens(io.StringIO(file.read_text(encoding="utf8")).readline):
            if token.type == tokenize.COMMENT and re.search(r"\b(TODO|FIXME|XXX|HACK)\b", token.string):
                found.append(f"{file.relative_to(SRC)}:{token.start[0]}: {token.string}")
    for file, call in calls():
        name = ast.unparse(call.func)
        if name in ("breakpoint", "pdb.set_trace") or (name == "print" and file.name != "cli.py"):
            found.append(f"{at(file, call)}: {name}")
    assert not found


def test_no_name_is_undefined():
    asked = [sys.executable, "-m", "ruff", "check", "--no-cache", "--isolated", "--select", "F821,F822,F823", str(SRC)]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# ------------------------------------------------------------------------------------------------- documentation


def test_every_module_and_every_public_class_and_function_says_what_it_is():
    found = []
    for file in FILES:
        body = tree(file).body
        if body and not ast.get_docstring(tree(file)):
            found.append(f"{file.relative_to(SRC)}:1: the module")
        for node in body:
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or node.name.startswith("_"):
                continue
            if not ast.get_docstring(node):
                found.append(f"{at(file, node)}: {node.name}")
    assert not found


def slots() -> list[Any]:
    """Every slot's question."""
    modules = [importlib.import_module(name) for name in MARKED]
    found = [one for module in modules for one in vars(module).values() if isinstance(one, type) and one.__module__ == module.__name__]
    return [vars(one)["__slot__"] for one in found if "__slot__" in vars(one)]


@pytest.mark.parametrize("question", slots(), ids=lambda question: question.protocol.__module__)
def test_a_slot_asks_a_question_and_its_parts_are_documented_and_told_apart(question):
    protocol = question.protocol
    beside = [one for one in slots() if one.protocol.__module__ == protocol.__module__]
    assert len(beside) == 1, "the parts in a module answer its one slot"
    asked = protocol.__doc__ or ""
    assert "?" in asked.split("\n\n")[0], "a slot's docstring opens with its question"
    assert "`" in asked, "and gives the signature"
    found = question.parts()
    assert found
    plain = collections.Counter(map(parts.plain, found))
    assert plain.most_common(1)[0][1] == 1, plain
    for name, cls in found.items():
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name)
        assert cls.__doc__, f"{name} has no docstring"
        assert not cls.__doc__.startswith(f"{cls.__name__}("), f"{name} has no docstring but the one that dataclasses make"
        meant = parts.documented(cls)
        assert set(parts.settings(cls)) == set(meant), f"{name}: settings and what is said of them"
        assert set(parts.mark_of(cls).cost) <= set(parts.settings(cls)), f"{name}: `cost` names no setting"


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_has_the_shape_of_all_engines(engine):
    module = parts.engine(engine)
    spec = parts.spec_of(module)
    assert module.__doc__
    assert spec.__doc__
    assert issubclass(spec, parts.Spec)
    assert spec() == spec(), "every field has a default"
    assert all(isinstance(one, Input) for one in module.INPUTS.values())
    assert all(one.about for one in module.INPUTS.values())
    assert callable(module.run)
    assert callable(module.passport)
    said = parts.documented(spec)
    silent = [name for name, setting in parts.settings(spec).items() if not setting.question and name not in said]
    assert not silent
    assert summarised(methods.summary(engine))


def test_some_engine_gives_what_a_part_needs():
    """Where another engine has the part too and does not give it, `check` refuses."""
    lacking: dict[type, bool] = {}
    for engine in ENGINES:
        module = parts.engine(engine)
        slots = parts.slots(parts.spec_of(module)).values()
        answers = [cls for setting in slots if setting.question for cls in setting.question.parts().values()]
        given = set(getattr(module, "PROVIDES", ())).union(*(parts.mark_of(cls).gives for cls in answers))
        for cls in answers:
            lacking[cls] = lacking.get(cls, True) and not set(parts.mark_of(cls).needs) <= given
    assert not [parts.mark_of(cls).name for cls, lacks in lacking.items() if lacks]


def summarised(text: str) -> bool:
    return 10 < len(text) < 200 and "\n" not in text


# ------------------------------------------------------------------------------------------ methods and their pages


@pytest.mark.parametrize(("engine", "name"), METHODS)
def test_a_method_can_be_read(engine, name):
    spec = parts.method(engine, name.upper())
    assert spec == parts.methods(engine)[name]
    if spec.paper:
        assert papers.resolve(spec.paper).engine == engine
    page = methods.page(engine, name)
    assert page.startswith(f"{engine}.{name}\n")
    for slot in parts.slots(spec):
        assert re.search(rf"^{slot}: ", page, re.MULTILINE)
    told = json.loads(json.dumps(methods.one(engine, name)))
    assert parts.build(type(spec), {key: value for key, value in told["settings"].items() if key != "paper"}, base=spec) == spec
    assert {row["slot"] for row in told["slots"]} == set(parts.slots(spec))
    for swapped, other in parts.ablations(spec).items():
        assert all(getattr(other, slot) == parts.slots(spec)[slot].default != getattr(spec, slot) for slot in swapped.split("+"))
        assert parts.starting_order(other, getattr(parts.engine(engine), "PROVIDES", ())), "an ablation can start too"


@pytest.mark.parametrize("engine", ENGINES)
def test_methods_stand_in_a_table_by_slots(engine):
    headings, rows = methods.table(engine)
    assert [row[0] for row in rows] == ["(default)", *parts.methods(engine)]
    assert all(len(row) == len(headings) for row in rows)
    assert set(headings[1:-1]) <= set(parts.slots(parts.spec_of(parts.engine(engine))))
    same = [names for names in grouped(rows[1:]) if len(names) > 1]
    assert not same, "methods that no part tells apart"
    assert methods.all_methods(engine).keys() == {engine}


def grouped(rows: list[list[str]]) -> Iterator[list[str]]:
    found = collections.defaultdict(list)
    for name, *cells, _ in rows:
        found[tuple(cells)].append(name)
    yield from found.values()


ROWS = {
    "text": {"text": "a b"},
    "completion": {"prompt": "a", "completion": " b"},
    "chat": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    "preference": {"prompt": "a", "chosen": " b", "rejected": " c"},
}


@pytest.mark.parametrize(("engine", "name"), METHODS)
def test_a_ready_recipe_reads_and_its_data_suit_the_method(engine, name, tmp_path):
    """The recipe that a method's page offers, with each shape of data that it names."""
    text = methods.ready(engine, name)
    shapes = [shape for shape in DATA if re.search(rf"\b{shape}\b", text)] if "rows.jsonl" in text else [None]
    assert shapes, "a recipe with a file of one's own says which rows it takes"
    for shape in shapes:
        if shape is not None:
            (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[shape]) + "\n")
        plan = recipe.read(text, folder=tmp_path)
        step = plan.steps[-1]
        assert (step.engine, step.method, step.spec) == (engine, name, parts.method(engine, name))
        assert not list(checker().iter_errors(YAML(typ="safe").load(text)))
        module = parts.engine(engine)
        model = Passport("model", base=UNKNOWN, tokenizer=UNKNOWN, template=UNKNOWN, numbers="float32", architecture=UNKNOWN)
        parents: dict[str, Any] = {}
        for role, takes in module.INPUTS.items():
            if takes.is_data and role != "data" and step.inputs.get(role):
                parents[role] = Passport(step.inputs[role].load("train").shape)
                takes.accept(role, parents[role])
            if not takes.is_data and step.inputs.get(role):  # a new one where the recipe says so
                parents[role] = [model] if takes.many else model
        if "data" in module.INPUTS:
            kind = shape or step.inputs["data"].load("train").shape
            module.INPUTS["data"].accept("data", Passport(kind))
            parents["data"] = Passport(kind)
        assert module.passport(step.spec, parents).kind in (*DATA, "model", "adapter", "figures")


# ----------------------------------------------------------------------------------------------- recipes and schema


@functools.cache
def checker() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(recipe.schema())


def test_the_schema_is_one():
    made = json.loads(recipe.schema_text())
    assert made["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    jsonschema.Draft202012Validator.check_schema(made)
    pointers = {one["$ref"].removeprefix("#/$defs/") for one in nodes(made) if "$ref" in one}
    assert pointers <= set(made["$defs"])
    assert {f"engine.{name}" for name in ENGINES} <= pointers


def nodes(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    for one in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from nodes(one)


def test_the_schema_says_what_every_setting_means():
    made = recipe.schema()["$defs"]
    for engine in ENGINES:
        spec = parts.spec_of(parts.engine(engine))
        entries = made[f"engine.{engine}"]["properties"]
        assert {*parts.settings(spec)} - {"paper"} <= set(entries)
        assert {*parts.engine(engine).INPUTS, "name", "method", "seed", "about", "aim"} <= set(entries)
        assert all(entries[name]["description"] for name in parts.documented(spec) if name != "paper")


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.name)
def test_a_shipped_recipe_loads_and_keeps_to_the_schema(file):
    plan = recipe.load(file)
    assert plan.steps
    assert all(dataclasses.is_dataclass(step.spec) for step in plan.steps)
    wrong = [f"{'.'.join(map(str, one.absolute_path))}: {one.message[:200]}" for one in checker().iter_errors(YAML(typ="safe").load(file))]
    assert not wrong
    if file.stem.startswith("house-"):
        word = f"house:{file.stem.removeprefix('house-')}"
        assert recipe.house(word).steps[-1].name == word
    else:
        assert recipe.load(file.stem) == plan, "a shipped recipe is found by its name"


@pytest.mark.parametrize(
    "raw",
    [
        {},
        {"steps": []},
        {"steps": ["tun"]},
        {"steps": [{"tune": {"epoch": 1}}]},
        {"steps": [{"tune": {"epochs": "two"}}]},
        {"steps": [{"tune": {"delta": "loro"}}]},
        {"steps": [{"tune": {"delta": {"lora": {"ranks": 3}}}}]},
        {"steps": [{"tune": None, "align": None}]},
        {"steps": ["tune"], "sed": 1},
        {"steps": [{"repeat": {"steps": ["tune"]}}]},
    ],
    ids=json.dumps,
)
def test_what_the_schema_refuses_the_reader_refuses(raw):
    assert list(checker().iter_errors(raw))
    with pytest.raises(parts.Problem):
        recipe.plan({"model": "house:lm", "data": "house:library", **raw}, "r.yaml", Path())


@pytest.mark.parametrize(
    "raw",
    [
        {"steps": ["tune"]},
        {"steps": [{"tune": None}]},
        {"steps": [{"tune": {"name": "one", "about": "learns", "aim": ["loss"], "seed": 3}}]},
        {"steps": [{"tune": {"about": "learns", "aim": "loss"}}]},
        {"steps": [{"tune": {"where": "none", "delta": {"lora": None}, "max-length": 64}}]},
        {"steps": [{"tune": {"schedule": {"phased": [[0.5, "constant"], ["end", "linear"]]}}}]},
        {"steps": [{"align": {"loss": ["dpo", {"sft": {"weight": 0.5}}]}}], "data": {"file": {"path": "rows.jsonl"}}},
        {"steps": [{"tune": {"data": ["house:library", "house:library"]}}]},
        {"steps": ["tune"], "data": ["house:library", "task:sort-words"]},
        {"steps": [{"repeat": {"times": 2, "until": "evaluate.perplexity < 1", "steps": ["tune", {"evaluate": {"model": "tune"}}]}}]},
        {"steps": [{"each": {"over": ["full", "lora"], "as": "way", "steps": [{"tune": {"method": "${way}"}}]}}]},
        {"steps": [{"tune": {"schedule": {"linear": {"floor": {"ramp": [0.0, 0.5]}}}}}]},
    ],
    ids=json.dumps,
)
def test_what_the_reader_takes_the_schema_takes(raw, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS["preference"]) + "\n")
    whole = {"model": "house:lm", "data": "house:library", **raw}
    assert recipe.plan(whole, "r.yaml", tmp_path).steps
    assert [one.message[:300] for one in checker().iter_errors(whole)] == []
