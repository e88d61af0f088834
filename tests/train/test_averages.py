"""Averages against their closed forms, torch's own, and through a checkpoint."""

from __future__ import annotations

import contextlib

import pytest
import torch

from temper.context import Context
from temper.train import checkpoints, slices
from temper.train.averages import EMA, Average, Tail

UPDATES = 20


def parameters(dtype=torch.float64) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in ((3, 4), (5,))]


def walk(average, held, first: int = 0, last: int = UPDATES, of: int = UPDATES) -> list[list[torch.Tensor]]:
    """Moves parameters as training might, and tells the average; where they were after each update."""
    found = []
    for update in range(first, last):
        draw = torch.Generator().manual_seed(update)
        with torch.no_grad():
            for one in held:
                one.add_(torch.randn(one.shape, generator=draw, dtype=torch.float64).to(one.dtype))
        average.update(held, (update + 1) / of)
        found.append([one.detach().clone() for one in held])
    return found


def averaged(average, held) -> list[torch.Tensor]:
    with average.swap(held):
        return [one.detach().clone() for one in held]


def started(part, tmp_path):
    return part.start(Context.scratch(tmp_path))


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
@pytest.mark.parametrize("updates", [1, 2, UPDATES])
def test_ema_is_the_weighted_mean_of_what_was_so_far(decay, updates, tmp_path):
    held, average = parameters(), started(EMA(decay=decay), tmp_path)
    path = walk(average, held, last=updates)
    shares = [decay ** (updates - 1 - k) for k in range(updates)]
    for index, one in enumerate(averaged(average, held)):
        wanted = sum(share * path[k][index] for k, share in enumerate(shares)) / sum(shares)
        torch.testing.assert_close(one, wanted, rtol=1e-12, atol=1e-12)


def test_ema_is_torchs_once_its_beginning_is_corrected(tmp_path):
    """torch's starts as the first weights with full weight: a0 = w1. Less that, over what is then missing, it is ours."""
    held, average, decay = parameters(), started(EMA(decay=0.9), tmp_path), 0.9
    function = torch.optim.swa_utils.get_ema_multi_avg_fn(decay)
    kept: list[torch.Tensor] = []
    path = []
    for update in range(UPDATES):
        path += walk(average, held, update, update + 1)
        if kept:
            function(kept, [one.detach() for one in held], update)
        else:
            kept = [one.detach().clone() for one in held]
    for one, two, first in zip(averaged(average, held), kept, path[0]):
        # kept = d^(T-1) w1 + (1 - d) sum_{k>1} d^(T-k) wk; ours has (1 - d) d^(T-1) w1 in place of the first, over 1 - d^T.
        wanted = (two - decay ** (UPDATES - 1) * first + (1 - decay) * decay ** (UPDATES - 1) * first) / (1 - decay**UPDATES)
        torch.testing.assert_close(one, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("share", [0.05, 0.25, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("updates", [10, 20, 100])
def test_tail_is_the_mean_of_the_last_share(share, updates, tmp_path):
    held, average = parameters(), started(Tail(share=share), tmp_path)
    path = walk(average, held, last=updates, of=updates)
    last = sum(k > (1 - share) * updates + 1e-6 for k in range(1, updates + 1))
    for index, one in enumerate(averaged(average, held)):
        torch.testing.assert_close(one, torch.stack([some[index] for some in path[-last:]]).mean(0), rtol=1e-12, atol=1e-12)


def test_tail_is_torchs_stochastic_weight_average(tmp_path):
    held, average = parameters(), started(Tail(share=0.5), tmp_path)
    function, kept = torch.optim.swa_utils.get_swa_multi_avg_fn(), list[torch.Tensor]()
    for update in range(UPDATES):
        walk(average, held, update, update + 1)
        if update >= UPDATES // 2:
            if kept:
                function(kept, [one.detach() for one in held], update - UPDATES // 2)
            else:
                kept = [one.detach().clone() for one in held]
    for one, two in zip(averaged(average, held), kept):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_before_the_tail_the_weights_stand_for_it(tmp_path):
    held, average = parameters(), started(Tail(share=0.25), tmp_path)
    path = walk(average, held, last=15)
    assert all(map(torch.equal, averaged(average, held), path[-1]))
    path += walk(average, held, 15, 16)
    assert all(map(torch.equal, averaged(average, held), path[-1]))


def test_the_average_is_put_in_for_good(tmp_path):
    held, average = parameters(), started(EMA(decay=0.5), tmp_path)
    average.put(held)
    assert not any(one.any() for one in held), "there is none yet"
    walk(average, held)
    mean = averaged(average, held)
    average.put(held)
    assert all(map(torch.equal, held, mean))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swapping_puts_back_bit_for_bit_even_after_an_error(dtype, tmp_path):
    held, average = parameters(dtype), started(EMA(decay=0.5), tmp_path)
    walk(average, held)
    before, mean = [one.detach().clone() for one in held], averaged(average, held)
    assert not any(map(torch.equal, before, mean))
    assert all(map(torch.equal, held, before))
    with contextlib.suppress(KeyError), average.swap(held):
        assert all(map(torch.equal, held, mean))
        raise KeyError
    assert all(map(torch.equal, held, before))
    assert all(map(torch.equal, averaged(average, held), mean))


def test_a_mean_of_bf16_weights_is_kept_in_float32(tmp_path):
    """1000 steps of 1 / 1000 each: in bf16 a mean of such a length would not move any more."""
    held, average = parameters(torch.bfloat16), started(Tail(share=1.0), tmp_path)
    values = torch.linspace(0, 1, 1000)
    for update, value in enumerate(values):
        with torch.no_grad():
            for one in held:
                one.fill_(value)
        average.update(held, (update + 1) / 1000)
    mean = values.bfloat16().float().mean()
    for one in average.state_dict()["mean"]:
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, mean.expand_as(one), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", Average.__slot__.parts())  # type: ignore[attr-defined]
@pytest.mark.parametrize("broken", [5, 16])
def test_it_goes_on_from_a_checkpoint_bit_for_bit(name, broken, tmp_path):
    part = Average.__slot__.parts()[name]()  # type: ignore[attr-defined]
    through, held = started(part, tmp_path), parameters(torch.float32)
    walk(through, held)

    first, other = started(part, tmp_path), parameters(torch.float32)
    walk(first, other, last=broken)
    (tmp_path / "saved").mkdir()
    checkpoints.fill(tmp_path / "saved", {"live": first.state_dict()})
    again = started(part, tmp_path)
    again.load_state_dict(checkpoints.read(tmp_path / "saved")["live"])
    walk(again, other, broken)
    assert all(map(torch.equal, averaged(again, other), averaged(through, held)))


def test_slices_change_nothing(tmp_path, monkeypatch):
    means = []
    for size in (slices.SLICE, 4):
        monkeypatch.setattr(slices, "SLICE", size)
        held, average = parameters(torch.float32), started(EMA(), tmp_path)
        walk(average, held)
        means.append(averaged(average, held))
    assert all(map(torch.equal, *means))


def test_an_average_of_other_parameters_is_an_error(tmp_path):
    held, average = parameters(), started(EMA(), tmp_path)
    walk(average, held)
    with pytest.raises(ValueError, match="shorter"):
        average.update(held[:1], 1.0)
