"""Permutations of an epoch: each sample once, the same for a seed, without memory where there are many samples."""

from __future__ import annotations

import itertools

import pytest
import torch

from danling_conf.components import permutation as permutations
from danling_conf.components import samplers
from danling_conf.components.permutation import LARGEST_HELD, Feistel, Held, permutation
from danling_conf.components.samplers import DROP, REPEAT, UNEVEN, ShardedSampler


@pytest.mark.parametrize("size", [1, 2, 3, 5, 31, 1000, 4097])
def test_a_computed_permutation_has_each_sample_once(size: int) -> None:
    places = torch.arange(size)
    first, other = Feistel(size, 1).at(places), Feistel(size, 2).at(places)
    assert torch.equal(first.sort().values, places)
    assert torch.equal(first, Feistel(size, 1).at(places.flip(0)).flip(0))
    assert size < 30 or not torch.equal(first, other)


def test_a_computed_permutation_is_spread_evenly() -> None:
    size, parts = 100_000, 20
    places = torch.arange(size)
    found = Feistel(size, 3).at(places)
    counts = torch.bincount(places * parts // size * parts + found * parts // size, minlength=parts * parts).double()
    expected = size / parts**2
    # Chi-squared of 361 degrees of freedom: 500 is six standard deviations away.
    assert float(((counts - expected) ** 2 / expected).sum()) < 500
    pairs = torch.stack([found[1:], found[:-1]]).double()
    assert abs(float(torch.corrcoef(pairs)[0, 1])) < 0.02


def test_which_permutation_is_held() -> None:
    assert isinstance(permutation(1000, 0), Held)
    assert isinstance(permutation(LARGEST_HELD + 1, 0), Feistel)
    drawn = torch.randperm(1000, generator=torch.Generator().manual_seed(7))
    assert torch.equal(permutation(1000, 7).at(torch.arange(1000)), drawn)


@pytest.mark.parametrize("remainder", [UNEVEN, REPEAT, DROP])
def test_a_computed_order_is_sharded_and_resumed_like_a_held_one(
    remainder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(permutations, "LARGEST_HELD", 10)
    size = 2503
    for degree, taken in itertools.product((1, 4), (0, 1000)):
        shares = []
        for rank in range(degree):
            made = ShardedSampler(size, rank=rank, degree=degree, shuffle=True, seed=5, remainder=remainder)
            whole = iter(made)
            whole.load_state_dict({"epoch": 2, "taken_by_all": taken})  # type: ignore[attr-defined]
            for _ in range(100):
                next(whole)
            resumed = iter(made)
            resumed.load_state_dict(whole.state_dict())  # type: ignore[attr-defined]
            rest = list(resumed)
            assert rest == list(whole)
            assert made.left(taken) == 100 + len(rest)
            shares.append([*made.samples(2, 0, 100, taken), *rest])
        seen = list(itertools.chain(*shares))
        expected = Feistel(size, 7).at(torch.arange(size)).tolist()[taken:]
        assert set(seen) <= set(expected) | (set(range(size)) if remainder == REPEAT else set())
        assert remainder == DROP or set(seen) >= set(expected)
        assert len(seen) - len(expected) in range(-degree + 1, degree)


def test_the_permutation_is_drawn_once_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(samplers, "permutation", lambda *given: drawn.append(given) or permutation(*given))
    made = ShardedSampler(5000, shuffle=True, seed=1)
    made.set_epoch(3)
    order = list(made)
    for number in range(100):  # as the record of micro-batches that were not finite
        assert made.samples(3, 32 * number, 32) == order[32 * number : 32 * number + 32]
    position = iter(made)
    position.load_state_dict({"epoch": 3, "taken_by_all": 2500})  # type: ignore[attr-defined]
    assert list(position) == order[2500:]
    assert drawn == [(5000, 4)]
