"""Writes src/temper/models/deltas/peft_types.json: the adapter types of the installed peft, as parts of slot `delta`.

    python tools/peft_types.py

A type's settings, with their types, defaults and a line about each, come from its configuration's dataclass. What is told of it and
where it comes from stand below, as do the settings that recipes cannot give and the types that cannot be trained here, with reasons.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union

import peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

TABLE = Path(__file__).parents[1] / "src" / "temper" / "models" / "deltas" / "peft_types.json"

ABOUT = {
    "ADAMSS": (
        "Low-rank updates, each of its own cluster of W's singular directions, by peft.",
        "AdaMSS: Adaptive Multi-Subspace Approach for Parameter-Efficient Fine-Tuning",
    ),
    "ADAPTION_PROMPT": (
        "Trained tokens that the upper layers attend to through a gate that starts at 0, by peft.",
        "LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention",
    ),
    "BEFT": ("A trained bias added to each layer's output, by peft.", "arXiv:2509.15974 (there of value projections)"),
    "BOFT": (
        "W turned by a product of sparse orthogonal matrices, by peft.",
        "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization",
    ),
    "C3A": ("W + a matrix of circulant blocks, by peft.", "Parameter-Efficient Fine-Tuning via Circular Convolution"),
    "CARTRIDGE": (
        "Keys and values of virtual tokens in every layer, trained themselves, the first of them frozen, by peft.",
        "Cartridges: Lightweight and general-purpose long context representations via self-study",
    ),
    "DEFT": (
        "(I - P) W + Q R: a projection takes directions out of W and others are put in, by peft.",
        'Proceedings of NeurIPS 2025, "DEFT: Decompositional Efficient Fine-Tuning for Text-to-Image Models"',
    ),
    "DELORA": (
        "W + a normalised B A, whose length is trained apart from its direction, by peft.",
        "Decoupling Angles and Strength in Low-rank Adaptation",
    ),
    "FOURIERFT": (
        "W + the inverse Fourier transform of a few trained coefficients, by peft.",
        "Parameter-Efficient Fine-Tuning with Discrete Fourier Transform",
    ),
    "FROD": (
        "Rotations and scales in a basis that the weights of one kind share, by peft.",
        "Full-Rank Efficient Fine-Tuning with Rotational Degrees",
    ),
    "GLORA": (
        "W + W A + B, and the bias likewise, each addend of low rank, a vector, a constant or none, by peft.",
        "One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning",
    ),
    "GRALORA": (
        "LoRA in each of k x k blocks of W, by peft.",
        "GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning",
    ),
    "HIRA": (
        "W + W o (B A), an entrywise product, by peft.",
        "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models",
    ),
    "HRA": (
        "W turned by a chain of Householder reflections, by peft.",
        "Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation",
    ),
    "IA3": (
        "A trained factor for each output, and for each input of a feed-forward layer, by peft.",
        "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
    ),
    "LN_TUNING": (
        "The norms' own weights, by peft.",
        "Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning",
    ),
    "LOHA": (
        "W + (B1 A1) o (B2 A2), an entrywise product, by peft.",
        "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning",
    ),
    "LOKR": (
        "W + a Kronecker product of a small matrix and one of low rank, by peft.",
        "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation",
    ),
    "LORA": (
        "W + scale B A as peft has it, with the variants that need nothing beside the loss.",
        "LoRA: Low-Rank Adaptation of Large Language Models",
    ),
    "MISS": ("W + one trained block that shards of W share, by peft.", "arXiv:2409.15371 (MiSS: matrix shard sharing)"),
    "OFT": (
        "W turned by a block-diagonal orthogonal matrix, by peft.",
        "Controlling Text-to-Image Diffusion by Orthogonal Finetuning",
    ),
    "OSF": (
        "W's smaller singular directions, with updates orthogonal to its larger ones, by peft.",
        "Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning",
    ),
    "P_TUNING": (
        "Virtual tokens before the prompt, written by a small network that is trained with them, by peft.",
        "GPT Understands, Too",
    ),
    "PEANUT": ("W + a small network of W, by peft.", "arXiv:2410.01870 (PEANuT)"),
    "PREFIX_TUNING": (
        "Keys and values of virtual tokens in every layer, by peft.",
        "Prefix-Tuning: Optimizing Continuous Prompts for Generation",
    ),
    "PROMPT_TUNING": (
        "Trained embeddings of virtual tokens before the prompt, by peft.",
        "The Power of Scale for Parameter-Efficient Prompt Tuning",
    ),
    "PSOFT": (
        "W's principal subspace turned by an orthogonal matrix, with trained scales, by peft.",
        "Efficient Orthogonal Fine-Tuning with Principal Subspace Adaptation",
    ),
    "PVERA": ("VeRA with a trained distribution in the place of its vector, by peft.", "arXiv:2512.07703 (PVeRA)"),
    "RANDLORA": (
        "W + a sum of random low-rank bases, each scaled by trained diagonals, by peft.",
        "RandLoRA: Full-rank parameter-efficient fine-tuning of large models",
    ),
    "ROAD": (
        "Pairs of outputs turned and scaled, by peft.",
        "3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and Composability",
    ),
    "SHIRA": ("W + a sparse matrix at random places, by peft.", "Sparse High Rank Adapters"),
    "SUPERTUNING": ("W + a sparse matrix where W is largest (or smallest), by peft.", "arXiv:2607.09287 (Super-Tuning)"),
    "TINYLORA": (
        "W + U S (sum of v_i P_i) V': a short trained vector between W's frozen singular directions, by peft.",
        "arXiv:2602.04118 (TinyLoRA)",
    ),
    "TRAINABLE_TOKENS": ("The embeddings of the tokens that are named, by peft.", "unknown"),
    "UNILORA": ("LoRA all of whose entries are drawn from one trained vector, by peft.", "Uni-LoRA: One Vector is All You Need"),
    "VBLORA": (
        "LoRA put together from vectors of a common bank, by peft.",
        "VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks",
    ),
    "VERA": (
        "W + diag(b) B diag(d) A with B and A random and shared, b and d trained, by peft.",
        "VeRA: Vector-based Random Matrix Adaptation",
    ),
    "WAVEFT": (
        "W + the inverse wavelet transform of a few trained coefficients, by peft.",
        "Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets",
    ),
}
"""Type -> what it trains, and where it comes from: a title, or an arXiv number."""

REFUSED = {
    "ADALORA": "shares out ranks after every update: use delta `svd-triplet` with budget `sensitivity-cubic`",
    "CPT": "learns from its own loss over the tokens of its context, which peft computes inside the model in place of slot `loss`; use "
    "`prompt-tuning`",
    "LILY": "mixes its factors by an average over the whole batch, later tokens and padding among it, so what a text is given would depend "
    "on the others; use `lora`",
    "MULTITASK_PROMPT_TUNING": "asks for every row's task, which batches do not carry; use `prompt-tuning`",
    "POLY": "asks for every row's task, which batches do not carry; use `lora`",
    "SHADOW": "learns from a second loss, which peft computes inside the model beside slot `loss`, and generates with a cache of its own; "
    "use `lora`",
    "XLORA": "mixes adapters that are trained already; use `lora`",
}
"""Type -> why it cannot be trained here, after its name."""

OURS = {field.name for field in dataclasses.fields(peft.PeftConfig)} | {
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters", "modules_to_save"),
    *("feedforward_modules", "fan_in_fan_out", "layer_replication", "ensure_weight_tying", "use_effective_conv2d"),
    *("token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers"),
    *("megatron_config", "megatron_core", "runtime_config", "runtime_offload_base_weight", "progressbar"),
    *("use_qalora", "qalora_group_size", "alora_invocation_tokens", "arrow_config"),
    *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("kasa_config", "monteclora_config", "velora_config", "use_bdlora"),
    *("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"),
    *("save_projection", "save_precomputed_indices", "save_only_topk_weights", "save_indices"),
    *("use_asa", "asa_target_subspaces", "init_warmup", "final_warmup", "mask_interval"),
    *("asa_importance_beta", "asa_uncertainty_beta", "asa_schedule_exponent"),
    *("sample_at_inference", "generator_seed", "mask_type", "target_svd_config"),
}
"""Settings that a recipe does not give; the module's docstring says why."""

IDLE = {
    ("HIRA", "rank_pattern"),  # the rank that it names is not handed on
    ("OFT", "module_dropout"),  # the dropout is made and never asked
    ("PSOFT", "psoft_alpha"),  # what is divided by it is multiplied by it again
}
"""Settings that change nothing in peft."""

DEFAULTS = {"num_virtual_tokens": 20, "adapter_len": 10}
"""Where peft asks for a number and has none."""
REQUIRED = {"token_indices"}
MEANINGS = {"adapter_layers": "Layers, from the top, that get adaption prompts; none: all of them."}
OR_BLOCKS = {"boft_block_size", "oft_block_size"}
"""0 where the number of blocks is given in its place."""
PATTERNS = {"rank_pattern": "{int}", "n_frequency_pattern": "{int}", "block_size_pattern": "{int}"}
"""Names, or patterns of names -> number, where it differs from the rest; others take any number."""


def made() -> dict[str, Any]:
    """The table, as the installed peft gives it."""
    found = {}
    own = {kind: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items() if config.__module__.startswith("peft.")}
    for kind, config in sorted(own.items()):
        name = "peft-lora" if kind == "LORA" else kind.value.lower().replace("_", "-")
        if kind.value in REFUSED:
            found[name] = {"type": kind.value, "refused": REFUSED[kind.value]}
            continue
        about, source = ABOUT[kind.value]
        found[name] = {
            "type": kind.value,
            "about": about,
            "source": source,
            "prompt": issubclass(config, peft.config.PromptLearningConfig),
            "settings": dict(_settings(kind.value, config)),
        }
    return {"peft": peft.__version__, "types": found}


def _settings(kind: str, config: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        default = field.default if field.default_factory is dataclasses.MISSING else None
        default = DEFAULTS.get(field.name, default.value if isinstance(default, enum.Enum) else default)
        choices = [one for one in _kinds(field, hints[field.name]) if one != "none"]
        if any(isinstance(one, dict) for one in choices):
            choices = [one for one in choices if one != "str"]  # beside the texts that are known
        if default is None and field.name not in REQUIRED:
            choices.append("none")
        if (
            field.name in OURS
            or (kind, field.name) in IDLE
            or (len(choices) == 1 and isinstance(choices[0], dict) and len(choices[0]["choices"]) == 1)
        ):
            continue
        told = MEANINGS.get(field.name) or _line(field.metadata.get("help") or "", field.name)
        row = {"type": choices, "default": default, "meaning": told}
        yield field.name, {key: value for key, value in row.items() if key != "default" or field.name not in REQUIRED}


def _kinds(field: Any, hint: Any) -> list[Any]:
    """A setting's types in words, those with bounds among them."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        return [one for arm in typing.get_args(hint) for one in _kinds(field, arm)]
    name, default = field.name, DEFAULTS.get(field.name, field.default)
    if name == "bias" and hint is str:
        return [{"choices": ["none", "all", re.search(r"\w+_only", _text(field.metadata["help"]))[0]]}]  # type: ignore[index]
    if typing.get_origin(hint) is Literal:
        return [{"choices": list(typing.get_args(hint))}]
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return [{"choices": [one.value for one in hint]}]
    if hint is type(None):
        return ["none"]
    if hint is dict or typing.get_origin(hint) is dict:
        return [PATTERNS.get(name, "{float}")] if name.endswith("_pattern") else []
    if typing.get_origin(hint) is list:
        return ["ints"]
    if name == "effective_rank":
        return [hint.__name__]  # a whole number is a rank, another a share
    if hint is int and "seed" not in name and "key" not in name:
        return ["whole" if default == 0 or name in OR_BLOCKS else "int" if isinstance(default, int) and default < 0 else "count"]
    if hint is float and re.search("dropout|sparsity|sparse_rate|weight_tying", name):
        return ["share"]
    if hint is str and isinstance(default, bool):
        return [{"choices": re.findall(r"'(\w+)'", _text(field.metadata["help"]))}]
    return [hint.__name__]


def _text(told: Any) -> str:
    return " ".join("".join(told).split() if isinstance(told, (tuple, list)) else str(told).split())


def _line(told: Any, name: str) -> str:
    """The first sentence of what peft says, without links."""
    text = re.sub(r"<a [^>]*>|</a>", "", _text(told))
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text)
    first = re.split(r"(?<=[a-z0-9)'\"`])\. ?(?=[A-Z]|$)", text)[0].strip(" .,")
    return f"{first[:1].upper()}{first[1:]}." if first else f"As in peft: {name}."


def main() -> None:
    """Writes the table."""
    TABLE.write_text(json.dumps(made(), indent=1, ensure_ascii=False) + "\n", encoding="utf8")
    print(f"{len(made()['types'])} types of peft {peft.__version__} in {TABLE}")


if __name__ == "__main__":
    main()
