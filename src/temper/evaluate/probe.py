"""What a model's hidden states tell of its rows: the slot `Probe`."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from pydantic import Field

from temper.evaluate.metric import together
from temper.evaluate.records import Estimate, Measured, Records, columns, ratio
from temper.evaluate.subject import neighbours
from temper.lazy import numpy, torch
from temper.models.sample import evaluating
from temper.parts import Problem, Rate, part, slot
from temper.tasks.rows import group_of
from temper.train.batching import collate

if TYPE_CHECKING:
    from temper.evaluate.subject import Subject
    from temper.train.examples import Example


@slot(combine=together, phased=False)
class Probe(Protocol):
    """What do hidden states tell?

    As a metric: `(subject) -> [Measured]`, tables of per-example records; `estimates(table, records)`, their figures.
    """

    def __call__(self, subject: Subject) -> list[Measured]: ...

    def estimates(self, table: str, records: Records) -> tuple[Estimate, ...]: ...


@part
class Linear:
    """How well a linear map reads a row's class off each layer: accuracy on rows that it was not fitted to.  Alain and Bengio 2017

    Formula: argmax_k of z W + b, with W, b = argmin mean_i |y_i - z_i W - b|^2 + strength |W|^2; y_ik = 1 for i's class, else -1; z the
    states, standardised by the rows fitted to.
    Layer 0 is the embedding. Of a text its tokens' states count; of a question those before the answer. `probe_chance` is what
    always saying the most frequent class gives.
    """

    key: str = "task"
    """The column that holds a row's class."""
    state: Literal["mean", "last"] = "mean"
    """The mean over the tokens, or the last token's, of a long text as it is in its last window."""
    strength: Rate = 0.1
    """Weight of the squared norm."""
    folds: Annotated[int, Field(ge=2)] = 5
    """Parts of the rows, each read by a map fitted to the others. Rows of one `group` or `module` are in one part; a class that is in
    fewer groups than this is left out."""

    def __call__(self, subject: Subject) -> list[Measured]:
        """Raises a `Problem` where fewer than two classes are left."""
        row, found = states(subject, self.state)
        labels = [subject.rows.rows[index].get(self.key) for index in row.tolist()]
        groups = numpy.array([group_of(subject.rows.rows[index]) or f"row {index}" for index in row.tolist()])
        kept = _kept(labels, groups.tolist(), self.folds)
        if len({str(labels[index]) for index in kept}) < 2:
            raise Problem(
                f"a probe of `{self.key}` needs two classes of rows in {self.folds} groups each; name another column, or lower `folds`",
                ("probe",),
            )
        row, found, groups = row[kept], found[:, kept], groups[kept]
        classes = numpy.array([str(labels[index]) for index in kept])
        split = folds(classes, groups, self.folds)
        layers = [crossed(one, classes, split, self.strength) == classes for one in found]
        common = numpy.empty_like(classes)
        for teach, test in split:
            common[test] = Counter(sorted(classes[teach].tolist())).most_common(1)[0][0]
        records = {
            "row": numpy.tile(row, len(found)),
            "layer": numpy.repeat(numpy.arange(len(found)), len(row)),
            "correct": numpy.concatenate(layers),
            "chance": numpy.tile(common == classes, len(found)),
        }
        return [Measured("probe", records)]

    def estimates(self, table: str, records: Records) -> tuple[Estimate, ...]:
        if table != "probe":
            return ()
        layer, correct, chance = (numpy.asarray(records[name]) for name in ("layer", "correct", "chance"))
        names = {"probe_chance": (0, chance), **{f"probe_layer_{one}": (one, correct) for one in numpy.unique(layer)}}
        return tuple(
            Estimate(name, columns((layer == one) & hit, layer == one), ratio, "share", "higher") for name, (one, hit) in names.items()
        )


def states(subject: Subject, state: str) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Rows that have states, int64 [N], and their states after the embedding and after every layer, float64 [layers + 1, N, H]."""
    examples = list(subject.encoded)
    final = {one.source: index for index, one in enumerate(examples)}  # a long text's last window
    sums: dict[int, Any] = defaultdict(float)
    counts: dict[int, int] = defaultdict(int)
    with torch.no_grad(), evaluating(subject.model), subject.context.track(len(examples), f"{subject.name}: probing", "sequence") as bar:
        for group in neighbours([len(one) for one in examples], subject.spec.batch):
            batch = collate([examples[index] for index in group]).to(subject.context.device)
            layers = subject.model(**batch.inputs, use_cache=False, output_hidden_states=True).hidden_states
            for place, index in enumerate(group):
                one = examples[index]
                begin, end = _places(one, subject.rows.shape)
                if state == "last":
                    begin = end - 1 if index == final[one.source] else end
                if 0 <= begin < end:  # else nothing stands before the answer
                    sums[one.source] += torch.stack([layer[place, begin:end].double().sum(0) for layer in layers]).cpu().numpy()
                    counts[one.source] += end - begin
            bar.advance(len(group), tokens=batch.tokens)
    row = sorted(sums)
    return numpy.array(row), numpy.stack([sums[index] / counts[index] for index in row], axis=1)


def _places(one: Example, shape: str) -> tuple[int, int]:
    """The tokens whose states count: of a text all, but not a second time the one that a window shares with that before it."""
    return (int(not one.supervised[0]), len(one)) if shape == "text" else (0, int(one.supervised.argmax()))


def _kept(labels: list[Any], groups: list[str], folds: int) -> list[int]:
    """Which rows have a class that is in at least `folds` groups."""
    found: dict[Any, set[str]] = defaultdict(set)
    for label, group in zip(labels, groups):
        found[str(label)].add(group)
    return [index for index, label in enumerate(labels) if label is not None and len(found[str(label)]) >= folds]


def folds(classes: numpy.ndarray, groups: numpy.ndarray, count: int) -> list[tuple[numpy.ndarray, numpy.ndarray]]:
    """Pairs (rows to fit to, rows to read): each row is read once, no group is on both sides, classes are spread as groups allow."""
    from sklearn.model_selection import StratifiedGroupKFold

    return list(StratifiedGroupKFold(count).split(classes, classes, groups))


def crossed(
    found: numpy.ndarray, classes: numpy.ndarray, split: list[tuple[numpy.ndarray, numpy.ndarray]], strength: float
) -> numpy.ndarray:
    """The class [N] read off each row of states [N, H], by a map that was fitted without it."""
    from sklearn.linear_model import RidgeClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    made = numpy.empty_like(classes)
    for teach, test in split:
        probe = make_pipeline(StandardScaler(), RidgeClassifier(alpha=strength * len(teach)))
        made[test] = probe.fit(found[teach], classes[teach]).predict(found[test])
    return made
