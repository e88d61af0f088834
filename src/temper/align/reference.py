"""Slot `reference`: the policy that the change is measured against."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from temper.align.layout import Layout, response_logprobs
from temper.context import write
from temper.lazy import safetensors_torch, torch
from temper.models.sample import evaluating
from temper.parts import Problem, part, slot
from temper.train import batching  # not its names: every part named here would answer this slot
from temper.train.faster import faster
from temper.train.precision import Precision, autocast

if TYPE_CHECKING:
    from collections.abc import Iterator

    from temper.context import Context
    from temper.train.batching import Batch
    from temper.train.examples import Example

_LOGITS, _TOKENS = 2**28, 2**13
"""Logits (1 GiB in float32, where a model holds all) and tokens of a batch in a pass without gradients, at most; but one pair is always
taken."""


@slot(phased=False)
class Reference(Protocol):
    """Against which policy is the change measured? `(batch) -> [R, T]`, its log-probabilities of a batch's supervised tokens.

    `prepare(policy, examples, precision, layout)` comes first, once, while `policy` is as it came in: nothing attached, nothing trained.
    """

    def prepare(self, policy: Any, examples: Sequence[Example], precision: Precision, layout: Layout = "two rows") -> None: ...

    def __call__(self, batch: Batch) -> torch.Tensor: ...


@part(gives=("reference",))
class Start:
    """The incoming policy itself.  Its log-probabilities are computed once and kept on disk, so no second model is in memory."""

    def start(self, context: Context) -> Remembered:
        made = Remembered(context)
        context.give("reference", made)
        return made


class Remembered:
    """Log-probabilities of the tokens of fixed examples, in `work/reference.safetensors`."""

    def __init__(self, context: Context):
        self._context = context
        self._places: dict[tuple[int, str | None], slice] = {}
        self._logprobs = torch.empty(0)

    def prepare(self, policy: Any, examples: Sequence[Example], precision: Precision, layout: Layout = "two rows") -> None:
        """Makes or reads the log-probabilities [N] of all supervised tokens, example by example. Processes share the work."""
        begin = 0
        for one in examples:
            self._places[one.source, one.side] = slice(begin, begin := begin + one.targets)
        if len(self._places) < len(examples):
            raise ValueError("two examples have one source and one side; their log-probabilities could not be told apart")
        file, digest, world = self._context.work / "reference.safetensors", _digest(examples), self._context.world
        if file.exists() and (found := safetensors_torch.load_file(file)).keys() == {digest}:
            self._logprobs = found[digest]
            return
        self._logprobs = torch.zeros(begin)
        quick = faster(policy, device=next(policy.parameters()).device.type, note=self._context.note)
        with quick, torch.no_grad(), evaluating(policy), self._context.track(len(examples) // 2, "reference", "pair") as bar:
            for number, batch in enumerate(passes(policy, examples, self._context)):
                if number % world.size == world.rank:
                    with autocast(batch.input_ids.device.type, precision):
                        made = response_logprobs(policy, batch, layout).cpu()
                    for row, (key, mask) in enumerate(zip(_keys(batch), batch.supervised.cpu(), strict=True)):
                        self._logprobs[self._places[key]] = made[row][mask]
                bar.advance(len(batch.rows) // 2, tokens=batch.tokens)
        world.sum(self._logprobs)
        if world.main:
            write(file, safetensors_torch.save({digest: self._logprobs}))

    def __call__(self, batch: Batch) -> torch.Tensor:
        if unknown := [key for key in _keys(batch) if key not in self._places]:
            raise Problem(f"row {unknown[0][0] + 1} was not among the examples that the reference was prepared for")
        each = torch.cat([self._logprobs[self._places[key]] for key in _keys(batch)]).to(batch.supervised.device)
        return each.new_zeros(batch.supervised.shape).masked_scatter(batch.supervised, each)


def passes(model: Any, examples: Sequence[Example], context: Context) -> Iterator[Batch]:
    """All pairs once, in batches of similar lengths on the model's device: for a pass without gradients."""
    tokens, device = min(_TOKENS, max(1, _LOGITS // model.config.get_text_config().vocab_size)), next(model.parameters()).device
    plan = batching.Bucketed(size=256, tokens=tokens)(examples, context.stream("passes"))
    for update in range(plan.updates_per_epoch):
        for batch in plan.update(update):
            yield batch.to(device)


def _keys(batch: Batch) -> list[tuple[int, str | None]]:
    """Source and side of each row."""
    return [(source, "rejected" if index % 2 else "chosen") for index, source in enumerate(batch.rows)]


def _digest(examples: Sequence[Example]) -> str:
    """Of what was asked, so that another's log-probabilities are never taken for these."""
    made = hashlib.sha256()
    for one in examples:
        made.update(f"{one.source} {one.side} ".encode() + one.tokens.tobytes() + one.supervised.tobytes())
    return made.hexdigest()
