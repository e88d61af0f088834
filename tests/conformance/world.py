"""The little world in which parts and methods are tried: a Llama of width 32 with one layer, an adapter on it, rows in files."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from temper import parts
from temper.context import Context
from temper.models import folders, io
from temper.models.deltas import attach
from temper.models.deltas.delta import Lora
from temper.models.deltas.init import Default
from temper.models.sample import sample
from temper.passport import Artefact, Inputs
from temper.pretrain.shape import Llama
from temper.pretrain.tokenizer import ByteBPE
from temper.run import passports
from temper.store import RECORD
from temper.tasks.files import File
from temper.tasks.rows import Rows
from temper.train.batching import Batch, collate
from temper.train.examples import encode

DEVICE = os.environ.get("TEMPER_DEVICE", "cpu")
"""Where models are put and engines run."""
LINE = "all of the words that are asked about come from this line so that there is more than enough to sort and reverse"
TEXTS = [f"def f{n}(first, last):\n    return {n * n} + 2024 * 2024 # {' '.join(LINE.split()[n % 7 :: 1 + n % 4])}" for n in range(32)]

OWN = """
from temper.train.objectives import Causal, Sum


def calm(model, batch):
    \"\"\"Cross-entropy and the square of the logits.\"\"\"
    found = Causal()(model, batch)
    return Sum(found.total + 0.1 * model(**batch.inputs).logits.square().sum(), found.count)


def shortest(row, responses):
    \"\"\"The shorter the better.\"\"\"
    return [-float(len(response)) for response in responses]
"""


_TASK = """dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
doc_to_text: "{{{{prompt}}}}"
"""
LM_EVAL = {
    "choosing": f'{_TASK}output_type: multiple_choice\ndoc_to_choice: "{{{{{{{{choices}}}}}}}}"\ndoc_to_target: answer\n',
    "reading": f'{_TASK}output_type: loglikelihood\ndoc_to_target: "{{{{{{{{completion}}}}}}}}"\n',
}
"""Tasks of lm-eval over the world's rows with choices."""


@dataclasses.dataclass(frozen=True, eq=False)
class World:
    """Where experiments take place. Everything that lies on disk is under `folder`. outcomes: of experiments and runs, each made once."""

    folder: Path
    outcomes: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)
    _count: Iterator[int] = dataclasses.field(default_factory=itertools.count, repr=False)

    def new(self) -> Path:
        """An empty folder."""
        made = self.folder / f"{next(self._count)}"
        made.mkdir()
        return made

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` gave when it was first asked for under this key, which is JSON."""
        text = json.dumps(key, sort_keys=True)
        if text not in self.outcomes:
            self.outcomes[text] = make()
        return self.outcomes[text]

    def scratch(self, seed: int = 0) -> Context:
        """A context in a folder of its own."""
        return dataclasses.replace(Context.scratch(self.new(), seed), device=DEVICE)

    def context(self, seed: int = 0) -> Context:
        """A context in a folder of its own, with what skeletons give before they start their slots."""
        made = self.scratch(seed)
        made.give("model", self.fresh())
        made.give("tokenizer", self.tokenizer)
        made.give("inputs", None)
        return made

    @functools.cached_property
    def tokenizer(self) -> Any:
        return ByteBPE(vocabulary=319, reserve=("mask", "spans", "middle"), sentinels=12)(TEXTS)

    @functools.cached_property
    def model(self) -> Artefact:
        made = Llama(hidden=32, layers=1, heads=2, feed_forward=64, positions=96, deviation=0.3)(self.tokenizer, 1)
        return self._artefact("base", lambda folder: io.save_model(made, self.tokenizer, folder))

    @functools.cached_property
    def series(self) -> list[Artefact]:
        """Three models, each larger than the one before."""
        made = []
        for seed, hidden in enumerate((8, 16, 32)):
            one = Llama(hidden=hidden, layers=1, heads=2, feed_forward=2 * hidden, positions=96, deviation=0.3)(self.tokenizer, seed)
            made.append(self._artefact(f"wide-{hidden}", lambda folder, one=one: io.save_model(one, self.tokenizer, folder)))
        return made

    @functools.cached_property
    def adapter(self) -> Artefact:
        """An adapter that says something: its second factor is not zero."""
        made = attach(self.fresh(), None, Lora(), Default(), seed=2)
        with torch.no_grad():
            for name, one in made.named_parameters():
                if "lora_B" in name:
                    one.copy_(0.05 * torch.randn(one.shape, generator=torch.Generator().manual_seed(3)))
        found = self._artefact("adapter", lambda folder: io.save_adapter(made, self.tokenizer, folder, "base"))
        passport = dataclasses.replace(
            found.passport, base=self.model.passport.base, numbers=self.model.passport.numbers, adapters=("adapter",)
        )
        return dataclasses.replace(found, passport=passport, base=self.model)

    def _artefact(self, name: str, save: Callable[[Path], Any]) -> Artefact:
        path = self.folder / name
        save(path / "model")
        return Artefact(name, path, folders.passport(path / "model", name), content=name, name=name)

    def fresh(self) -> Any:
        """The model, loaded anew, to be changed at will."""
        return io.load_model(self.model, device=DEVICE).requires_grad_(True)

    def deep(self) -> Any:
        """A model like it with two blocks, not trained, to be changed at will."""
        return Llama(hidden=32, layers=2, heads=2, feed_forward=64, positions=96, deviation=0.3)(self.tokenizer, 1).to(DEVICE)

    # ------------------------------------------------------------------------------------------------------- data

    @functools.cached_property
    def rows(self) -> dict[str, list[dict[str, Any]]]:
        """Rows by shape, and of completions by what they say. The model answers every second question right."""
        asked = [f"sort {n * 7} {n} {'and more ' * (n % 3)}" for n in range(32)]
        tokens = [self.tokenizer(one)["input_ids"] for one in asked]
        said = [self.tokenizer.decode(one.tokens) for one in sample(self.fresh(), tokens, max_new_tokens=2, temperature=0, stop=())]
        answers = [text if n % 2 and text.strip() else f"{n} first" for n, text in enumerate(said)]
        completions = [{"prompt": ask, "completion": answer, "kind": n % 2} for n, (ask, answer) in enumerate(zip(asked, answers))]
        return {
            "text": [{"text": text} for text in TEXTS],
            "completion": completions,
            "choices": [{**row, "choices": [row["completion"], f" no {n}"], "answer": 0} for n, row in enumerate(completions)],
            "labels": [{"prompt": ask, "completion": " even" if n % 2 else " odd"} for n, ask in enumerate(asked)],
            "tags": [{"prompt": ask, "completion": " ".join(f"w{len(word) % 3}" for word in ask.split())} for ask in asked],
            "rationales": [{**row, "prompt": f"{prefix} {row['prompt']}"} for row in completions for prefix in ("[label]", "[rationale]")],
            "preference": [{"prompt": ask, "chosen": f"{n} {n + 1}", "rejected": "no " * (1 + n % 4)} for n, ask in enumerate(asked)],
        }

    @functools.cached_property
    def sources(self) -> dict[str, File]:
        """Rows of each shape in a file, a quarter of them held out."""
        made = {}
        for shape, rows in self.rows.items():
            file = self.folder / f"{shape}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
            made[shape] = File(path=str(file), holdout=0.25)
        for name, task in LM_EVAL.items():
            (self.folder / f"{name}.yaml").write_text(f"task: {name}\n{task.format(file=self.folder / 'choices.jsonl')}")
        return made

    def given(self, shape: str) -> Rows:
        return self.sources[shape].load("train")

    def batch(self, shape: str = "completion", size: int = 6) -> Batch:
        return collate(encode(self.given(shape), self.tokenizer, max_length=64)[:size]).to(DEVICE)

    @functools.cached_property
    def scope(self) -> parts.Scope:
        """A folder with a user's own functions, `own.py`."""
        (self.folder / "own.py").write_text(OWN)
        return parts.Scope(self.folder)


# -------------------------------------------------------------------------------------------------- what a run left


def run(world: World, engine: str, spec: Any, inputs: Mapping[str, str], seed: int = 0, context: Context | None = None) -> dict[str, Any]:
    """Runs an engine on the world's model and rows.

    inputs: role -> `model`, `adapter`, or a shape of data. What comes back: `weights`, the tensors under out/; `files`, the content
    hash of every file that counts as content; `figures`, without clock times; `curve`, likewise.
    """
    module = parts.engine(engine)
    context = context or world.scratch(seed)
    given: dict[str, Any] = {}
    for role, word in inputs.items():
        takes = module.INPUTS[role]
        value = world.sources[word] if takes.is_data else getattr(world, word)
        given[role] = [value] if takes.many and not isinstance(value, list) else value
    promised = module.passport(spec, passports(given))
    output = module.run(spec, Inputs(given), context)
    files = {file.relative_to(context.out).as_posix(): file for file in sorted(context.out.rglob("*")) if file.is_file()}
    content = {name: file for name, file in files.items() if not name.startswith(f"{RECORD}/")}
    if promised.kind in ("model", "adapter"):
        assert folders.kind_of(context.out / "model") == promised.kind
    return {
        "weights": {name: load_file(file) for name, file in content.items() if name.endswith(".safetensors")},
        "files": {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in content.items()},
        "figures": {name: dataclasses.astuple(one) for name, one in output.figures.items() if one.unit != "s"},
        "curve": [{key: value for key, value in row.items() if key != "seconds"} for row in context.curve()],
    }


# ------------------------------------------------------------------------------------------------------ comparing


def difference(one: Any, two: Any, tolerance: float = 0.0, place: str = "") -> str:
    """Where two outcomes first differ, in words; nothing where they are the same. tolerance: relative to the larger of two numbers,
    of two tensors to the largest number in them."""
    if type(one) is not type(two):
        return f"{place}: {type(one).__name__}, {type(two).__name__}"
    if isinstance(one, dict):
        if one.keys() != two.keys():
            return f"{place}: {sorted(map(str, one.keys() ^ two.keys()))[:4]}"
        return next((found for key in one if (found := difference(one[key], two[key], tolerance, f"{place}.{key}"))), "")
    if isinstance(one, (list, tuple)):
        if len(one) != len(two):
            return f"{place}: {len(one)} items, {len(two)} items"
        pairs = enumerate(zip(one, two))
        return next((found for index, (a, b) in pairs if (found := difference(a, b, tolerance, f"{place}.{index}"))), "")
    if isinstance(one, torch.Tensor):
        if one.shape != two.shape or one.dtype != two.dtype:
            return f"{place}: {one.dtype} {list(one.shape)}, {two.dtype} {list(two.shape)}"
        if torch.equal(one, two):
            return ""
        apart, most = (one.double() - two.double()).abs().max().item(), max(one.abs().max().item(), two.abs().max().item())
        return "" if apart <= tolerance * most else f"{place}: up to {apart:.3g} apart, of {most:.3g}"
    if isinstance(one, float):
        return "" if one == two or abs(one - two) <= tolerance * max(abs(one), abs(two)) else f"{place}: {one!r}, {two!r}"
    return "" if one == two else f"{place}: {str(one)[:60]}, {str(two)[:60]}"
