"""Where LoRA starts: each init against peft's on the same input, or against its paper's formula in float64."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, initialize_lora_eva_weights, set_peft_model_state_dict
from peft.tuners.lora.config import CordaConfig, EvaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.utils.incremental_pca import IncrementalPCA
from sklearn.decomposition import PCA
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from temper.context import Context
from temper.models.deltas import attach, merge, to_plain_lora
from temper.models.deltas.budget import ExplainedVariance
from temper.models.deltas.delta import Lora
from temper.models.deltas.init import Corda, Eva, LoraGa, Mica, Orthogonal, Pissa, Random, left_vectors, low_rank_layers
from temper.models.deltas.where import AllLinear, Names
from temper.models.statistics import Statistics
from temper.parts import Problem
from temper.train.batching import collate
from temper.train.examples import Example
from temper.train.objectives import Causal

UP, DOWN, QUERY = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj", "model.layers.1.self_attn.q_proj"


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.2,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def gpt():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, initializer_range=0.2)
    return AutoModelForCausalLM.from_config(config).eval()


def stretched(model, decay=0.75):
    """The model with weights and embeddings that have directions of very different length, as trained ones have."""
    with torch.no_grad():
        for name, one in model.named_parameters():
            if one.dim() == 2:
                u, s, v = torch.linalg.svd(one, full_matrices=False)
                one.copy_(u * s[0] * decay ** torch.arange(len(s)) @ v * (1 if "embed" in name else 2))
    return model


def batches(count=8, size=8):
    rng = torch.Generator().manual_seed(1)
    made = []
    for update in range(count):
        lengths = torch.randint(6, 25, (size,), generator=rng).tolist()
        some = [Example(torch.randint(0, 64, (one,), generator=rng).int().numpy(), torch.ones(one).bool().numpy(), 0) for one in lengths]
        made.append(collate(some, update))
    return made


@pytest.fixture
def inputs():
    return {"input_ids": torch.randint(0, 64, (3, 9), generator=torch.Generator().manual_seed(3))}


def context(tmp_path, model, names=None, general=True):
    made = Context.scratch(tmp_path)
    made.give("statistics", Statistics(model, lambda: names or AllLinear()(model), batches, Causal()))
    if general:
        made.give("general_statistics", Statistics(model, lambda: names or AllLinear()(model), lambda: batches()[4:], Causal()))
    return made


def put(tmp_path, init, model, *, delta=None, where=None, budget=None, seed=0):
    """The model with LoRA on it, as an engine puts it on."""
    delta, surroundings = delta or Lora(rank=4, alpha=6.0), context(tmp_path, model)
    live = init.start(surroundings) if hasattr(init, "start") else init
    if budget is None:
        return attach(model, where, delta, live, seed=seed)
    settle = budget.start(surroundings).settle
    return attach(model, where, delta, lambda plain, config, wrap: live(plain, settle(plain, config), wrap), seed=seed)


def layers(model):
    return {name.removeprefix("base_model.model."): layer for name, layer in low_rank_layers(model)}


def whole(layer):
    """What a layer's base and adapter make together, and what the adapter adds: [out, in]."""
    base = layer.get_base_layer().weight.detach()
    change = layer.get_delta_weight("default").detach()
    return (base + change, change) if not layer.fan_in_fan_out else ((base + change).T, change.T)


def weights(model):
    return {
        name: (one.weight.T if type(one).__name__ == "Conv1D" else one.weight).detach().clone()
        for name, one in model.named_modules()
        if hasattr(one, "weight")
    }


def close(actual, wanted, tolerance=1e-5):
    torch.testing.assert_close(actual, wanted.to(actual.dtype), atol=tolerance, rtol=tolerance)


def peft(model, kind, **more):
    """peft's own."""
    names = AllLinear()(model)
    config = LoraConfig(target_modules=names, r=4, lora_alpha=6, init_lora_weights=kind, fan_in_fan_out=False, **more)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        return config, get_peft_model(model, config)


UNCHANGED = [
    Pissa(),
    Pissa(part="bottom"),
    Pissa(part="random"),
    Pissa(iterations=4),
    Corda(),
    Corda(keep="bottom"),
    Eva(),
    LoraGa(),
    Orthogonal(),
    Mica(),
]
MOVING = (Pissa, Corda, LoraGa)


@pytest.mark.parametrize("init", UNCHANGED, ids=str)
@pytest.mark.parametrize("make", [llama, gpt])
def test_a_start_changes_nothing_and_is_saved_as_plain_lora(tmp_path, inputs, init, make):
    """W_res + scale B A = W; trained, what is saved gives on the untouched base what the model gives, and so does what is merged."""
    plain = make()
    before, names = weights(plain), AllLinear()(plain)
    with torch.no_grad():
        said = plain(**inputs).logits
    model = put(tmp_path, init, plain, delta=Lora(rank=4, alpha=6.0, rank_stabilized=True)).eval()
    assert set(layers(model)) == set(names)
    for name, layer in layers(model).items():
        close(whole(layer)[0], before[name])
    with torch.no_grad():
        close(model(**inputs).logits, said, 1e-4)
        for name, one in model.named_parameters():
            if one.requires_grad:
                one += 0.02 * torch.randn(one.shape, generator=torch.Generator().manual_seed(len(name)))
        trained = model(**inputs).logits
    assert (trained - said).abs().max() > 1e-2
    config, tensors = to_plain_lora(model)
    assert config.r == (8 if isinstance(init, MOVING) else 4)
    fresh = get_peft_model(make(), config)
    assert not set_peft_model_state_dict(fresh, tensors).unexpected_keys
    with torch.no_grad():
        close(fresh.eval()(**inputs).logits, trained, 1e-4)
        close(merge(model)(**inputs).logits, trained, 1e-4)


@pytest.mark.parametrize("make", [llama, gpt])
def test_pissa_as_peft_has_it(tmp_path, make):
    """Exact: the same adapter but for the signs of directions. With 16 iterations, of weights with a spectrum, too."""
    _, theirs = peft(make(), "pissa")
    ours, found = layers(put(tmp_path, Pissa(), make())), layers(theirs)
    for name, layer in found.items():
        close(whole(ours[name])[1], whole(layer)[1])
        close(ours[name].get_base_layer().weight, layer.get_base_layer().weight)
        for one in ("lora_A", "lora_B"):
            mine, its = (getattr(some, one)["default"].weight.detach() for some in (ours[name], layer))
            close((mine @ mine.T if one == "lora_A" else mine.T @ mine).diag(), (its @ its.T if one == "lora_A" else its.T @ its).diag())
    ours = layers(put(tmp_path, Pissa(iterations=16), stretched(make(), 0.5)))
    for name, layer in layers(peft(stretched(make(), 0.5), "pissa_niter_16")[1]).items():
        close(whole(ours[name])[1], whole(layer)[1], 1e-4)


@pytest.mark.parametrize("shape", [(24, 24), (40, 16), (16, 40)])
def test_parts_of_a_weight(shape):
    """Against a decomposition in float64; the random part is r of the directions, drawn anew from each seed."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    for part, some in (("top", slice(0, 3)), ("bottom", slice(-3, None))):
        found = left_vectors(weight, 3, part)
        close((found.T @ u[:, some]).abs(), torch.eye(3), 1e-8)
        a, b = Pissa(part=part)._factors("", weight, 3)
        close(b @ a, (u * s)[:, some] @ v[some])
        close(a.square().sum(1), s[some])
        close(b.square().sum(0), s[some])
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        near = (left_vectors(weight, 3, "random").T @ u).abs()
        close(near.sort(1)[0][:, :-1], torch.zeros(3, min(shape) - 1), 1e-8)
        drawn.append(near.argmax(1).tolist())
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(len(set(one)) == 3 for one in drawn)


@pytest.mark.parametrize("keep", ["top", "bottom"])
@pytest.mark.parametrize("make", [llama, gpt])
def test_corda_as_peft_has_it(tmp_path, make, keep):
    """From the same covariance the same base, and the same factors but for the signs of directions."""
    model, ours = make(), make()
    name = {"top": "statistics", "bottom": "general_statistics"}[keep]
    covariance = context(tmp_path, ours).want(name).ask("covariance", 256)()
    ours = layers(put(tmp_path, Corda(keep=keep), ours))
    names = AllLinear()(model)
    file = tmp_path / "cov" / "matrices.pt"
    file.parent.mkdir()
    torch.save(covariance, file)
    corda = CordaConfig(corda_method={"top": "ipm", "bottom": "kpm"}[keep], covariance_file=str(file))
    config = LoraConfig(target_modules=names, r=4, lora_alpha=6, init_lora_weights="corda", corda_config=corda)
    preprocess_corda(model, config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = layers(get_peft_model(model, config))
    for name, layer in theirs.items():
        close(whole(ours[name])[1], whole(layer)[1], 2e-4)
        close(ours[name].get_base_layer().weight, layer.get_base_layer().weight, 2e-4)
        signs = (ours[name].lora_B["default"].weight * layer.lora_B["default"].weight).sum(0).sign()
        close(ours[name].lora_B["default"].weight * signs, layer.lora_B["default"].weight, 5e-4)
        close(ours[name].lora_A["default"].weight * signs[:, None], layer.lora_A["default"].weight, 5e-4)


def test_corda_against_the_formula(tmp_path):
    """W (W C) (W C)^-1 by float64 with the inverse that the paper writes."""
    model = llama()
    weight = weights(model)[UP].double()
    c = context(tmp_path, model).want("statistics").ask("covariance", 256)()[UP].double()
    c = c + 0.01 * c.diagonal().mean() * torch.eye(len(c))
    u, s, v = torch.linalg.svd(weight @ c, full_matrices=False)
    layer = layers(put(tmp_path, Corda(), model))[UP]
    close(whole(layer)[1], u[:, :4] * s[:4] @ v[:4] @ torch.linalg.inv(c))
    close(layer.lora_B["default"].weight.square().sum(0), s[:4] / 1.5)


def test_corda_keeps_what_the_data_need(tmp_path):
    """What the base alone gets wrong of the outputs on the data is least without the smallest components, among all that are tried."""
    model = llama()
    weight, c = weights(model)[UP], context(tmp_path, model).want("general_statistics").ask("covariance", 256)()[UP]

    def lost(init):
        change = whole(layers(put(tmp_path, init, llama(), where=Names((UP,))))[UP])[1]
        return float((change @ c @ change.T).trace())

    bottom = lost(Corda(keep="bottom"))
    assert bottom < 0.2 * float((weight @ c @ weight.T).trace())
    assert bottom < min(lost(Pissa()), lost(Corda(keep="top")), lost(Pissa(part="random")), lost(Pissa(part="bottom")))


def real_inputs(name, model):
    """The inputs of a layer over all real tokens, float64 [n, in]."""
    seen = []
    for batch in batches():
        hook = model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, batch=batch: seen.append(args[0][batch.attention_mask.bool()])
        )
        with torch.no_grad():
            model(**batch.inputs)
        hook.remove()
    return torch.cat(seen).double()


def test_eva_is_the_decomposition_of_all_inputs(tmp_path):
    """Against scikit-learn's and peft's decomposition of every token's input: orthonormal rows, B = 0."""
    model = put(tmp_path, Eva(), llama())
    for name in (UP, DOWN, QUERY):
        x = real_inputs(name, llama())
        a, b = (getattr(layers(model)[name], one)["default"].weight.detach() for one in ("lora_A", "lora_B"))
        close(a @ a.T, torch.eye(4))
        assert (b == 0).all()
        exact = torch.from_numpy(PCA(4).fit(x.numpy()).components_)
        close((a.double() @ exact.T).abs().diag(), torch.ones(4), 1e-4)
        incremental = IncrementalPCA(n_components=32)
        for part in x.split(100):
            incremental.partial_fit(part)
        close((a.double() @ incremental.components_[:4].T.double()).abs().diag(), torch.ones(4), 1e-3)


def eva_by_peft(rho, model):
    """peft's on the same batches."""
    given = [dict(batch.inputs) for batch in batches()]
    config = LoraConfig(
        target_modules=AllLinear()(llama()), r=4, lora_alpha=6, init_lora_weights="eva", eva_config=EvaConfig(rho=rho, tau=0.999)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(model, config)
        initialize_lora_eva_weights(model, given, show_progress_bar=False)
    return model


def test_eva_as_peft_has_it(tmp_path):
    """peft stops when its directions have nearly stopped turning: it explains nearly as much of the variance, in nearly the same subspace
    where the next direction explains clearly less."""
    theirs, ours = layers(eva_by_peft(1.0, stretched(llama(), 0.5))), layers(put(tmp_path, Eva(), stretched(llama(), 0.5)))
    clear = 0
    for name, layer in theirs.items():
        mine, its = (one.lora_A["default"].weight.detach().double() for one in (ours[name], layer))
        covariance = torch.cov(real_inputs(name, stretched(llama(), 0.5)).T)
        values = torch.linalg.eigvalsh(covariance).flip(0)
        explained = [float((one @ covariance @ one.T).trace() / values[:4].sum()) for one in (mine, its)]
        assert explained[0] == pytest.approx(1, abs=1e-6)
        assert 0.98 < explained[1] <= 1 + 1e-6
        if values[3] > 2 * values[4]:
            clear += 1
            assert torch.linalg.svdvals(mine @ its.T).square().mean() > 0.99
    assert clear >= 5


@pytest.mark.parametrize("stabilized", [False, True])
def test_ranks_by_explained_variance(tmp_path, inputs, stabilized):
    """The largest shares over all layers, counted by hand in float64; as many ranks in all as before, at the scale of before."""
    delta = Lora(rank=4, alpha=6.0, rank_stabilized=stabilized)
    model = put(tmp_path, Eva(), stretched(llama()), delta=delta, budget=ExplainedVariance())
    found = {name: layer.r["default"] for name, layer in layers(model).items()}
    names = AllLinear()(stretched(llama()))
    shares = []
    for name in names:
        values = torch.linalg.eigvalsh(torch.cov(real_inputs(name, stretched(llama())).T, correction=0)).flip(0)
        shares += [(float(value / values.sum()), name) for value in values[:8]]
    kept = [name for _, name in sorted(shares, reverse=True)[: 4 * len(names)]]
    assert sum(found.values()) == 4 * len(names)
    assert max(found.values()) <= 8
    assert len(set(found.values())) > 2
    last = sorted(shares, reverse=True)[4 * len(names) - 1][
        0
    ]  # layers with the same inputs have equal shares: at the edge one has to stand back
    edge = {name for share, name in shares if abs(share - last) < 1e-6}
    for name in names:
        assert abs(found.get(name, 0) - kept.count(name)) <= (name in edge)
    assert {round(layer.scaling["default"], 5) for layer in layers(model).values()} == {3.0 if stabilized else 1.5}
    with torch.no_grad():
        close(model(**inputs).logits, stretched(llama())(**inputs).logits)
    if stabilized:  # peft keeps the scale of plain LoRA alone
        return
    theirs = {name: layer.r["default"] for name, layer in layers(eva_by_peft(2.0, stretched(llama()))).items()}
    assert sum(theirs.values()) == 4 * len(names)
    assert sum(abs(found.get(name, 0) - theirs.get(name, 0)) for name in names) <= 0.1 * 4 * len(names)


@pytest.mark.parametrize("init", [Pissa(), Corda()], ids=str)
def test_ranks_of_their_own_are_saved_as_plain_lora(tmp_path, inputs, init):
    """A share of the base moved into adapters of different ranks: what is saved has twice each of them."""
    model = put(tmp_path, init, llama(), budget=ExplainedVariance()).eval()
    with torch.no_grad():
        close(model(**inputs).logits, llama()(**inputs).logits, 1e-4)
        for name, one in model.named_parameters():
            if one.requires_grad:
                one += 0.02 * torch.randn(one.shape, generator=torch.Generator().manual_seed(len(name)))
        trained = model(**inputs).logits
    config, tensors = to_plain_lora(model)
    ranks = {name: layer.r["default"] for name, layer in layers(model).items()}
    fresh = get_peft_model(llama(), config)
    assert {name: layer.r["default"] for name, layer in layers(fresh).items()} == {name: 2 * rank for name, rank in ranks.items()}
    assert not set_peft_model_state_dict(fresh, tensors).unexpected_keys
    with torch.no_grad():
        close(fresh.eval()(**inputs).logits, trained, 1e-4)


def test_rho_1_leaves_all_ranks_equal(tmp_path):
    model = put(tmp_path, Eva(), llama(), budget=ExplainedVariance(rho=1.0))
    assert {layer.r["default"] for layer in layers(model).values()} == {4}
    assert model.peft_config["default"].rank_pattern == {}


def test_lora_ga_follows_the_gradient(tmp_path):
    """Algorithm 1 in float64: A spans the first r right directions of the gradient, B the next r left ones, both of length f."""
    model = llama()
    gradient = context(tmp_path, model).want("statistics").ask("gradient", 128)()
    model = put(tmp_path, LoraGa(gamma=9.0), model)
    for name in (UP, DOWN):
        layer = layers(model)[name]
        u, _, v = torch.linalg.svd(gradient[name].double(), full_matrices=False)
        a, b = layer.lora_A["default"].weight.detach().double(), layer.lora_B["default"].weight.detach().double()
        factor = len(u) ** 0.5 / 9.0
        close(a.T @ a, factor * v[:4].T @ v[:4], 1e-3)
        close(b @ b.T, factor * u[:, 4:8] @ u[:, 4:8].T, 1e-3)


@pytest.mark.parametrize(("init", "kind"), [(Random(), False), (Orthogonal(), "orthogonal"), (Mica(), "mica")])
def test_by_peft(tmp_path, init, kind):
    """The same numbers as peft's from the same seed."""
    ours = get_peft_model_state_dict(put(tmp_path, init, llama()))
    theirs = get_peft_model_state_dict(peft(llama(), kind)[1])
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    if kind == "mica":
        learning = [name for name, one in put(tmp_path, init, llama()).named_parameters() if one.requires_grad]
        assert learning
        assert all("lora_A" in name for name in learning)


@pytest.mark.parametrize(
    ("init", "delta", "told"),
    [
        (Orthogonal(), Lora(rank=3), "init `orthogonal` halves the rank, and 3 is odd; give rank 4"),
        (Mica(), Lora(dora=True), "init `mica` freezes B, which `dora` trains"),
        (LoraGa(), Lora(rank=9), r"init `lora-ga` finds 16 directions in `.*k_proj` \[16, 32\]; rank 9 needs 18"),
        (Corda(), Lora(rank=17), r"init `corda` finds 16 directions in `.*k_proj` \[16, 32\]; rank 17 is more"),
        (Eva(), Lora(rank=17), "init `eva` finds 16 directions"),
    ],
)
def test_refusals(tmp_path, init, delta, told):
    with pytest.raises(Problem, match=told):
        put(tmp_path, init, llama(), delta=delta)


def test_refusals_of_settings_and_gifts(tmp_path):
    with pytest.raises(ValueError, match="iterations 3 find the principal part; leave them out with `part: bottom`"):
        Pissa(part="bottom", iterations=3)
    with pytest.raises(Problem, match="`keep: bottom` preserves what general data need, and there are none"):
        Corda(keep="bottom").start(context(tmp_path, llama(), general=False))
    model = copy.deepcopy(llama())
    with pytest.raises(Problem, match=r"`explained-variance` looks at inputs of linear layers, and `model.embed_tokens` is none"):
        put(tmp_path, Random(), model, where=Names(("embed_tokens", "q_proj")), budget=ExplainedVariance())
