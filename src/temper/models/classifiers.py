"""Models that give labels, of a text or of each of its words: what their labels are, where they are read, what they say of prompts."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from temper.lazy import F, torch
from temper.parts import Problem

POOLING = "classifier_pooling"
"""In a token classifier's config.json: how what it says of a text's tokens becomes what it says of the text, `max` or `mean`. transformers
alone gives each token's logits, of which a reader takes the same maximum or mean."""


def plain(model: Any) -> Any:
    """The model under an adapter."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def names(model: Any) -> list[str]:
    """Its labels, in the order of its logits."""
    found = plain(model).config.id2label
    return [found[index] for index in range(len(found))]


def of_words(model: Any) -> bool:
    """Whether it labels each word of a text, not the text."""
    inner = plain(model)
    return type(inner).__name__.endswith("ForTokenClassification") and getattr(inner.config, POOLING, None) is None


def scores(model: Any, prompts: Sequence[Sequence[int]], places: Sequence[Sequence[int]]) -> torch.Tensor:
    """Logits in float32 (float64) of each prompt's label, [prompts, labels]; of a model of words at the places of each, [places, labels].

    Raises `Problem` on a prompt without tokens.
    """
    if not all(prompts):
        raise Problem("a prompt without a token has no label; leave such rows out")
    inner = plain(model)
    config = inner.config.get_text_config()
    pad, words, device = config.pad_token_id, of_words(model), next(inner.parameters()).device
    if pad is None and len(prompts) > 1 and not type(inner).__name__.endswith("ForTokenClassification"):
        # such a model reads the last place of a row, which must not be padding
        return torch.cat([scores(model, [one], [some]) for one, some in zip(prompts, places, strict=True)])
    width = max(map(len, prompts))
    tokens = torch.tensor([[*one, *[pad or 0] * (width - len(one))] for one in prompts], device=device)
    real = torch.tensor([[1] * len(one) + [0] * (width - len(one)) for one in prompts], device=device)
    more = {"use_cache": False} if hasattr(config, "use_cache") else {}
    logits = model(input_ids=tokens, attention_mask=real, **more).logits
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if words:
        rows = torch.tensor([row for row, some in enumerate(places) for _ in some], device=device, dtype=torch.int64)
        return logits[rows, torch.tensor([place for some in places for place in some], device=device, dtype=torch.int64)]
    if logits.ndim == 2:
        return logits
    if getattr(inner.config, POOLING) == "max":
        return logits.masked_fill(real[..., None] == 0, -torch.inf).amax(1)
    return (logits * real[..., None]).sum(1) / real.sum(1, keepdim=True)


class Words:
    """Where the words of a text, which white space parts, end among its tokens."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._before = tokenizer("a", add_special_tokens=False)["input_ids"]
        self._lead = self._text(self._before)
        self._piece = functools.cache(self._written)

    def ends(self, tokens: Sequence[int]) -> list[int]:
        """The place of each word's last token."""
        found: list[int] = []
        inside = False
        for place, token in enumerate(tokens):
            for letter in self._piece(token):
                if letter.isspace():
                    inside = False
                elif inside:
                    found[-1] = place
                else:
                    found.append(place)
                    inside = True
        return found

    def _written(self, token: int) -> str:
        """What a token writes inside a text: at a text's start some tokenizers leave its space out."""
        return self._text([*self._before, token]).removeprefix(self._lead)

    def _text(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def said(model: Any, prompts: Sequence[Sequence[int]], words: Words) -> tuple[list[str], torch.Tensor]:
    """What a classifier answers, a label or the words' labels between spaces, and the log-probability of each answer, float64 [prompts]."""
    known = names(model)
    places = [words.ends(one) if of_words(model) else [0] for one in prompts]
    logs = F.log_softmax(scores(model, prompts, places).double(), -1)
    top, best = logs.max(-1)
    counts = list(map(len, places))
    texts = [" ".join(known[index] for index in some.tolist()) for some in best.split(counts)]
    return texts, torch.stack([one.sum() for one in top.split(counts)])
