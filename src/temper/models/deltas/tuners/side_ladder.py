"""Ladder side-tuning: a narrow network beside a frozen decoder, fed by its hidden states and heard in place of it.

Sung, Cho and Bansal 2022, "LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning", sections 3.2 and 3.3, and the
authors' code. The backbone computes without a graph: nothing is kept for a backward pass through it but the states that the rungs read.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from temper.models.cache import BufferedLayer
from temper.models.deltas.tuners.base import Config, register

_BESIDE = ("input_ids", "inputs_embeds", "past_key_values", "use_cache", "output_hidden_states", "output_attentions", "return_dict")
"""What a body is called with that its side network gets otherwise, or not at all."""


def known() -> None:
    """Makes the type known to peft."""
    register("SIDE_LADDER", SideLadderConfig, SideLadderModel)


@dataclass
class SideLadderConfig(Config):
    """What the network beside a model is."""

    kind: ClassVar[str] = "SIDE_LADDER"

    shrink: int = field(default=8, metadata={"help": "The side network is this many times narrower than the model."})
    temperature: float = field(default=0.1, metadata={"help": "Temperature of the gates."})
    alpha: float = field(default=0.0, metadata={"help": "What the gates' parameters start at."})
    skip: list[int] = field(default_factory=list, metadata={"help": "Blocks of the model, from 0, with none beside them."})
    join: str = field(default="replace", metadata={"help": "`replace` or `add`: what the side's output does to the model's last state."})

    def kept(self, count: int) -> list[int]:
        """The blocks, of so many, that have one beside them. Raises `ValueError` where `skip` names others, or all."""
        if wrong := [one for one in self.skip if not 0 <= one < count]:
            raise ValueError(f"skip names block {wrong[0]}, and the model has blocks 0 to {count - 1}")
        if not (kept := [one for one in range(count) if one not in self.skip]):
            raise ValueError(f"skip names all {count} blocks; leave one at least")
        return kept


# ------------------------------------------------------------------------------------------------ the narrow network


def decoder_body(model: Any) -> Any:
    """The part of a model that a side network stands beside. Raises `ValueError` where it is no decoder of Llama's make."""
    body = getattr(model, "base_model", None)
    if not {"embed_tokens", "layers", "norm", "rotary_emb"} <= set(getattr(body, "_modules", ())):
        parts = "embed_tokens, layers, norm and rotary_emb"
        raise ValueError(f"a side network stands beside decoders of {parts}, as Llama is made, not beside {type(model).__name__}")
    return body


def narrowed(config: Any, shrink: int, kept: Sequence[int]) -> Any:
    """The settings of a decoder with the blocks `kept`, `shrink` times narrower: as many heads, each of them narrower.

    Raises `ValueError` where nothing would be left, or heads of an odd width, which rotary positions cannot turn.
    """
    small, heads = copy.deepcopy(config), config.num_attention_heads
    size = (getattr(config, "head_dim", None) or config.hidden_size // heads) // shrink
    if size < 2 or size % 2 or config.hidden_size < shrink or config.intermediate_size < shrink:
        raise ValueError(f"shrink {shrink} leaves heads {size} wide of a hidden size of {config.hidden_size}; they must be of even width")
    small.update({"hidden_size": config.hidden_size // shrink, "intermediate_size": config.intermediate_size // shrink})
    small.update({"head_dim": size, "num_hidden_layers": len(kept), "vocab_size": 1})
    small.update({"pad_token_id": None, "bos_token_id": None, "eos_token_id": None})
    small.update({name: [one[i] for i in kept] for name, one in config.to_dict().items() if _by_layer(one, config.num_hidden_layers)})
    small._attn_implementation = config._attn_implementation
    return small


def _by_layer(value: Any, count: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == count


class Side(nn.Module):
    """The network of one adapter.

    With b_0 the model's embedded tokens and b_i what its block i gives: h_0 = first(b_0), h_i = block_i(mu_i h + (1 - mu_i) down_i(b_i))
    with h that of the last block kept before i and mu_i = sigmoid(gate_i / temperature), output up(norm(h)).
    """

    def __init__(self, body: Any, config: SideLadderConfig) -> None:
        super().__init__()
        self.kept, self.temperature = config.kept(len(body.layers)), config.temperature
        small = narrowed(body.config, config.shrink, self.kept)
        wide, narrow = body.config.hidden_size, small.hidden_size
        self.gates = nn.Parameter(torch.full((len(self.kept),), config.alpha))
        self.first = nn.Linear(wide, narrow)
        self.downs = nn.ModuleList([nn.Linear(wide, narrow) for _ in self.kept])
        self.body = type(body)(small)
        self.body.embed_tokens = None
        self.up = nn.Linear(narrow, wide)
        if config.join == "add":
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)
        self._states: list[Tensor] = []
        for index, block in enumerate(self.body.layers):
            block.register_forward_pre_hook(functools.partial(self._climb, index), with_kwargs=True)

    def forward(self, states: list[Tensor], given: dict[str, Any]) -> Tensor:
        """states: b_0 and those of the blocks kept, [B, T, wide] each; given: what else the body was called with. Gives [B, T, wide]."""
        self._states = [one.to(self.gates.dtype) for one in states]
        self._states[0] = self.first(self._states[0])
        try:
            made = self.body(inputs_embeds=self._states[0], **given)
        finally:
            self._states = []
        return self.up(made.last_hidden_state)

    def _climb(self, index: int, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A block's input, mixed."""
        before, *rest = args if args else (kwargs.pop("hidden_states"),)
        before = _laid(self._states[0], kwargs) if index == 0 else before  # some bodies scale what they are given as embedded tokens
        backbone = self.downs[index](_laid(self._states[index + 1], kwargs))
        return (backbone + torch.sigmoid(self.gates[index] / self.temperature) * (before - backbone), *rest), kwargs


# ------------------------------------------------------------------------------------------------ beside the model


class Ladder(nn.Module, BaseTunerLayer):
    """The side networks of a model, and the hooks that feed them and let them be heard. The model's own modules are as they were."""

    adapter_layer_names = ("side_ladder_nets",)
    other_param_names = ("joins",)

    def __init__(self, body: Any, adapter: str) -> None:
        super().__init__()
        self.side_ladder_nets, self.joins = nn.ModuleDict(), dict[str, str]()
        self.merged_adapters = []
        self._active_adapter, self._disable_adapters = adapter, False
        self._grad, self._states = True, dict[int, Tensor]()
        self._hooks = [
            body.register_forward_pre_hook(self._begin),
            body.layers[0].register_forward_pre_hook(self._enter, with_kwargs=True),
            *(one.register_forward_hook(functools.partial(self._pass, index), with_kwargs=True) for index, one in enumerate(body.layers)),
            body.register_forward_hook(self._end, with_kwargs=True, always_call=True),
        ]

    def add(self, adapter: str, body: Any, config: Any) -> None:
        """Puts a side network beside the body."""
        if config.join not in ("replace", "add"):
            raise ValueError(f"join is `{config.join}`; it is `replace` or `add`")
        self.side_ladder_nets[adapter] = Side(body, config).to(body.norm.weight.device)
        self.joins[adapter] = config.join

    def leave(self) -> None:
        """Takes the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        if not isinstance(adapter_names, str) and len(adapter_names) > 1:
            raise ValueError(f"{len(adapter_names)} side networks cannot be heard at once ({', '.join(adapter_names)}); name one")
        super().set_adapter(adapter_names, inference_mode)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(_UNMERGED)

    def unmerge(self) -> None:
        raise ValueError(_UNMERGED)

    # a pass, in the order of what happens in it

    def _begin(self, _body: nn.Module, _args: Any) -> None:
        self._states.clear()
        self._grad = torch.is_grad_enabled()
        if self._net() is not None:
            torch.set_grad_enabled(False)

    def _enter(self, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._net() is not None:
            self._states[-1] = _standing(args[0] if args else kwargs["hidden_states"], kwargs)

    def _pass(self, index: int, _block: nn.Module, _args: Any, kwargs: dict[str, Any], out: Any) -> None:
        if (net := self._net()) is not None and index in net.kept:
            self._states[index] = _standing(out[0] if isinstance(out, tuple) else out, kwargs)

    def _end(self, body: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """The body's output with the side's last state; called also where the body has failed, with nothing."""
        states, net = [self._states[index] for index in sorted(self._states)], self._net()
        self._states.clear()
        torch.set_grad_enabled(self._grad)
        if net is None or out is None:
            return None
        if len(args) > 1 or not hasattr(out, "last_hidden_state"):
            raise ValueError("a model with a side network takes its arguments by name, and returns no tuple")
        given = {name: value for name, value in kwargs.items() if name not in _BESIDE}
        cache = getattr(out, "past_key_values", None)
        own = None if cache is None else slots(cache, len(body.layers), len(net.kept))
        last = net(states, {**given, "use_cache": cache is not None, "past_key_values": own}).to(out.last_hidden_state.dtype)
        out.last_hidden_state = last if self.joins[self.active_adapters[0]] == "replace" else out.last_hidden_state + last
        return out

    def _net(self) -> Any:
        """The side network that is heard."""
        names = self.active_adapters
        return None if self.disable_adapters or not names else self.side_ladder_nets[names[0]]


def _laid(states: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """States as a block has them that takes batches laid flat, [1, N, H]; as they are for any other."""
    lay = getattr(kwargs.get("attention_mask"), "lay", None)
    return states if lay is None else lay(states)


for _hook in (Side._climb, Ladder._enter, Ladder._pass):
    _hook.takes_flat = True  # type: ignore[attr-defined]

_UNMERGED = "a side network is no change of the model's weights; keep it as an adapter"


class SideLadderModel(BaseTuner):
    """A model and its ladder."""

    prefix = "side_ladder_"
    tuner_layer_cls = Ladder
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def inject_adapter(self, model: Any, adapter_name: str, *_: Any, **__: Any) -> None:  # type: ignore[override]
        """Adds a side network."""
        config, body = self.peft_config[adapter_name], decoder_body(model)
        self._check_new_adapter_config(config)
        if "ladder" not in self._modules:
            self.ladder = Ladder(body, adapter_name)
        self.ladder.add(adapter_name, body, config)
        self._mark_only_adapters_as_trainable(model)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Makes one side network the one that is heard, and, but in `inference_mode`, trained."""
        super().set_adapter(adapter_name, inference_mode)
        self.ladder.set_adapter(adapter_name, inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad)
        self.ladder.set_requires_grad(adapter_names, requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.ladder.delete_adapter(adapter_name)
        self.active_adapter = self.ladder.active_adapters

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        super()._enable_adapter_layers(enabled)
        self.ladder.enable_adapters(enabled)

    def merge_and_unload(self, *_: Any, **__: Any) -> nn.Module:
        raise ValueError(_UNMERGED)

    merge_adapter = merge_and_unload  # type: ignore[assignment]

    def unload(self) -> nn.Module:
        """The model as it was."""
        self.ladder.leave()
        return self.model

    def _create_and_replace(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError("a side network replaces no module")

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key.replace(f"side_ladder_nets.{adapter_name}.", "side_ladder_nets.", 1)


def _standing(states: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """[B, T, H] of what a block takes or gives, also where batches are laid flat."""
    stand = getattr(kwargs.get("attention_mask"), "stand", None)
    return states if stand is None else stand(states)


def slots(cache: Any, first: int, count: int) -> Cache:
    """The `count` layers of a model's cache after its own `first`, added where they are not there yet, as a cache.

    So whatever chooses, orders or cuts a cache does it to the side's part too.
    """
    layers = cache.layers
    if any(isinstance(one, StaticLayer) for one in layers):
        raise ValueError("a side network's keys and values do not fit a static cache; use a dynamic one")
    while len(layers) < first + count:
        layers.append(BufferedLayer(layers[0].capacity) if isinstance(layers[0], BufferedLayer) else DynamicLayer())
    return Cache(layers=layers[first : first + count])


# ------------------------------------------------------------------------------------------- a start from the model

_LINEARS = tuple(f"self_attn.{one}_proj" for one in "qkvo") + tuple(f"mlp.{one}_proj" for one in ("gate", "up", "down"))


def prunable(body: Any) -> list[str]:
    """The linear layers that a side network can be cut from, named in the body. Raises `ValueError` where blocks are made of others."""
    names = [f"layers.{index}.{name}" for index in range(len(body.layers)) for name in _LINEARS]
    found = dict(body.named_modules())
    if other := next((name for name in names if type(found.get(name)).__name__.removeprefix("Constrained") != "Linear"), None):
        raise ValueError(f"a side network is cut from blocks with linear layers {', '.join(_LINEARS)}, and `{other}` is none here")
    return names


def copy_pruned(net: Side, body: Any, importance: dict[str, Tensor]) -> None:
    """Fills a side network's blocks and norm with the rows and columns of the body's that matter most; the rest stays as drawn.

    importance: of each weight [out, in] of `prunable`, and optionally of `embed_tokens` [V, H], by name in the body.
    Structured pruning in the order of computation: rows kept of one weight are the columns kept of the next. Weights that share an input
    choose rows together, by the sum over columns of the product of what their entries matter.
    """
    config, small = body.config, net.body.config
    size, heads, shared = _head(config), config.num_attention_heads, config.num_key_value_heads
    into = [importance[f"layers.0.self_attn.{one}_proj"].abs() for one in "qkv"]
    width = _most(importance["embed_tokens"].abs().sum(0) if "embed_tokens" in importance else torch.cat(into).sum(0), small.hidden_size)
    for index, block in enumerate(body.layers):
        named = {name: importance[f"layers.{index}.{name}"].abs() for name in _LINEARS}
        q, k, v, o, gate, up, down = named.values()
        entering, alike = width, any(hasattr(block.self_attn, one) for one in ("q_norm", "k_norm"))
        each = [_each(one, heads, size) for one in (q, k, v)]  # key-value heads as often as queries attend with them
        rows = _pairs(torch.stack([one[:, entering] for one in each]).prod(0).sum(1).view(shared, -1, size).sum(1), _head(small), alike)
        q_rows, kv_rows = (_flat_rows(rows.repeat_interleave(n // shared, 0), size) for n in (heads, shared))
        width = between = _most(o[:, q_rows].sum(1), small.hidden_size)
        inner = _most((gate[:, between] * up[:, between]).sum(1), small.intermediate_size)
        width = _most(down[:, inner].sum(1), small.hidden_size)
        if index in net.kept:
            places = {"q": (q_rows, entering), "k": (kv_rows, entering), "v": (kv_rows, entering), "o": (between, q_rows)}
            cuts = {f"self_attn.{one}_proj": place for one, place in places.items()}
            cuts |= {f"mlp.{one}_proj": (inner, between) for one in ("gate", "up")} | {"mlp.down_proj": (width, inner)}
            norms = {"input_layernorm": entering, "post_attention_layernorm": between}
            norms |= {f"self_attn.{one}_norm": rows[0] for one in "qk" if hasattr(block.self_attn, f"{one}_norm")}
            _cut(net.body.layers[net.kept.index(index)], block, cuts, norms)
    _cut(net.body, body, {}, {"norm": width})


def _cut(into: nn.Module, block: nn.Module, cuts: dict[str, tuple[Tensor, Tensor]], norms: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, (rows, columns) in cuts.items():
            target, source = into.get_submodule(name), block.get_submodule(name)
            target.weight.copy_(source.weight[rows][:, columns])  # type: ignore
            if source.bias is not None:
                target.bias.copy_(source.bias[rows])  # type: ignore
        for name, kept in norms.items():
            into.get_submodule(name).weight.copy_(block.get_submodule(name).weight[kept])  # type: ignore


def _head(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _each(matter: Tensor, heads: int, size: int) -> Tensor:
    """[n size, in] -> [heads size, in], each of n heads as often as its turn comes."""
    by_head = matter.view(-1, size, matter.shape[1])
    return by_head.repeat_interleave(heads // len(by_head), 0).flatten(0, 1)


def _most(scores: Tensor, count: int) -> Tensor:
    """Where the `count` highest are, in order."""
    return scores.topk(count, -1).indices.sort(-1).values


def _pairs(scores: Tensor, count: int, alike: bool) -> Tensor:
    """[heads, size] -> [heads, count]: rows kept of each head, in pairs (j, j + size / 2), which rotary positions turn together.

    alike: whether all heads keep the same, since one norm is over each of them.
    """
    half = scores.shape[1] // 2
    paired = scores.view(-1, 2, half).sum(1)
    best = _most(paired.sum(0, keepdim=True).expand_as(paired) if alike else paired, count // 2)
    return torch.cat((best, best + half), 1)


def _flat_rows(rows: Tensor, size: int) -> Tensor:
    """[heads, count] of each head -> [heads count] of all."""
    return (rows + size * torch.arange(len(rows), device=rows.device)[:, None]).flatten()
