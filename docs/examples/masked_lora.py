"""Prune to a mask, train a LoRA, merge: four ways to do it on one small model, and what is left of mask and adapter.

    python docs/examples/masked_lora.py

Trains a model of 90,000 weights to count up by one, prunes half of the linear weights, and tunes a LoRA to count up by
three. No download; a few seconds.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.utils import parametrize, prune
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from temper.models.constraints import Mask, magnitude_mask
from temper.models.parametrizations import attach, cover_adapters, fold

WORDS, DENSITY = 64, 0.5


def sequences(by: int, rows: int = 32, length: int = 12) -> torch.Tensor:
    """Counting up by `by` from random numbers, modulo the vocabulary: [rows, length]."""
    start = torch.randint(0, WORDS, (rows, 1), generator=torch.Generator().manual_seed(by))
    return (start + by * torch.arange(length)) % WORDS


def train(model: Any, by: int, updates: int, rate: float) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    model.train()
    for _ in range(updates):
        optimizer.zero_grad()
        model(input_ids=sequences(by), labels=sequences(by)).loss.backward()
        optimizer.step()
    model.eval()


def loss(model: Any, by: int) -> float:
    with torch.no_grad():
        return model(input_ids=sequences(by), labels=sequences(by)).loss.item()


def outputs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=sequences(3)).logits


def start() -> tuple[LlamaForCausalLM, dict[str, Mask]]:
    """The trained model, still dense, and a mask for each of its linear layers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    train(model, by=1, updates=60, rate=3e-3)
    linear = {name: module for name, module in model.named_modules() if name.endswith("_proj")}
    return model, {name: magnitude_mask(module.weight, DENSITY) for name, module in linear.items()}


class Keep(torch.nn.Module):
    """The mask as a torch parametrization."""

    def __init__(self, mask: Mask):
        super().__init__()
        self.register_buffer("keep", mask.keep)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.keep


def zeros(model: Any, masks: dict[str, Mask]) -> None:
    """The pruned weights are set to 0, and nothing remembers it."""
    for name, mask in masks.items():
        module = model.get_submodule(name)
        module.weight.data = mask.fold(module.weight)


def torch_parametrize(model: Any, masks: dict[str, Mask]) -> None:
    for name, mask in masks.items():
        parametrize.register_parametrization(model.get_submodule(name), "weight", Keep(mask))


def torch_prune(model: Any, masks: dict[str, Mask]) -> None:
    for name, mask in masks.items():
        prune.custom_from_mask(model.get_submodule(name), "weight", mask.keep)


def temper(model: Any, masks: dict[str, Mask]) -> None:
    attach(model, masks)


def chain(way: Callable[[Any, dict[str, Mask]], None], model: Any, masks: dict[str, Mask]) -> dict[str, float]:
    """Prune, tune a LoRA, merge, save and load; what came out."""
    torch.manual_seed(1)
    way(model, masks)
    tuned: Any = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    if way is temper:
        cover_adapters(tuned)
    before = loss(tuned, by=3)
    train(tuned, by=3, updates=60, rate=1e-2)
    after, wanted = loss(tuned, by=3), outputs(tuned)
    merged: Any = copy.deepcopy(tuned).merge_and_unload()
    got = outputs(merged)
    with tempfile.TemporaryDirectory() as folder:
        if way is temper:
            fold(merged)  # a plain model again: the mask is in its weights
        merged.save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    weights = torch.cat([loaded.get_submodule(name).weight.detach().flatten() for name in masks])
    return {
        "loss before tuning": before,
        "tuned": after,
        "merged": loss(merged, by=3),
        "merged against tuned, largest change of an output": (got - wanted).abs().max().item(),
        "saved and loaded": loss(loaded, by=3),
        "density": weights.ne(0).float().mean().item(),
    }


WAYS = {
    "zeroed weights, `peft`": zeros,
    "`torch.nn.utils.parametrize`, `peft`": torch_parametrize,
    "`torch.nn.utils.prune`, `peft`": torch_prune,
    "Temper's mask, `peft`": temper,
}


def main() -> dict[str, dict[str, float]]:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model, masks = start()
    found = {name: chain(way, *copy.deepcopy((model, masks))) for name, way in WAYS.items()}
    print("| mask | loss before tuning | tuned | merged | largest change of an output by merging | saved and loaded | density left |")
    print("|---|---|---|---|---|---|---|")
    for name, row in found.items():
        first, tuned, merged, change, loaded, density = row.values()
        print(f"| {name} | {first:.2f} | {tuned:.2f} | {merged:.2f} | {change:.2g} | {loaded:.2f} | {density:.2f} |")
    return found


if __name__ == "__main__":
    main()
