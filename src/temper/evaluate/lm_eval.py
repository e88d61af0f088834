"""Tasks of `lm-eval` on a `Subject`: lm-eval asks, the subject's own passes answer, and the figures of single examples are kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from temper.evaluate.records import Estimate, Measured, Records, columns, ratio
from temper.lazy import numpy
from temper.parts import Problem, nearest, shown
from temper.train.examples import Example

if TYPE_CHECKING:
    from temper.evaluate.subject import Subject

PREFIX = "lm-eval."
"""Begins the names of the tables."""
_STATISTICS = {
    "mean": ratio,
    "perplexity": lambda totals: numpy.exp(-ratio(totals)),
    "bits": lambda totals: -ratio(totals) / math.log(2),
}
"""Kind of figure -> what it is of the sums of values and of weights."""
_KINDS = {
    "mean": "mean",
    "nanmean": "mean",
    "brier_score": "mean",
    "perplexity": "perplexity",
    "weighted_perplexity": "perplexity",
    "bits_per_byte": "bits",
}
"""lm-eval's name of an aggregation -> the kind of figure that it makes."""


def measured(subject: Subject, names: Sequence[str], limit: int | None, shots: int | None) -> list[Measured]:
    """A table of each task: its examples' places, and for each metric a value and a weight. Raises `Problem` without lm-eval."""
    try:
        from lm_eval import evaluator
    except ImportError as error:
        raise Problem(f"lm-eval is not installed ({error}); pip install 'temper-ml[lm-eval]'", ("metric", "lm-eval")) from error
    tasks = _tasks(names)
    for task in tasks.values():
        if shots is not None or task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=shots or 0)
        task.set_fewshot_seed(seed=1234)  # lm-eval's own: figures are those that it gives
    # `evaluate` is what its `simple_evaluate` calls, which would seed the whole process and describe the machine for a quarter of a minute
    results: Any = evaluator.evaluate(lm=_language_model(subject), task_dict={"tasks": tasks}, limit=limit, bootstrap_iters=0)
    return [_table(subject, task, results["samples"][name]) for name, task in tasks.items()]


def estimates(table: str, records: Records) -> tuple[Estimate, ...]:
    """What the columns of such a table say: `<better> <kind> <figure>` holds values, `weight <figure>` their weights."""
    if not table.startswith(PREFIX):
        return ()
    found = []
    for column, values in records.items():
        better, _, rest = column.partition(" ")
        kind, _, figure = rest.partition(" ")
        if better in ("higher", "lower"):
            terms = columns(values, records[f"weight {figure}"])
            unit = {"mean": "", "perplexity": "", "bits": "bits"}[kind]
            found.append(Estimate(figure, terms, _STATISTICS[kind], unit, better))
    return tuple(found)


def _tasks(names: Sequence[str]) -> dict[str, Any]:
    """lm-eval's tasks, those of groups among them, by name."""
    from lm_eval.tasks import TaskManager

    files = [name for name in names if Path(name).suffix in (".yaml", ".yml")]
    manager = TaskManager(include_defaults=len(files) < len(names))
    for name in names:
        if name in files and not Path(name).is_file():
            raise Problem(f"no file {shown(name)}; give its path from where Temper is started", ("metric", "lm-eval", "tasks"))
        if name not in files and name not in manager.all_tasks:
            raise Problem(f"lm-eval has no task {shown(name)}{nearest(name, manager.all_tasks)}", ("metric", "lm-eval", "tasks"))
    try:
        return manager.load(list(names))["tasks"]
    except Exception as error:  # a task's data are fetched here, and whatever goes wrong there comes up
        raise Problem(
            f"lm-eval cannot load {', '.join(map(shown, names))}: {type(error).__name__}: {error}", ("metric", "lm-eval", "tasks")
        ) from error


def _table(subject: Subject, task: Any, samples: Sequence[dict[str, Any]]) -> Measured:
    """The records of one task, from what lm-eval logged of its examples: one entry for each of them and each filter of answers."""
    from lm_eval.api import metrics

    known = {getattr(metrics, name): (name, kind) for name, kind in _KINDS.items()}
    row = numpy.array(sorted({one["doc_id"] for one in samples}), numpy.int64)
    made: dict[str, Any] = {"row": row}
    for sample in samples:
        at = int(numpy.searchsorted(row, sample["doc_id"]))
        for metric in sample["metrics"]:
            name, kind = known.get(task.aggregation().get(metric), ("", ""))
            pair = _weighed(name, sample[metric])
            if pair is None:
                subject.context.note(f"`{metric}` of {task.task_name} is no mean over examples and is left out")
                continue
            words = [task.task_name, metric, *([] if sample["filter"] == "none" else [sample["filter"]])]
            figure = "_".join(words).replace(".", "-")  # a dot parts a figure from its model
            better = "higher" if task.higher_is_better().get(metric, True) else "lower"
            for column, value in zip((f"{better} {kind} {figure}", f"weight {figure}"), pair):
                made.setdefault(column, numpy.zeros(len(row)))[at] = value
    return Measured(f"{PREFIX}{task.task_name.replace('/', '-')}", made, unit=row)


def _weighed(aggregation: str, value: Any) -> tuple[float, float] | None:
    """One example's value and its weight in the figure; None where it is none."""
    try:
        match aggregation:
            case "weighted_perplexity" | "bits_per_byte":
                return float(value[0]), float(value[1])
            case "brier_score":
                right, shares = int(value[0]), numpy.asarray(value[1], numpy.float64)
                return float(numpy.square(shares - numpy.eye(len(shares))[right]).sum()), 1.0
            case "":
                return None
        number = float(value)
    except (TypeError, ValueError, IndexError):
        return None
    return (0.0, 0.0) if math.isnan(number) else (number, 1.0)


def _language_model(subject: Subject) -> Any:
    """What lm-eval takes for a model."""
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs

    words = subject.tokenizer
    begin = words.eos_token_id if words.bos_token_id is None else words.bos_token_id

    class Asked(TemplateLM):
        """Answers with the subject's own passes, whose figures no batch moves."""

        @property
        def eot_token_id(self) -> int:
            return words.eos_token_id

        @property
        def prefix_token_id(self) -> int:
            return begin

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            opened = words.bos_token is not None and string.startswith(words.bos_token)
            special = not opened if add_special_tokens is None else add_special_tokens
            ids = words.encode(string, add_special_tokens=special)
            return ids[:-1] if special and len(ids) > 1 and ids[-1] == words.eos_token_id else ids

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
            return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
            pairs = [(before, after) for _, before, after in requests]
            return [(-float(one[0].sum(dtype=numpy.float64)), bool(one[2].all())) for one in self._scored(pairs)]

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
            windows = [
                [utils.make_disjoint_window(one) for one in utils.get_rolling_token_windows(ids, begin, subject.length - 1, 1)]
                for ids in (self.tok_encode(request.args[0]) for request in requests)
            ]
            scored = iter(self._scored([pair for some in windows for pair in some]))
            return [-float(sum(next(scored)[0].sum(dtype=numpy.float64) for _ in some)) for some in windows]

        def _scored(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[numpy.ndarray]:
            """Token statistics of the second of two parts. Where both are too long, the first loses its left end."""
            examples = []
            for before, after in pairs:
                tokens = numpy.array([*before, *after][-subject.length :], numpy.int32)
                supervised = numpy.arange(len(tokens)) >= max(1, len(tokens) - len(after))
                examples.append(Example(tokens, supervised, 0))
            return subject.scored(examples, "lm-eval")

        def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
            stream, texts = subject.context.stream("metric"), [""] * len(requests)
            alike: dict[str, list[int]] = {}
            for index, request in enumerate(requests):
                alike.setdefault(repr(request.args[1]), []).append(index)
            for members in alike.values():
                how: dict[str, Any] = dict(normalize_gen_kwargs(requests[members[0]].args[1]))
                room = min(how["max_gen_toks"], subject.length - 1)
                prompts = [self.tok_encode(requests[index].args[0])[-(subject.length - room) :] for index in members]
                seeds = [stream.seed("lm-eval", index) for index in members]
                cut = {"top_k": how.get("top_k") or None, "top_p": how.get("top_p")}
                with subject.context.track(len(members), f"{subject.name}: lm-eval", "question") as bar:
                    made = subject.generated(prompts, room, bar, seeds, temperature=float(how.get("temperature") or 0.0), **cut)
                for index, text in zip(members, subject.texts(made)):
                    for stop in filter(None, how["until"]):
                        text = text.partition(stop)[0]
                    texts[index] = text
            return texts

    return Asked()
