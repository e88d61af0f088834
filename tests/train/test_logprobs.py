"""Log-probabilities and the causal objective against transformers and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model

from temper.train.batching import Padded, collate
from temper.train.logprobs import sequence_logprobs, supervised_logits, token_logprobs
from temper.train.objectives import Causal


def test_token_logprobs_by_hand():
    logits = torch.tensor([[[0.0, math.log(3.0)], [math.log(4.0), 0.0]]])
    assert token_logprobs(logits, torch.tensor([[1, 1]])).tolist() == [pytest.approx([math.log(3 / 4), math.log(1 / 5)])]


def test_chunked_equals_plain_in_float64():
    draw = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 7, 11, dtype=torch.float64, generator=draw)
    targets = torch.randint(0, 11, (3, 7), generator=draw)
    weights = torch.randn(3, 7, dtype=torch.float64, generator=draw)
    gradients, values = [], []
    for chunk in (None, 1, 4, 21, 100):
        own = logits.clone().requires_grad_()
        each = token_logprobs(own, targets, chunk=chunk)
        (each * weights).sum().backward()
        values.append(each.detach())
        gradients.append(own.grad)
    expected = torch.log_softmax(logits, -1).gather(-1, targets[..., None])[..., 0]
    for value, gradient in zip(values, gradients, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-12, atol=1e-12)


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


def test_sequence_logprobs_add_up_each_row(llama, examples):
    model, batch = llama().double(), batch_of(examples)
    sums = sequence_logprobs(model, batch)
    each = token_logprobs(model(**batch.inputs).logits[:, :-1], batch.input_ids[:, 1:])
    torch.testing.assert_close(sums, (each * batch.supervised[:, 1:]).sum(1), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(sequence_logprobs(model, batch, chunk=3), sums, rtol=1e-10, atol=1e-10)


def test_padding_changes_no_log_probability(llama, examples):
    model, made = llama().double(), examples(6)
    together = sequence_logprobs(model, collate(made))
    alone = torch.cat([sequence_logprobs(model, collate([one])) for one in made])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)
    batch = collate(made)
    batch.input_ids[batch.attention_mask == 0] = 77  # what stands in the padding does not matter either
    torch.testing.assert_close(sequence_logprobs(model, batch), together, rtol=0, atol=0)


def test_separate_packing_equals_documents_alone(llama, examples, stream):
    from temper.train.batching import Packed

    model, made = llama(max_position_embeddings=256).double(), examples(9)
    total = sum(map(len, made))
    (packed,) = Packed(length=total + 5, size=1, documents="separate")(made, stream).update(0)
    (plain,) = Padded(size=9)(made, stream).update(0)
    one, two = Causal()(model, packed), Causal()(model, plain)
    assert one.count == two.count == sum(example.targets for example in made)
    torch.testing.assert_close(one.total, two.total, rtol=1e-10, atol=1e-10)
