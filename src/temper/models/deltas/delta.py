"""Slot `delta`: what is trained on the modules that `where` names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from temper.lazy import nn, peft
from temper.models.deltas import where as places  # not its parts by name: they would stand in this slot too
from temper.models.walk import is_linear
from temper.parts import Count, Problem, Rate, Share, part, slot
from temper.passport import family

if TYPE_CHECKING:
    from temper.models.deltas.init import Init


@slot(phased=False)
class Delta(Protocol):
    """What is trained? `(model, modules, init) -> model`.

    model: the plain model; modules: names from `where`; init: fills what the delta adds. Returns the model to train,
    in which exactly what is trained requires gradients. A delta of peft's builds its configuration and returns
    `init(model, config, peft.get_peft_model)`: any of peft's types fits, and what they save is a PEFT folder.
    """

    kind: ClassVar[Literal["model", "adapter"]]
    """The kind of artefact that a step with this delta leaves."""
    usual: ClassVar[places.Where]
    """Where it goes when the recipe does not say."""

    def __call__(self, model: nn.Module, modules: list[str], init: Init) -> nn.Module: ...


# ---------------------------------------------------------------------------------------------------------- parts


@part
class Full:
    """The parameters themselves, of the modules that `where` names (by default all of them)."""

    kind: ClassVar[Literal["model", "adapter"]] = "model"
    usual: ClassVar[places.Where] = places.Everything()

    def __call__(self, model: nn.Module, modules: list[str], init: Any) -> nn.Module:
        model = init(model, None, lambda plain, _: plain)
        model.requires_grad_(False)
        for name in modules:
            for parameter in model.get_submodule(name).parameters(recurse=False):
                parameter.requires_grad_(True)
        return model


@part
class Lora:
    """W + scale B A with A [rank, in], B [out, rank] trained and W frozen.  Hu et al. 2021, "LoRA", eq. 3."""

    kind: ClassVar[Literal["model", "adapter"]] = "adapter"
    usual: ClassVar[places.Where] = places.AllLinear()

    rank: Count = 8
    """Rows of A."""
    alpha: Rate = 16.0
    """scale = alpha / rank."""
    dropout: Share = 0.0
    """Share of the adapter's inputs dropped in training."""
    rank_stabilized: bool = False
    """scale = alpha / sqrt(rank).  Kalajdzievski 2023, "A Rank Stabilization Scaling Factor", theorem 3.2."""
    dora: bool = False
    """Trains magnitude and direction apart: m (W + scale B A) / |W + scale B A| by row.  Liu et al. 2024, "DoRA", eq. 5."""

    def __call__(self, model: nn.Module, modules: list[str], init: Any) -> nn.Module:
        _adaptable(model, modules, "lora")
        config = peft.LoraConfig(
            task_type=_TASKS[family(type(model).__name__)],
            target_modules=modules,
            r=self.rank,
            lora_alpha=int(self.alpha) if self.alpha.is_integer() else self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            use_rslora=self.rank_stabilized,
            use_dora=self.dora,
        )
        return init(model, config, peft.get_peft_model)


_TASKS = {"causal": "CAUSAL_LM", "encoder-decoder": "SEQ_2_SEQ_LM", "masked": None}
"""What peft calls what a family of models does; it has no word for telling masked tokens."""


def _adaptable(model: nn.Module, modules: list[str], delta: str) -> None:
    """Refuses modules that low-rank factors cannot go to, or cannot be merged into."""
    found = dict(model.named_modules())
    tied = places.shared(model)
    for name in modules:
        if not is_linear(found[name]) and not isinstance(found[name], nn.Embedding):
            kind = type(found[name]).__name__
            raise Problem(f"`{delta}` goes to linear layers and embeddings, and `{name}` is a {kind}; leave it out, or use delta `full`")
        if name in tied:
            raise Problem(f"`{name}` shares its weight with `{tied[name]}`, so an adapter on one could not be merged; leave it out")
