"""Slot `head`: what stands in the place of a language model's output layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

from temper.lazy import nn, torch, transformers
from temper.models.classifiers import POOLING, Words, plain
from temper.models.deltas import merge
from temper.parts import Problem, Share, held, mark_of, part, shown, slot
from temper.passport import UNKNOWN, Passport, child, family
from temper.train.examples import Encoded, Example

if TYPE_CHECKING:
    from temper.context import Context

_MOST = 1000
"""Labels at most: more distinct completions are answers, not labels."""


@slot(phased=False)
class Head(Protocol):
    """What takes the place of the output layer? `(model, examples, tokenizer) -> model`, of the same body under a new head.

    examples: completion rows as tokens, whose completions say the labels. What leaves is a whole model of the class that
    `architecture(name)` names. The head itself is trained in full, beside whatever delta.
    """

    def __call__(self, model: nn.Module, examples: Encoded, tokenizer: Any) -> nn.Module: ...

    def architecture(self, name: str | None) -> str | None: ...


# --------------------------------------------------------------------------------------------------- for the skeleton


def headed(spec: Any, made: Passport, model: Passport, data: Passport) -> Passport:
    """The passport of what leaves with a head; without one, what would leave anyway. Or a refusal.

    spec: with `head`, `surgery`, `loss` and `base`. made: what would leave. model, data: of the inputs.
    """
    head = spec.head
    labelling = [one for one in held(spec.loss) if "classifier" in getattr(one, "families", ())]
    if labelling and data.kind != "completion":
        raise Problem(f"`{mark_of(labelling[0]).name}` reads labels off completions; give rows with `prompt` and `completion`", ("data",))
    if head is None:
        if spec.surgery is not None:
            raise Problem(f"`{mark_of(spec.surgery).name}` changes what a model sees; give it a head, such as `head: linear`", ("surgery",))
        if labelling and family(model.architecture) != "classifier":
            raise Problem(f"`{mark_of(labelling[0]).name}` trains a model with a head; give it one, such as `head: linear`", ("head",))
        return made
    name = mark_of(head).name
    if (kind := family(model.architecture)) != "causal":
        remedy = "it has one already; leave `head` out to train it on" if kind == "classifier" else "give a causal one"
        raise Problem(f"`{name}` goes on a causal model, and {model.origin or 'the model'} is {model.architecture}: {remedy}", ("head",))
    if model.kind == "adapter" and spec.base.continues:
        raise Problem("with a head a whole model leaves, and an adapter comes in that would go on; write `base: merged`", ("base",))
    if model.quantised:
        raise Problem(f"`{name}` goes on plain weights, and the model's are {model.numbers}; put the head on before quantising", ("head",))
    for one in held(spec.loss):
        if "classifier" not in getattr(one, "families", ("classifier",)):
            raise Problem(f"`{mark_of(one).name}` learns text, and a model with a head gives labels; write `loss: label`", ("loss",))
    return child(made, kind="model", architecture=head.architecture(model.architecture), base=UNKNOWN)


def let_head_learn(model: nn.Module) -> None:
    """Lets the parameters outside a classifier's body be trained, whatever a delta on the body froze."""
    inner = plain(model)
    for name, one in inner.named_parameters():
        if not name.startswith(f"{inner.base_model_prefix}."):
            one.requires_grad_(True)


def labels_of(examples: Sequence[Example], tokenizer: Any) -> list[str]:
    """The completion of each example as a text."""
    taught = [one.tokens[one.supervised].tolist() for one in examples]
    texts = tokenizer.batch_decode(taught, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return [text.strip() for text in texts]


# ------------------------------------------------------------------------------------------------------------- parts


@part
class Linear:
    """A linear map of the last hidden states to the labels of a text; the labels are the distinct completions, in the order of their
    letters.  Li et al. 2023, "Label Supervised LLaMA Finetuning", section 3.1

    Formula: logits = W h_T, T the prompt's last token; or, over all its tokens, max_t W h_t or mean_t W h_t.
    """

    pool: Literal["last", "max", "mean"] = "last"
    """Which tokens speak. last: the folder is transformers' `...ForSequenceClassification`. max, mean: it is `...ForTokenClassification`
    with `classifier_pooling` in its config.json: transformers alone gives the logits of each token, of which a reader takes the maximum
    or the mean over a text's tokens, as is done here."""

    def architecture(self, name: str | None) -> str | None:
        return _renamed(name, "Sequence" if self.pool == "last" else "Token")

    def start(self, context: Context) -> _Head:
        return _Head(self, context.stream().seed())

    def put(self, model: nn.Module, examples: Encoded, tokenizer: Any, seed: int) -> nn.Module:
        classes = _classes(labels_of(examples, tokenizer))
        if self.pool == "last":
            return _with_head(model, "Sequence", classes, tokenizer, seed, {"problem_type": "single_label_classification"})
        more = {POOLING: self.pool, "classifier_dropout": 0.0, "token_classification_bias": False}
        return _with_head(model, "Token", classes, tokenizer, seed, more)


@part
class TokenLinear:
    """A linear map of each word's last hidden state to the word's label. A completion holds as many labels as its prompt has words, white
    space between them.  Li et al. 2023, section 3.3

    Formula: logits_w = W h_t + b, t the last token of word w.
    """

    dropout: Share = 0.1
    """Share of the states that the head reads dropped in training."""

    def architecture(self, name: str | None) -> str | None:
        return _renamed(name, "Token")

    def start(self, context: Context) -> _Head:
        return _Head(self, context.stream().seed())

    def put(self, model: nn.Module, examples: Encoded, tokenizer: Any, seed: int) -> nn.Module:
        words, tags = Words(tokenizer), list[str]()
        for one, text in zip(examples, labels_of(examples, tokenizer), strict=True):
            prompt, said = one.tokens[: int(one.supervised.argmax())].tolist(), text.split()
            if len(words.ends(prompt)) != len(said):
                asked = shown(tokenizer.decode(prompt, skip_special_tokens=True))
                raise Problem(
                    f"row {one.source + 1}: {asked} has {len(words.ends(prompt))} words and {shown(text)} as many labels as {len(said)}; "
                    "give one label a word"
                )
            tags += said
        return _with_head(model, "Token", _classes(tags), tokenizer, seed, {"classifier_dropout": self.dropout})


@dataclasses.dataclass(frozen=True)
class _Head:
    """A head at work. seed: of its first weights."""

    part: Linear | TokenLinear
    seed: int

    def __call__(self, model: nn.Module, examples: Encoded, tokenizer: Any) -> nn.Module:
        if examples.cut:
            raise Problem(
                f"{examples.cut:,} of {examples.rows:,} rows are longer than max_length and lost the end of their label; raise it, or give "
                "shorter prompts",
                ("max_length",),
            )
        return self.part.put(model, examples, tokenizer, self.seed)


# ------------------------------------------------------------------------------------------------------------ inside


def _renamed(name: str | None, kind: str) -> str | None:
    """`LlamaForCausalLM` -> `LlamaForSequenceClassification`."""
    if name is None:
        return None
    return f"{name.removesuffix('ForCausalLM').removesuffix('LMHeadModel')}For{kind}Classification"


def _classes(labels: Sequence[str]) -> list[str]:
    found = sorted(set(labels))
    if not 2 <= len(found) <= _MOST:
        some = ", ".join(shown(one) for one in found[:3])
        raise Problem(f"the completions are {len(found):,} different labels ({some}); a head takes 2 to {_MOST:,}", ("data",))
    if "" in found:
        raise Problem("a completion is empty; each must say a label", ("data",))
    return found


def _with_head(model: Any, kind: str, classes: list[str], tokenizer: Any, seed: int, more: dict[str, Any]) -> nn.Module:
    """The body of a causal model under transformers' own head for its kind, newly drawn."""
    model = merge(model)
    known = getattr(transformers, f"MODEL_FOR_{kind.upper()}_CLASSIFICATION_MAPPING")
    if type(model.config) not in known:
        raise Problem(f"transformers has no {kind.lower()} classifier for {type(model).__name__}", ("head",))
    config = model.config
    config.id2label, config.label2id = dict(enumerate(classes)), {label: index for index, label in enumerate(classes)}
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    config.get_text_config().pad_token_id = tokenizer.pad_token_id
    for name, value in more.items():
        setattr(config, name, value)
    with torch.device("meta"):
        made = known[type(config)](config)
    body = made.base_model_prefix
    setattr(made, body, getattr(model, body))
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for name, child_ in made.named_children():
            if name != body:
                child_.to_empty(device=device)
                child_.apply(made._init_weights)
    made.config.architectures = [type(made).__name__]
    return made.train(model.training)
