"""peft type `SPARSE`: chosen entries of a weight are trained, W + sum_k v_k e_(i_k) e_(j_k)'; a matrix in `rank_pattern` has LoRA instead.

peft's SHiRA trains entries too, but r (in + out) of them in every module alike, which its `r` fixes for saving and loading.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from temper.models.deltas.tuners.base import AdapterLayer, Config, Tuner, register

KIND = "SPARSE"


@dataclass
class SparseConfig(Config):
    """Settings of a sparse adapter. Which entries they are is saved with their values."""

    kind: ClassVar[str] = KIND

    counts: dict[str, int] = field(default_factory=dict, metadata={"help": "Module -> how many of its entries are trained."})
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "Module -> rank of LoRA in place of entries."})
    scale: float = field(default=1.0, metadata={"help": "Factor of B A where a module has LoRA."})


class SparseLayer(AdapterLayer):
    """A linear layer in which chosen entries of the weight have a trained number added, or with LoRA.

    sparse_index: places in the weight [out, in] laid flat, rising. Nothing of the weight's size is made: the entries lie in the
    weight itself while a product with it is taken.
    """

    adapter_layer_names = ("sparse_values", "sparse_A", "sparse_B")
    other_param_names = ("sparse_index", "sparse_scale")

    def containers(self) -> None:
        _told()
        self.sparse_values = nn.ParameterDict()
        self.sparse_A = nn.ParameterDict()
        self.sparse_B = nn.ParameterDict()
        self.sparse_index: Any = BufferDict(persistent=True)
        self.sparse_scale: dict[str, float] = {}
        self._replaced: dict[str, Tensor] = {}

    def fill(self, adapter: str, config: SparseConfig, name: str) -> None:
        if rank := config.rank_pattern.get(name):
            a = torch.empty(rank, self.in_features, **self.like())
            self.sparse_A[adapter] = nn.Parameter(nn.init.kaiming_uniform_(a, a=math.sqrt(5)))
            self.sparse_B[adapter] = nn.Parameter(torch.zeros(self.out_features, rank, **self.like()))
            self.sparse_scale[adapter] = config.scale
        elif count := config.counts.get(name):
            size = self.in_features * self.out_features
            device = self.like()["device"]
            self.sparse_values[adapter] = nn.Parameter(torch.zeros(count, **self.like()))
            self.sparse_index[adapter] = torch.arange(count, dtype=torch.int32 if size < 2**31 else torch.int64, device=device)
        else:
            raise ValueError(f"`{name}` is among the targets and has neither entries in `counts` nor a rank in `rank_pattern`")

    def dtype(self, adapter: str) -> torch.dtype:
        return (self.sparse_values if adapter in self.sparse_values else self.sparse_A)[adapter].dtype

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base: Any = self.get_base_layer()
        entries = [adapter for adapter in self.active_adapters if adapter in self.sparse_values]
        plain = type(base) in (nn.Linear, Conv1D) and base.weight.is_floating_point()
        if self.disable_adapters or self.merged or kwargs.get("adapter_names") or not entries or not plain:
            return super().forward(x, *args, **kwargs)
        indices, values = [self.sparse_index[one] for one in entries], [self.sparse_values[one] for one in entries]
        result = _product(x, self._oriented(), base.bias, indices, values)  # type: ignore[call-arg]
        for adapter in self.active_adapters:
            if adapter in self.sparse_A:
                result = result + self.change(self._cast_input_dtype(x, self.dtype(adapter)), adapter).to(result.dtype)
        return result

    def _oriented(self) -> Tensor:
        """The base weight as [out, in]."""
        weight: Any = self.get_base_layer().weight
        return weight.T if self.transposed else weight

    def change(self, x: Tensor, adapter: str) -> Tensor:
        if adapter in self.sparse_values:  # over weights that are not plain numbers
            return F.linear(x, self.delta_weight(adapter))
        return self.sparse_scale[adapter] * F.linear(F.linear(x, self.sparse_A[adapter]), self.sparse_B[adapter])

    def delta_weight(self, adapter: str) -> Tensor:
        if adapter in self.sparse_values:
            values, shape = self.sparse_values[adapter], (self.out_features, self.in_features)
            return values.new_zeros(math.prod(shape)).scatter(0, self.sparse_index[adapter].long(), values).view(shape)
        return self.sparse_scale[adapter] * (self.sparse_B[adapter] @ self.sparse_A[adapter])

    def low_rank(self, adapter: str) -> tuple[Tensor, Tensor, float] | None:
        return (self.sparse_A[adapter], self.sparse_B[adapter], self.sparse_scale[adapter]) if adapter in self.sparse_A else None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self.sparse_values:
                super().merge(safe_merge, [adapter])
                continue
            weight = self._oriented().data
            if not weight.is_floating_point():
                raise ValueError(f"{type(self).__name__} cannot be merged into weights in {weight.dtype}")
            place = _places(self.sparse_index[adapter], weight)
            before = weight[place]
            merged = (before + self.sparse_values[adapter].data).to(weight.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"adapter `{adapter}`: the merged weight is not finite")
            weight[place], self._replaced[adapter] = merged, before
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        while self.merged_adapters:
            adapter = self.merged_adapters.pop()
            if adapter in self._replaced:  # the very numbers that were there: (w + v) - v is not always w
                weight = self._oriented().data
                weight[_places(self.sparse_index[adapter], weight)] = self._replaced.pop(adapter).to(weight)
            else:
                self.get_base_layer().weight.data = self._plus(adapter, -1)


class SparseModel(Tuner):
    """A model with sparse adapters."""

    prefix: str = "sparse_"
    tuner_layer_cls = SparseLayer


def known() -> None:
    """Makes the type known to peft."""
    register(KIND, SparseConfig, SparseModel)


def layers(model: nn.Module) -> list[tuple[str, SparseLayer]]:
    """Name in the plain model -> layer of every layer with a sparse adapter."""
    named = [(name, module) for name, module in model.named_modules() if isinstance(module, SparseLayer)]
    return [(name.removeprefix("base_model.model."), layer) for name, layer in named]


def place(model: nn.Module, entries: Mapping[str, Tensor], adapter: str = "default") -> nn.Module:
    """Says which entries of each module a fresh adapter trains. entries: places in [out, in] laid flat, each once."""
    for name, layer in layers(model):
        if adapter in layer.sparse_index:
            layer.sparse_index[adapter].copy_(entries[name].sort().values)
    return model


@functools.cache
def _told() -> None:
    """Lets torch say once, to nobody, that its sparse matrices are young."""
    with warnings.catch_warnings(action="ignore"):
        torch.sparse_csr_tensor([0, 0], torch.tensor([], dtype=torch.int64), torch.tensor([]), (1, 1), check_invariants=False)


# ----------------------------------------------------------------------------------------------------- the arithmetic


def _places(index: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    index = index.long()
    return index // weight.shape[1], index % weight.shape[1]


@contextmanager
def _entered(weight: Tensor, indices: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[Tensor]:
    """Within, the weight holds W + the entries, as merging would leave it; afterwards the very numbers that it held before.

    Through `.data`: to autograd the weight has not changed, and to whoever reads it afterwards it has not either.
    """
    whole = weight.data
    places = [_places(index, whole) for index in indices]
    before: list[Tensor] = []
    try:
        for where, added in zip(places, values, strict=True):
            before.append(whole[where])
            whole[where] = (before[-1] + added.data).to(whole.dtype)
        yield whole
    finally:
        for where, held in reversed(list(zip(places, before, strict=False))):
            whole[where] = held


class _Product(torch.autograd.Function):
    """x (W + entries)' + bias: keeps x alone, and takes the entries' gradients where they lie (a sampled product), not all of W's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, indices: list[Tensor], *values: Tensor) -> Tensor:
        ctx.indices = indices
        ctx.save_for_backward(x, weight, *values)
        with _entered(weight, indices, values) as whole:
            return F.linear(x, whole, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        x, weight, *values = ctx.saved_tensors
        down = over = None
        if ctx.needs_input_grad[0]:
            with _entered(weight, ctx.indices, values) as whole:
                down = (gradient @ whole.to(gradient.dtype)).to(x.dtype)
        g, x = gradient.flatten(0, -2), x.flatten(0, -2)
        if ctx.needs_input_grad[1]:
            over = g.T @ x.to(g.dtype)
        bias = g.sum(0) if ctx.needs_input_grad[2] else None
        needed = ctx.needs_input_grad[4:]
        own = [sampled(g, x, index, one.dtype) if need else None for index, one, need in zip(ctx.indices, values, needed, strict=True)]
        return down, over, bias, None, *own


def sampled(g: Tensor, x: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """sum_t g[t, i_k] x[t, j_k] for every k. g [n, out], x [n, in]; index: places in [out, in] laid flat, rising."""
    rows, columns = g.shape[1], x.shape[1]
    g, x = g.to(dtype), x.to(dtype)
    if g.device.type not in ("cpu", "cuda"):
        return (g.T @ x).flatten()[index.long()]
    edges = torch.arange(0, rows * columns + 1, columns, dtype=index.dtype, device=index.device)
    starts = torch.searchsorted(index, edges).to(index.dtype)
    zeros = torch.zeros(len(index), dtype=dtype, device=g.device)
    pattern = torch.sparse_csr_tensor(starts, index % columns, zeros, (rows, columns), check_invariants=False)
    return torch.sparse.sampled_addmm(pattern, g.T, x, beta=0.0).values()


@torch.compiler.disable
def _product(x: Tensor, weight: Tensor, bias: Tensor | None, indices: list[Tensor], values: list[Tensor]) -> Tensor:
    return _Product.apply(x, weight, bias, indices, *values)  # type: ignore[return-value]
