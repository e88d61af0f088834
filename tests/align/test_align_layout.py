from __future__ import annotations

import dataclasses
import re

import numpy
import pytest
import torch
import transformers
from align_toys import preferences, tiny
from peft import LoraConfig, get_peft_model

from temper.align import layout
from temper.align.layout import choose, layout_of, one_row, response_logprobs
from temper.context import Context
from temper.tasks.rows import Rows
from temper.train.batching import collate
from temper.train.examples import Example, encode
from temper.train.faster import faster

SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
WIDE = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2}
ATTENTION = {
    "llama": transformers.LlamaConfig(**WIDE),
    "llama-eager": transformers.LlamaConfig(**WIDE, attn_implementation="eager"),
    "qwen2": transformers.Qwen2Config(**WIDE),
    "gpt2": transformers.GPT2Config(**SMALL),
    "gemma2": transformers.Gemma2Config(**WIDE, head_dim=8, sliding_window=64, attn_implementation="eager"),
}


def made(config) -> transformers.PreTrainedModel:
    """In float64 throughout where attention is sdpa's; eager attention takes its softmax in float32."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for one in model.parameters():
            one.data.add_(0.2 * torch.randn_like(one))  # so that every place matters
    for parent in list(model.modules()):
        for name, norm in list(parent.named_children()):
            if type(norm).__name__ in ("LlamaRMSNorm", "Qwen2RMSNorm"):  # they compute in float32
                setattr(parent, name, torch.nn.RMSNorm(norm.weight.shape[0], norm.variance_epsilon))
    return model.double().eval()


def near(config) -> float:
    return 1e-5 if config._attn_implementation == "eager" else 1e-10


def pair(prompt: list[int], chosen: list[int], rejected: list[int], source: int = 0) -> list[Example]:
    sides = (("chosen", chosen), ("rejected", rejected))
    rows = [(side, numpy.array(prompt + answer, numpy.int32)) for side, answer in sides]
    return [Example(tokens, numpy.arange(len(tokens)) >= len(prompt), source, side) for side, tokens in rows]


def drawn(count: int = 5, prompt: int = 12, answer: int = 9, most: int = 16) -> list[Example]:
    """Pairs of many lengths; the last has no token in common, the one before differs in the middle of its prompt."""
    draw = numpy.random.default_rng(3)

    def some(limit: int) -> list[int]:
        return draw.integers(1, most, draw.integers(1, limit + 1)).tolist()

    examples = [one for source in range(count) for one in pair(some(prompt), some(answer), some(answer), source)]
    for source, place in ((count - 2, 1), (count - 1, 0)):
        chosen, rejected = pair([7, 8, 9, 10], [3, 3, 4], [5, 4], source)
        rejected.tokens[place] = 11
        examples[2 * source : 2 * source + 2] = [chosen, rejected]
    return examples


def both(model, batch):
    """Log-probabilities and gradients in two rows and in one; each token's gradient counts differently."""
    weights = torch.linspace(0.5, 1.5, batch.supervised.numel(), dtype=torch.float64).view(batch.supervised.shape)
    found = []
    for way in ("two rows", "one row"):
        model.zero_grad()
        each = response_logprobs(model, batch, way)
        (each * weights).sum().backward()
        found.append((each.detach(), {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}))
    return found


def test_a_row_by_hand():
    batch = collate([*pair([4, 5, 6], [7, 8], [9]), *pair([1, 2], [3], [3, 3])])
    row = one_row(batch)
    assert row.tokens.tolist() == [[8, 7, 4, 5, 6, 9], [1, 2, 3, 3, 0, 0]]
    assert row.positions.tolist() == [[4, 3, 0, 1, 2, 3], [0, 1, 2, 3, 4, 4]]
    sees = [[place.nonzero().flatten().tolist() for place in one] for one in row.seen]
    assert sees[0] == [[0, 1, 2, 3, 4], [1, 2, 3, 4], [2], [2, 3], [2, 3, 4], [2, 3, 4, 5]]
    assert sees[1] == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [], []]
    assert row.predicts.tolist() == [4, 1, 4, 6 + 1, 6 + 1, 6 + 2]


@pytest.mark.parametrize("name", ATTENTION)
def test_one_row_is_two_rows_in_float64(name):
    model, batch = made(ATTENTION[name]), collate(drawn())
    (two, slopes), (one, others) = both(model, batch)
    tiny = near(ATTENTION[name])
    torch.testing.assert_close(one, two, rtol=tiny, atol=tiny)
    assert torch.equal(one != 0, batch.supervised)
    assert slopes.keys() == others.keys()
    for key, slope in slopes.items():
        torch.testing.assert_close(others[key], slope, rtol=10 * tiny, atol=tiny)


def test_through_an_adapter_in_float64():
    model = get_peft_model(made(ATTENTION["llama"]), LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False))
    (two, slopes), (one, others) = both(model.double().eval(), collate(drawn()))
    torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)
    assert len(slopes) == 6
    for key, slope in slopes.items():
        torch.testing.assert_close(others[key], slope, rtol=1e-9, atol=1e-10)


def test_in_the_fused_layers():
    """Their formulas in float64, their kernels in float32, against the model's own layers in two rows."""
    model, batch = tiny(num_key_value_heads=2).double(), collate(drawn())
    (plain, _), _ = both(model, batch)
    with faster(model, device="cpu") as fused:
        (two, slopes), (one, others) = both(model, batch)
    assert fused
    torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)
    for key, slope in slopes.items():
        torch.testing.assert_close(others[key], slope, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(one, plain, rtol=1e-5, atol=1e-5)
    with faster(model.float(), device="cpu"):
        _, (short, less) = both(model, batch)
    torch.testing.assert_close(short, plain, rtol=1e-4, atol=1e-4, check_dtype=False)
    for key, slope in slopes.items():
        torch.testing.assert_close(less[key], slope, rtol=1e-3, atol=1e-4, check_dtype=False)


def test_the_mask_and_the_positions_are_what_makes_it_so(monkeypatch):
    model, batch = made(ATTENTION["llama"]), collate(drawn())
    right = one_row(batch)
    all_before = right.seen | right.seen.transpose(1, 2)
    in_order = torch.arange(right.tokens.shape[1]).expand_as(right.tokens)

    def apart(**changed) -> float:
        monkeypatch.setattr(layout, "one_row", lambda _: dataclasses.replace(right, **changed))
        two, one = (response_logprobs(model, batch, way) for way in ("two rows", "one row"))
        return (two - one).abs().max().item()

    with torch.no_grad():
        assert apart() < 1e-10
        assert apart(seen=torch.ones_like(right.seen)) > 0.1
        assert apart(seen=all_before) > 0.1
        assert apart(positions=in_order) > 0.1


def test_in_bf16_within_its_rounding():
    model, batch = made(ATTENTION["llama"]).float(), collate(drawn())
    with torch.no_grad():
        exact = response_logprobs(model, batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            two, one = (response_logprobs(model, batch, way) for way in ("two rows", "one row"))
    rounding = (two - exact).abs().max()
    assert 1e-3 < rounding < 0.5
    assert (one - exact).abs().max() < 1.5 * rounding


def test_what_both_learn_and_begin_with_stands_once():
    model, examples = made(ATTENTION["gpt2"]), pair([1, 2, 3, 4, 5, 6], [9, 10, 11, 12], [9, 10, 13])
    for one in examples:
        one.supervised[3:5] = True  # an earlier turn
    whole = [*pair([4, 5, 6], [7, 8], [7, 8, 9]), *pair([4], [5], [5])]  # one response is the other's beginning
    assert one_row(collate(examples)).tokens.shape == (1, 6 + 2 + 2 + 1)
    assert one_row(collate(whole)).tokens.shape == (2, 6)
    for batch in (collate(examples), collate(whole)):
        (two, slopes), (one, others) = both(model, batch)
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)
        assert torch.equal(one != 0, batch.supervised)
        for key, slope in slopes.items():
            torch.testing.assert_close(others[key], slope, rtol=1e-9, atol=1e-10)


# ------------------------------------------------------------------------------------------------------- the choice

OTHERS = {
    "state space": (transformers.MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, state_size=4), "does not take it"),
    "mixed": (
        transformers.JambaConfig(
            **WIDE, attn_layer_period=2, attn_layer_offset=1, num_experts=1, num_experts_per_tok=1, use_mamba_kernels=False
        ),
        "gives other log-probabilities",
    ),
    "alibi": (transformers.BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=4), "does not take it"),
    "window": (transformers.MistralConfig(**WIDE, sliding_window=8), "exceed the model's attention window of 8"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_models_that_read_from_left_to_right_take_two_rows(name):
    config, why = OTHERS[name]
    way, reason = choose(made(config).float(), drawn())
    assert way == "two rows"
    assert why in reason
    assert reason.startswith("one row a pair takes 0.")


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_takes_one_row(name):
    way, reason = choose(made(ATTENTION[name]).float(), drawn())
    assert way == "one row"
    assert reason.endswith("of the operations of two; the log-probabilities are the same")


def test_a_window_longer_than_the_rows_takes_one_row():
    assert choose(made(transformers.MistralConfig(**WIDE, sliding_window=48)).float(), drawn())[0] == "one row"


def test_work_is_counted():
    """16 tokens of prompt, 4 and 2 of answers: 20 + 18 places in two rows, 22 in one; their squares in attention."""
    model = tiny()
    linear = 2 * sum(one.numel() for one in model.model.layers.parameters()) + 2 * model.model.norm.weight.numel()
    attention = 4 * 2 * 32
    two, one = linear * 38 + attention * (20**2 + 18**2), linear * 22 + attention * 22**2
    examples = pair(list(range(16)), [1, 2, 3, 4], [5, 6])
    assert layout._gain(model, examples) == pytest.approx(two / one, rel=1e-12)
    assert layout._gain(model, examples * 2000) == pytest.approx(two / one, rel=1e-12)


def test_long_answers_to_no_prompt_take_two_rows():
    way, reason = choose(tiny(), pair([1], [2, 3] * 25, [4, 5] * 25))
    assert way == "two rows"
    assert re.fullmatch(r"one row a pair takes 1\.\d+ of the operations of two; 0\.91 is asked for", reason)


def test_chosen_once(tmp_path, tokenizer, llama):
    examples = encode(Rows("preference", preferences(), "toy", "a test"), tokenizer, max_length=64)
    context = Context.scratch(tmp_path)
    assert layout_of(llama, examples, context) == "one row"
    assert context.decisions()["pairs"]["value"] == "one row"
    assert layout_of(None, examples, context) == "one row"  # there is no model to try
