"""The sampler: completions of token prompts by a language model, in batches, each with its log-probabilities."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from temper.lazy import nn, torch
from temper.parts import Problem

_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}


@dataclass(frozen=True)
class Sample:
    """One completion. `finished`: it ended with a stop token (which is its last token), not for want of room."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finished: bool


def sample(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: Sequence[int] | None = None,
    seeds: Sequence[int] | None = None,
    batch_size: int = 64,
) -> list[Sample]:
    """One completion of each prompt, in the order of `prompts`.

    model: a Hugging Face causal language model whose layers are attention, or a `PeftModel` on one, soft prompts and
    prefixes among them; it is used in evaluation mode and left as it was. temperature: 0 is greedy (the draws are not
    used). top_k, then top_p, cut the tempered distribution. stop: ids that end a completion (default: the model's own end-of-sequence ids).
    seeds: one a prompt, needed unless greedy. batch_size: rows computed together; costs memory, saves time.

    `logprobs` are those of the policy itself: the log-softmax, in float32, of the logits before temperature, top_k
    and top_p. In float32 they agree with a full forward pass within 1e-5.

    The draws of a prompt are a function of its seed alone. Its completion therefore does not depend on the other
    prompts, their order, the batch size, or, up to its length, `max_new_tokens`, except through rounding: kernels
    may sum in another order for another batch shape, which moves a logit by some 1e-7 of its size, and so changes a
    token only where a draw falls that close to an edge of the distribution (or where two logits tie, when greedy).
    The same call on the same machine gives the same result bit for bit.

    Raises `Problem` on an empty prompt, on a prompt that leaves no room in the model's context, and on models that
    the cache does not hold (state-space and linear-attention layers).
    """
    if not prompts:
        return []
    _check(model, prompts, max_new_tokens, temperature, top_k, top_p, seeds)
    ends = frozenset(own_stops(model) if stop is None else stop)
    # neighbours in length share a batch (little padding), and equal prompts come together (one prefill)
    order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), tuple(prompts[index])))
    made: dict[int, Sample] = {}
    with torch.no_grad(), evaluating(model):
        for rows in _groups(model, [len(prompts[index]) for index in order], order, batch_size):
            draws = None if seeds is None or temperature == 0 else _draws([seeds[row] for row in rows], max_new_tokens)
            batch = _Batch(model, [prompts[row] for row in rows], max_new_tokens)
            made.update(zip(rows, batch.complete(draws, temperature, top_k, top_p, ends)))
    return [made[index] for index in range(len(prompts))]


def choose(
    logprobs: torch.Tensor, draws: torch.Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> torch.Tensor:
    """Tokens [B] from log-probabilities [B, V] by the inverse of their cumulative distribution at `draws` [B] in [0, 1).

    The distribution is softmax(logprobs / temperature), cut to its `top_k` largest, then to the smallest set that
    holds `top_p` of what is left (the nucleus of Holtzman et al. 2020). Tokens that tie with the last of top_k stay.
    """
    scaled = logprobs / temperature
    if top_k is not None and top_k < scaled.shape[-1]:
        scaled = scaled.masked_fill(scaled < scaled.topk(top_k).values[:, -1:], -torch.inf)
    weights = scaled.softmax(-1)
    if top_p is not None and top_p < 1:
        ranked, index = weights.sort(dim=-1, descending=True, stable=True)
        before = ranked.cumsum(-1, dtype=torch.float64) - ranked
        weights = weights.masked_fill(torch.zeros_like(weights, dtype=torch.bool).scatter(-1, index, before >= top_p), 0)
    edges = weights.cumsum(-1, dtype=torch.float64)
    # the first token whose edge lies beyond the draw: one of weight 0 has the edge of its neighbour and is never it
    return torch.searchsorted(edges, draws[:, None] * edges[:, -1:], right=True).squeeze(-1).clamp(max=weights.shape[-1] - 1)


def virtual_tokens(model: Any) -> int:
    """How many trained tokens an adapter puts before every text: they take positions of the model. 0 without such an adapter."""
    return sum(one.num_virtual_tokens for one in getattr(model, "peft_config", {}).values() if one.is_prompt_learning)


def own_stops(model: Any) -> tuple[int, ...]:
    """The end-of-sequence ids in the model's generation settings, else in its configuration."""
    for settings in (getattr(model, "generation_config", None), model.config):
        ids = getattr(settings, "eos_token_id", None)
        if ids is not None:
            return (ids,) if isinstance(ids, int) else tuple(ids)
    return ()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within, and every module's own mode again afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


_EMBEDDED, _CACHED = {"PROMPT_TUNING", "P_TUNING"}, {"PREFIX_TUNING", "CARTRIDGE"}
"""peft's types whose virtual tokens are embeddings before the prompt's; keys and values before those of the prompt, in every layer."""


def _kind(model: Any) -> str:
    """The type of the adapter that brings virtual tokens; none: an empty text."""
    return model.active_peft_config.peft_type.value if virtual_tokens(model) else ""


def _groups(model: Any, lengths: Sequence[int], order: Sequence[int], most: int) -> Iterator[list[int]]:
    """Rows computed together. Between a prefix in the cache and a prompt there is padding, which a sliding window would count:
    under one, prompts of one length share a batch."""
    alike = _kind(model) in _CACHED and getattr(model.config.get_text_config(), "sliding_window", None) is not None
    first = 0
    while first < len(order):
        last = min(first + most, len(order))
        while alike and lengths[last - 1] != lengths[first]:
            last -= 1
        yield list(order[first:last])
        first = last


class _Batch:
    """Prompts of one batch, left-padded so that all rows write to the cache at one place.

    A row of the cache holds a prefix that the adapter keeps there, padding, virtual tokens that are embeddings, the prompt.
    """

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], room: int):
        from temper.models.cache import BufferedCache

        kind, count = _kind(model), virtual_tokens(model)
        before, kept = (count, 0) if kind in _EMBEDDED else (0, count)
        self.model, self.room = model.get_base_model() if count else model, room
        self.device = next(model.parameters()).device
        unique = list(dict.fromkeys(map(tuple, prompts)))
        width = max(map(len, unique)) + before
        lengths = torch.tensor([before + len(prompt) for prompt in unique])
        tokens = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in unique]).to(self.device)
        place = torch.arange(width + room) - (width - lengths)[:, None]  # of each token in its row, from 0
        real = torch.cat([torch.ones(len(unique), kept, dtype=torch.bool), place >= 0], dim=1)
        positions = place[:, :width].clamp(min=0) + kept
        self.cache = BufferedCache(model.config.get_text_config().num_hidden_layers, kept + width + room)
        self.length = kept
        self.real = real.to(self.device)
        self.padded = int(lengths.min()) < width
        embedded = None
        if kind in _EMBEDDED:
            embedded = self.model.get_input_embeddings()(tokens)
            virtual = (place[:, :width] >= 0) & (place[:, :width] < before)
            embedded[virtual.to(self.device)] = model.get_prompt(len(unique)).to(embedded).flatten(0, 1)
        elif kind in _CACHED:
            for layer, own in zip(self.cache.layers, model.get_prompt(len(unique)).layers):
                layer.update(own.keys, own.values)
        self.logprobs = self._forward(tokens, positions.to(self.device), embedded)
        self.positions = (lengths[:, None] + kept).to(self.device)
        if len(unique) < len(prompts):
            index = {prompt: number for number, prompt in enumerate(unique)}
            self._select([index[tuple(prompt)] for prompt in prompts])

    def _forward(self, tokens: torch.Tensor, positions: torch.Tensor, embedded: torch.Tensor | None = None) -> torch.Tensor:
        """Log-probabilities [B, V] of what follows `tokens` [B, T], or their embeddings [B, T, H], which join the cache."""
        self.length += tokens.shape[1]
        out = self.model(
            **({"input_ids": tokens} if embedded is None else {"inputs_embeds": embedded}),
            # without padding there is nothing to mask, and attention takes its fast path
            attention_mask=self.real[:, : self.length] if self.padded else None,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1].float().log_softmax(-1)

    def _select(self, rows: list[int]) -> None:
        index = torch.tensor(rows, device=self.device)
        self.cache.select(index)
        self.real, self.positions, self.logprobs = self.real[index], self.positions[index], self.logprobs[index]

    def complete(
        self, draws: torch.Tensor | None, temperature: float, top_k: int | None, top_p: float | None, ends: frozenset[int]
    ) -> list[Sample]:
        alive = list(range(len(self.logprobs)))  # the sample that each row of the batch makes
        tokens: list[list[int]] = [[] for _ in alive]
        scores: list[list[float]] = [[] for _ in alive]
        finished = [False] * len(alive)
        for step in range(self.room):
            if draws is None:
                chosen = self.logprobs.argmax(-1)
            else:
                chosen = choose(self.logprobs, draws[alive, step].to(self.device), temperature, top_k, top_p)
            picked = self.logprobs.gather(-1, chosen[:, None]).squeeze(-1)
            for one, token, score in zip(alive, chosen.tolist(), picked.tolist()):
                if not finished[one]:
                    tokens[one].append(token)
                    scores[one].append(score)
                    finished[one] = token in ends
            going = [row for row, one in enumerate(alive) if not finished[one]]
            if not going or step + 1 == self.room:
                break
            if len(going) <= 0.75 * len(alive):  # dropping rows copies the cache: not for one row at a time
                self._select(going)
                chosen = chosen[torch.tensor(going, device=self.device)]
                alive = [alive[row] for row in going]
            self.logprobs = self._forward(chosen[:, None], self.positions)
            self.positions = self.positions + 1
        return [Sample(tuple(a), tuple(b), c) for a, b, c in zip(tokens, scores, finished)]


def _draws(seeds: Sequence[int], count: int) -> torch.Tensor:
    """[B, count] numbers in [0, 1), each row from its own generator."""
    return torch.stack([torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def _check(
    model: Any,
    prompts: Sequence[Sequence[int]],
    room: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seeds: Sequence[int] | None,
) -> None:
    if room < 1:
        raise Problem(f"max_new_tokens is {room}; it must be at least 1")
    if temperature < 0:
        raise Problem(f"temperature is {temperature}; it must be 0 (greedy) or above")
    if top_k is not None and top_k < 1:
        raise Problem(f"top_k is {top_k}; it must be at least 1, or None for no limit")
    if top_p is not None and not 0 < top_p <= 1:
        raise Problem(f"top_p is {top_p}; it must be above 0 and at most 1, or None for no limit")
    if seeds is None and temperature > 0:
        raise Problem("sampling needs `seeds`, one for each prompt; temperature 0 needs none")
    if seeds is not None and len(seeds) != len(prompts):
        raise Problem(f"{len(seeds)} seeds for {len(prompts)} prompts; give one for each")
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise Problem(f"prompt {index} is empty; begin it with at least one token, such as the beginning-of-text token")
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    virtual = virtual_tokens(model)
    longest = max(map(len, prompts)) + virtual
    if limit is not None and longest + room > limit:
        said = f"{virtual} virtual tokens, a prompt of {longest - virtual}" if virtual else f"a prompt of {longest} tokens"
        raise Problem(
            f"{said} and {room} new ones do not fit the model's {limit} positions; "
            f"shorten the prompt or ask for at most {limit - longest} tokens"
        )
    other = set(getattr(config, "layer_types", None) or ()) - _ATTENTION
    if other or getattr(model, "_is_stateful", False):
        raise Problem(
            f"the sampler's cache holds attention layers alone, and this model has {', '.join(sorted(other)) or 'state-space'} layers"
        )
    if (kind := _kind(model)) and kind not in _EMBEDDED | _CACHED:
        raise Problem(f"the sampler does not carry the virtual tokens of a {kind} adapter; use the model's own `generate`")
