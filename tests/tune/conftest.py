"""A tiny model of letters in a folder, rows of copied letters, and one tuning step as a run makes it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from temper.context import Context
from temper.models import folders, io
from temper.passport import Artefact, Inputs, Passport
from temper.pretrain.shape import Llama
from temper.pretrain.tokenizer import ByteBPE
from temper.run import complete
from temper.tasks.rows import Rows, detect_shape
from temper.tune import engine

LETTERS = "abcd"


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclasses.dataclass(frozen=True)
class Given:
    """A source of rows that are there already."""

    train: Rows
    test: Rows

    def load(self, split: str) -> Rows:
        return getattr(self, split)

    def digest(self) -> str:
        return "given"


@pytest.fixture(scope="session")
def given() -> Callable[..., Given]:
    """`given(train, test=train)`: a source of these rows."""

    def make(train: list[dict[str, Any]], test: list[dict[str, Any]] | None = None) -> Given:
        return Given(*(Rows(detect_shape(rows), rows, "rows", "a test") for rows in (train, test or train)))

    return make


@pytest.fixture(scope="session")
def copies(given: Callable[..., Given]) -> Given:
    """Prompts of three letters, whose completion is the same letters; a tenth is held out."""
    rows = [{"prompt": f"copy {' '.join(one)} =", "completion": f" {' '.join(one)}"} for one in itertools.product(LETTERS, repeat=3)]
    return given([row for index, row in enumerate(rows) if index % 10], rows[::10])


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    """A Llama of width 32 with 2 layers, not trained, as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = ByteBPE(vocabulary=300)([f"copy {letter} =" for letter in LETTERS] * 5)
    model = Llama(hidden=32, layers=2, heads=2, feed_forward=64, positions=64, deviation=0.2)(tokenizer, 1)
    io.save_model(model, tokenizer, folder / "model")
    return artefact(folder)


def artefact(folder: Path) -> Artefact:
    return Artefact(folder.name, folder, folders.passport(folder / "model", ""), name=folder.name)


@pytest.fixture
def tuned(tmp_path: Path, base: Artefact, copies: Given) -> Callable[..., Artefact]:
    """`tuned(name, spec, model=base, data=copies, general=None, seed=0)`: the artefact of one step, as `run` makes it; its `name` holds
    the notes."""

    def step(
        name: str, spec: engine.Tune, model: Artefact = base, data: Any = copies, general: Any = None, seed: int = 0, show: Any = None
    ) -> Artefact:
        context = Context.scratch(tmp_path / name, seed, "tune")
        context.show = show or context.show
        inputs = Inputs(model=model, data=data) if general is None else Inputs(model=model, data=data, general=general)
        parents = {"model": model.passport, "data": Passport("completion"), "general": general and Passport(general.train.shape)}
        predicted = engine.passport(spec, parents)
        output = engine.run(spec, inputs, context)
        passport = complete(predicted, context.out, name, inputs, output.base)
        return Artefact(name, context.out, passport, output.base, output.figures, name=" / ".join(context.notes))

    return step
