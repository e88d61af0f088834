"""Which models are decoders whose layers the fused nodes compute, and how these take the place of the models' own methods."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from temper.models.deltas.tuners.side_ladder import Side
from temper.train.faster import ops
from temper.train.faster.flat import flat
from temper.train.faster.nodes import Attend, GatedMLP, Linear, Norm, Normed, Product

_ACTS: dict[str, ops.Act] = {"SiLUActivation": "silu", "SiLU": "silu", "GELUTanh": "gelu"}

# ------------------------------------------------------------------------------------------------ linear layers


class Group:
    """The linear layers of a module that share an input. Frozen weights are held in the computation's format, others cast each pass."""

    def __init__(self, module: nn.Module, *names: str):
        self._module, self._names = module, names
        self._held: tuple[Any, Tensor] | None = None

    def linears(self) -> list[Linear] | None:
        """The layers as they are now; None where one is more than a linear layer or plain LoRA on one."""
        found = [linear(getattr(self._module, name)) for name in self._names]
        return None if any(one is None for one in found) else found  # type: ignore[return-value]

    def product(self, kind: torch.dtype) -> Product:
        linears = self.linears()
        assert linears is not None
        weights = [one.weight for one in linears]
        if any(one.requires_grad for one in weights):
            return Product(linears, _stacked(weights, kind), kind)
        key = kind, *((id(one), one.data_ptr(), one._version) for one in weights)
        if self._held is None or self._held[0] != key:
            self._held = key, _stacked(weights, kind)
        return Product(linears, self._held[1], kind)


def _stacked(weights: list[Tensor], kind: torch.dtype) -> Tensor:
    """The weights below one another, cast and copied in one go."""
    if len(weights) == 1:
        return weights[0].detach().to(kind)
    stack = weights[0].new_empty(sum(map(len, weights)), weights[0].shape[1], dtype=kind)
    for part, weight in zip(stack.split([len(one) for one in weights]), weights, strict=True):
        part.copy_(weight.detach())
    return stack


def linear(module: nn.Module) -> Linear | None:
    """A module as a linear layer, if it is one: `nn.Linear`, or peft's plain LoRA on one with one adapter."""
    if type(module) is nn.Linear:
        return Linear(module.weight, module.bias)
    if type(module) is not LoraLinear or type(module.base_layer) is not nn.Linear or module.merged:
        return None
    base = Linear(module.base_layer.weight, module.base_layer.bias)
    active = [] if module.disable_adapters else [name for name in module.active_adapters if name in module.lora_A]
    if not active:
        return base
    if len(active) > 1 or active[0] in module.lora_variant:
        return None
    down, up, dropout = tuple[Any, ...](held[active[0]] for held in (module.lora_A, module.lora_B, module.lora_dropout))
    if (type(down), type(up)) != (nn.Linear, nn.Linear) or up.bias is not None or type(dropout) not in (nn.Identity, nn.Dropout):
        return None
    share = dropout.p if dropout.training and type(dropout) is nn.Dropout else 0.0
    return Linear(base.weight, base.bias, down.weight, up.weight, module.scaling[active[0]], share)


# ---------------------------------------------------------------------------------------------------- one layer


class Layer:
    """A decoder layer: x + o(attention(qkv(norm(x)))), then x + down(act(gate(norm(x))) up(norm(x))). offset: of its norms' weights."""

    def __init__(self, module: Any, offset: float):
        attention, mlp = module.self_attn, module.mlp
        self.module, self.attention = module, attention
        self.qkv, self.o = Group(attention, "q_proj", "k_proj", "v_proj"), Group(attention, "o_proj")
        self.into, self.outof = Group(mlp, "gate_proj", "up_proj"), Group(mlp, "down_proj")
        self.act = _ACTS[type(mlp.act_fn).__name__]
        self.window = getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))
        self.offset = offset

    def ready(self) -> bool:
        """Whether its linear layers are such just now."""
        return all(one.linears() is not None for one in (self.qkv, self.o, self.into, self.outof))

    def forward(
        self, hidden_states: Tensor, *given: Any, attention_mask: Any = None, position_embeddings: Any = None, **rest: Any
    ) -> Tensor:
        """In place of the layer's own, for tokens laid flat [1, N, H]; for any others the layer's own."""
        sequences: ops.Sequences | None = getattr(attention_mask, "laid", None)
        if sequences is None:
            rest.update(attention_mask=attention_mask, position_embeddings=position_embeddings)
            return type(self.module).forward(self.module, hidden_states, *given, **rest)
        x, kind = hidden_states[0].contiguous(), ops.computing(hidden_states)
        first, second = (self._norm(one) for one in (self.module.input_layernorm, self.module.post_attention_layernorm))
        turn, size, scale = self._turn(*position_embeddings), self.attention.head_dim, self.attention.scaling
        qkv, o, into, outof = (one.product(kind) for one in (self.qkv, self.o, self.into, self.outof))
        sequences = sequences.within(self.window)
        head_norms = turn.q_weight, turn.k_weight
        x = Attend.apply(x, first.weight, *head_norms, first, size, scale, turn, sequences, qkv, o, *qkv.tensors, *o.tensors)
        x = GatedMLP.apply(x, second.weight, second, self.act, into, outof, *into.tensors, *outof.tensors)
        return x[None]

    def _norm(self, module: Any) -> Norm:
        return Norm(module.weight, _eps(module), self.offset)

    def _turn(self, *rotation: Tensor) -> ops.Turn:
        cos, sin = (one[0].to(torch.promote_types(one.dtype, torch.float32)).contiguous() for one in rotation)
        q_norm, k_norm = (getattr(self.attention, name, None) for name in ("q_norm", "k_norm"))
        turn = ops.Turn(cos, sin) if getattr(self.attention, "use_rope", True) else ops.Turn()
        if q_norm is None or k_norm is None:
            return turn
        return dataclasses.replace(turn, q_weight=q_norm.weight, k_weight=k_norm.weight, eps=_eps(q_norm), offset=self.offset)


def _eps(norm: Any) -> float:
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps


# ------------------------------------------------------------------------------------------------- whole models


class Decoder:
    """The body of a model, from its embedding to its last norm, over tokens laid flat: nothing is computed on padding."""

    def __init__(self, body: Any, offset: float):
        self.body, self.offset = body, offset
        self.layers = [Layer(one, offset) for one in body.layers]
        self._inner = [one for layer in body.layers for one in layer.modules() if one is not layer or not isinstance(one, FSDPModule)]
        self._inner += [body.norm, body.rotary_emb]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **rest: Any,
    ) -> Any:
        """In place of the body's own, for whole sequences of tokens; for whatever else is asked the body's own."""
        own = functools.partial(type(self.body).forward, self.body, **rest)
        given = {"attention_mask": attention_mask, "position_ids": position_ids, "use_cache": use_cache}
        if past_key_values is not None or use_cache or self._asked(rest) or not self.ready():
            return own(input_ids, **given, past_key_values=past_key_values, inputs_embeds=inputs_embeds)
        x = self.body.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        laid = flat(x.shape[0], x.shape[1], attention_mask, position_ids, x.device)
        if laid is None or ops.computing(x) == torch.float16:
            return own(None, **given, inputs_embeds=x)
        mark = x.new_empty(1, 1, 1, 1)  # of four dimensions, so that `transformers` hands it to the layers as it is
        mark.laid = laid.sequences  # type: ignore[attr-defined]
        mark.lay, mark.stand = laid.lay, lambda states: laid.stand(states, x.shape)  # type: ignore[attr-defined]
        made = own(None, inputs_embeds=laid.lay(x), attention_mask=mark, position_ids=laid.positions, use_cache=False)
        made.last_hidden_state = laid.stand(made.last_hidden_state, x.shape)
        return made

    def _asked(self, rest: dict[str, Any]) -> bool:
        """Whether a call, or the model's settings, ask for more than the last hidden states."""
        kept = any(getattr(self.body.config, name, False) for name in ("output_hidden_states", "output_attentions"))
        return kept or rest.get("return_dict") is False or any(value for name, value in rest.items() if name != "return_dict")

    def ready(self) -> bool:
        """Whether every layer is as the nodes compute it, and nobody listens to what they leave out."""
        return not any(map(_hooked, self._inner)) and all(one.ready() for one in self.layers)

    def norm(self, x: Tensor) -> Tensor:
        """In place of the last norm's forward."""
        norm = Norm(self.body.norm.weight, _eps(self.body.norm), self.offset)
        return Normed.apply(x.flatten(0, -2), norm.weight, norm).view(x.shape)  # type: ignore[union-attr]

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Within, the model computes by these methods."""
        places = [(self.body, self.forward), (self.body.norm, self.norm), *((one.module, one.forward) for one in self.layers)]
        for module, method in places:
            module.forward = method
        try:
            yield
        finally:
            for module, _ in places:
                del module.forward


def _hooked(module: nn.Module) -> bool:
    """Whether somebody listens who does not say that he takes tokens laid flat."""
    forward = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    others = [one for one in forward if not getattr(getattr(one, "func", one), "takes_flat", False)]
    return bool(others or module._backward_hooks or module._backward_pre_hooks)


# ------------------------------------------------------------------------------------------------ which models


def decoder(model: Any) -> tuple[Decoder | None, str]:
    """`model` as a decoder, through peft, or None and why not."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(inner, PreTrainedModel):
        return None, f"{type(inner).__name__} is no model of transformers"
    body: Any = inner.base_model
    if changed := next((name for name, one in inner.named_modules() if "forward" in vars(one)), None):
        return None, f"something has changed the forward method of {changed}"
    if why := _unlike(body):
        return None, why
    plain = next(kind for kind in type(inner).__mro__ if not issubclass(kind, FSDPModule))
    try:
        offset, kinds = _compared(plain, json.dumps(_small(inner.config).to_dict(), default=str, sort_keys=True), inner.config)
    except Exception as problem:  # whatever a kind of model that is not known here raises when it is made small
        return None, f"no small {plain.__name__} can be made: {problem}"
    if offset is None:
        return None, f"{plain.__name__} computes something besides"
    for layer in body.layers:
        if other := next((one for one, kind in zip(_kinds(body, layer), kinds, strict=True) if not issubclass(one, kind)), None):
            return None, f"{plain.__name__} has no {other.__name__} there of its own"
    return Decoder(body, offset), ""


def beside(model: Any) -> list[Decoder]:
    """The side networks of a model, as decoders, where they are such."""
    found = [decoder(module.body)[0] for module in model.modules() if isinstance(module, Side)]
    return [one for one in found if one is not None]


def _unlike(body: Any) -> str:
    """What a model's parts are not, where they are not a decoder's; else nothing."""
    if not {"embed_tokens", "layers", "norm", "rotary_emb"} <= set(body._modules):
        return f"{type(body).__name__} is not made of embed_tokens, layers, norm and rotary_emb"
    for layer in body.layers:
        if set(layer._modules) != {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}:
            return f"{type(layer).__name__} is not made of an attention, an MLP and a norm before each"
        norms = set(layer.self_attn._modules) & {"q_norm", "k_norm"}
        if set(layer.self_attn._modules) - norms != {"q_proj", "k_proj", "v_proj", "o_proj"} or len(norms) == 1:
            return f"{type(layer.self_attn).__name__} is not made of four projections"
        if set(layer.mlp._modules) != {"gate_proj", "up_proj", "down_proj", "act_fn"} or type(layer.mlp.act_fn).__name__ not in _ACTS:
            return f"{type(layer.mlp).__name__} is no MLP gated by SiLU or by GELU with a tanh"
    return ""


def _kinds(body: Any, layer: Any) -> list[type]:
    """The classes of a layer and of what it is made of, linear layers apart, and of what stands beside the layers."""
    return [type(one) for one in (layer, *layer._modules.values(), layer.mlp.act_fn, body.norm, body.rotary_emb)]


_known: dict[tuple[type, str], tuple[float | None, list[type]]] = {}


def _compared(kind: type, told: str, config: Any) -> tuple[float | None, list[type]]:
    """The offset of a kind of model's norms, and the classes of its layers. None where the nodes do not give what it does.

    A narrow model of the kind is made and computed both ways, values and gradients. So whatever its code does besides (soft caps,
    multipliers, dropout) is noticed, in any version of it.
    """
    if (kind, told) not in _known:
        with torch.enable_grad(), torch.random.fork_rng([]), torch.device("cpu"), torch.autocast("cpu", enabled=False):
            _known[kind, told] = _compare(kind(_small(config)).double())
    return _known[kind, told]


_LAYERS = 8  # of a narrow model at most; layers of several kinds take turns sooner


def _small(config: Any) -> Any:
    """The same settings for a narrow model."""
    small, groups = copy.deepcopy(config), config.num_attention_heads // config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    small.update({"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 4 // min(groups, 4)})
    small.update({"head_dim": size, "vocab_size": 32, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None})
    if getattr(config, "sliding_window", None):
        small.sliding_window = 5
    if (count := config.num_hidden_layers) > _LAYERS:
        lists = {name: one[:_LAYERS] for name, one in config.to_dict().items() if isinstance(one, list) and len(one) == count}
        small.update({"num_hidden_layers": _LAYERS, **lists})
    small._attn_implementation = "sdpa"
    return small


def _compare(model: Any) -> tuple[float | None, list[type]]:
    body, draw = model.base_model.train(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for one in body.parameters():
            one.copy_(torch.randn(one.shape, generator=draw, dtype=one.dtype) * (0.3 if one.ndim > 1 else 1.0))
        offset = float((body.norm(torch.ones(1, 24, dtype=torch.float64)) - body.norm.weight).mean().round())
    ids, mask = torch.randint(0, 32, (2, 14), generator=draw), torch.ones(2, 14, dtype=torch.int64)
    mask[1, 9:] = 0
    slopes = torch.randn(2, 14, 24, generator=draw, dtype=torch.float64)

    def found() -> list[Tensor]:
        states = body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state * mask[..., None]
        return [states, *torch.autograd.grad((states * slopes).sum(), list(body.parameters()))]

    expected = found()
    with Decoder(body, offset).inside():
        made = found()
    # transformers takes norms and rotations in float32 whatever the format, hence no closer.
    same = all((one - two).abs().max() <= 1e-4 * one.abs().max() for one, two in zip(expected, made, strict=True))
    return (offset if same else None), _kinds(body, body.layers[0])
