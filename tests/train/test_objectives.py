"""Objectives against the models' own losses in transformers, against documents alone, and against themselves cut otherwise."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM, T5Config
from transformers import T5ForConditionalGeneration as Translator

from temper.context import Context
from temper.parts import LiveSlot, Problem, fill
from temper.pretrain.tokenizer import ByteBPE
from temper.tasks.rows import Rows
from temper.train.batching import Batch, Bucketed, Packed, collate
from temper.train.examples import Example, encode
from temper.train.objectives import Causal, FillMiddle, Masked, Objective, Prefix, SpanMixture, Sum, check
from temper.train.objectives.attention import check_mask, full_mask

TEXTS = [f"def f{n}(first, lást):\n    return {n * n} + 2024  # {'and so on ' * (n % 4)}" for n in range(14)]
TOKENS = ByteBPE(vocabulary=430, reserve=("mask", "spans", "middle"), sentinels=30)(TEXTS)
BEGIN, END = TOKENS.bos_token_id, TOKENS.eos_token_id
BEFORE, AFTER, WITHIN = TOKENS.convert_tokens_to_ids(["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"])
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 256}


def drawn(cls: Any, config: Any) -> Any:
    """A model in float64, the same every time, with weights large enough to matter."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return cls(config).double().eval()


def llama(**settings: Any) -> Any:
    return drawn(LlamaForCausalLM, LlamaConfig(vocab_size=len(TOKENS), initializer_range=0.2, **{**SIZES, **settings}))


def bert(**settings: Any) -> Any:
    return drawn(BertForMaskedLM, BertConfig(vocab_size=len(TOKENS), initializer_range=0.2, **{**SIZES, **settings}))


def t5() -> Any:
    config = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 2, "pad_token_id": 2}
    return drawn(Translator, T5Config(vocab_size=len(TOKENS), **config))


MODELS: dict[str, Callable[[], Any]] = {"causal": llama, "masked": bert, "encoder-decoder": t5}
PARTS = [Causal(), Masked(), Prefix(), SpanMixture(), FillMiddle()]
EACH = [pytest.param(one, kind, id=f"{type(one).__name__} {kind}") for one in PARTS for kind in type(one).families]


@pytest.fixture
def started(tmp_path: Path) -> Callable[..., Any]:
    """Starts a part, or several as one, on a model."""

    def start(part: Any, model: Any, tokenizer: Any = TOKENS, seed: int = 0, context: Context | None = None) -> Any:
        context = context or Context.scratch(tmp_path, seed)
        context.give("model", model)
        context.give("tokenizer", tokenizer)
        return LiveSlot("objective", part, Objective.__slot__, context.at("objective"))  # type: ignore[attr-defined]

    return start


def texts(count: int = 14) -> list[Example]:
    return encode(Rows("text", [{"text": one} for one in TEXTS[:count]], "texts", "a test"), TOKENS, max_length=None)


def completions(count: int = 8) -> list[Example]:
    rows = [{"prompt": one[:12], "completion": one[12:]} for one in TEXTS[:count]]
    return encode(Rows("completion", rows, "completions", "a test"), TOKENS, max_length=None)


def packed(stream: Any, documents: Any, length: int = 70, size: int = 3) -> Batch:
    return Packed(length=length, size=size, documents=documents)(texts(), stream).update(0)[0]


def alone(batch: Batch) -> list[tuple[int, slice]]:
    """Where each document of a batch that has a target stands: its row, and its places there."""
    found = []
    for row in range(len(batch.input_ids)):
        length = len(batch.input_ids[row]) if batch.attention_mask is None else int(batch.attention_mask[row].sum())
        starts = [0] if batch.position_ids is None else (batch.position_ids[row] == 0).nonzero().flatten().tolist()
        found += [(row, slice(start, end)) for start, end in zip(starts, [*starts[1:], length]) if batch.supervised[row, start:end].any()]
    return found


def own_loss(model: Any, ids: Sequence[int], labels: Sequence[int]) -> torch.Tensor:
    """The loss that transformers computes for one sequence, as a sum over its labels; -100 is none.

    Of a causal model from its logits, for its own loss is in float32.
    """
    wanted = torch.tensor([labels])
    if (wanted == -100).all():
        return torch.zeros((), dtype=torch.float64)
    if isinstance(model, LlamaForCausalLM):
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
        return torch.nn.functional.cross_entropy(logits, wanted[0, 1:], reduction="sum", ignore_index=-100).detach()
    return model(input_ids=torch.tensor([ids]), labels=wanted).loss.detach() * (wanted != -100).sum()


def close(one: Any, two: Any, tolerance: float = 1e-9) -> bool:
    return torch.allclose(torch.as_tensor(one), torch.as_tensor(two), rtol=tolerance, atol=0)


# --------------------------------------------------------------------------------------------- what holds for each


@pytest.mark.parametrize(("part", "kind"), EACH)
def test_micro_batches_add_up(part: Any, kind: str, started):
    """However an update is cut, its loss and its gradient are the same: draws belong to rows."""
    model, examples = MODELS[kind](), texts(6)
    objective = started(part, model)
    whole = objective(model, collate(examples, 3))
    pieces = [objective(model, collate(examples[at : at + 2], 3, range(at, at + 2))) for at in (4, 0, 2)]
    assert whole.count == sum(one.count for one in pieces)
    assert close(whole.total.detach(), sum(one.total.detach() for one in pieces))
    weights = list(model.parameters())
    one = torch.autograd.grad(whole.total, weights, allow_unused=True)
    two = torch.autograd.grad(sum(one.total for one in pieces), weights, allow_unused=True)
    for first, second in zip(one, two):
        assert (first is None and second is None) or torch.allclose(first, second, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("part", "kind"), EACH)
@pytest.mark.parametrize("layout", ["packed", "flat"])
def test_a_layout_changes_nothing(part: Any, kind: str, layout: Any, started, stream):
    """Examples side by side draw what they draw each in a row of its own; rows may be longer than what the model takes."""
    model = MODELS[kind]()
    objective, examples = started(part, model), [*texts(), *completions(4)]
    losses = []
    for one in ("rows", layout):
        batches = Bucketed(size=12, tokens=400, layout=one)(examples, stream).update(1)
        found = [objective(model, batch) for batch in batches]
        losses.append((sum(each.total.detach() for each in found), sum(each.count for each in found)))
    assert losses[0][1] == losses[1][1]
    assert close(losses[0][0], losses[1][0])


@pytest.mark.parametrize(("part", "kind"), EACH)
@pytest.mark.parametrize("content", [0, 77])
def test_padding_changes_nothing(part: Any, kind: str, content: int, started):
    model, batch = MODELS[kind](), collate(texts(5), 1)
    objective = started(part, model)
    hidden = batch.attention_mask == 0
    more = {name: torch.nn.functional.pad(getattr(batch, name), (0, 9)) for name in ("input_ids", "supervised", "attention_mask")}
    more["input_ids"] = more["input_ids"].masked_fill(torch.nn.functional.pad(hidden, (0, 9), value=True), content)
    one, two = objective(model, batch), objective(model, dataclasses.replace(batch, **more))
    assert one.count == two.count
    assert close(one.total.detach(), two.total.detach())


@pytest.mark.parametrize(("part", "kind"), [one for one in EACH if not isinstance(one.values[0], Causal)])
def test_draws_belong_to_the_update_the_row_and_the_seed(part: Any, kind: str, started):
    model, examples = MODELS[kind](), texts(4)
    objective = started(part, model)

    def loss(objective: Any = objective, **changes: Any) -> float:
        return float(objective(model, dataclasses.replace(collate(examples), **changes)).total.detach())

    assert loss() == loss(started(part, model))
    assert len({loss(), loss(update=1), loss(keys=[4, 5, 6, 7]), loss(started(part, model, seed=1))}) == 4


@pytest.mark.parametrize(("part", "kind"), EACH)
def test_rows_without_a_target_cost_nothing(part: Any, kind: str, started):
    model, batch = MODELS[kind](), collate(texts(3))
    nothing = dataclasses.replace(batch, supervised=torch.zeros_like(batch.supervised), targets=0)
    found = started(part, model)(model, nothing)
    assert (float(found.total), found.count) == (0.0, 0)
    found.total.backward()


# ------------------------------------------------------------------------------------------------------------- causal


@pytest.mark.parametrize("documents", ["joined", "separate"])
def test_causal_is_the_models_own_loss(documents: Any, started, stream):
    model, batch = llama(), packed(stream, documents)
    wanted = []
    for row, places in alone(batch):
        ids, flags = batch.input_ids[row, places], batch.supervised[row, places]
        wanted.append(own_loss(model, ids.tolist(), torch.where(flags, ids, -100).tolist()))
    found = started(Causal(), model)(model, batch)
    assert close(found.total.detach(), sum(wanted))


# ------------------------------------------------------------------------------------------------------------- masked


def both_sides(model: Any) -> Any:
    """The same decoder, made to see both sides by transformers itself."""
    other = llama(is_causal=False)
    for layer in other.model.layers:
        layer.self_attn.is_causal = False
    other.load_state_dict(model.state_dict())
    return other


ATTENTION = pytest.mark.parametrize(("attention", "tolerance"), [("sdpa", 1e-9), ("eager", 1e-5)])
"""Eager attention has its softmax in float32."""


@pytest.mark.parametrize("documents", ["joined", "separate", "padded"])
@pytest.mark.parametrize("kind", ["masked", "causal"])
@ATTENTION
def test_masked_is_the_models_own_loss(kind: str, documents: Any, attention: str, tolerance: float, started, stream):
    """Document by document with the labels that transformers takes: nothing is shifted, nothing crosses."""
    model = {"masked": bert, "causal": llama}[kind](attn_implementation=attention)
    batch = collate(texts(5)) if documents == "padded" else packed(stream, documents)
    objective, reference = started(Masked(rate=0.4), model), model if kind == "masked" else both_sides(model)
    tokens, picked = objective.corrupt(batch)
    wanted = []
    for row, places in alone(batch):
        labels = torch.where(picked, batch.input_ids, -100)[row, places]
        if kind == "masked":
            wanted.append(own_loss(reference, tokens[row, places].tolist(), labels.tolist()))
        else:
            logits = reference(input_ids=tokens[row, places][None]).logits[0]
            wanted.append(torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100).detach())
    found = objective(model, batch)
    assert found.count == picked.sum() > 3
    assert close(found.total.detach(), sum(wanted), tolerance)


def test_masked_hides_supervised_words_alone(started):
    objective, batch = started(Masked(rate=1.0, masked=1.0, swapped=0.0), bert()), collate(completions())
    tokens, picked = objective.corrupt(batch)
    special = torch.isin(batch.input_ids, torch.tensor([BEGIN, END, TOKENS.pad_token_id]))
    assert torch.equal(picked, batch.supervised & ~special)
    assert torch.equal(tokens, torch.where(picked, TOKENS.mask_token_id, batch.input_ids))


def test_masked_predicts_its_share(started):
    objective, batch = started(Masked(), bert()), collate(texts())
    able = (batch.supervised & (batch.input_ids != END)).sum(1)
    _, picked = objective.corrupt(batch)
    assert picked.sum(1).tolist() == [round(0.15 * int(one)) for one in able]


def test_masked_takes_another_token(started):
    tokens, picked = started(Masked(token="<|user|>", masked=1.0, swapped=0.0), llama(), ByteBPE(vocabulary=430)(TEXTS)).corrupt(
        collate(texts(2))
    )
    assert (tokens[picked] == TOKENS.convert_tokens_to_ids("<|user|>")).all()


# ------------------------------------------------------------------------------------------------------------- prefix


@pytest.mark.parametrize("source", ["joined", "separate", "texts", "completions"])
@ATTENTION
def test_prefix_sees_itself(source: str, attention: str, tolerance: float, started, stream):
    """Document by document under a mask written out place by place."""
    model = llama(attn_implementation=attention)
    given = {"texts": lambda: collate(texts(5)), "completions": lambda: collate(completions())}
    batch = given.get(source, lambda: packed(stream, source))()
    objective, plain = started(Prefix(), model), llama()
    drawn = {(row, places.start): length for row, places, length in objective.draw(batch)}
    wanted, count = torch.zeros((), dtype=torch.float64), 0
    for row, places in alone(batch):
        ids, flags = batch.input_ids[row, places], batch.supervised[row, places]
        prefix = drawn.get((row, places.start), len(ids))
        seen = [[j <= i or (i < prefix and j < prefix) for j in range(len(ids))] for i in range(len(ids))]
        mask = torch.tensor(seen)[None, None]
        logits = plain(input_ids=ids[None], attention_mask=mask).logits[0].log_softmax(-1).detach()
        for place in range(prefix, len(ids)):
            if flags[place]:
                wanted, count = wanted - logits[place - 1, ids[place]], count + 1
    found = objective(model, batch)
    assert found.count == count > 0
    assert close(found.total.detach(), wanted, tolerance)


def test_a_prompt_is_the_prefix(started):
    batch = collate(completions())
    drawn = started(Prefix(), llama()).draw(batch)
    assert [length for _, _, length in drawn] == batch.supervised.int().argmax(1).tolist()
    objective = started(Prefix(), llama())
    lengths = {objective.draw(collate(texts(1), update))[0][2] for update in range(300)}
    assert lengths == set(range(1, len(texts(1)[0])))


def test_an_encoder_decoder_reads_the_prefix_and_writes_the_rest(started):
    model, batch = t5(), collate([*completions(4), *texts(3)])
    objective = started(Prefix(), model)
    wanted = []
    for row, places, length in objective.draw(batch):
        ids = batch.input_ids[row, places].tolist()
        wanted.append(own_loss(model, [*ids[:length], END], ids[length:]))
    assert close(objective(model, batch).total.detach(), sum(wanted))


# ------------------------------------------------------------------------------------------------------- span mixture


def parts_of(pair: Any) -> tuple[str, list[int], list[int]]:
    """The mode, the input without it and its beginning and end, the targets without their end."""
    ids, (targets, flags) = pair
    assert all(flags)
    ids = ids[1:] if ids[0] == BEGIN else ids
    return TOKENS.decode(ids[:1]), [one for one in ids[1:] if one != END], [one for one in targets if one != END]


@pytest.mark.parametrize("kind", ["encoder-decoder", "causal"])
def test_input_and_targets_rebuild_the_text(kind: str, started):
    objective = started(SpanMixture(), MODELS[kind]())
    sentinels = {TOKENS.convert_tokens_to_ids(f"<extra_id_{number}>"): number for number in range(30)}
    modes = collections.Counter()
    for update in range(40):
        for example, (pair,) in zip(texts(), objective.corrupt(collate(texts(), update)), strict=True):
            mode, ids, targets = parts_of(pair)
            modes[mode] += 1
            spans: dict[int, list[int]] = {}
            for token in targets:
                if token in sentinels:
                    spans[token] = []
                elif mode != "[S]":
                    spans[next(reversed(spans))].append(token)
            assert list(map(sentinels.get, spans)) == list(range(len(spans)))
            whole = [token for one in ids for token in spans.get(one, [one])] + (targets if mode == "[S]" else [])
            assert whole == example.tokens.tolist()[1:-1]
    assert set(modes) == {"[R]", "[S]", "[X]"}


def test_denoisers_are_drawn_as_often_as_they_should(started):
    """10,000 documents: the shares of R, S and X, and in each the share of tokens lifted out and the mean span."""
    part = SpanMixture(r=((3.0, 0.15),), x=((4.0, 0.5),), s=0.25)
    objective = started(part, t5())
    example = Example(torch.tensor([BEGIN, *range(300, 380), END]).numpy(), torch.tensor([False] + [True] * 81).numpy(), 0)
    batch, lost, spans, times = collate([example] * 100), collections.Counter(), collections.Counter(), collections.Counter()
    for update in range(100):
        for (pair,) in objective.corrupt(dataclasses.replace(batch, update=update)):
            mode, _, targets = parts_of(pair)
            count = sum(token < 300 and token > 0 for token in targets)
            times[mode], spans[mode], lost[mode] = times[mode] + 1, spans[mode] + count, lost[mode] + len(targets) - count
    assert sum(times.values()) == 10_000
    assert all(abs(times[mode] - 3333) < 5 * (10_000 / 3 * 2 / 3) ** 0.5 for mode in times)
    shares = {mode: lost[mode] / times[mode] / 80 for mode in times}
    assert shares == pytest.approx({"[R]": 0.15, "[S]": 0.25, "[X]": 0.5}, rel=0.02)
    assert lost["[R]"] / spans["[R]"] == pytest.approx(3, rel=0.02)
    assert lost["[X]"] / spans["[X]"] == pytest.approx(4, rel=0.02)
    weighted = started(dataclasses.replace(part, weights=(6.0, 1.0, 3.0)), t5())
    chances = {part_mode: float(one) for (part_mode, _), one in zip(weighted.denoisers, weighted.chances)}
    assert chances == pytest.approx({0: 6.0, 1: 1.0, 2: 3.0})


@pytest.mark.parametrize("documents", ["joined", "separate", "padded"])
def test_span_mixture_is_t5s_own_loss(documents: Any, started, stream):
    model = t5()
    batch = collate(texts(6)) if documents == "padded" else packed(stream, documents)
    objective = started(SpanMixture(), model)
    pairs = [pair for row in objective.corrupt(batch) for pair in row]
    wanted = sum(own_loss(model, ids, targets) for ids, (targets, _) in pairs)
    found = objective(model, batch)
    assert found.count == sum(len(targets) for _, (targets, _) in pairs)
    assert close(found.total.detach(), wanted)
    assert all(ids[-1] == targets[-1] == END for ids, (targets, _) in pairs if parts_of((ids, (targets, [1])))[0] != "[S]")


@pytest.mark.parametrize("documents", ["joined", "separate", "padded"])
def test_a_decoder_is_taught_the_targets_alone(documents: Any, started, stream):
    model = llama()
    batch = collate(texts(6)) if documents == "padded" else packed(stream, documents)
    objective = started(SpanMixture(), model)
    pairs = [pair for row in objective.corrupt(batch) for pair in row]
    wanted = sum(own_loss(model, [*ids, *targets], [*[-100] * len(ids), *targets]) for ids, (targets, _) in pairs)
    found = objective(model, batch)
    assert found.count == sum(len(targets) for _, (targets, _) in pairs)
    assert close(found.total.detach(), wanted)


def test_prompts_stay_whole(started):
    objective, batch = started(SpanMixture(), t5()), collate(completions())
    for row, ((ids, _),) in enumerate(objective.corrupt(batch)):
        prompt = batch.input_ids[row, : int(batch.supervised[row].int().argmax())].tolist()
        assert [ids[0], *ids[2 : 1 + len(prompt)]] == prompt


def test_what_does_not_fit_is_cut_off_the_document(started, tmp_path):
    context = Context.scratch(tmp_path)
    model, batch = llama(max_position_embeddings=40), collate(texts(8))
    objective = started(SpanMixture(), model, context=context)
    for update in range(20):
        rows = objective.corrupt(dataclasses.replace(batch, update=update))
        assert all(len(ids) + len(targets) <= 40 for row in rows for ids, (targets, _) in row)
        for example, row in zip(texts(8), rows):
            kept = {token for ids, (targets, _) in row for token in [*ids, *targets]} & set(range(150, 430))
            assert kept <= set(example.tokens.tolist())
    objective(model, batch)
    assert "`span-mixture` cuts off the end of documents that with their targets exceed the model's 40 tokens" in context.notes


# ---------------------------------------------------------------------------------------------------- fill in the middle


def restored(ids: list[int]) -> tuple[str, list[int]]:
    """How a document was rearranged, and its tokens in their first order, without begin and end."""
    ids = [one for one in ids if one not in (BEGIN, END)]
    if BEFORE not in ids:
        return "as it was", ids
    assert ids[0] == BEFORE
    after, within = ids.index(AFTER), ids.index(WITHIN)
    if after == 1:
        return "SPM", [*ids[within + 1 :], *ids[after + 1 : within]]
    return "PSM", [*ids[1:after], *ids[within + 1 :], *ids[after + 1 : within]]


@pytest.mark.parametrize("split", ["characters", "tokens"])
def test_a_middle_is_moved_and_nothing_lost(split: Any, started):
    objective, found = started(FillMiddle(rate=0.75, suffix_first=0.4, split=split), llama()), collections.Counter()
    within_a_token = 0
    for update in range(60):
        made = objective.corrupt(collate(texts(), update))
        for example, (row, places) in zip(texts(), alone(made), strict=True):
            ids = made.input_ids[row, places].tolist()
            assert (ids[0], ids[-1]) == (BEGIN, END)
            order, words = restored(ids)
            found[order] += 1
            assert TOKENS.decode(words) == TEXTS[example.source]
            if split == "tokens":
                assert words == example.tokens.tolist()[1:-1]
            within_a_token += words != example.tokens.tolist()[1:-1]
    assert (within_a_token > 0) == (split == "characters")
    assert sum(found.values()) == 840
    for order, share in (("as it was", 0.25), ("SPM", 0.3), ("PSM", 0.45)):
        assert abs(found[order] - 840 * share) < 4 * (840 * share * (1 - share)) ** 0.5


@pytest.mark.parametrize("documents", ["joined", "separate", "padded"])
def test_fill_middle_learns_every_token(documents: Any, started, stream):
    model = llama()
    batch = collate(texts(6)) if documents == "padded" else packed(stream, documents)
    objective = started(FillMiddle(rate=1.0), model)
    made = objective.corrupt(batch)
    wanted = sum(own_loss(model, ids := made.input_ids[row, places].tolist(), ids) for row, places in alone(made))
    found = objective(model, batch)
    assert found.count == made.targets == sum(places.stop - places.start - 1 for _, places in alone(made))
    assert close(found.total.detach(), wanted)
    documents = sum(int((batch.input_ids[row, places][:-1] == END).sum()) + 1 for row, places in alone(batch))
    assert abs(documents - int((made.input_ids == WITHIN).sum())) <= 3  # one with nothing but its begin token has no middle


def test_documents_in_a_joined_row_are_rearranged_apart(started, stream):
    batch = packed(stream, "joined", 200, 2)
    made = started(FillMiddle(rate=1.0, split="tokens"), llama(max_position_embeddings=512)).corrupt(batch)

    def apart(ids: list[int]) -> list[list[int]]:
        edges = [0, *(place + 1 for place, one in enumerate(ids) if one == END), len(ids)]
        return [restored(ids[start:end])[1] for start, end in itertools.pairwise(edges) if end > start]

    for row in range(2):
        one, two = (some.input_ids[row, some.attention_mask[row] > 0].tolist() for some in (made, batch))
        assert apart(one) == apart(two)
    assert torch.equal(made.supervised, (made.attention_mask > 0) & (torch.arange(made.supervised.shape[1]) > 0))


def test_rows_never_exceed_what_the_model_takes(started, tmp_path):
    context = Context.scratch(tmp_path)
    objective, batch = started(FillMiddle(rate=1.0, split="tokens"), llama(max_position_embeddings=30), context=context), collate(texts(8))
    free = started(FillMiddle(rate=1.0, split="tokens"), llama()).corrupt(batch)
    made = objective.corrupt(batch)
    assert free.input_ids.shape[1] > 30
    assert torch.equal(made.input_ids, free.input_ids[:, :30])
    assert torch.equal(made.supervised, free.supervised[:, :30])
    assert made.targets == made.supervised.sum()
    assert "`fill-middle` cuts off the end of what its marks make longer than the 30 tokens that the model takes" in context.notes


def test_documents_with_a_prompt_stay_as_they_are(started, tmp_path):
    context, batch = Context.scratch(tmp_path), collate(completions())
    made = started(FillMiddle(rate=1.0), llama(), context=context).corrupt(batch)
    assert torch.equal(made.input_ids, batch.input_ids)
    assert torch.equal(made.supervised, batch.supervised)
    assert "`fill-middle` leaves documents with an unsupervised prompt as they are" in context.notes


def test_broken_characters_are_cut_between_tokens(started):
    """A document that begins within a character: its bytes must not become replacement characters."""
    ids = TOKENS("á und so weiter", add_special_tokens=False)["input_ids"][1:]
    assert "\ufffd" in TOKENS.decode(ids)
    example = Example(torch.tensor(ids, dtype=torch.int32).numpy(), torch.ones(len(ids), dtype=torch.bool).numpy(), 0)
    objective = started(FillMiddle(rate=1.0), llama())
    for update in range(20):
        assert restored(objective.corrupt(collate([example], update)).input_ids[0].tolist())[1] == ids


def test_marks_by_other_names(started):
    class Named:
        """A tokenizer with tokens of StarCoder's names."""

        bos_token_id = eos_token_id = None

        def get_vocab(self) -> dict[str, int]:
            return {"<fim_prefix>": 7, "<fim_middle>": 8, "<fim_suffix>": 9, "one": 10}

    assert started(FillMiddle(), llama(), Named()).marks == (7, 9, 8)
    assert started(FillMiddle(tokens=("one", "<fim_suffix>", "<fim_middle>")), llama(), Named()).marks == (10, 9, 8)


# ------------------------------------------------------------------------------------------------------ several as one


def test_a_list_is_a_sum(started):
    model, batch = llama(), collate(texts(5), 2)
    several = (Causal(), Masked(), FillMiddle(), Masked(rate=0.5))
    alone = [started(one, model)(model, batch) for one in several]
    found = started(several, model)(model, batch)
    assert found.count == batch.targets
    assert close(found.total.detach(), sum(one.total.detach() for one in alone))
    assert list(found.extras) == ["causal", "masked", "fill-middle", "masked-2"]
    assert all(close(value, one.total.detach()) for value, one in zip(found.extras.values(), alone))
    pieces = [started(several, model)(model, collate(texts(5)[at : at + 1], 2, [at])) for at in range(5)]
    assert close(found.total.detach(), sum(one.total.detach() for one in pieces))
    assert sum(one.count for one in pieces) == found.count


def test_extras_of_members_are_kept(started):
    class Told:
        part = Causal()

        def __call__(self, model: Any, batch: Batch) -> Sum:
            return Sum(torch.tensor(2.0), 4, {"margin": 1.0})

    combine = Objective.__slot__.combine  # type: ignore[attr-defined]
    assert combine([Told(), Told()])(None, None).extras == {"margin": 1.0, "causal": torch.tensor(2.0), "causal-2": torch.tensor(2.0)}


# ---------------------------------------------------------------------------------------------------------- refusals

PLAIN = ByteBPE(vocabulary=430)(TEXTS)


@pytest.mark.parametrize(
    ("part", "token", "reserve"),
    [(Masked(), "<|mask|>", "mask"), (SpanMixture(), "<extra_id_0>", "spans"), (FillMiddle(), "<|fim_prefix|>", "middle")],
)
def test_a_tokenizer_without_the_token_is_refused(part: Any, token: str, reserve: str, started):
    with pytest.raises(Problem) as caught:
        started(part, llama(), PLAIN)
    name = type(part).__part__.name
    assert str(caught.value) == (
        f"`{name}` needs the token {token}, which the tokenizer lacks; name other tokens of it in the settings of `{name}`, or train a "
        f"new tokenizer with `reserve: [{reserve}]`"
    )


def test_a_token_beyond_the_embeddings_is_refused(started):
    with pytest.raises(Problem, match=r"the tokenizer's <\|mask\|> has the id 8 and the model has 5 embeddings; name another token"):
        started(Masked(), drawn(LlamaForCausalLM, LlamaConfig(vocab_size=5, **SIZES)))


def mamba() -> Any:
    return drawn(MambaForCausalLM, MambaConfig(vocab_size=len(TOKENS), hidden_size=16, num_hidden_layers=1, state_size=4))


@pytest.mark.parametrize("part", [Masked(), Prefix()])
def test_a_state_space_model_is_refused(part: Any, started):
    with pytest.raises(Problem, match=f"`{type(part).__part__.name}` needs attention .* MambaForCausalLM"):
        started(part, mamba())
    assert float(started(FillMiddle(), mamba())(mamba(), collate(texts(2))).total.detach()) > 0


class Mixed(torch.nn.Module):
    """Attention that keeps to a mask, after a sum over all that came before, which does not."""

    def __init__(self, reads: bool):
        super().__init__()
        self.inner, self.reads = llama(), reads
        self.config = self.inner.config

    def forward(self, input_ids: Any, **given: Any) -> Any:
        embedded = self.inner.get_input_embeddings()(input_ids)
        return self.inner(inputs_embeds=embedded.cumsum(1) if self.reads else embedded, **given)


def test_what_reads_from_left_to_right_beside_attention_is_refused():
    check_mask(Mixed(reads=False), "masked")
    with pytest.raises(Problem, match="`masked` needs attention that sees both sides, and Mixed does not keep to a mask"):
        check_mask(Mixed(reads=True), "masked")


def test_a_fresh_model_that_mixes_nothing_yet_is_taken():
    model = llama()
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    check_mask(model, "prefix")


def test_a_window_and_attention_without_masks_are_refused():
    seen, model = torch.ones(1, 6, 6, dtype=torch.bool), llama()
    model.config.sliding_window = 5
    with pytest.raises(Problem, match="rows of 6 tokens exceed the model's attention window of 5; make them no longer than that"):
        full_mask(model, seen)
    model.config.sliding_window = 6
    assert full_mask(model, seen).shape == (1, 1, 6, 6)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(Problem, match="flash_attention_2 takes no mask that says who sees whom; load the model with attn_implementation"):
        full_mask(model, seen)


@pytest.mark.parametrize(
    ("part", "kind", "message"),
    [
        (Masked(), "encoder-decoder", "`masked` does not train encoder-decoder models such as T5ForConditionalGeneration; use `prefix`"),
        (Prefix(), "masked", "`prefix` does not train masked models such as BertForMaskedLM; use `masked`"),
        (FillMiddle(), "masked", "`fill-middle` does not train masked models such as BertForMaskedLM; use `masked`"),
    ],
)
def test_models_of_another_family_are_refused(part: Any, kind: str, message: str, started):
    with pytest.raises(Problem) as caught:
        started(part, MODELS[kind]())
    assert message in str(caught.value)


def test_families_are_checked_by_name():
    check((Causal(), Masked()), "LlamaForCausalLM", "objective")
    check(Masked(), "ModernBertForMaskedLM", "objective")
    with pytest.raises(Problem, match="`objective`: `causal` does not train masked models such as BertForMaskedLM; use `masked`"):
        check((Masked(), Causal()), "BertForMaskedLM", "objective")
    with pytest.raises(Problem, match=r"`masked` needs tokens of its own; write `tokenizer: {byte-bpe: {reserve: \[spans, mask\]}}`"):
        check((Masked(), SpanMixture()), "LlamaForCausalLM", "objective", ByteBPE(reserve=("spans",)))
    check(Masked(token="<|user|>"), "LlamaForCausalLM", "objective", ByteBPE())


def test_what_the_plain_folder_computes_otherwise_is_told(started, tmp_path):
    for part, kind, told in ((Masked(), "causal", 1), (Prefix(), "causal", 1), (Masked(), "masked", 0), (SpanMixture(), "causal", 0)):
        context = Context.scratch(tmp_path)
        started(part, MODELS[kind](), context=context)
        assert sum("loaded from its folder it" in note for note in context.notes) == told


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"masked": {"masked": 0.9, "swapped": 0.2}}, "masked 0.9 and swapped 0.2 are more than all; make them at most 1 together"),
        ({"span-mixture": {"r": [], "x": [], "s": "none"}}, "no denoiser is left; give one in `r`, `s` or `x`"),
        ({"span-mixture": {"sentinel": "<x>"}}, "sentinel <x>: has no place for its number; write {} there, such as <extra_id_{}>"),
    ],
)
def test_settings_are_refused(settings: Any, message: str):
    with pytest.raises(Problem) as caught:
        fill(Objective.__slot__, settings)  # type: ignore[attr-defined]
    assert message in str(caught.value)
