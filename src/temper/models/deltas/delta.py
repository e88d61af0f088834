"""Slot `delta`: what is trained on the modules that `where` names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol

from pydantic import Field

from temper.lazy import nn, peft, torch
from temper.models.deltas import peft_types
from temper.models.deltas import route as routes  # not their parts by name: they would stand in this slot too
from temper.models.deltas import where as places
from temper.models.walk import is_linear
from temper.parts import Count, Problem, Rate, Share, Slot, dump, part, slot
from temper.passport import family

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from temper.context import Context
    from temper.models.deltas.init import Init
    from temper.passport import Passport


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

    def fits(self, model: Passport) -> None:
        if self.dora:
            _unpruned(model, "`dora: true`")

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


_TASKS = {"causal": "CAUSAL_LM", "encoder-decoder": "SEQ_2_SEQ_LM", "masked": None, "classifier": None}
"""What peft calls what a family of models does; it has no word for telling masked tokens, and would train a classifier's head itself."""


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


globals().update(peft_types.made())  # `peft-lora`, `oft`, `vera`, `prompt-tuning`, ...: peft's other types, a part each
REFUSED = peft_types.refused()


@part
class SvdTriplet:
    """W + alpha / rank P diag(lambda) Q with P [out, rank], lambda [rank] and Q [rank, in] trained, lambda 0 at the start and W frozen.
    Zhang et al. 2023, "AdaLoRA", section 3.1. The budget `sensitivity-cubic` takes triplets away; the penalty `orthogonal` keeps their
    vectors apart."""

    kind: ClassVar[Literal["model", "adapter"]] = "adapter"
    usual: ClassVar[places.Where] = places.AllLinear()

    rank: Count = 12
    """Triplets of each matrix, at the start."""
    alpha: Rate = 24.0
    """Multiplies the change, over the rank at the start."""
    dropout: Share = 0.0
    """Share of the adapter's inputs dropped in training."""

    def __call__(self, model: nn.Module, modules: list[str], init: Any) -> nn.Module:
        _adaptable(model, modules, "svd-triplet")
        found = dict(model.named_modules())
        for name in modules:
            if not is_linear(found[name]):
                raise Problem(f"`svd-triplet` goes to linear layers, and `{name}` is a {type(found[name]).__name__}; leave it out")
        config = peft.AdaLoraConfig(
            task_type=_TASKS[family(type(model).__name__)],
            target_modules=modules,
            init_r=self.rank,
            target_r=self.rank,
            lora_alpha=int(self.alpha) if self.alpha.is_integer() else self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            total_step=1,  # peft asks for one; how long a run is, and what a penalty weighs, the recipe's other slots say
            orth_reg_weight=0.0,
        )
        return init(model, config, peft.get_peft_model)


@part
class TriFactor:
    """W + scale B R A with R [rank, rank] trained, B [out, rank] and A [rank, in] fixed, W frozen.  Bałazy et al. 2024, "LoRA-XS", eq. 2.

    By default B A is the principal part of W and R next to 0; init `first-update` has them of the first update. A peft type of ours:
    `import temper.peft` loads it, and it is a LoRA exactly: B R and A.
    """

    kind: ClassVar[Literal["model", "adapter"]] = "adapter"
    usual: ClassVar[places.Where] = places.AllLinear()

    rank: Count = 32
    """Rows of A and R."""
    scale: Rate = 1.0
    """Factor of the adapter's output."""

    def __call__(self, model: nn.Module, modules: list[str], init: Any) -> nn.Module:
        from temper.models.deltas.tuners import register
        from temper.models.deltas.tuners.tri_factor import TriFactorConfig

        _linear_only(model, modules, "tri-factor")
        for name in modules:
            if self.rank > (most := min(model.get_submodule(name).weight.shape)):  # type: ignore[union-attr]
                raise Problem(f"`tri-factor` finds {most} directions in `{name}`; rank {self.rank} is more", ("rank",))
        register()
        task = _TASKS[family(type(model).__name__)]
        return init(model, TriFactorConfig(task_type=task, target_modules=modules, r=self.rank, scale=self.scale), peft.get_peft_model)


@part
class LowRankExperts:
    """W + scale sum_k w_k B_k A_k, with weights w of each token's own from a linear router; all but W trained.

    Chen et al. 2024, "LLaVA-MoLE", section 3.2, with a router for every layer. A peft type of ours: `import temper.peft` loads it. It is
    no change of a weight, so it stays an adapter. The loss `load-balance` keeps the experts in use.
    """

    kind: ClassVar[Literal["model", "adapter"]] = "adapter"
    usual: ClassVar[places.Where] = places.Mlp()

    experts: Count = 4
    """Experts of a layer, K."""
    rank: Count = 8
    """Rank of an expert."""
    alpha: Rate = 16.0
    """scale = alpha / rank."""
    dropout: Share = 0.0
    """Share of the experts' inputs dropped in training."""
    route: Slot[routes.Route] = routes.TokenTop1()
    """Which experts work on a token."""

    def fits(self, model: Passport) -> None:
        _unpruned(model, "`low-rank-experts`")

    def __call__(self, model: nn.Module, modules: list[str], init: Any) -> nn.Module:
        from temper.models.deltas.tuners import register
        from temper.models.deltas.tuners.low_rank_experts import LowRankExpertsConfig

        _linear_only(model, modules, "low-rank-experts")
        named = dump(self.route)
        if "function" in named:
            raise Problem("an adapter's folder brings no code, so a function cannot route its tokens; use a part", ("route",))
        register()
        config = LowRankExpertsConfig(
            task_type=_TASKS[family(type(model).__name__)],
            target_modules=modules,
            r=self.rank,
            scale=self.alpha / self.rank,
            experts=self.experts,
            dropout=self.dropout,
            route=named,
        )
        return init(model, config, peft.get_peft_model)


@part
class SideLadder:
    """A network of the same blocks, `shrink` times narrower, beside the frozen model: its last state, widened, goes to the model's head.

    Sung et al. 2022, "LST: Ladder Side-Tuning", section 3.2: block i takes mu_i h + (1 - mu_i) W_i b_i, with h what the one before gave
    (at first the embedded tokens, narrowed), b_i what the model's block i gives, mu_i = sigmoid(alpha_i / temperature). Nothing is
    propagated back through the model. As in the paper the model's own last state is not heard, so training does not start from what the
    model says but under `join: add`. Init `pruned-copy` starts the blocks from the model's. A peft type of ours: `import temper.peft`
    loads it. It is no change of a weight, so it stays an adapter.
    """

    kind: ClassVar[Literal["model", "adapter"]] = "adapter"
    usual: ClassVar[places.Where] = places.Everything()

    shrink: Count = 8
    """The side network is this many times narrower; heads stay as many and get narrower."""
    temperature: Rate = 0.1
    """Temperature of the gates."""
    alpha: float = 0.0
    """What the gates' parameters start at; 0 takes half of each."""
    skip: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Blocks of the model, from 0, with none beside them."""
    join: Literal["replace", "add"] = "replace"
    """replace: the model's head hears the side network alone. add: it hears the model's last state and the side's, which starts at 0, so
    that the start changes nothing."""

    def fits(self, model: Passport) -> None:
        _unpruned(model, "`side-ladder`")

    def __call__(self, model: nn.Module, modules: list[str], init: Any) -> nn.Module:
        from temper.models.deltas.tuners import register, side_ladder

        if modules != self.usual(model):
            raise Problem("`side-ladder` stands beside the whole model; leave `where` out")
        register()
        task = _TASKS[family(type(model).__name__)]
        config = side_ladder.SideLadderConfig(
            task_type=task, shrink=self.shrink, temperature=self.temperature, alpha=self.alpha, skip=list(self.skip), join=self.join
        )
        try:
            body = side_ladder.decoder_body(model)
            side_ladder.narrowed(body.config, self.shrink, config.kept(len(body.layers)))
        except ValueError as error:
            raise Problem(f"`side-ladder`: {error}") from error
        return init(model, config, peft.get_peft_model)


def _unpruned(model: Passport, what: str) -> None:
    """Refuses, by its passport, a model whose mask a delta could not be merged into."""
    if model.mask is not None:
        told = f"the model is pruned (density {model.mask:g}), and {what} does not keep its mask; use plain `lora`, or `full`"
        raise Problem(told, ("delta",))


def _linear_only(model: nn.Module, modules: list[str], delta: str) -> None:
    """Refuses modules that are not linear layers, or whose weight another shares."""
    _adaptable(model, modules, delta)
    found = dict(model.named_modules())
    for name in modules:
        if not is_linear(found[name]):
            raise Problem(f"`{delta}` goes to linear layers, and `{name}` is a {type(found[name]).__name__}; leave it out")


@part
class Entries:
    """Single entries of the weights are trained, all else stands still: W + sum_k v_k e_(i_k) e_(j_k)', v = 0 at the start.
    He et al. 2023, "Sensitivity-Aware Visual Parameter-Efficient Fine-Tuning" (SPT), section 3.2, and the authors' code.
    Formula: the entries are the greatest, over all matrices, of sum over batches of (mean gradient of the batch)^2.

    That is the square of a batch's gradient; a Fisher information would sum the squares of single examples' gradients. Where a mask
    prunes a weight, the pruned entries are not chosen. The authors' code chooses among biases and norms as well; here matrices alone."""

    kind: ClassVar[Literal["model", "adapter"]] = "adapter"
    usual: ClassVar[places.Where] = places.AllLinear()

    by: Literal["sensitivity", "magnitude", "random"] = "sensitivity"
    """Which entries: of the greatest sensitivity, of the greatest |W|, or any, drawn evenly."""
    share: places.Portion = 0.005
    """Of all weights of the modules, those that are trained."""
    count: Count | None = None
    """Entries of all modules together, in place of a share."""
    samples: Count = 256
    """Training examples that the sensitivity is measured on."""

    def start(self, context: Context) -> Choice:
        return Choice(self, context.want("statistics").ask("squared-gradient", self.samples) if self.by == "sensitivity" else None)

    def __call__(self, model: nn.Module, modules: list[str], init: Any) -> nn.Module:
        return Choice(self, None)(model, modules, init)


class Choice:
    """See the part `entries`."""

    def __init__(self, part: Entries, asked: Callable[[], Mapping[str, torch.Tensor]] | None):
        self.kind, self.usual = part.kind, part.usual
        self._part, self._asked = part, asked

    def __call__(self, model: nn.Module, modules: list[str], init: Any) -> nn.Module:
        from temper.models.deltas.ranking import Ranking
        from temper.models.deltas.tuners import sparse

        _linear_only(model, modules, "entries")
        found = dict(model.named_modules())
        sparse.known()
        share, count = self._part.share, self._part.count
        ranking = Ranking(lambda: self._scores(found, modules), lambda most: round(share * most) if count is None else count)
        config = sparse.SparseConfig(task_type=_TASKS[family(type(model).__name__)], target_modules=list(modules))
        config.ranking = ranking  # for a budget, and until the adapter is on  # type: ignore[attr-defined]

        def wrap(model: Any, config: Any) -> nn.Module:
            if not config.counts and not config.rank_pattern:
                config.counts = ranking.counts(ranking.owners(ranking.asked))
            config.target_modules = {*config.counts, *config.rank_pattern}
            del config.ranking
            self._asked = None  # numbers as many as the weights: they are read once
            return sparse.place(peft.get_peft_model(model, config), ranking.entries(config.counts))

        return init(model, config, wrap)

    def _scores(self, found: dict[str, Any], modules: list[str]) -> dict[str, torch.Tensor]:
        """Module -> the score of each of its weights [out, in]; of a pruned one -inf."""
        from temper.models.constraints import Mask, part_of
        from temper.models.parametrizations import oriented

        by = self._part.by
        if by == "sensitivity" and self._asked is None:
            raise Problem("`entries` by sensitivity needs statistics; start it in a context that gives some, once for a model", ("by",))
        asked = self._asked() if self._asked else {}
        scores: dict[str, torch.Tensor] = {}
        for name in modules:
            weight = oriented(found[name], found[name].weight.detach())
            score = asked[name].float() if by == "sensitivity" else weight.float().abs() if by == "magnitude" else torch.rand(weight.shape)
            constraint = getattr(found[name], "constraint", None)
            mask = None if constraint is None else part_of(constraint, Mask)
            scores[name] = score if mask is None else score.masked_fill(~mask.keep.to(score.device), -torch.inf)
        return scores
