"""The table: every part and every method of every engine, with what its settings change. Data alone; the checks are in test_conformance.

A part's row gives for each setting a second value besides the default (or besides the one in `small`, which keeps an experiment
small); the two must lead to different outcomes of the slot's experiment. What the part itself marks as `cost` must change nothing.
An engine's row does the same for every field of its spec, in whole runs on a tiny model. A part, a setting, a field or a method
without its place here is an error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import experiments
from adapters import ADAPTERS, IDLE


@dataclasses.dataclass(frozen=True)
class Change:
    """A setting's second value, where more is to be said than the value.

    differs: which aspects of the outcome must differ; empty: nothing may, beyond rounding; None: what the slot or engine says. same:
    which must be equal to the last bit. beside: further settings that both runs have, without which this one has no say. inputs: what
    both runs are given in place of the engine's usual inputs.
    """

    value: Any
    differs: tuple[str, ...] | None = None
    same: tuple[str, ...] = ()
    beside: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    inputs: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Row:
    """A part: setting -> its second value, and what holds in place of defaults."""

    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    small: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Slot:
    """A slot: its experiment, the aspects of an outcome that every change must show in (empty: any), and its parts."""

    experiment: Callable[..., Any]
    parts: Mapping[str, Row]
    differs: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Method:
    """A method: what it is run on where that is not the engine's usual, further settings, and whether chance has a part in it."""

    random: bool = True
    inputs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    small: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Engine:
    """An engine: its usual inputs, settings that keep a run small, its spec's fields, its methods.

    differs: the aspects of a run in which every field must show. alone: slots that one part without settings answers, so that
    nothing can be exchanged yet.
    """

    inputs: Mapping[str, str]
    small: Mapping[str, Any]
    fields: Mapping[str, Any]
    methods: Mapping[str, Method]
    differs: tuple[str, ...] = ("weights",)
    alone: tuple[str, ...] = ()


FIXED = Row()
COMMIT = {"path": "hub:owner/name", "revision": "a" * 40}

OBJECTIVES = {
    "causal": FIXED,
    "masked": Row({"rate": 0.5, "masked": 0.5, "swapped": 0.2, "token": "<|user|>"}),
    "prefix": FIXED,
    "span-mixture": Row(
        {
            "r": [[5.0, 0.3]],
            "s": Change(0.5, beside={"weights": [1.0, 9.0, 1.0]}),
            "x": [[2.0, 0.4]],
            "weights": [9.0, 1.0, 1.0],
            "modes": ["a", "b", "c"],
            "sentinel": "<extra_id_1{}>",
        }
    ),
    "fill-middle": Row({"rate": 1.0, "suffix_first": 1.0, "split": "tokens", "tokens": ["<|user|>", "<|system|>", "<|assistant|>"]}),
}
"""What tunes and what pre-trains."""

SLOTS: dict[str, Slot] = {
    # ------------------------------------------------------------------------------------------------- training
    "temper.train.schedules": Slot(
        experiments.schedule,
        {
            "constant": Row({"warmup": 0.5}),
            "linear": Row({"warmup": 0.5, "floor": 0.5}),
            "cosine": Row({"warmup": 0.5, "floor": 0.5}),
            "warmup-stable-decay": Row({"warmup": 0.5, "decay": 0.5, "floor": 0.5}),
            "rewarm": Row({"peak": 2.0, "warmup": 0.5, "begin": 0.5, "floor": 0.5}),
            "one-cycle": Row({"rise": 0.3, "low": 0.5, "floor": 0.01, "momenta": "none"}),
        },
    ),
    "temper.train.optimizers": Slot(
        experiments.optimizer,
        {
            "adamw": Row({"lr": 0.1, "betas": [0.5, 0.9], "eps": 0.1, "weight_decay": 0.5, "bias_correction": False}),
            "sgd": Row({"lr": 0.1, "momentum": 0.5, "nesterov": True, "weight_decay": 0.5}),
            "adafactor": Row({"lr": 0.1, "decay": -0.5, "eps": 10.0, "clip": 2.0, "weight_decay": 0.5}),
            "muon": Row({"lr": 0.1, "momentum": 0.5, "betas": [0.5, 0.9], "weight_decay": 0.5}),
            "lion": Row({"lr": 0.1, "betas": [0.0, 0.5], "weight_decay": 0.5}, {"lr": 1.0}),
            "sgd-sai": Row({"lr": 0.1, "momentum": 0.5, "eps": 0.1, "normalised": False, "weight_decay": 0.5}),
            "adamw-8bit": Row(
                {"lr": 0.1, "betas": [0.5, 0.9], "eps": 0.1, "weight_decay": 0.5, "block": 3, "smallest": 8}, {"smallest": 1, "block": 2}
            ),
            "galore": Row(
                {"lr": 0.1, "rank": 1, "gap": 2, "scale": 1.0, "betas": [0.5, 0.9], "eps": 0.1, "weight_decay": 0.5}, {"rank": 2}
            ),
            "layerwise-decay": Row({"base": "adamw", "rate": 0.5}, {"base": "sgd"}),
            "sam": Row({"base": "adamw", "rho": 0.5, "adaptive": True}, {"base": "sgd"}),
            "mezo": Row({"base": "adamw", "epsilon": 0.5, "estimator": "sign", "sparsity": 0.5}),
        },
    ),
    "temper.train.averages": Slot(experiments.average, {"ema": Row({"decay": 0.5}), "tail": Row({"share": 0.5})}),
    "temper.train.anchors": Slot(
        experiments.anchor,
        {"l2": Row({"strength": 0.5}), "orthogonal": Row({"strength": 0.5}), "fisher": Row({"strength": 1.0, "samples": 2})},
    ),
    "temper.train.objectives": Slot(experiments.objective, OBJECTIVES),
    "temper.tune.loss": Slot(
        experiments.objective,
        {
            **OBJECTIVES,
            "label": FIXED,
            "load-balance": Row({"weight": 0.5}),
            "rationale": Row({"weight": 0.5, "label": "[answer]", "rationale": "[because]"}),
        },
    ),
    "temper.tune.head": Slot(experiments.head, {"linear": Row({"pool": "max"}), "token-linear": Row({"dropout": 0.5})}),
    "temper.tune.surgery": Slot(experiments.surgery, {"bidirectional": FIXED}),
    "temper.train.batching": Slot(
        experiments.batching,
        {
            "padded": Row({"size": 3, "accumulate": 2}, {"size": 4}),
            "bucketed": Row({"size": 6, "tokens": 60, "layout": "packed"}, {"size": 5}),
            "packed": Row({"length": 24, "size": 3, "accumulate": 2, "documents": "separate"}, {"length": 40, "size": 2}),
            "best-fit": Row({"length": 24, "size": 3, "accumulate": 2}, {"length": 40, "size": 2}),
            "decomposed": Row(
                {"longest": 32, "shortest": 32, "tokens": 64, "accumulate": 2, "cycles": 1, "growth": 0.01},
                {"longest": 64, "shortest": 8, "tokens": 128, "cycles": 3},
            ),
        },
    ),
    "temper.train.feed": Slot(
        experiments.feed,
        {"shuffled": FIXED, "in-order": FIXED, "random-subset": Row({"fraction": 0.5, "replacement": True}, {"fraction": 0.3})},
    ),
    # --------------------------------------------------------------------------------------------------- models
    "temper.models.deltas.where": Slot(
        experiments.where,
        {
            "all-linear": FIXED,
            "attention": FIXED,
            "mlp": FIXED,
            "everything": FIXED,
            "layers": Row({"last": 2, "of": "attention"}, {"last": 1}),
            "names": Row({"patterns": ["layers.*.v_proj", "up_proj"]}, {"patterns": ["q_proj"]}),
            "sensitive-weights": Row({"share": 0.5, "samples": 1, "of": "attention"}, {"share": 0.002}),
        },
    ),
    "temper.models.deltas.delta": Slot(
        experiments.delta,
        {
            "full": FIXED,
            "lora": Row({"rank": 4, "alpha": 4.0, "dropout": 0.5, "rank_stabilized": True, "dora": True}),
            "svd-triplet": Row({"rank": 4, "alpha": 4.0, "dropout": 0.5}),
            "entries": Row({"by": "random", "share": 0.05, "count": 100, "samples": 1}),
            "tri-factor": Row({"rank": 8, "scale": 2.0}, {"rank": 4}),
            "low-rank-experts": Row(
                {"experts": 2, "rank": 4, "alpha": 4.0, "dropout": 0.5, "route": {"token-top1": {"scaled": False}}}, {"rank": 2}
            ),
            **{
                name: Row(
                    {key: Change(one, () if (name, key) in IDLE else None, beside=more.get(key, {})) for key, one in given.items()}, small
                )
                for name, (given, small, more) in ADAPTERS.items()
            },
            "side-ladder": Row({"shrink": 8, "temperature": 1.0, "alpha": 0.1, "skip": [1], "join": "add"}, {"shrink": 4, "alpha": 0.05}),
        },
    ),
    "temper.models.deltas.init": Slot(
        experiments.init,
        {
            "first-update": Row({"samples": 1, "rate": 0.1, "sign": False}, {"rate": 0.01}),
            "default": FIXED,
            "gaussian": FIXED,
            "olora": FIXED,
            "pissa": Row({"part": "bottom", "iterations": 1}),
            "reinit-top": Row({"last": 2}),
            "random": FIXED,
            "orthogonal": FIXED,
            "mica": FIXED,
            "corda": Row({"keep": "bottom", "samples": 1}),
            "eva": Row({"samples": 1}),
            "lora-ga": Row({"samples": 1, "gamma": 4.0}),
            "vocabulary": Row({"words": ["sort"], "most": 50}),
            "pruned-copy": Row({"score": "fisher", "samples": Change(1, beside={"score": "fisher"})}),
        },
    ),
    "temper.models.deltas.budget": Slot(
        experiments.budget,
        {
            "sensitivity-cubic": Row(
                {"target": 1, "warmup": 0.5, "final": 0.8, "interval": 1, "betas": [0.5, 0.5]},
                {"target": 2, "interval": 2, "warmup": 0.1},
            ),
            "explained-variance": Row({"rho": 1.0, "samples": 2}),
            "structured-if-dense": Row({"rank": 2, "ratio": 5.0, "scale": 2.0}, {"rank": 1, "ratio": 2.0}),
        },
    ),
    "temper.models.deltas.route": Slot(experiments.route, {"token-top1": Row({"scaled": False})}),
    "temper.models.deltas.base": Slot(
        experiments.base,
        {"as-loaded": FIXED, "merged": FIXED, "nf4": Row({"block": 32, "double": False, "merge": "dequantised", "compared": 4})},
    ),
    "temper.models.grids": Slot(
        experiments.grid,
        {"integer": Row({"bits": 3, "group": "none", "symmetric": False}), "nf4": Row({"group": 16})},
    ),
    # ---------------------------------------------------------------------------------------------------- tasks
    "temper.tasks.source": Slot(
        experiments.source,
        {
            "file": Row(
                {
                    "path": "other.jsonl",
                    "test": "other.jsonl",
                    "holdout": 0.5,
                    "columns": Change({"text": "body"}, beside={"path": "other.jsonl"}),
                    "split": Change("more", beside={"path": "splits"}),
                    "name": Change("other", differs=("digest",), beside=COMMIT),
                    "revision": Change("b" * 40, differs=("digest",), beside=COMMIT),
                    "streaming": True,
                    "buffer": Change(3, differs=("digest",), beside={"streaming": True}),
                    "test_count": Change(2, beside={"streaming": True}),
                },
                {"path": "text.jsonl", "holdout": 0.25, "test_count": 4},
            ),
            "library": Row({"limit": 200_000, "holdout": 0.5, "piece": 1000}, {"limit": 100_000, "holdout": 0.2}),
            "task": Row(
                {"task": "arithmetic", "count": 12, "test_count": 6, "seed": 1, "holdout": 0.4},
                {"count": 10, "test_count": 5, "holdout": 0.2},
            ),
            "derive": Row(
                {
                    "task": "reverse-words",
                    "source": {"file": {"path": "other.jsonl", "holdout": 0.25}},
                    "count": 12,
                    "test_count": 6,
                    "vocabulary": 12,
                    "seed": 1,
                    "holdout": 0.4,
                },
                {"source": {"file": {"path": "text.jsonl", "holdout": 0.25}}, "count": 10, "test_count": 5, "holdout": 0.2},
            ),
            "cloze": Row(
                {
                    "source": {"file": {"path": "text.jsonl", "holdout": 0.5}},
                    "count": 12,
                    "test_count": 6,
                    "choices": 3,
                    "context": 30,
                    "seed": 1,
                },
                {"source": {"file": {"path": "text.jsonl", "holdout": 0.25}}, "count": 10, "test_count": 5, "choices": 4, "context": 40},
            ),
            "docstrings": Row(
                {"classes": 3, "count": 12, "test_count": 6, "shortest": 40, "longest": 80, "holdout": 0.5, "seed": 1},
                {"classes": 2, "count": 10, "test_count": 4},
            ),
            "tags": Row(
                {
                    "source": {"file": {"path": "text.jsonl", "holdout": 0.5}},
                    "count": 12,
                    "test_count": 1,
                    "shortest": 7,
                    "longest": 7,
                    "holdout": 0.3,
                    "seed": 1,
                },
                {"source": {"file": {"path": "text.jsonl", "holdout": 0.25}}, "count": 10, "test_count": 2, "holdout": 0.5},
            ),
            "rationales": Row(
                {"source": {"task": {"task": "brackets", "count": 6, "test_count": 3}}, "label": "[answer]", "rationale": "[because]"},
                {"source": {"task": {"task": "arithmetic", "count": 6, "test_count": 3}}},
            ),
            "halves": Row(
                {"source": {"file": {"path": "other.jsonl"}}, "split": 1, "swapped": True},
                {"source": {"file": {"path": "text.jsonl", "holdout": 0.25}}},
            ),
        },
        differs=("rows", "digest"),
    ),
    "temper.tasks.verifiable": Slot(
        experiments.task,
        {
            "sort-letters": Row({"shortest": 2, "longest": 9, "alphabet": "xyz", "words": ["here", "there"], "descending": True}),
            "sort-words": Row({"shortest": 2, "longest": 6, "words": ["a", "b", "c", "d", "e", "f"]}, {"shortest": 3, "longest": 5}),
            "sort-numbers": Row({"shortest": 2, "longest": 6, "digits": 3}),
            "reverse-letters": Row({"shortest": 2, "longest": 9, "alphabet": "xyz", "words": ["here", "there"]}),
            "reverse-words": Row({"shortest": 2, "longest": 6, "words": ["a", "b", "c", "d", "e", "f"]}, {"shortest": 3, "longest": 5}),
            "arithmetic": Row({"digits": 3, "operation": "-", "working": True}),
            "brackets": Row({"shortest": 2, "longest": 16, "kinds": 1, "depth": 2, "working": True}),
            "instructions": Row({"skills": ["sort", "add"], "marks": 1, "shortest": 2, "longest": 9, "alphabet": "xyz"}),
        },
    ),
    # ------------------------------------------------------------------------------------------------- pretrain
    "temper.pretrain.tokenizer": Slot(
        experiments.tokenizer,
        {
            "byte-bpe": Row(
                {
                    "vocabulary": 280,
                    "frequency": 30,
                    "digits": False,
                    "reserve": ["mask"],
                    "sentinels": Change(9, beside={"reserve": ["spans"], "vocabulary": 400}),
                },
                {"vocabulary": 320},
            )
        },
    ),
    "temper.pretrain.shape": Slot(
        experiments.shape,
        {
            "llama": Row(
                {
                    "hidden": 16,
                    "layers": 2,
                    "heads": 4,
                    "kv_heads": 1,
                    "feed_forward": 48,
                    "tie": False,
                    "positions": 64,
                    "theta": 100.0,
                    "deviation": 0.5,
                },
                {"hidden": 32, "layers": 1, "heads": 2},
            ),
            "bert": Row(
                {"hidden": 16, "layers": 2, "heads": 4, "feed_forward": 48, "positions": 96, "dropout": 0.5, "deviation": 0.5},
                {"hidden": 32, "layers": 1, "heads": 2},
            ),
            "t5": Row(
                {"hidden": 16, "layers": 2, "heads": 4, "feed_forward": 48, "dropout": 0.5, "distance": 20},
                {"hidden": 32, "layers": 1, "heads": 2},
            ),
        },
    ),
    # ---------------------------------------------------------------------------------------------------- align
    "temper.align.likelihood": Slot(experiments.likelihood, {"sum": FIXED, "mean": FIXED}),
    "temper.align.loss": Slot(
        experiments.preference,
        {"dpo": Row({"beta": 1.0, "label_smoothing": 0.2, "weight": 0.5}), "sft": Row({"weight": 0.5})},
    ),
    "temper.align.reference": Slot(experiments.reference, {"start": FIXED}),
    "temper.align.reward": Slot(experiments.reward, {"verifier": FIXED}),
    "temper.align.source": Slot(
        experiments.responses,
        {
            "given": FIXED,
            "attempts": Row(
                {
                    "count": 6,
                    "temperature": 0.5,
                    "top_p": 0.5,
                    "max_new_tokens": 3,
                    "pairs_per_prompt": 2,
                    "prompts": 2,
                    "gold": True,
                    "batch_size": 3,
                },
                {"count": 4, "max_new_tokens": 6, "prompts": 4},
            ),
        },
    ),
    # ------------------------------------------------------------------------------------------------- quantize
    "temper.quantize.calibrate": Slot(
        experiments.calibrate,
        {"samples": Row({"count": 5, "length": 12, "batch": 3}, {"count": 4, "length": 16})},
    ),
    "temper.quantize.objective": Slot(experiments.error, {"weights": FIXED, "layer-output": FIXED}),
    "temper.quantize.range": Slot(experiments.ranging, {"min-max": FIXED, "mse-search": Row({"steps": 7, "lowest": 0.9})}),
    "temper.quantize.solver": Slot(
        experiments.solver,
        {"nearest": FIXED, "gptq": Row({"damping": 1.0, "order": "activation", "refit": False, "block": 5})},
    ),
    "temper.quantize.store": Slot(experiments.store, {"compressed-tensors": FIXED, "dequantised": FIXED}),
    # ------------------------------------------------------------------------------------------------- evaluate
    "temper.evaluate.metric": Slot(
        experiments.metric,
        {
            "perplexity": FIXED,
            "forgetting": FIXED,
            "agreement": Row({"of": "choices"}),
            "accuracy": FIXED,
            "exact-match": Row({"normalise": "space"}),
            "token-edit": FIXED,
            "format": FIXED,
            "pass-until": Row({"successes": 4, "budget": 3, "temperature": 0.7}, {"successes": 3, "budget": 6, "temperature": 0.4}),
            "choice": Row({"bins": 3}),
            "calibration": Row({"of": "answers", "bins": 3}),
            "lm-eval": Row({"tasks": ["reading.yaml"], "limit": 3, "shots": 1}, {"tasks": ["choosing.yaml"]}),
        },
    ),
    "temper.evaluate.perturb": Slot(
        experiments.perturb,
        {"typos": Row({"rate": 0.5, "kinds": ["drop"]}, {"rate": 0.2}), "cut": Row({"keep": 0.8, "lost": "end"})},
    ),
    "temper.evaluate.slice": Slot(
        experiments.slicing,
        {"field": Row({"key": "kind", "most": 1}), "length": Row({"bins": 2, "edges": [15]}), "confidence": Row({"bins": 2})},
    ),
    "temper.evaluate.probe": Slot(
        experiments.probe,
        {"linear": Row({"key": "kind", "state": "last", "strength": 10.0, "folds": 3})},
    ),
    "temper.evaluate.fit": Slot(
        experiments.fit,
        {
            "law": Row(
                {"form": "log-law", "x": "tokens", "y": "other", "predict": "last", "samples": 50, "level": 0.5, "name": "other"},
                {"samples": 100},
            ),
            "learning-curve": Row(
                {
                    "x": "updates",
                    "y": "other",
                    "threshold": 1e-9,
                    "lowest": 0.95,
                    "highest": 0.5,
                    "predict": 1e6,
                    "samples": 50,
                    "level": 0.5,
                    "name": "other",
                },
                {"samples": 100, "threshold": 0.05},
            ),
        },
    ),
    "temper.evaluate.resample": Slot(experiments.resample, {"bootstrap": Row({"samples": 10, "level": 0.5})}),
    # -------------------------------------------------------------------------------------------------- studies
    "temper.study.ranges": Slot(
        experiments.within,
        {
            "uniform": Row({"low": 0.5, "high": 9.0}, {"low": 1.0, "high": 3.0}),
            "log": Row({"low": 0.5, "high": 9.0}, {"low": 1.0, "high": 3.0}),
            "choice": Row({"values": [1, 2, "c"]}, {"values": ["a", "b"]}),
        },
    ),
    "temper.study.search": Slot(experiments.search, {"random": FIXED, "halving": Row({"first": 0.5, "keep": 4})}),
    "temper.study.significance": Slot(
        experiments.significance,
        {
            "multi-bootstrap": Row({"samples": 50}),
            "paired-t": FIXED,
            "wilcoxon": FIXED,
            "mcnemar": Row({"mid_p": False}),
            "5x2": FIXED,
        },
    ),
}

NOTHING = ()
LEARNING = {
    "epochs": Change(2.0, beside={"updates": "none"}),
    "updates": 3,
    "tokens": Change(400, beside={"updates": "none"}),
    "flops": Change(1.0, beside={"updates": "none"}),
    "seconds": Change(0.001, beside={"updates": "none"}),
    "max_length": 12,
    "clip": 0.01,
    "precision": "bf16",
    "evaluate_every": Change(1, differs=("curve",), same=("files", "figures"), beside={"evaluate_every": 2}),
    "evaluate_rows": Change(2, differs=("curve", "figures"), same=("files",), beside={"evaluate_every": 1}),
    "checkpoint_every": Change("none", NOTHING, same=("files", "curve")),
    "keep": Change([1], differs=("files",), same=("figures", "curve")),
    "keep_best": Change(True, differs=("files",), same=("figures", "curve"), beside={"evaluate_every": 1}),
    "distribute": Change("replicate", NOTHING, same=("files", "curve")),
    "compile": Change("never", NOTHING, same=("files", "curve")),
    "recompute": Change(True, NOTHING),
    "range_test": 8,
    "feed": "in-order",
    "optimizer": "sgd",
    "schedule": "constant",
    "average": {"ema": {"decay": 0.5}},
}
"""What every engine that trains has."""
LEARN = {"updates": 2, "precision": "float32", "evaluate_every": "none", "checkpoint_every": 1, "batching": {"padded": {"size": 4}}}
CHANGES = {
    "where": "attention",
    "delta": "full",
    "init": "gaussian",
    "budget": Change("explained-variance", beside={"init": "eva"}),
    "base": Change("merged", inputs={"model": "adapter"}),
}
"""What every engine that trains a delta has."""
SAMPLES = {"samples": {"count": 3, "length": 16}}
CURVED = {"objective": "layer-output", "solver": "gptq", "calibrate": SAMPLES}
ATTEMPTS = {"attempts": {"count": 4, "max_new_tokens": 4, "prompts": 6, "gold": True}}
ASKED = {"data": "completion"}
HEADED = {"head": "linear", "loss": "label"}
LABELS = {"data": "labels"}
COMPARED = {"model": "adapter", "reference": "model"}

ENGINES: dict[str, Engine] = {
    "pretrain": Engine(
        inputs={"data": "text"},
        small={
            **LEARN,
            "tokenizer": {"byte-bpe": {"vocabulary": 300}},
            "shape": {"llama": {"hidden": 32, "layers": 1, "heads": 2, "feed_forward": 64, "positions": 96}},
            "batching": {"packed": {"length": 32, "size": 4}},
        },
        fields={
            **LEARNING,
            "tokenizer": {"byte-bpe": {"digits": False}},
            "shape": {"llama": {"layers": 2}},
            "objective": "own.py:calm",
            "batching": {"padded": {"size": 4}},
            "dtype": "bfloat16",
        },
        methods={
            "causal": Method(),
            "ul2": Method(
                small={
                    "tokenizer": {"byte-bpe": {"vocabulary": 320, "sentinels": 20}},
                    "shape": {"t5": {"hidden": 32, "layers": 1, "heads": 2}},
                }
            ),
        },
    ),
    "tune": Engine(
        inputs={"model": "model", "data": "completion"},
        small=LEARN,
        fields={
            **LEARNING,
            **CHANGES,
            "loss": "own.py:calm",
            "penalty": {"l2": {"strength": 10.0}},
            "head": Change({"linear": {"pool": "max"}}, beside=HEADED, inputs=LABELS),
            "surgery": Change("bidirectional", beside=HEADED, inputs=LABELS),
            "batching": {"packed": {"length": 32, "size": 4}},
        },
        methods={
            **{name: Method() for name in ("full", "layerwise-decay", "lora", "rslora", "dora", "lora-mole", "olora", "pissa")},
            **{name: Method() for name in ("corda", "eva", "lora-ga", "qlora")},
            "adalora": Method(small={"budget": {"sensitivity-cubic": {"target": 3, "interval": 1}}}),
            "lora-xs": Method(small={"delta": {"tri-factor": {"rank": 8}}}),
            "lora-sb": Method(small={"delta": {"tri-factor": {"rank": 8}}}),
            "spt": Method(
                small={
                    "delta": {"entries": {"share": 0.1}},
                    "budget": {"structured-if-dense": {"rank": 2}},
                }
            ),
            "prompt-tuning": Method(small={"delta": {"prompt-tuning": {"num_virtual_tokens": 4}}}),
            "lst": Method(small={"delta": {"side-ladder": {"shrink": 4}}}),
            "ewc-lora": Method(inputs={"general": "text"}),
            "ls-llama": Method(inputs=LABELS),
            "ls-unllama": Method(inputs={"data": "tags"}),
            "distilling-step-by-step": Method(inputs={"data": "rationales"}),
        },
    ),
    "align": Engine(
        inputs={"model": "model", "data": "preference"},
        small=LEARN,
        fields={
            **LEARNING,
            **CHANGES,
            "source": Change({"attempts": {**ATTEMPTS["attempts"], "count": 6}}, inputs=ASKED, beside={"source": ATTEMPTS}),
            "reward": Change("own.py:shortest", inputs=ASKED, beside={"source": ATTEMPTS}),
            "loss": ["dpo", "sft"],
            "likelihood": "mean",
            "anchor": {"l2": {"strength": 10.0}},
            "batching": {"bucketed": {"size": 6}},
        },
        methods={"dpo": Method(), "length-normalized-dpo": Method(), "checked-dpo": Method(inputs=ASKED, small={"source": ATTEMPTS})},
        alone=("reference",),
    ),
    "quantize": Engine(
        inputs={"model": "model", "data": "text"},
        small={},
        fields={
            "where": "attention",
            "grid": {"integer": {"bits": 3}},
            "range": "mse-search",
            "objective": Change("layer-output", beside={"solver": "gptq", "calibrate": SAMPLES}),
            "solver": Change("gptq", beside={"objective": "layer-output", "calibrate": SAMPLES}),
            "calibrate": Change({"samples": {"count": 6}}, beside=CURVED),
            "store": "dequantised",
        },
        methods={"rtn": Method(random=False), "gptq": Method(small={"calibrate": SAMPLES})},
    ),
    "evaluate": Engine(
        inputs={"model": "model", "data": "completion"},
        small={"split": "train", "answer": 2, "resample": {"bootstrap": {"samples": 40}}},
        fields={
            "metric": "accuracy",
            "probe": {"linear": {"key": "kind", "folds": 2}},
            "perturb": {"cut": {"keep": 0.5}},
            "slice": {"length": {"bins": 2}},
            "fit": Change({"law": {"samples": 20}}, inputs={"model": "series"}),
            "resample": "none",
            "split": "test",
            "limit": 4,
            "length": 12,
            "answer": Change(1, beside={"metric": "accuracy"}),
            "batch": Change(40, NOTHING),
            "precision": "bfloat16",
        },
        methods={
            **{name: Method() for name in ("perplexity", "accuracy", "calibration", "language", "answers", "exact-match")},
            "emergence-mirage": Method(),
            **{name: Method(inputs=COMPARED) for name in ("forgetting", "agreement")},
            "pass-until": Method(small={"metric": {"pass-until": {"successes": 2, "budget": 4}}}),
            "choice": Method(inputs={"data": "choices"}),
            "quantised-confidence": Method(inputs={**COMPARED, "data": "choices"}),
        },
        differs=("figures",),
    ),
}
