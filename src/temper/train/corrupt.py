"""What objectives do to a sequence before a model sees it: pure functions of tokens and a generator.

A sequence is a list of ids, or an int64 tensor [T] on the CPU. How much is drawn from a generator depends on what may be changed
alone, never on padding beside it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from temper.lazy import torch

# ----------------------------------------------------------------------------------------------------------- masking


def pick(candidates: torch.Tensor, rate: float, generator: torch.Generator) -> torch.Tensor:
    """Some of the candidates, bool [T] to bool [T]: round(rate n) of n, at least one where there is one, each choice equally likely.

    A fixed number, as in the code of Devlin et al. 2019, "BERT", in place of one that varies about it.
    """
    places = candidates.nonzero().flatten()
    count = min(len(places), max(1, round(rate * len(places))))
    picked = torch.zeros_like(candidates)
    picked[places[torch.randperm(len(places), generator=generator)[:count]]] = True
    return picked


def mask(
    tokens: torch.Tensor, picked: torch.Tensor, token: int, vocabulary: int, masked: float, swapped: float, generator: torch.Generator
) -> torch.Tensor:
    """The sequence [T] whose picked tokens become `token` with probability `masked`, any id below `vocabulary` with probability
    `swapped`, and else stay. Devlin et al. 2019, "BERT", section 3.1."""
    count = int(picked.sum())
    fate = torch.rand(count, generator=generator)
    other = torch.randint(vocabulary, (count,), generator=generator)
    made = tokens.clone()
    made[picked] = torch.where(fate < masked, token, torch.where(fate < masked + swapped, other, tokens[picked]))
    return made


# ------------------------------------------------------------------------------------------------------------- spans


def composition(total: int, pieces: int, generator: torch.Generator) -> list[int]:
    """`total` as a sum of so many whole numbers above 0, in order; every such sum is equally likely."""
    cuts = torch.randperm(total - 1, generator=generator)[: pieces - 1].add(1).sort().values.tolist()
    return [last - first for first, last in itertools.pairwise([0, *cuts, total])]


def noise(length: int, rate: float, span: float, most: int, generator: torch.Generator) -> list[bool]:
    """Which of `length` places are noise: round(rate length) of them, in round(that / span) spans but no more than `most`.

    Kept and noise spans alternate, a kept one first, each with random lengths. At least one place is noise and, of several, one is
    kept. Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", section 3.3.4, as
    `random_spans_noise_mask` of their code draws it.
    """
    if length < 2:
        return [True] * length
    count = min(max(round(length * rate), 1), length - 1)
    spans = min(max(round(count / span), 1), count, length - count, most)
    lengths = zip(composition(length - count, spans, generator), composition(count, spans, generator))
    return [flag for kept, lost in lengths for flag in [False] * kept + [True] * lost]


def lift(tokens: Sequence[int], noisy: Sequence[bool], sentinels: Sequence[int]) -> tuple[list[int], list[int]]:
    """Inputs, in which the i-th span of noise is replaced by the i-th sentinel, and targets, which give each sentinel with its span.

    Spans beyond the last sentinel stay where they are. Raffel et al. 2020, figure 2, without the sentinel that ends their targets there,
    as in their code.
    """
    inputs: list[int] = []
    targets: list[int] = []
    left = iter(sentinels)
    for lost, group in itertools.groupby(zip(noisy, tokens, strict=True), key=lambda pair: pair[0]):
        some = [token for _, token in group]
        sentinel = next(left, None) if lost else None
        if sentinel is None:
            inputs += some
        else:
            inputs.append(sentinel)
            targets += [sentinel, *some]
    return inputs, targets


def tail(length: int, share: float, generator: torch.Generator) -> int:
    """How many of `length` places at the end are cut off: from 1 on, uniform, on average `share` of them; at least one place stays.

    With a share of 0.5 any cut is equally likely: `random_prefix_noise_mask` of the code of Raffel et al. 2020.
    """
    most = min(max(round(2 * share * length) - 1, 1), length - 1)
    return int(torch.randint(1, most + 1, (), generator=generator))


# ---------------------------------------------------------------------------------------------------- fill in the middle


def cut(length: int, generator: torch.Generator) -> tuple[int, int]:
    """Two places from 0 to `length`, in order: where a document's middle begins and ends. Uniform and apart from one another."""
    first, second = sorted(torch.randint(length + 1, (2,), generator=generator).tolist())
    return first, second


def rearrange(
    prefix: Sequence[int], middle: Sequence[int], suffix: Sequence[int], marks: tuple[int, int, int], suffix_first: bool
) -> list[int]:
    """A document with its middle at its end, to be written once the rest is known. marks: the tokens for prefix, suffix, middle.

    <prefix> prefix <suffix> suffix <middle> middle, or with the suffix first <prefix> <suffix> suffix <middle> prefix middle: Bavarian
    et al. 2022, "Efficient Training of Language Models to Fill in the Middle", section 3, modes PSM and SPM (its second variant).
    """
    before, after, within = marks
    if suffix_first:
        return [before, after, *suffix, within, *prefix, *middle]
    return [before, *prefix, after, *suffix, within, *middle]
