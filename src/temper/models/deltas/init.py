"""Slot `init`: where a delta starts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, Protocol

from temper.lazy import peft, torch
from temper.parts import Count, Problem, Rate, part, slot

if TYPE_CHECKING:
    from torch import nn

    from temper.context import Context


@slot(phased=False)
class Init(Protocol):
    """Where does the delta start? `(model, config, wrap) -> model`.

    model: the plain model; config: the delta's peft configuration, or None where the delta adds nothing; wrap:
    `(model, config) -> PeftModel` adds the delta. A part settles the configuration before it wraps, sets the delta's
    numbers after it, or both: it sees the model untouched, and it holds the wrapped one. Random numbers come from
    torch's global generator, which the caller has seeded. A part that moves a share of the base weight into the
    adapter calls `remember` on what it returns.
    """

    def __call__(self, model: nn.Module, config: Any, wrap: Callable[[nn.Module, Any], nn.Module]) -> nn.Module: ...


Part = Literal["top", "bottom", "random"]
"""Which singular directions: of the largest values, of the smallest, or drawn."""
Factors = Callable[[str, "torch.Tensor", int], "tuple[torch.Tensor, torch.Tensor]"]
"""(module, W [out, in], rank) -> (a [rank, in], b [out, rank])."""

# ------------------------------------------------------------------------------------------------- pure functions


def low_rank_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """Name -> layer of every layer with LoRA factors."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)]


def remember(model: nn.Module) -> nn.Module:
    """Keeps the factors that the base weight gave up, so that saving can convert the adapter to the original base.

    They are buffers of the layers that no state dict holds: attaching again with the same seed gives them again.
    """
    for _, layer in low_rank_layers(model):
        for adapter in layer.active_adapters:
            layer.register_buffer(f"start_A_{adapter}", layer.lora_A[adapter].weight.detach().clone(), persistent=False)
            layer.register_buffer(f"start_B_{adapter}", layer.lora_B[adapter].weight.detach().clone(), persistent=False)
    return model


def first_factors(layer: Any, adapter: str) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The factors A0 [r, in] and B0 [out, r] that `remember` kept, or None."""
    a, b = getattr(layer, f"start_A_{adapter}", None), getattr(layer, f"start_B_{adapter}", None)
    return None if a is None or b is None else (a, b)


def _low_rank(config: Any, name: str) -> Any:
    if getattr(config, "peft_type", None) != "LORA":
        raise Problem(f"init `{name}` starts low-rank factors, and the delta has none; use delta `lora`, or init `default`")
    return config


def _fits(model: nn.Module, config: Any, name: str, kinds: str, times: int = 1) -> Any:
    """The configuration; refuses what a decomposition of a weight cannot start: other modules, too high a rank, which needs `times` as
    many directions."""
    modules = dict(model.named_modules())
    for target in sorted(_low_rank(config, name).target_modules):
        module: Any = modules[target]
        if type(module).__name__.removeprefix("Constrained") not in kinds.split():
            raise Problem(f"init `{name}` does not start an adapter on `{target}`, a {type(module).__name__}; use init `default`")
        if (rank := config.rank_pattern.get(target, config.r)) * times > (most := min(module.weight.shape)):
            told = f"rank {rank} is more" if times == 1 else f"rank {rank} needs {rank * times}"
            raise Problem(f"init `{name}` finds {most} directions in `{target}` {list(module.weight.shape)}; {told}")
    return config


def _moving(model: nn.Module, config: Any, wrap: Callable[[nn.Module, Any], nn.Module], factors: Factors) -> nn.Module:
    """The wrapped model after every layer's base gave up what its adapter starts with.

    factors: `(name, W, rank)` -> (a [rank, in], b [out, rank]), of W [out, in] in float32; the base becomes W - b a and scale B A = b a.
    """
    config.init_lora_weights = True  # what is wrapped starts with B = 0, so DoRA measures the length of W
    wrapped = wrap(model, config)
    with torch.no_grad():
        for name, layer in low_rank_layers(wrapped):
            (adapter,) = layer.active_adapters
            base, scale = layer.get_base_layer(), layer.scaling[adapter]
            weight = base.weight.data
            plain = (weight.T if layer.fan_in_fan_out else weight).float()
            a, b = factors(name.removeprefix("base_model.model."), plain, layer.r[adapter])
            for held, value in ((layer.lora_A[adapter], a), (layer.lora_B[adapter], b)):
                held.weight.data = (value / scale**0.5).to(held.weight.dtype).contiguous()
            kept = plain.addmm(layer.lora_B[adapter].weight.float(), layer.lora_A[adapter].weight.float(), alpha=-scale)
            base.weight.data = (kept.T if layer.fan_in_fan_out else kept).to(weight.dtype).contiguous()
    return remember(wrapped)


def eigenvectors(matrix: torch.Tensor, count: int, part: Part) -> torch.Tensor:
    """Orthonormal eigenvectors [n, count] of a symmetric matrix [n, n] in float64: of the largest eigenvalues, the largest first; of the
    smallest, the smallest last; or of `count` drawn at random."""
    n = len(matrix)
    if matrix.device.type != "cpu" or part == "random":
        vectors = torch.linalg.eigh(matrix)[1].flip(1)
        if part == "random":
            return vectors[:, torch.randperm(n)[:count].sort()[0].to(vectors.device)]
        return vectors[:, :count] if part == "top" else vectors[:, -count:]
    from scipy.linalg import eigh  # LAPACK's way to a few eigenvectors, which takes half the time of all

    first = n - count if part == "top" else 0
    found = eigh(matrix.numpy(), subset_by_index=[first, first + count - 1], check_finite=False, driver="evr")[1]
    return torch.from_numpy(found).flip(1)


def left_vectors(matrix: torch.Tensor, count: int, part: Part) -> torch.Tensor:
    """Left singular vectors [out, count] in float64 of a matrix [out, in], among its min(out, in); see `eigenvectors`.

    By the eigenvectors of the smaller of M M' and M' M in float64: where singular values are above 1e-7 of the greatest this is at
    least as exact as a decomposition of M in float32, and takes less time.
    """
    matrix = matrix.double()
    if matrix.shape[0] <= matrix.shape[1]:
        return eigenvectors(matrix @ matrix.T, count, part)
    across = matrix @ eigenvectors(matrix.T @ matrix, count, part)
    return torch.linalg.qr(across)[0] if part == "bottom" else across / across.norm(dim=0).clamp_min(1e-300)


# ---------------------------------------------------------------------------------------------------------- parts


@part
class Default:
    """The delta's own start. LoRA: A uniform (Kaiming), B = 0, so the model starts unchanged.  Hu et al. 2021."""

    def __call__(self, model: nn.Module, config: Any, wrap: Callable[[nn.Module, Any], nn.Module]) -> nn.Module:
        return wrap(model, config)


@part
class Gaussian:
    """A normal with standard deviation 1 / rank, B = 0.  Hu et al. 2021, section 4.1."""

    def __call__(self, model: nn.Module, config: Any, wrap: Callable[[nn.Module, Any], nn.Module]) -> nn.Module:
        _low_rank(config, "gaussian").init_lora_weights = "gaussian"
        return wrap(model, config)


@part
class Random:
    """A and B both uniform (Kaiming): the model does not start unchanged.  peft's `init_lora_weights=False`, for tests of adapters."""

    def __call__(self, model: nn.Module, config: Any, wrap: Callable[[nn.Module, Any], nn.Module]) -> nn.Module:
        _low_rank(config, "random").init_lora_weights = False
        return wrap(model, config)


@part
class Orthogonal:
    """Both factors random and not 0, the rows of B' and of A in orthogonal subspaces: B A = 0.  Datta 2024, "Rethinking LoRA init".

    Formula: A = (X Q_odd)' / 10, B = Y Q_even / 10, X [in, r/2] and Y [out, r/2] normal, Q_odd and Q_even the odd and even rows of a
    random orthogonal matrix [r, r].
    """

    def __call__(self, model: nn.Module, config: Any, wrap: Callable[[nn.Module, Any], nn.Module]) -> nn.Module:
        _fits(model, config, "orthogonal", "Linear Conv1D")
        for rank in {config.r, *config.rank_pattern.values()}:
            if rank % 2:
                raise Problem(f"init `orthogonal` halves the rank, and {rank} is odd; give rank {rank + 1}")
        config.init_lora_weights = "orthogonal"
        return wrap(model, config)


@part
class Mica:
    """B = U_r of W = U S V', the directions of the r smallest singular values, frozen; A = 0 is trained.  "MiCA", arXiv 2604.01694."""

    def __call__(self, model: nn.Module, config: Any, wrap: Callable[[nn.Module, Any], nn.Module]) -> nn.Module:
        _fits(model, config, "mica", "Linear Conv1D")
        if config.use_dora:
            raise Problem("init `mica` freezes B, which `dora` trains; set `dora` to false, or use another init")
        config.init_lora_weights = "mica"
        return wrap(model, config)


@part
class Pissa:
    """The adapter takes the principal part of W = U S V': scale B A = U_r S_r V_r', and the base keeps the rest.

    Meng et al. 2024, "PiSSA: Principal Singular Values and Singular Vectors Adaptation", eqs. 2-4. Formula: A = (S_r / scale)^1/2 V_r',
    B = U_r (S_r / scale)^1/2. What is saved is the exact plain LoRA on the untouched base: B A - B0 A0, of twice the rank.
    """

    part: Part = "top"
    """Which r components the adapter takes: the principal ones, the minor ones, or r drawn at random."""
    iterations: Count | None = None
    """Subspace iterations of a randomised decomposition, of the principal part alone (fast: 16 are near exact); none: the exact one."""

    def __post_init__(self) -> None:
        if self.iterations is not None and self.part != "top":
            raise Problem(f"iterations {self.iterations} find the principal part; leave them out with `part: {self.part}`", ("iterations",))

    def __call__(self, model: nn.Module, config: Any, wrap: Callable[[nn.Module, Any], nn.Module]) -> nn.Module:
        _fits(model, config, "pissa", "Linear Conv1D")
        return _moving(model, config, wrap, self._factors)

    def _factors(self, _: str, weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self.iterations is not None:
            u, s, v = torch.svd_lowrank(weight, rank, niter=self.iterations)
            return (v * s.sqrt()).T, u * s.sqrt()
        return split(left_vectors(weight, rank, self.part).float(), weight)


def split(u: torch.Tensor, weight: torch.Tensor, lengths: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(a, b) with b a = u u' W, the part of W that lies in the directions u [out, r].

    lengths [r]: b = u lengths^1/2, a = lengths^-1/2 u' W; None: the lengths of u' W, so that a and b have their halves of W each.
    """
    across = u.T @ weight
    lengths = across.norm(dim=1) if lengths is None else lengths
    root = lengths.clamp_min(torch.finfo(lengths.dtype).tiny).sqrt()
    return across / root[:, None], u * root


@part
class Olora:
    """B A = Q_r R_r of W = Q R, and the base keeps W - scale B A.  Büyükakyüz 2024, "OLoRA", algorithm 1.

    Saved as PiSSA is: the exact plain LoRA on the untouched base, of twice the rank.
    """

    def __call__(self, model: nn.Module, config: Any, wrap: Callable[[nn.Module, Any], nn.Module]) -> nn.Module:
        _fits(model, config, "olora", "Linear")
        config.init_lora_weights = "olora"
        return remember(wrap(model, config))


@part(needs=("statistics",))
class Corda:
    """The adapter takes r components of W seen through data: of W C = U S V', C = mean x x' of the layer's inputs; the base keeps the rest.

    Yang et al. 2024, "CorDA: Context-Oriented Decomposition Adaptation", section 3, and the authors' code. Formula: with C + 0.01
    mean(diag C) I for C, scale B A = U_r S_r V_r' C^-1 = U_r U_r' W, B = U_r (S_r / scale)^1/2. Taken in this second form, which needs no
    inverse, the damping never has to be raised. C is the mean over tokens; the authors scale inputs by their maximum and add up over a
    sample, which weighs samples differently and moves length between A and B. Saved as PiSSA is, of twice the rank.
    """

    keep: Literal["bottom", "top"] = "top"
    """Components that are trained. top: the largest, seen through the data that are tuned on (instruction-previewed). bottom: the smallest,
    seen through the step's input `general`, so that what these data need stays in the base (knowledge-preserved)."""
    samples: Count = 256
    """Examples that C is a mean over."""

    @property
    def asks_general(self) -> bool:
        return self.keep == "bottom"

    def start(self, context: Context) -> Callable[..., nn.Module]:
        wanted = "general_statistics" if self.asks_general else "statistics"
        if wanted not in context.gifts:
            told = "`keep: bottom` preserves what general data need, and there are none; give the step `general`, or write `keep: top`"
            raise Problem(told, ("keep",))
        asked = context.want(wanted).ask("covariance", samples=self.samples)
        return functools.partial(self._oriented, asked)

    def _oriented(
        self, asked: Callable[[], dict[str, torch.Tensor]], model: nn.Module, config: Any, wrap: Callable[[nn.Module, Any], nn.Module]
    ) -> nn.Module:
        _fits(model, config, "corda", "Linear Conv1D")
        covariance = asked()

        def factors(name: str, weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
            c = covariance[name].to(weight.device, torch.float64)
            seen = weight.double() @ c + 0.01 * c.diagonal().mean() * weight
            u = left_vectors(seen, rank, self.keep)
            return split(u.float(), weight, (u.T @ seen).norm(dim=1).float())

        return _moving(model, config, wrap, factors)


@part(needs=("statistics",))
class Eva:
    """A = the r directions in which the layer's inputs vary most, orthonormal rows; B = 0, so the model starts unchanged.

    Paischer et al. 2024, "One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation" (EVA), section 3. Formula:
    A = V_r' of mean x x' - mean x mean x' = V L V'. The authors approach V by an incremental decomposition of batch after batch until its
    directions stop turning (cosine 0.99); here all samples are decomposed at once, which is what that converges to: they are the setting.
    """

    samples: Count = 256
    """Examples whose tokens are seen."""

    def start(self, context: Context) -> Callable[..., nn.Module]:
        statistics = context.want("statistics")
        return functools.partial(_varying, statistics.ask("covariance", samples=self.samples), statistics.ask("mean", samples=self.samples))


def _varying(
    covariance: Callable[[], dict[str, torch.Tensor]],
    mean: Callable[[], dict[str, torch.Tensor]],
    model: nn.Module,
    config: Any,
    wrap: Callable[[nn.Module, Any], nn.Module],
) -> nn.Module:
    _fits(model, config, "eva", "Linear Conv1D")
    c, m = covariance(), mean()
    config.init_lora_weights = True
    wrapped = wrap(model, config)
    known: dict[tuple[int, int], torch.Tensor] = {}  # layers with the same inputs have one covariance
    for name, layer in low_rank_layers(wrapped):
        (adapter,), plain = layer.active_adapters, name.removeprefix("base_model.model.")
        key, weight = (id(c[plain]), layer.r[adapter]), layer.lora_A[adapter].weight
        if key not in known:
            known[key] = eigenvectors(centred(c[plain], m[plain]), layer.r[adapter], "top").T
        weight.data = known[key].to(weight).contiguous()
    return wrapped


def centred(second: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """The covariance [n, n] about the mean in float64, of mean x x' and mean x."""
    return second.double() - torch.outer(mean, mean)


@part(needs=("statistics",))
class LoraGa:
    """B A begins where full tuning's first step would be steepest: of the mean gradient U S V', A = V_1..r', B = U_r+1..2r.

    Wang et al. 2024, "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", algorithm 1 (direction ArB2r, scale stable), as in the
    authors' code; peft's copy also multiplies B by the gradient's singular values and leaves A unscaled. Formula: A = f V_1..r',
    B = f U_r+1..2r, f = out^1/4 / gamma^1/2; the base keeps W - scale B A. Saved as PiSSA is, of twice the rank.
    """

    samples: Count = 128
    """Examples that the gradient is taken of, their targets' mean."""
    gamma: Rate = 16.0
    """How little the factors are: both are as gamma^-1/2."""

    def start(self, context: Context) -> Callable[..., nn.Module]:
        return functools.partial(self._steepest, context.want("statistics").ask("gradient", samples=self.samples))

    def _steepest(
        self, asked: Callable[[], dict[str, torch.Tensor]], model: nn.Module, config: Any, wrap: Callable[[nn.Module, Any], nn.Module]
    ) -> nn.Module:
        _fits(model, config, "lora-ga", "Linear Conv1D", times=2)
        gradients, rslora = asked(), config.use_rslora

        def factors(name: str, weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
            gradient = gradients[name].to(weight.device)
            u, _, v = torch.svd_lowrank(gradient, min(4 * rank, *gradient.shape), niter=4)
            alpha = config.alpha_pattern.get(name, config.lora_alpha)
            length = (alpha / (rank**0.5 if rslora else rank)) ** 0.5 * len(weight) ** 0.25 / self.gamma**0.5
            return length * v[:, :rank].T, length * u[:, rank : 2 * rank]

        return _moving(model, config, wrap, factors)


@part(needs=("statistics",))
class FirstUpdate:
    """scale B R A is the best rank-r approximation of what full tuning's first update would be.  Ponkshe et al. 2024, "LoRA-SB".

    Formula: D = -rate sign(mean gradient) = U S V', B = U_r, A = V_r', R = S_r / scale (section 2.2). For delta `tri-factor`. W is left as
    it is, so the model starts at W + scale B R A and not at W: the first update is kept.
    """

    samples: Count = 50
    """Examples that the gradient is taken of, their targets' mean."""
    rate: Rate = 1e-5
    """Learning rate of the update, at best that of the run's first: where rates warm up, a part of the optimizer's."""
    sign: bool = True
    """Whether the update is Adam's first, by the gradient's sign; if not, plain descent's, by the gradient."""

    def start(self, context: Context) -> Callable[..., nn.Module]:
        asked = context.want("statistics").ask("gradient", samples=self.samples)

        def first_update(model: nn.Module, config: Any, wrap: Callable[[nn.Module, Any], nn.Module]) -> nn.Module:
            if getattr(config, "kind", "") != "TRI_FACTOR":
                raise Problem("init `first-update` starts three factors; use delta `tri-factor`, or init `default`")
            from temper.models.deltas.tuners.tri_factor import layers

            gradients, config.init_weights = asked(), False
            wrapped = wrap(model, config)
            for name, layer in layers(wrapped):
                gradient = gradients[name.removeprefix("base_model.model.")]
                layer.start("default", -self.rate * (gradient.sign() if self.sign else gradient), whole=True)
            return wrapped

        return first_update


@part(needs=("statistics",))
class PrunedCopy:
    """The blocks of a side network are the model's own, of which the rows and columns that matter least are left out.

    Sung et al. 2022, "LST", section 3.3, as in the authors' code: what is kept of one weight's rows is kept of the next one's columns;
    query, key and value weights, and gate and up, choose rows together, by the product of what their entries matter. The first columns are
    chosen by the embedding, under `fisher` by the first block's weights; heads keep rows in the pairs that rotary positions turn. The
    ladder and the way up stay as drawn.
    """

    score: Literal["magnitude", "fisher"] = "magnitude"
    """What an entry matters: its size, or its diagonal Fisher information on the data."""
    samples: Count = 1024
    """Examples that the Fisher information is a mean over."""

    def start(self, context: Context) -> Callable[..., nn.Module]:
        from temper.models.deltas.tuners import side_ladder

        if self.score == "magnitude":
            return functools.partial(_copy_pruned, None)
        given: Any = context.want("model")
        model = given.get_base_model() if hasattr(given, "get_base_model") else given  # with an adapter that goes on, nothing is read
        try:
            names = side_ladder.prunable(side_ladder.decoder_body(model))
        except ValueError as error:
            raise Problem(f"init `pruned-copy`: {error}") from error
        above = f"{model.base_model_prefix}."
        asked = context.want("statistics").ask("fisher", self.samples, modules=[above + name for name in names])
        return functools.partial(_copy_pruned, lambda: {name.removeprefix(above): one for name, one in asked().items()})


def _copy_pruned(fisher: Callable[[], dict[str, torch.Tensor]] | None, model: Any, config: Any, wrap: Callable[..., Any]) -> nn.Module:
    """See the part `pruned-copy`. fisher: gives layer -> its Fisher information; None: magnitudes."""
    from temper.models.deltas.tuners import side_ladder

    if not isinstance(config, side_ladder.SideLadderConfig):
        raise Problem("init `pruned-copy` starts a side network, and the delta has none; use delta `side-ladder`, or init `default`")
    try:
        body = side_ladder.decoder_body(model)
        names = side_ladder.prunable(body)
    except ValueError as error:
        raise Problem(f"init `pruned-copy`: {error}") from error
    matter = fisher() if fisher else {name: body.get_submodule(name).weight.detach() for name in [*names, "embed_tokens"]}
    wrapped: Any = wrap(model, config)
    side_ladder.copy_pruned(wrapped.base_model.ladder.side_ladder_nets[wrapped.active_adapter], body, matter)
    return wrapped


@part
class ReinitTop:
    """The last blocks start anew, as an untrained model's do; all else is as it came. For delta `full`.
    Zhang et al. 2021, "Revisiting Few-sample BERT Fine-tuning", section 5."""

    last: Count = 1
    """Blocks from the end."""

    def __call__(self, model: nn.Module, config: Any, wrap: Callable[[nn.Module, Any], nn.Module]) -> nn.Module:
        if config is not None:
            raise Problem("init `reinit-top` starts the model's own weights anew, which an adapter leaves as they are; use delta `full`")
        from temper.models.walk import blocks

        chain = blocks(model)
        if self.last > len(chain):
            raise Problem(f"last {self.last}: {type(model).__name__} has {len(chain)} blocks", ("last",))
        inner: Any = model
        for _, block in chain[-self.last :]:
            for tensor in (*block.parameters(), *block.buffers()):
                tensor._is_hf_initialized = False  # type: ignore[attr-defined]  # transformers keeps what it once set
            with torch.no_grad():
                block.apply(inner._init_weights)
        return wrap(model, config)


@part(needs=("tokenizer",))
class Vocabulary:
    """Virtual tokens start as embeddings of the vocabulary: of given words, one each, then of tokens drawn. For delta `prompt-tuning`.

    Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning", section 3.2 ("sampled vocabulary", "class label"). A
    word of several tokens gives their mean.
    """

    words: tuple[str, ...] = ()
    """Such as the labels of a task, each written as in the data (with the space before it, where it has one)."""
    most: Count = 5000
    """Tokens are drawn from the first so many of the vocabulary, special ones left out: tokenizers list common pieces first."""

    def start(self, context: Context) -> Callable[..., nn.Module]:
        return functools.partial(self._start, context.want("tokenizer"))

    def _start(self, tokenizer: Any, model: Any, config: Any, wrap: Callable[[nn.Module, Any], nn.Module]) -> nn.Module:
        if getattr(config, "peft_type", None) != "PROMPT_TUNING":
            raise Problem("init `vocabulary` starts soft prompts, and the delta has none; use delta `prompt-tuning`, or init `default`")
        rest = config.num_virtual_tokens - len(self.words)
        if rest < 0:
            raise Problem(f"{len(self.words)} words for {config.num_virtual_tokens} virtual tokens; give as many at most", ("words",))
        ids = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in self.words]
        if empty := [word for word, some in zip(self.words, ids) if not some]:
            raise Problem(f"{empty[0]!r} has no token; give words", ("words",))
        plain = [one for one in range(min(self.most, len(tokenizer))) if one not in set(tokenizer.all_special_ids)]
        if rest > len(plain):
            raise Problem(f"{rest} tokens to draw, and {len(plain)} to draw from; give fewer virtual tokens or more words", ("most",))
        drawn = torch.randperm(len(plain))[:rest].tolist()
        table = model.get_input_embeddings().weight
        with torch.no_grad():
            start = torch.stack([table[some].mean(0) for some in [*ids, *([plain[index]] for index in drawn)]])
            wrapped: Any = wrap(model, config)
            wrapped.prompt_encoder[wrapped.active_adapter].embedding.weight.copy_(start)
        return wrapped
