"""Single weights in the order of a score, over all matrices together."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from temper.lazy import torch
from temper.parts import Problem


def greatest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Places of the `count` greatest of scores [n], rising; of equals the first."""
    least = scores.topk(count, sorted=False).values.min()
    chosen = scores > least
    ties = (scores == least).nonzero().flatten()
    chosen[ties[: count - int(chosen.sum())]] = True
    return chosen.nonzero().flatten()


class Ranking:
    """The weights of some matrices in the order of a score.

    scores: gives module -> score of each of its weights [out, in], -inf where one may not be chosen; called when first needed. many: how
    many are asked for, given how many there are.
    """

    def __init__(self, scores: Callable[[], Mapping[str, torch.Tensor]], many: Callable[[int], int]):
        self._read, self._many = scores, many
        self._held: dict[str, torch.Tensor] = {}

    @property
    def scores(self) -> dict[str, torch.Tensor]:
        if not self._held:
            self._held = {name: one.detach().flatten() for name, one in self._read().items()}
        return self._held

    @property
    def most(self) -> int:
        """Weights that may be chosen."""
        return sum(int((one > -torch.inf).sum()) for one in self.scores.values())

    @property
    def asked(self) -> int:
        """How many are asked for. Raises `Problem` where there are not as many."""
        count, most = max(1, self._many(self.most)), self.most
        if count > most:
            raise Problem(f"{count} entries are asked for, and the modules have {most} to choose from; ask for fewer, or name more modules")
        return count

    def owners(self, count: int) -> torch.Tensor:
        """The number of the module that each of the first `count` weights lies in, [count], the most sensitive weight first."""
        scores = torch.cat(list(self.scores.values()))
        chosen = greatest(scores, count)
        ends = torch.tensor([one.numel() for one in self.scores.values()], device=chosen.device).cumsum(0)
        falling = scores[chosen].argsort(descending=True, stable=True)
        return torch.searchsorted(ends, chosen[falling], right=True)

    def counts(self, owners: torch.Tensor) -> dict[str, int]:
        """Module -> how many of the weights that lie in `owners` are its own; modules with none are left out."""
        found = torch.bincount(owners, minlength=len(self.scores)).tolist()
        return {name: count for name, count in zip(self.scores, found, strict=True) if count}

    def entries(self, counts: Mapping[str, int]) -> dict[str, torch.Tensor]:
        """Module -> places of its first weights in [out, in] laid flat, rising."""
        return {name: greatest(self.scores[name], count) for name, count in counts.items()}
