"""Log-probabilities and the causal objective against transformers and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import T5Config, T5ForConditionalGeneration

from temper.train.batching import Padded, collate
from temper.train.logprobs import (
    causal_loss,
    cross_entropy,
    linear_cross_entropy,
    linear_logprobs,
    logprobs_at,
    supervised_logits,
    supervised_logprobs,
    token_logprobs,
)
from temper.train.objectives import Causal


def test_token_logprobs_by_hand():
    logits = torch.tensor([[[0.0, math.log(3.0)], [math.log(4.0), 0.0]]])
    assert token_logprobs(logits, torch.tensor([[1, 1]])).tolist() == [pytest.approx([math.log(3 / 4), math.log(1 / 5)])]


def test_half_precision_logits_are_normalised_in_float32():
    logits = torch.randn(1, 5, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.arange(5)[None]
    assert token_logprobs(logits, targets).dtype == torch.float32
    torch.testing.assert_close(token_logprobs(logits, targets), token_logprobs(logits.float(), targets))


def batch_of(examples, **settings):
    return collate(examples(6, completion=True, **settings))


def full_logits(model, batch):
    logits = model(**batch.inputs).logits
    return logits[:, :-1][batch.supervised[:, 1:]]


def test_supervised_logits_are_those_of_a_full_pass(llama, examples):
    model, batch = llama().double(), batch_of(examples)
    logits, targets = supervised_logits(model, batch)
    torch.testing.assert_close(logits, full_logits(model, batch), rtol=1e-12, atol=1e-12)
    assert targets.tolist() == batch.input_ids[batch.supervised].tolist()
    assert len(targets) == batch.targets
    assert not model.lm_head._forward_pre_hooks


def test_what_a_model_does_after_its_output_layer_counts(examples):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    settings = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(vocab_size=128, head_dim=16, final_logit_softcapping=0.1, **settings)).double().eval()
    logits, _ = supervised_logits(model, batch_of(examples))
    torch.testing.assert_close(logits, full_logits(model, batch_of(examples)), rtol=1e-10, atol=1e-12)
    assert logits.abs().max() < 0.1


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]])
def test_supervised_logits_through_peft(llama, examples, targets):
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=targets, init_lora_weights=False)).double().eval()
    batch = batch_of(examples)
    logits, _ = supervised_logits(model, batch)
    torch.testing.assert_close(logits, full_logits(model, batch), rtol=1e-10, atol=1e-12)


def test_soft_prompts_stand_before_the_batch(llama, examples):
    from peft import PromptTuningConfig

    model = get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).double().eval()
    batch = batch_of(examples)
    full = model(**batch.inputs).logits[:, 3:]
    logits, _ = supervised_logits(model, batch)
    torch.testing.assert_close(logits, full[:, :-1][batch.supervised[:, 1:]], rtol=1e-10, atol=1e-12)


def test_a_model_without_an_output_layer_of_its_own_gives_all_logits(llama, examples):
    model, batch = llama().double(), batch_of(examples)
    expected, _ = supervised_logits(model, batch)
    model.get_output_embeddings = lambda: None
    logits, _ = supervised_logits(model, batch)
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)


def test_causal_equals_transformers_loss(llama, examples):
    model, batch = llama().double(), batch_of(examples)
    result = Causal()(model, batch)
    labels = batch.input_ids.masked_fill(~batch.supervised, -100)
    expected = model(**batch.inputs, labels=labels).loss
    torch.testing.assert_close(result.mean, expected.double(), rtol=1e-6, atol=1e-6)
    assert result.count == batch.targets


def test_padding_changes_no_log_probability(llama, examples):
    model, made = llama().double(), examples(6)
    batch = collate(made)
    together = supervised_logprobs(model, batch)
    alone = torch.cat([supervised_logprobs(model, collate([one])) for one in made])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)
    batch.input_ids[batch.attention_mask == 0] = 77  # what stands in the padding does not matter either
    torch.testing.assert_close(supervised_logprobs(model, batch), together, rtol=0, atol=0)


def test_separate_packing_equals_documents_alone(llama, examples, stream):
    from temper.train.batching import Packed

    model, made = llama(max_position_embeddings=256).double(), examples(9)
    total = sum(map(len, made))
    (packed,) = Packed(length=total + 5, size=1, documents="separate")(made, stream).update(0)
    (plain,) = Padded(size=9)(made, stream).update(0)
    one, two = Causal()(model, packed), Causal()(model, plain)
    assert one.count == two.count == sum(example.targets for example in made)
    torch.testing.assert_close(one.total, two.total, rtol=1e-10, atol=1e-10)


# -------------------------------------------------------------------------------------- without whole logits


@pytest.fixture
def widths(monkeypatch):
    """How many rows of logits were normalised at a time."""
    from temper.train.faster import ops

    seen, plain = [], ops.log_probabilities
    monkeypatch.setattr(ops, "log_probabilities", lambda logits, *rest: (seen.append(len(logits)), plain(logits, *rest))[1])
    return seen


def head(bias=True, count=75):
    draw = torch.Generator().manual_seed(1)
    hidden, weight, slopes = (torch.randn(*shape, dtype=torch.float64, generator=draw) for shape in ((count, 6), (50, 6), (count,)))
    targets = torch.randint(0, 50, (count,), generator=draw)
    return [hidden.requires_grad_(), weight.requires_grad_(), slopes[:50].clone().requires_grad_() if bias else None], targets, slopes


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("most", [2**25, 50 * 32, 1])
def test_a_linear_layer_s_log_probabilities(bias, most, widths):
    given, targets, slopes = head(bias)
    leaves = [one for one in given if one is not None]
    expected = token_logprobs(torch.nn.functional.linear(*given), targets)
    each = linear_logprobs(*given, targets, most=most)
    torch.testing.assert_close(each, expected, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad((one * slopes).sum(), leaves, retain_graph=True) for one in (each, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
    total = linear_cross_entropy(*given, targets, most=most)
    torch.testing.assert_close(total, -expected.sum(), rtol=1e-12, atol=1e-12)
    for factor in (1, -2):
        gradients = [torch.autograd.grad(factor * one, leaves, retain_graph=True) for one in (total, -expected.sum())]
        torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
    assert max(widths) == {2**25: 96, 50 * 32: 32, 1: 32}[most]
    assert sum(widths) == 3 * 96, "one pass forward and one backward for each, one pass for the sum"


@pytest.mark.parametrize("bias", [True, False])
def test_where_the_layer_stands_still_logits_are_computed_once(bias, widths):
    (hidden, *rest), targets, slopes = head(bias)
    given = [None if one is None else one.detach() for one in rest]
    expected = token_logprobs(torch.nn.functional.linear(hidden, *given), targets)
    each = linear_logprobs(hidden, *given, targets)
    torch.testing.assert_close(each, expected, rtol=1e-12, atol=1e-12)
    found = [torch.autograd.grad((one * slopes).sum(), [hidden]) for one in (each, expected)]
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
    assert widths == [96]
    with torch.no_grad():
        assert torch.equal(linear_logprobs(hidden, *given, targets), each)


def test_only_the_gradients_that_are_wanted(widths):
    (hidden, weight, _), targets, _ = head()
    (alone,) = torch.autograd.grad(linear_cross_entropy(hidden, weight.detach(), None, targets), [hidden])
    both = torch.autograd.grad(linear_cross_entropy(hidden, weight, None, targets), [hidden, weight])
    assert torch.equal(alone, both[0])
    with torch.no_grad():
        assert linear_cross_entropy(hidden, weight, None, targets).grad_fn is None
    none = linear_cross_entropy(hidden[:0], weight, None, targets[:0])
    assert none.item() == 0
    none.backward()


def losses(model, batch):
    """By all logits, by the sum, by each."""
    plain = token_logprobs(*supervised_logits(model, batch))
    return -plain.sum(), causal_loss(model, batch), -supervised_logprobs(model, batch).sum()


def agree(model, batch):
    leaves = [one for one in model.parameters() if one.requires_grad]
    found = [[loss, *torch.autograd.grad(loss, leaves, allow_unused=True)] for loss in losses(model, batch)]
    for one in found[1:]:
        for made, expected in zip(one, found[0], strict=True):
            assert (made is None) == (expected is None)
            if made is not None:
                torch.testing.assert_close(made, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_of_a_model_is_that_of_its_logits(tied, llama, examples, widths):
    model, batch = llama(tie_word_embeddings=tied).double(), batch_of(examples)
    agree(model, batch)
    assert sum(widths) > 0
    assert "forward" not in vars(model.lm_head)


@pytest.mark.parametrize("settings", [{"target_modules": ["q_proj"]}, {"target_modules": ["q_proj", "lm_head"]}])
def test_the_loss_through_peft(settings, llama, examples, widths):
    model = get_peft_model(llama(), LoraConfig(r=2, init_lora_weights=False, **settings)).double().eval()
    agree(model, batch_of(examples))
    assert bool(widths) == ("lm_head" not in settings["target_modules"]), "an adapter on the output layer makes it more than a linear one"


def test_the_loss_behind_soft_prompts(llama, examples, widths):
    from peft import PromptTuningConfig

    agree(get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).double().eval(), batch_of(examples))
    assert widths


def test_the_loss_of_a_model_that_goes_on_after_its_output_layer(examples, widths):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    settings = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(vocab_size=128, head_dim=16, final_logit_softcapping=0.1, **settings)).double()
    agree(model, batch_of(examples))
    assert not widths


def test_an_output_layer_that_somebody_listens_to(llama, examples, widths):
    model, heard = llama().double(), []
    model.lm_head.register_forward_hook(lambda _, __, out: heard.append(out.shape))
    batch = batch_of(examples)
    causal_loss(model, batch)
    assert heard == [(1, batch.targets, 128)]
    assert not widths


def test_trying_the_output_layer_draws_nothing(llama, examples):
    model = llama(attention_dropout=0.5).double().train()
    batch = batch_of(examples)
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(causal_loss(model, batch).item())
    assert found[0] == found[1], "the first one tries, the second knows"


def test_places_by_number(llama, examples):
    model, batch = llama().double(), batch_of(examples)
    places = torch.zeros_like(batch.supervised)
    places[:, 1:3] = True
    targets = batch.input_ids[places]
    by_mask = logprobs_at(model, batch.inputs, places, targets)
    torch.testing.assert_close(logprobs_at(model, batch.inputs, places.flatten().nonzero()[:, 0], targets), by_mask)
    torch.testing.assert_close(cross_entropy(model, batch.inputs, places, targets), -by_mask.sum())


def test_in_bf16_it_strays_no_further_than_logits_do(llama, examples):
    model, batch = llama(), batch_of(examples)
    exact = torch.autograd.grad(causal_loss(model, batch), list(model.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        plain, *fused = losses(model, batch)
    apart = []
    for loss in (plain, *fused):
        found = torch.autograd.grad(loss, list(model.parameters()))
        apart.append(sum((one - two).square().sum() for one, two in zip(found, exact, strict=True)))
    assert max(apart[1:]) < 1.2 * apart[0]


@pytest.mark.parametrize("written", [3, 9])
def test_an_encoder_decoder_s_places_are_those_it_writes(written, widths):
    config = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 32, "decoder_start_token_id": 0}
    torch.manual_seed(0)
    model, draw = T5ForConditionalGeneration(T5Config(**config)).double().eval(), torch.Generator().manual_seed(0)
    inputs = {name: torch.randint(1, 32, (2, n), generator=draw) for name, n in (("input_ids", 5), ("decoder_input_ids", written))}
    places = torch.rand(2, written, generator=draw) < 0.6
    targets = torch.randint(0, 32, (int(places.sum()),), generator=draw)
    expected = token_logprobs(model(**inputs).logits[places], targets)
    torch.testing.assert_close(logprobs_at(model, inputs, places, targets), expected, rtol=1e-10, atol=1e-10)
    assert widths, "its logits are never whole"
    model.lm_head.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(logprobs_at(model, inputs, places, targets), expected, rtol=1e-10, atol=1e-10)
