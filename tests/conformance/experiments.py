"""The smallest experiment that can tell one answer to a slot from another: `(live, world) -> outcome`, one for each slot.

live: the slot with a part in it, started as skeletons start it (`parts.LiveSlot`). An outcome is made of numbers, texts, tensors,
lists and dicts, and depends on the part alone.
"""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import numpy
import torch
from world import DEVICE, TEXTS, World
from world import run as run_engine

from temper import parts
from temper.align.scores import compare
from temper.evaluate.engine import Evaluate
from temper.evaluate.fit import Fitting
from temper.evaluate.records import Sums, ratio
from temper.evaluate.subject import Subject
from temper.models import io
from temper.models.classifiers import scores
from temper.models.deltas import attach, trainable_parameters
from temper.models.deltas.delta import Entries, Full, Lora, LowRankExperts, PromptTuning, SideLadder, SvdTriplet, TriFactor
from temper.models.deltas.init import Default
from temper.models.deltas.where import AllLinear
from temper.models.grids import Integer, ranges
from temper.models.nf4 import layers
from temper.models.statistics import Statistics
from temper.quantize.engine import Quantize
from temper.quantize.layer import Layer
from temper.quantize.range import MinMax
from temper.study.significance import Evidence
from temper.tasks.files import HUB
from temper.tasks.rows import Rows
from temper.train.anchors import Anchor
from temper.train.batching import Batch, collate
from temper.train.examples import encode
from temper.train.objectives import Causal, Sum, added
from temper.tune.head import Linear


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers, always the same."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------- training


def schedule(live: Any, world: World) -> Any:
    momentum = getattr(live, "momentum", lambda progress: None)
    return [[live(step / 20), momentum(step / 20)] for step in range(21)]


def optimizer(live: Any, world: World) -> Any:
    """Four updates of a matrix below a model's blocks and a vector after them, which a parabola pulls."""
    held = [torch.nn.Parameter(drawn(3, 4)), torch.nn.Parameter(drawn(4, seed=1))]
    model = live.context.want("model")
    model.below, model.above = held[0], torch.nn.ParameterList(held[1:])
    descend(live.build(held), held, 4)
    return [one.detach() for one in held]


def descend(built: torch.optim.Optimizer, held: list[torch.nn.Parameter], updates: int) -> None:
    def closure() -> torch.Tensor:
        built.zero_grad()
        loss = torch.stack([(one - 2).square().sum() for one in held]).sum()
        if torch.is_grad_enabled():
            loss.backward()
        return loss

    for _ in range(updates):
        built.step(closure)


def average(live: Any, world: World) -> Any:
    """What stands in the place of weights that grow by 1 in each of eight updates, two of them at the end's share."""
    held = [torch.nn.Parameter(drawn(3, 4)), torch.nn.Parameter(drawn(4, seed=1))]
    for update in range(8):
        with torch.no_grad():
            torch._foreach_add_(held, 1.0)
        live.update(held, (update + 1) / 8)
    with live.swap(held):
        return [one.detach().clone() for one in held]


def anchor(live: Any, world: World) -> Any:
    """The term and its gradient, one step away from where it was first asked for, on what a delta trains."""
    held = list(trainable_parameters(live.context.want("model")).values())
    for place, one in enumerate(held):
        one.data = drawn(*one.shape, seed=place).to(one.device)
        one.grad = torch.zeros_like(one)
    values = [live(held, 2.0)]
    with torch.no_grad():
        torch._foreach_add_(held, 1.0)
    values.append(live(held, 2.0))
    return {"values": values, "gradients": [one.grad for one in held]}


def objective(live: Any, world: World) -> Any:
    """A loss of a model and two batches, texts and answers, and its gradient; of a loss that asks for rows of its own, of such."""
    model, own = world.fresh(), answers(live.part, world)
    batches = [world.batch(shape) for shape in ("text", "completion")]
    if own is not None:
        batches = [collate(own[:6]).to(DEVICE)]
    if own is not None and labels(live.part):
        model = Linear().put(model, own, world.tokenizer, 0)
    if parts.mark_of(live.part).name == "load-balance":
        model, live = live.context.want("model"), added([Causal(), live])
    found = [live(model, batch) for batch in batches]
    return {"losses": [(one.total.detach(), one.count) for one in found], "gradient": gradient(model, found)}


def labels(part: Any) -> bool:
    """Whether a loss trains a model with a head."""
    return "classifier" in getattr(part, "families", ())


def answers(part: Any, world: World) -> Any:
    """Questions as a loss asks for them, with a label for each or under its prefixes; None where it takes any."""
    given = world.given("completion")
    prefixes = [getattr(part, name, None) for name in ("label", "rationale")]
    if labels(part):
        rows = [{**row, "completion": f" {'even' if n % 2 else 'odd'}"} for n, row in enumerate(given.rows)]
    elif all(prefixes):
        rows = [{**row, "prompt": f"{prefixes[n % 2]} {row['prompt']}"} for n, row in enumerate(given.rows)]
    else:
        return None
    return encode(dataclasses.replace(given, rows=rows), world.tokenizer, max_length=None)


def gradient(model: Any, sums: list[Sum]) -> list[torch.Tensor]:
    """Of the mean over all that the sums count."""
    held = [one for one in model.parameters() if one.requires_grad]
    total = torch.stack([one.total for one in sums]).sum() / sum(one.count for one in sums)
    return [one.detach() for one in torch.autograd.grad(total, held)]


def batching(live: Any, world: World) -> Any:
    """What three updates descend: an update's cut into micro-batches does not show, its examples and what they see of one another do."""
    examples = encode(world.given("text"), world.tokenizer, max_length=None)
    plan, model = live(examples, world.context().stream("batching")), world.fresh()
    sums = [[Causal()(model, one.to(DEVICE)) for one in plan.update(update)] for update in range(3)]
    return {"updates": plan.updates_per_epoch, "gradients": [gradient(model, some) for some in sums]}


def feed(live: Any, world: World) -> Any:
    return [live(20, world.context().stream("batching"), epoch) for epoch in range(5)]


# --------------------------------------------------------------------------------------------------------- models


def where(live: Any, world: World) -> Any:
    return live(world.deep() if "last" in parts.settings(type(live.part)) else world.fresh())


def delta(live: Any, world: World) -> Any:
    settings = parts.settings(type(live.part))
    model = world.deep() if "skip" in settings or "adapter_layers" in settings else world.fresh()
    if "bias" in settings:  # which says something of layers that have one
        for module in model.get_submodule("model.layers").modules():
            if isinstance(module, torch.nn.Linear):
                module.bias = torch.nn.Parameter(0.1 * drawn(module.out_features).to(DEVICE))
    return trained(attach(model, None, live, Default(), seed=0), world.batch())


def init(live: Any, world: World) -> Any:
    if parts.mark_of(live.part).name == "reinit-top":
        model = attach(world.deep(), None, Full(), live, seed=0)
    elif parts.mark_of(live.part).name == "first-update":
        model = attach(world.fresh(), None, TriFactor(rank=4), live, seed=0)
    elif parts.mark_of(live.part).name == "pruned-copy":
        model = attach(world.fresh(), None, SideLadder(shrink=4), live, seed=0)
    elif parts.mark_of(live.part).name == "vocabulary":
        model = attach(world.fresh(), None, PromptTuning(num_virtual_tokens=4), live, seed=0)
    else:
        model = attach(world.fresh(), None, Lora(rank=4), live, seed=0)
    start = {name: one.detach().clone() for name, one in model.named_parameters() if one.requires_grad}
    return {"start": start, "trained": trained(model, world.batch())}


def route(live: Any, world: World) -> Any:
    return live(drawn(6, 4))


def budget(live: Any, world: World) -> Any:
    """A delta as a budget settles it, and what is left of it after eight updates of twelve."""
    of = {"sensitivity-cubic": SvdTriplet(rank=4), "structured-if-dense": Entries(by="random", count=300)}
    delta = of.get(parts.mark_of(live.part).name, Lora(rank=4))
    model = attach(world.fresh(), None, delta, Default(), seed=0, budget=live)
    live.context.give("model", model)
    held, batch = trainable_parameters(model), world.batch()
    optimizer = torch.optim.AdamW(held.values(), lr=0.01)
    for update in range(8):
        optimizer.zero_grad()
        Causal()(model, batch).mean.backward()
        optimizer.step()
        live.after(parts.Progress(update + 1, 12))
    return {name: one.detach() for name, one in held.items()}


def base(live: Any, world: World) -> Any:
    """What becomes of a model with an adapter, and what is said of what leaves."""
    model = live(io.load_model(world.adapter))
    held = {name: one.packed.floats() for name, one in layers(model)}
    said = {"numbers": live.numbers, "whole": live.whole, "compared": live.compared}
    return {"names": sorted(name for name, _ in model.named_parameters()), "held": held, **said}


def head(live: Any, world: World) -> Any:
    """A model under a head for the labels of words, and what it says."""
    given = world.given("completion")
    rows = [{**row, "completion": " ".join(f"w{n % 3}" for n, _ in enumerate(row["prompt"].split()))} for row in given.rows]
    examples = encode(dataclasses.replace(given, rows=rows), world.tokenizer, max_length=None)
    made = live(world.fresh(), examples, world.tokenizer).eval()
    config = made.config.to_dict()
    told = {name: config.get(name) for name in ("architectures", "id2label", "classifier_dropout", "classifier_pooling")}
    with torch.no_grad():
        return {"config": {name: str(value) for name, value in told.items()}, "said": scores(made, [[3, 4, 5], [6, 7]], [[0, 2], [1]])}


def surgery(live: Any, world: World) -> Any:
    with torch.no_grad():
        return live(world.fresh())(**world.batch().inputs).logits


def trained(model: Any, batch: Batch) -> Any:
    """Two steps down the gradient, dropout drawn from one seed; what was trained, and what the model says then."""
    held = {name: one for name, one in model.named_parameters() if one.requires_grad}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.train()
        for _ in range(2):
            steps = torch.autograd.grad(Causal()(model, batch).mean, list(held.values()), allow_unused=True)
            with torch.no_grad():
                for one, step in zip(held.values(), steps):
                    if step is not None:  # of a module that was dropped
                        one -= 0.1 * step
    with torch.no_grad():
        return {"held": {name: list(one.shape) for name, one in held.items()}, "logits": model.eval()(**batch.inputs).logits}


def tokenizer(live: Any, world: World) -> Any:
    learnt = live(TEXTS)
    return {"most": live.most(), "ids": learnt(TEXTS)["input_ids"], "back": learnt.decode(learnt(TEXTS[3])["input_ids"][1:])}


def shape(live: Any, world: World) -> Any:
    made = live(world.tokenizer, 3)
    assert made.num_parameters() == live.count(len(world.tokenizer))
    assert type(made).__name__ == live.architecture
    config = {name: str(value) for name, value in made.config.to_dict().items()}
    ids = world.batch().input_ids
    read = {"decoder_input_ids": ids} if made.config.is_encoder_decoder else {}
    with torch.no_grad():
        return {"config": config, "logits": made.eval().to(DEVICE)(ids, **read).logits}


# ----------------------------------------------------------------------------------------------------- quantising


def grid(live: Any, world: World) -> Any:
    weight = drawn(6, 80)
    fit = live.fit(*ranges(weight, live.group), torch.float32)
    return {"label": live.label, "bits": live.bits, "values": live.values(live.codes(weight, **fit), **fit)}


def layer(curved: bool = True) -> Layer:
    """A weight with a few large entries, and inputs that depend on one another."""
    inputs = drawn(200, 64, seed=1) @ drawn(64, 64, seed=2)
    return Layer("tried", drawn(6, 64) ** 3, torch.float32, inputs.T @ inputs / 200 if curved else None)


def ranging(live: Any, world: World) -> Any:
    return live(layer(), Integer(bits=3))


def solver(live: Any, world: World) -> Any:
    return live(layer(), Integer(bits=3), MinMax())


def error(live: Any, world: World) -> Any:
    return live(drawn(20, 5))


def calibrate(live: Any, world: World) -> Any:
    """The windows one after the other: how many run at once does not show."""
    return torch.cat([one["input_ids"] for one in live(world.given("text"), world.tokenizer, 96)])


def store(live: Any, world: World) -> Any:
    return run_engine(world, "quantize", Quantize(store=live.part), {"model": "model"})["weights"]


# ------------------------------------------------------------------------------------------------------- aligning


def likelihood(live: Any, world: World) -> Any:
    mask = torch.arange(7) < torch.tensor([[3], [5], [7]])
    return live(-drawn(3, 7).abs() * mask, mask)


def preference(live: Any, world: World) -> Any:
    """What a loss makes of four pairs."""
    mask = torch.arange(7) < torch.tensor([[3], [5], [7], [4], [2], [6], [1], [7]])
    return live(compare(-drawn(8, 7).abs() * mask, -drawn(8, 7, seed=1).abs() * mask, mask, lambda logprobs, _: logprobs.sum(-1)))


def reference(live: Any, world: World) -> Any:
    examples = encode(world.given("preference"), world.tokenizer, max_length=64)[:6]
    live.prepare(world.fresh(), examples, "float32")
    return live(world.batch("preference"))


def reward(live: Any, world: World) -> Any:
    return live({"prompt": "1 + 1 =", "completion": " 2"}, ["2", " 2 ", "3", ""])


def responses(live: Any, world: World) -> Any:
    """Pairs from rows of a shape that the part takes; the row's own answer is best, and of others the one with more letters."""

    def judged(row: Any, texts: Any) -> list[float]:
        return [1000.0 if text == row.get("completion") else len(text) + sum(map(ord, text)) / 1e6 for text in texts]

    found = live(world.given(live.part.shapes[0]), "train", judged, 64)
    return [[one.tokens.tolist(), one.supervised.tolist(), one.source, one.side] for one in found.examples]


# ------------------------------------------------------------------------------------------------------ evaluating


def metric(live: Any, world: World) -> Any:
    """Figures of a model that an adapter was put on, beside the model itself; of questions with choices, the right one's place shifting."""
    spec, context, given = Evaluate(answer=2), world.context(), world.given("completion")
    others = [" no", " perhaps it is so"]
    posed = [{**row, "choices": [*others[: n % 3], row["completion"], *others[n % 3 :]]} for n, row in enumerate(given.rows)]
    posed = [{**row, "answer": n % 3, "answers": [f"The  {row['completion']}."]} for n, row in enumerate(posed)]
    rows = dataclasses.replace(given, rows=posed)
    reference = Subject("base", world.fresh(), world.tokenizer, rows, spec, context, "reference")
    tables = live(Subject("adapter", io.load_model(world.adapter, device=DEVICE), world.tokenizer, rows, spec, context, "0", reference))
    estimates = {
        one.name: float(one.statistic(one.terms.sum(0))) for table in tables for one in live.part.estimates(table.name, table.records)
    }
    return {"estimates": estimates, "reliability": [table.reliability for table in tables]}


def resample(live: Any, world: World) -> Any:
    sums = numpy.stack([numpy.arange(12.0), numpy.ones(12)], axis=1)
    return live(sums, lambda totals: totals[..., 0] / totals[..., 1])


def perturb(live: Any, world: World) -> Any:
    return live(world.given("completion")).rows


def slicing(live: Any, world: World) -> Any:
    """Labels of rows of three tasks, two kinds and many lengths."""
    rows = world.given("completion")
    labelled = [{**row, "task": f"t{n % 3}", "kind": f"k{n % 2}"} for n, row in enumerate(rows.rows)]
    return live(dataclasses.replace(rows, rows=labelled))


def probe(live: Any, world: World) -> Any:
    rows = Rows("text", [{"text": text, "task": n % 2, "kind": n % 3} for n, text in enumerate(TEXTS)], "texts", "here")
    (table,) = live(Subject("base", world.fresh(), world.tokenizer, rows, Evaluate(), world.context(), "0"))
    return {"row": table.records["row"].tolist(), "correct": table.records["correct"].tolist()}


def fit(live: Any, world: World) -> Any:
    """Six models that got better with their size, some noise beside."""
    rng = numpy.random.default_rng(0)
    models = []
    for index in range(6):
        size = 1000.0 * 2**index
        made = {"nats_per_token": 2 + 30 * size**-0.5, "accuracy": 0.8 - 9 * size**-0.6, "other": 0.7 - 5 * size**-0.5}
        noisy = {name: numpy.stack([value + 0.01 * rng.normal(size=20), numpy.ones(20)], 1) for name, value in made.items()}
        sums = {name: Sums(numpy.arange(20), one, ratio, "", "lower") for name, one in noisy.items()}
        models.append(Fitting(f"m{index}", {"parameters": size, "tokens": 10 * size + index, "updates": size**0.5}, sums))
    found = live(models)
    return {"figures": {name: one.dump() for name, one in found.figures.items()}, "tables": found.tables}


# ------------------------------------------------------------------------------------------------------------ data


def source(live: Any, world: World) -> Any:
    """The rows of both splits, and the digest, which must tell whatever changes them. Nothing is fetched."""
    far = getattr(live.part, "path", "").startswith(HUB)
    return {"rows": None if far else [live.load(split).rows[:1000] for split in ("train", "test")], "digest": live.digest()}


def task(live: Any, world: World) -> Any:
    rng = random.Random(0)
    rows = [live.example(rng) for _ in range(40)]
    assert all(live.check(row["prompt"], row["completion"]) for row in rows)
    return rows


# --------------------------------------------------------------------------------------------------------- studies


def within(live: Any, world: World) -> Any:
    return [live(share / 20) for share in range(21)]


def search(live: Any, world: World) -> Any:
    """What is tried of eight settings, the sixth best, one of which breaks."""
    return [dataclasses.astuple(one)[:3] for one in live(8, lambda wanted: [abs(n - 5.0) if n != 7 else float("nan") for n, _ in wanted])]


def significance(live: Any, world: World) -> Any:
    """Ten seeds, and thirty examples that two models get right or wrong."""
    rng = numpy.random.default_rng(0)
    seeds, right = rng.normal(0.5, 1, 10), rng.random((2, 30)) < [[0.7], [0.5]]
    values = rng.normal(0.5, 0.3, 5000)
    evidence = Evidence(0.5, lambda samples: values[:samples], True, seeds, (right[0].astype(float), right[1].astype(float)))
    return dataclasses.astuple(live(evidence, 0.0, 0.9))


# ------------------------------------------------------------------------------------------------------ in general


class Tried(parts.LiveSlot):
    """A slot with one part in it. `part`: the part itself; `context`: with what skeletons give."""

    def __init__(self, question: parts.Question, part: Any, world: World):
        context = world.context()
        if "reference" in parts.mark_of(part).needs:
            given = world.given("completion")
            context.give("reference", Subject("reference", world.fresh(), world.tokenizer, given, Evaluate(), context, "reference"))
        if question.protocol is Anchor:
            context.give("model", attach(world.fresh(), None, SvdTriplet(rank=2), Default(), seed=0))
        model, shapes = context.want("model"), ("text", "completion")
        usual = AllLinear()(world.fresh())
        for name in ("statistics", "general_statistics"):
            context.give(name, Statistics(model, lambda: usual, lambda: [world.batch(shape) for shape in shapes], Causal()))
        if (own := answers(part, world)) is not None:
            context.give("examples", own)
            if labels(part):
                context.give("model", Linear().put(world.fresh(), own, world.tokenizer, 0))
        if parts.mark_of(part).name == "load-balance":
            context.give("model", attach(world.fresh(), None, LowRankExperts(), Default(), seed=0))
        super().__init__("tried", part, question, context.at("tried"))
        self.part, self.context = part, context
