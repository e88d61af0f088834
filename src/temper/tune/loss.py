"""Slot `loss`: what tuning minimises."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol

from pydantic import Field

from temper.lazy import F, torch
from temper.models.classifiers import Words, names, of_words, scores
from temper.parts import Problem, part, shown, slot
from temper.train.logprobs import supervised_logprobs
from temper.train.objectives import Causal, FillMiddle, Masked, Prefix, SpanMixture, Sum, added, check
from temper.train.objectives.balance import LoadBalance
from temper.train.objectives.base import ranges

if TYPE_CHECKING:
    from temper.context import Context
    from temper.train.batching import Batch


@slot(combine=added)
class Loss(Protocol):
    """What is minimised? `(model, batch) -> Sum`, from `input_ids [B, T]` to a sum over the batch's targets and their number.

    A list is summed."""

    def __call__(self, model: Any, batch: Batch) -> Sum: ...


__all__ = ["Causal", "FillMiddle", "Label", "LoadBalance", "Loss", "Masked", "Prefix", "Rationale", "SpanMixture", "check"]


def questions(batch: Batch) -> Iterator[tuple[list[int], list[int]]]:
    """Prompt and completion of every question of a batch, row by row. A prompt begins where its document does, and in documents that are
    joined after the completion before."""
    tokens, taught = batch.input_ids.tolist(), batch.supervised.tolist()
    for row, found in enumerate(ranges(batch)):
        for place, end in found:
            while place < end:
                first = place
                while place < end and not taught[row][place]:
                    place += 1
                last = place
                while place < end and taught[row][place]:
                    place += 1
                if place > last:
                    yield tokens[row][first:last], tokens[row][last:place]


# ------------------------------------------------------------------------------------------------------------- labels


@part
class Label:
    """Cross-entropy of the labels that completions say, by a model with a head that reads the prompts alone.  Li et al. 2023, "Label
    Supervised LLaMA Finetuning", section 3.1

    Formula: - log softmax(logits)[label], summed over texts, or over the words of each text where they are what is labelled.
    """

    families: ClassVar = ("classifier",)

    def start(self, context: Context) -> _Labels:
        return _Labels(context.want("model"), context.want("tokenizer"))


class _Labels:
    """Labels at work: the tokens of a completion, and what they say."""

    def __init__(self, model: Any, tokenizer: Any):
        self._tokenizer, self._words = tokenizer, Words(tokenizer) if of_words(model) else None
        self._numbers = {label: number for number, label in enumerate(names(model))}
        self._known: dict[tuple[int, ...], list[int]] = {}

    def __call__(self, model: Any, batch: Batch) -> Sum:
        asked = list(questions(batch))
        prompts = [prompt for prompt, _ in asked]
        found = [self._said(completion) for _, completion in asked]
        places = [[0]] * len(asked) if self._words is None else [self._words.ends(one) for one in prompts]
        for prompt, some, where in zip(prompts, found, places):
            if len(some) != len(where):
                text = shown(self._tokenizer.decode(prompt, skip_special_tokens=True))
                raise Problem(f"{text} has {len(where)} words and {len(some)} labels; {_WHOLE}")
        targets = torch.tensor([number for some in found for number in some], device=batch.input_ids.device)
        return Sum(F.cross_entropy(scores(model, prompts, places), targets, reduction="sum"), len(targets))

    def _said(self, completion: list[int]) -> list[int]:
        """The labels of a completion, as numbers."""
        if (key := tuple(completion)) not in self._known:
            text = self._tokenizer.decode(completion, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
            said = [text] if self._words is None else text.split()
            if unknown := [one for one in said if one not in self._numbers]:
                raise Problem(f"{shown(unknown[0])} is no label of the model ({', '.join(list(self._numbers)[:3])}, ...); {_WHOLE}")
            self._known[key] = [self._numbers[one] for one in said]
        return self._known[key]


_WHOLE = "give rows whose labels the training rows have, whole under max_length and not cut by batching (`bucketed` or `padded`)"


# --------------------------------------------------------------------------------------------------------- rationales


@part
class Rationale:
    """Learns the label of a question and, as a task of its own, its rationale: each row is one of the two, as its prefix says.
    Hsieh et al. 2023, "Distilling Step-by-Step", eq. 2 and 3

    Formula: CE(label | "[label] x") + weight CE(rationale | "[rationale] x"), each the mean over its own targets in the training rows.
    An update takes sum_label + weight N_label / N_rationale sum_rationale over its number of label targets, N counted over the training
    examples (of a stream over its first block). At test only the label's prefix is used, so that a rationale costs nothing there.
    """

    families: ClassVar = ("causal",)
    weight: Annotated[float, Field(ge=0)] = 1.0
    """Of the rationales; 0 leaves the labels alone."""
    label: Annotated[str, Field(min_length=1)] = "[label]"
    """With what the prompts of labels begin."""
    rationale: Annotated[str, Field(min_length=1)] = "[rationale]"
    """With what the prompts of rationales begin."""

    def __post_init__(self) -> None:
        if self.label.startswith(self.rationale) or self.rationale.startswith(self.label):
            raise Problem(f"`label` is {shown(self.label)} and `rationale` {shown(self.rationale)}; neither may begin with the other")

    def start(self, context: Context) -> _Prefixed:
        made = _Prefixed(self, context.want("tokenizer"))
        made.weigh((one.tokens.tolist(), one.targets) for one in context.want("examples"))
        return made


class _Prefixed:
    """Labels and rationales at work. share: N_label / N_rationale."""

    def __init__(self, part: Rationale, tokenizer: Any):
        self.part, self.tokenizer, self.share = part, tokenizer, 0.0
        lengths = [len(tokenizer(text)["input_ids"]) for text in (part.label, part.rationale)]
        self._most = max(lengths) + 4  # tokens in which a prefix shows, whatever stands around it

    def weigh(self, examples: Any) -> None:
        counts = {True: 0, False: 0}
        for tokens, targets in examples:
            counts[self.explains(tokens)] += targets
        for kind, prefix in ((False, self.part.label), (True, self.part.rationale)):
            if not counts[kind] and (self.part.weight or not kind):
                raise Problem(f"no row's prompt begins with {shown(prefix)}; give data `rationales`, which makes both rows of a question")
        self.share = counts[False] / counts[True] if counts[True] else 0.0

    def explains(self, tokens: list[int]) -> bool:
        """Whether a prompt asks for a rationale, not for a label."""
        text = self.tokenizer.decode(tokens[: self._most], skip_special_tokens=True, clean_up_tokenization_spaces=False).lstrip()
        if text.startswith(self.part.rationale):
            return True
        if text.startswith(self.part.label):
            return False
        label, rationale = shown(self.part.label), shown(self.part.rationale)
        raise Problem(f"{shown(text)} begins with neither {label} nor {rationale}; give data `rationales`")

    def __call__(self, model: Any, batch: Batch) -> Sum:
        flags = [flag for prompt, said in questions(batch) for flag in [self.explains(prompt)] * len(said)]
        nll, explains = -supervised_logprobs(model, batch), torch.tensor(flags, dtype=torch.bool, device=batch.input_ids.device)
        label, rationale = nll[~explains].sum(), self.share * nll[explains].sum()
        count = len(flags) - sum(flags)
        return Sum(label + self.part.weight * rationale, count, {"label": label.detach(), "rationale": rationale.detach()})
