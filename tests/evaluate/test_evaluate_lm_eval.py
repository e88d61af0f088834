"""lm-eval's tasks on a subject, beside lm-eval's own runner for Hugging Face models, and beside our own metrics."""

from __future__ import annotations

import json
import sys

import numpy
import pytest
import torch
from bigrams import END, WORDS, Given, saved, tokenizer
from test_evaluate_engine import real
from transformers import AutoModelForCausalLM, AutoTokenizer

from temper.context import Context
from temper.evaluate.engine import Evaluate, run
from temper.evaluate.metric import Choice, LmEval
from temper.evaluate.records import read
from temper.models.sample import sample
from temper.parts import Problem
from temper.passport import Inputs

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")

TASKS = {
    "chosen": """
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
  - {metric: brier_score, aggregation: brier_score, higher_is_better: false}
  - {metric: mcc, aggregation: matthews_corrcoef, higher_is_better: true}
""",
    "written": """
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: said
generation_kwargs: {until: ["d"], max_gen_toks: 6, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}
""",
    "read": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
""",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model that attends, rows, and tasks over them in YAML files."""
    folder = tmp_path_factory.mktemp("lm-eval")
    rng = numpy.random.default_rng(0)

    def words(least, most):
        return " ".join(rng.choice(WORDS[3:7], rng.integers(least, most)))

    rows = []
    for _ in range(24):
        choices, answer = [f" {word} {words(1, 4)}" for word in rng.permutation(WORDS[3:6])], int(rng.integers(3))
        rows.append({"prompt": words(1, 9), "completion": choices[answer], "choices": choices, "answer": answer})
    model = real()
    model.generation_config.eos_token_id = END
    asked = []
    for index, row in enumerate(rows):
        (said,) = sample(model, [tokenizer()(row["prompt"])["input_ids"]], max_new_tokens=6, temperature=0)
        text = tokenizer().decode(said.tokens, skip_special_tokens=True).partition("d")[0] if index % 2 else "none"
        asked.append({**row, "choices": [one.strip() for one in row["choices"]], "said": text, "text": words(40, 90)})
    (folder / "rows.json").write_text(json.dumps(asked))
    head = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/rows.json}}}}\ntest_split: test\n"
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{head}{text}")
    return folder, saved(folder, model), rows


def evaluated(folder, model, rows=None, **spec):
    context = Context.scratch(folder)
    data = Given("completion", rows) if rows is not None else None
    return run(Evaluate(**spec), Inputs(model=[model], data=data), context).figures, context


def every(folder, **settings):
    return LmEval(tasks=tuple(f"{folder}/{name}.yaml" for name in TASKS), **settings)


def test_figures_are_those_of_lm_evals_own_runner(world, tmp_path):
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    folder, model, _ = world
    figures, context = evaluated(tmp_path, model, metric=every(folder))
    theirs = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(model.model),
        tokenizer=AutoTokenizer.from_pretrained(model.model),
        batch_size=5,
        max_length=63,  # of its windows' inputs: ours hold the last target too
    )
    manager = TaskManager(include_defaults=False)
    tasks = manager.load([f"{folder}/{name}.yaml" for name in TASKS])
    found = evaluate(theirs, tasks, bootstrap_iters=0)["results"]
    wanted = {f"tune.{task}_{name.partition(',')[0]}": value for task, some in found.items() for name, value in some.items() if "," in name}
    wanted = {name: value for name, value in wanted.items() if "_stderr" not in name and "mcc" not in name}
    assert {name: one.value for name, one in figures.items()} == pytest.approx(wanted, rel=1e-4)
    assert len(wanted) == 6
    assert 0 < wanted["tune.written_exact_match"] < 1
    assert context.notes == ["`mcc` of chosen is no mean over examples and is left out"]
    assert (figures["tune.read_word_perplexity"].better, figures["tune.chosen_acc"].better) == ("lower", "higher")
    acc = figures["tune.chosen_acc"]
    assert acc.n == 24
    assert acc.low < acc.value < acc.high
    again = read(context.out, Evaluate(metric=every(folder)))
    assert {name: one.value for name, one in again.items()} == {name: one.value for name, one in figures.items()}


def test_a_task_of_choices_is_our_own_metric(world, tmp_path):
    folder, model, rows = world
    metric = (Choice(), LmEval(tasks=(f"{folder}/chosen.yaml",)))
    figures, _ = evaluated(tmp_path, model, rows, metric=metric)
    for theirs, ours in (("acc", "accuracy"), ("acc_norm", "accuracy_normalised"), ("brier_score", "brier")):
        one, other = figures[f"tune.chosen_{theirs}"], figures[f"tune.choice_{ours}"]
        assert (one.value, one.low, one.high, one.n) == pytest.approx((other.value, other.low, other.high, other.n), abs=1e-6)


def test_batch_size_and_padding_never_change_a_figure(world, tmp_path):
    folder, model, _ = world
    many, _ = evaluated(tmp_path / "many", model, metric=every(folder, limit=8))
    alone, _ = evaluated(tmp_path / "alone", model, metric=every(folder, limit=8), batch=1)
    assert {one.n for one in many.values()} == {8}
    for name, one in many.items():
        assert (alone[name].value, alone[name].low) == pytest.approx((one.value, one.low), abs=1e-6, rel=1e-5), name


def test_a_tasks_files_are_part_of_the_key(world):
    folder, _, _ = world
    (folder / "mine.yaml").write_text("include: chosen.yaml\nprocess_docs: !function tools.change\n")
    (folder / "tools.py").write_text("")
    metric = LmEval(tasks=(f"{folder}/mine.yaml", "arc_easy"))
    assert {one.name for one in metric.files} == {"mine.yaml", "chosen.yaml", "tools.py"}
    assert {one.name for one in LmEval(tasks=(f"{folder}/chosen.yaml",)).files} == {"chosen.yaml", "rows.json"}


def test_the_process_keeps_its_random_state(world, tmp_path):
    folder, model, _ = world
    before = torch.get_rng_state(), numpy.random.get_state()[1].tolist()
    evaluated(tmp_path, model, metric=LmEval(tasks=(f"{folder}/chosen.yaml",), limit=2, shots=1))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == numpy.random.get_state()[1].tolist()


def test_what_lm_eval_cannot_do_is_said(world, tmp_path, monkeypatch):
    folder, model, _ = world
    with pytest.raises(Problem, match=r"no file .*; give its path from where Temper is started"):
        evaluated(tmp_path / "1", model, metric=LmEval(tasks=(f"{folder}/nonesuch.yaml",)))
    (folder / "far.yaml").write_text("task: far\ndataset_path: nobody/nothing\ntest_split: test\noutput_type: multiple_choice\n")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(Problem, match=r"lm-eval cannot load .*far.yaml.*: (ConnectionError|OfflineModeIsEnabled|DatasetNotFoundError)"):
        evaluated(tmp_path / "2", model, metric=LmEval(tasks=(f"{folder}/far.yaml",)))
    for name in [one for one in sys.modules if one.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(Problem, match=r"lm-eval is not installed .*; pip install 'temper-ml\[lm-eval\]'"):
        evaluated(tmp_path / "3", model, metric=every(folder))
