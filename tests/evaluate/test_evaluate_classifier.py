"""Classifiers measured by their answers, as models that write are; what reads text refuses them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from temper.context import Context
from temper.evaluate import engine
from temper.evaluate.engine import Evaluate
from temper.evaluate.metric import Accuracy, Calibration, Choice, ExactMatch, PassUntil, Perplexity, TokenEdit
from temper.evaluate.subject import Subject
from temper.models import folders, io
from temper.models.classifiers import POOLING
from temper.parts import Problem
from temper.passport import Artefact, Inputs, Passport
from temper.pretrain.shape import Llama
from temper.pretrain.tokenizer import ByteBPE
from temper.tasks.rows import Rows

PROMPTS = [f"{b} {a} {c}\n" for a in ("if", "abc", "q") for b, c in (("or", "z"), ("a", "not"), ("x y", "if"))]


@dataclasses.dataclass(frozen=True)
class Given:
    rows: Rows

    def load(self, split: str) -> Rows:
        return self.rows


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artefact]:
    """A classifier of texts, one of words, and one of texts by the maximum over their tokens."""
    transformers = pytest.importorskip("transformers")
    tokenizer = ByteBPE(vocabulary=300)(PROMPTS * 5)
    body = Llama(hidden=16, layers=1, heads=2, feed_forward=32, positions=64, deviation=0.3)(tokenizer, 1)
    found = {}
    for name, kind, more in (("texts", "Sequence", {}), ("words", "Token", {}), ("max", "Token", {POOLING: "max"})):
        config = transformers.LlamaConfig(**{**body.config.to_dict(), "id2label": {0: "x", 1: "y z", 2: "w"}, **more})
        config.pad_token_id = tokenizer.pad_token_id
        torch.manual_seed(3)
        model = getattr(transformers, f"LlamaFor{kind}Classification")(config)
        with torch.no_grad():
            model.score.weight.normal_()
        folder = tmp_path_factory.mktemp(name)
        io.save_model(model, tokenizer, folder / "model")
        found[name] = Artefact(name, folder, folders.passport(folder / "model", name), name=name)
    return found


def rows(answers: list[str]) -> Rows:
    return Rows("completion", [{"prompt": prompt, "completion": f" {said}"} for prompt, said in zip(PROMPTS, answers)], "rows", "a test")


def subject(artefact: Artefact, folder: Path, batch: int = 4096) -> Subject:
    context = Context.scratch(folder, 0, "evaluate")
    return Subject("it", io.load_model(artefact), io.load_tokenizer(artefact), rows(["x"] * 9), Evaluate(batch=batch), context, "0")


@pytest.mark.parametrize("name", ["texts", "words", "max"])
@pytest.mark.parametrize("batch", [1, 4096])
def test_an_answer_is_what_the_model_says_alone(name: str, batch: int, made: dict[str, Artefact], tmp_path: Path):
    answers = subject(made[name], tmp_path, batch).answers
    model, tokenizer = io.load_model(made[name]), io.load_tokenizer(made[name])
    labels = model.config.id2label
    for index, prompt in enumerate(PROMPTS):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logs = model(ids).logits[0]
        if name == "words":
            following = [tokenizer.decode(one) for one in ids[0].tolist()[1:]] + [" "]
            logs = logs[
                [place for place, text in enumerate(following) if place and text[0].isspace() and not following[place - 1].isspace()]
            ]
            assert len(logs) == len(prompt.split())
        logs = (logs.amax(0, keepdim=True) if name == "max" else logs.view(-1, 3)).log_softmax(-1)
        assert answers.text[index] == " ".join(labels[one] for one in logs.argmax(-1).tolist())
        assert answers.logprob[index] == pytest.approx(logs.amax(-1).sum().item(), abs=1e-5)
    assert answers.finished.all()


def test_figures_are_those_of_the_answers(made: dict[str, Artefact], tmp_path: Path):
    said = subject(made["texts"], tmp_path / "said").answers.text.tolist()
    assert len(set(said)) > 1
    right = [text if n % 3 else "no" for n, text in enumerate(said)]
    spec = Evaluate(metric=(Accuracy(), ExactMatch(), TokenEdit(), Calibration(of="answers")))
    parents = {"model": [made["texts"].passport], "data": Passport("completion")}
    assert engine.passport(spec, parents).kind == "figures"
    context = Context.scratch(tmp_path / "run", 0, "evaluate")
    figures = engine.run(spec, Inputs(model=[made["texts"]], data=Given(rows(right))), context).figures
    assert figures["texts.accuracy"].value == figures["texts.exact_match"].value == pytest.approx(6 / 9)
    assert 0 <= figures["texts.answer_ece"].value <= 1


@pytest.mark.parametrize("metric", [Perplexity(), Choice(), PassUntil(), Calibration(), (Accuracy(), Perplexity())])
def test_what_reads_text_is_refused_before_and_in_the_run(metric: Any, made: dict[str, Artefact], tmp_path: Path):
    with pytest.raises(
        Problem, match=r"LlamaForSequenceClassification, which gives labels, and `.*` reads what a model writes; measure `accur"
    ):
        engine.passport(Evaluate(metric=metric), {"model": [made["texts"].passport], "data": Passport("completion")})
    if metric == Perplexity():
        with pytest.raises(Problem, match="gives labels, not text; measure its answers"):
            metric(subject(made["texts"], tmp_path))


def test_engines_that_write_refuse_classifiers(made: dict[str, Artefact]):
    from temper import parts

    for name in parts.engines():
        takes = parts.engine(name).INPUTS.get("model")
        if takes is not None and name not in ("tune", "evaluate"):
            with pytest.raises(
                Problem, match=r"is classifier .* and gives labels, not text; train it with `tune`, measure it with `evaluate`"
            ):
                takes.accept("model", made["texts"].passport)
