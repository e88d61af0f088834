"""The sampler against transformers' own full passes and `generate`, its draws against exact distributions."""

from __future__ import annotations

import pytest
import torch
from peft import CPTConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, MambaConfig, MistralConfig

from temper.models.deltas import attach
from temper.models.deltas.delta import Lora
from temper.models.deltas.init import Pissa
from temper.models.sample import choose, own_stops, sample
from temper.parts import Problem


def prompts(count: int = 7, vocabulary: int = 64) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 14, (count,), generator=generator).tolist()
    return [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in lengths]


def full_pass(model, prompt, tokens):
    """Log-probabilities of `tokens` after `prompt` from one pass without cache or batch."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0].float()
    return logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(-1, torch.tensor(tokens)[:, None])[:, 0]


def others():
    """Models with other positions, biases, transposed weights, and a window shorter than the text."""
    torch.manual_seed(0)
    common = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
    yield GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **common)
    yield MistralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, sliding_window=5, **common
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0, 1.7])
def test_logprobs_are_those_of_a_full_pass(tiny, temperature):
    model = tiny()
    given = prompts()
    made = sample(model, given, max_new_tokens=9, temperature=temperature, seeds=range(len(given)), batch_size=4)
    for prompt, one in zip(given, made):
        assert 1 <= len(one.tokens) <= 9
        torch.testing.assert_close(torch.tensor(one.logprobs), full_pass(model, prompt, list(one.tokens)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("index", [0, 1])
def test_other_architectures(index):
    model = AutoModelForCausalLM.from_config(list(others())[index]).eval()
    given = prompts()
    for prompt, one in zip(given, sample(model, given, max_new_tokens=12, seeds=range(7), stop=(), batch_size=7)):
        torch.testing.assert_close(torch.tensor(one.logprobs), full_pass(model, prompt, list(one.tokens)), atol=1e-5, rtol=0)


def test_eager_attention_agrees(tiny):
    model = tiny(attn_implementation="eager")
    given = prompts()
    for prompt, one in zip(given, sample(model, given, max_new_tokens=6, seeds=range(7), stop=())):
        torch.testing.assert_close(torch.tensor(one.logprobs), full_pass(model, prompt, list(one.tokens)), atol=1e-5, rtol=0)


def test_greedy_is_generate(tiny):
    model = tiny()
    given = prompts(12)
    stops = sample(model, given, max_new_tokens=3, temperature=0, stop=())
    stop = stops[0].tokens[1]  # so that some rows end early and leave the batch
    made = sample(model, given, max_new_tokens=10, temperature=0, stop=(stop,), batch_size=5)
    assert any(one.finished for one in made)
    assert any(not one.finished for one in made)
    for prompt, one in zip(given, made):
        wanted = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False, max_new_tokens=10, eos_token_id=stop
        )[0, len(prompt) :].tolist()
        assert list(one.tokens) == wanted
        assert one.finished == (wanted[-1] == stop)


def test_a_prompt_does_not_see_its_neighbours(tiny):
    model = tiny()
    given, seeds = prompts(9), [11 * index for index in range(9)]
    together = sample(model, given, max_new_tokens=8, seeds=seeds, batch_size=9)
    backwards = sample(model, given[::-1], max_new_tokens=8, seeds=seeds[::-1], batch_size=2)[::-1]
    alone = [sample(model, [prompt], max_new_tokens=8, seeds=[seed])[0] for prompt, seed in zip(given, seeds)]
    assert [one.tokens for one in together] == [one.tokens for one in backwards] == [one.tokens for one in alone]
    longer = sample(model, given, max_new_tokens=12, seeds=seeds, stop=())
    shorter = sample(model, given, max_new_tokens=5, seeds=seeds, stop=())
    assert [one.tokens[:5] for one in longer] == [one.tokens for one in shorter]
    assert together == sample(model, given, max_new_tokens=8, seeds=seeds, batch_size=9)
    assert together != sample(model, given, max_new_tokens=8, seeds=[seed + 1 for seed in seeds], batch_size=9)


def test_equal_prompts_with_other_seeds_differ(tiny):
    model = tiny(initializer_range=0.05)
    made = sample(model, [[5, 6, 7]] * 6, max_new_tokens=8, seeds=range(6), stop=())
    assert len({one.tokens for one in made}) == 6
    assert made[3].tokens == sample(model, [[5, 6, 7]], max_new_tokens=8, seeds=[3], stop=())[0].tokens


def test_choose_follows_the_distribution():
    weights = torch.tensor([0.1, 0.4, 0.0, 0.2, 0.3])
    draws = torch.linspace(0, 1, 10_001, dtype=torch.float64)[:-1]
    logprobs = weights.log().expand(len(draws), 5)

    def shares(**cut):
        return torch.bincount(choose(logprobs, draws, **cut), minlength=5) / len(draws)

    torch.testing.assert_close(shares(), weights, atol=2e-4, rtol=0)
    torch.testing.assert_close(shares(temperature=0.5), weights**2 / (weights**2).sum(), atol=2e-4, rtol=0)
    torch.testing.assert_close(shares(top_k=2), torch.tensor([0, 4, 0, 0, 3]) / 7, atol=2e-4, rtol=0)
    torch.testing.assert_close(shares(top_p=0.71), torch.tensor([0, 4, 0, 2, 3]) / 9, atol=2e-4, rtol=0)
    torch.testing.assert_close(shares(top_p=0.69), torch.tensor([0, 4, 0, 0, 3]) / 7, atol=2e-4, rtol=0)
    # top_p is a share of what top_k left: 0.4 / 0.9 and 0.3 / 0.9
    torch.testing.assert_close(shares(top_k=3, top_p=0.7), torch.tensor([0, 4, 0, 0, 3]) / 7, atol=2e-4, rtol=0)


def test_the_last_draw_never_picks_an_impossible_token():
    logprobs = torch.tensor([[0.5, 0.5, 0.0]]).log()
    last = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert choose(logprobs, last).item() == 1


def test_finished_rows_end_with_a_stop(tiny):
    model = tiny(initializer_range=0.02)  # nearly uniform: stops come at random
    made = sample(model, [[4]] * 40, max_new_tokens=30, seeds=range(40), stop=(2, 9), batch_size=16)
    assert {one.finished for one in made} == {True, False}
    for one in made:
        assert one.finished == (one.tokens[-1] in (2, 9))
        assert not set(one.tokens[:-1]) & {2, 9}
        assert one.finished or len(one.tokens) == 30
    assert own_stops(model) == (2,)


def test_an_adapted_model_samples_as_its_full_pass(tiny):
    model = attach(tiny(), None, Lora(rank=4, dropout=0.5), Pissa(), seed=0)
    given = prompts()
    model.train()
    made = sample(model, given, max_new_tokens=6, seeds=range(7), stop=())
    assert model.training
    model.eval()
    for prompt, one in zip(given, made):
        torch.testing.assert_close(torch.tensor(one.logprobs), full_pass(model, prompt, list(one.tokens)), atol=1e-5, rtol=0)


def test_modes_come_back_as_they_were(tiny):
    model = tiny().train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    sample(model, [[4, 5]], max_new_tokens=2, temperature=0)
    assert before == {name: module.training for name, module in model.named_modules()}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seeds": None}, "sampling needs `seeds`, one for each prompt; temperature 0 needs none"),
        ({"seeds": [1]}, "1 seeds for 2 prompts; give one for each"),
        ({"temperature": -1.0}, "temperature is -1.0; it must be 0 (greedy) or above"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0 and at most 1, or None for no limit"),
        ({"top_k": 0}, "top_k is 0; it must be at least 1, or None for no limit"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
        (
            {"max_new_tokens": 63},
            "a prompt of 2 tokens and 63 new ones do not fit the model's 64 positions; shorten the prompt or ask for at most 62 tokens",
        ),
        ({"prompts": [[4, 5], []]}, "prompt 1 is empty; begin it with at least one token, such as the beginning-of-text token"),
    ],
)
def test_refusals(tiny, change, told):
    call = {"prompts": [[4, 5], [6]], "max_new_tokens": 4, "seeds": [1, 2], **change}
    with pytest.raises(Problem) as caught:
        sample(tiny(), **call)
    assert str(caught.value) == told


def test_models_that_the_cache_does_not_hold(tiny):
    mamba = AutoModelForCausalLM.from_config(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(Problem, match="the sampler's cache holds attention layers alone, and this model has linear_attention layers"):
        sample(mamba, [[4]], max_new_tokens=2, temperature=0)
    model = tiny()
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(Problem, match="and this model has linear_attention layers"):
        sample(model, [[4]], max_new_tokens=2, temperature=0)
    prompted = get_peft_model(tiny(), CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[3], cpt_mask=[1], cpt_tokens_type_mask=[1]))
    with pytest.raises(Problem, match="the virtual tokens of a CPT adapter"):
        sample(prompted, [[4]], max_new_tokens=2, temperature=0)


def test_nothing_to_do(tiny):
    assert sample(tiny(), [], max_new_tokens=3) == []
