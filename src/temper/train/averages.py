"""Which weights a run ends with: the slot `Average`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Protocol

from pydantic import Field

from temper.lazy import torch
from temper.parts import part, slot
from temper.train.distribution import is_sharded, like, local
from temper.train.slices import sliced

if TYPE_CHECKING:
    from temper.context import Context


class Averaging(Protocol):
    """An average under way. Parameters are the same ones, in the same order, whenever they are given."""

    def update(self, parameters: Iterable[torch.Tensor], progress: float) -> None:
        """Told after every update, with the share of the run that is done: above 0, at most 1."""
        ...

    def swap(self, parameters: Iterable[torch.Tensor]) -> contextlib.AbstractContextManager[None]:
        """Within it the parameters hold their average, and afterwards again, bit for bit, what they held."""
        ...

    def put(self, parameters: Iterable[torch.Tensor]) -> None:
        """Gives the parameters their average for good."""
        ...


@slot(phased=False)
class Average(Protocol):
    """Which weights does the run end with? `start(context)` gives what takes a mean of them, by `update(parameters, progress)` after
    every update, and puts it in their place within `swap(parameters)`."""

    def start(self, context: Context) -> Averaging: ...


@part(name="ema")
class EMA:
    """Exponential moving average of the weights after each update, its beginning corrected as Adam's means are.  Polyak and
    Juditsky 1992.  4 bytes a weight.
    Formula: a <- a + (1 - decay) / (1 - decay^t) (w - a), so that a = sum_k decay^(t - k) w_k / sum_k decay^(t - k)."""

    decay: Annotated[float, Field(gt=0, lt=1)] = 0.999
    """How much less an update counts than the one after it: 0.999 looks back about 1000 updates."""

    def start(self, context: Context) -> Mean:
        return Mean(lambda count, progress: (1 - self.decay) / (1 - self.decay**count))


@part
class Tail:
    """Mean of the weights after each update of the last part of the run.  Izmailov et al. 2018.  4 bytes a weight.
    Formula: a = mean of w_k over k > (1 - share) updates."""

    share: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Share of the run, at its end, that is averaged over. Before it there is no average, and the weights stand for it."""

    def start(self, context: Context) -> Mean:
        begin = 1 - self.share + 1e-9  # of 10 updates and a share of 0.9 the last 9, although 1 - 0.9 is below 1 / 10
        return Mean(lambda count, progress: 1 / count if progress > begin else 0.0)


class Mean:
    """A weighted mean of parameters, in float32 at least.

    toward: `(count, progress)` -> how far the mean goes towards the weights of now, which would be the count-th in it; 0: they are
    not to be in it.
    """

    def __init__(self, toward: Callable[[int, float], float]):
        self._toward = toward
        self._count = 0
        self._mean: list[Any] = []

    def update(self, parameters: Iterable[torch.Tensor], progress: float) -> None:
        parameters = list(parameters)
        step = self._toward(self._count + 1, progress)
        if not step:
            return
        self._count += 1
        with torch.no_grad():
            if self._count == 1:
                self._mean = [one.detach().to(torch.promote_types(one.dtype, torch.float32), copy=True) for one in parameters]
                return
            for means, weights in sliced(local(self._placed(parameters)), local(parameters)):
                weights = [one.to(mean.dtype) for one, mean in zip(weights, means)]
                torch._foreach_lerp_(means, weights, step)  # pyright: ignore[reportPrivateImportUsage]

    @contextlib.contextmanager
    def swap(self, parameters: Iterable[torch.Tensor]) -> Iterator[None]:
        parameters = list(parameters)
        if not self._count:
            yield
            return
        before = [one.detach().clone() for one in parameters]
        self.put(parameters)
        try:
            yield
        finally:
            with torch.no_grad():
                for one, held in zip(parameters, before):
                    one.copy_(held)

    def put(self, parameters: Iterable[torch.Tensor]) -> None:
        parameters = list(parameters)
        if self._count:
            with torch.no_grad():
                for one, mean in zip(parameters, self._placed(parameters), strict=True):
                    one.copy_(mean)

    def _placed(self, parameters: list[torch.Tensor]) -> list[Any]:
        """The mean where the parameters are, and cut as they are: what a checkpoint gives back is whole and on the CPU."""
        pairs = list(zip(self._mean, parameters, strict=True))
        self._mean = [mean if is_sharded(mean) else like(mean.to(one.device), one) for mean, one in pairs]
        return self._mean

    def state_dict(self) -> dict[str, Any]:
        return {"count": self._count, "mean": list(self._mean)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._count = state["count"]
        self._mean = [one.clone() for one in state["mean"]]
