"""Permutations of a data set's samples, looked up place by place.

Up to `LARGEST_HELD` samples a permutation is torch's own (`torch.randperm`), drawn once and held, 4 bytes a sample.
Beyond that it is computed where it is needed and takes no memory, so that a run on 10^9 samples starts and resumes at
once: a Feistel network over pairs (J. Black, P. Rogaway, https://doi.org/10.1007/3-540-45760-7_9) is a bijection
whatever its round function is.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

LARGEST_HELD = 2**23
"""Samples up to which a permutation is held: 32 MiB, and a third of a second to draw."""
_ROUNDS = 8
_BITS = 2**32 - 1


class Permutation(Protocol):
    """A bijection of the integers from 0 up to a size."""

    def at(self, places: Tensor) -> Tensor:
        """The samples at so many places, both (n,) int64."""


class Identity:
    """The order of the data set itself."""

    def at(self, places: Tensor) -> Tensor:
        return places


class Held:
    """`torch.randperm`, as `torch.utils.data.DistributedSampler` draws it."""

    def __init__(self, size: int, seed: int) -> None:
        # The numbers are those that int64 would give.
        self._order = torch.randperm(size, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)

    def at(self, places: Tensor) -> Tensor:
        return self._order[places].long()


class Feistel:
    """A permutation that is computed, in `_ROUNDS` rounds over pairs of about the square root of `size` values."""

    def __init__(self, size: int, seed: int) -> None:
        self._size = size
        self._rows = max(1, round(size**0.5))
        self._columns = -(-size // self._rows)
        generator = torch.Generator().manual_seed(seed)
        self._keys = torch.randint(_BITS, (_ROUNDS,), generator=generator).tolist()

    def at(self, places: Tensor) -> Tensor:
        found = self._permuted(places)
        # There are a few more pairs than samples: walk on from those beyond, on a cycle that leads back to the others.
        while (beyond := found >= self._size).any():
            found[beyond] = self._permuted(found[beyond])
        return found

    def _permuted(self, places: Tensor) -> Tensor:
        left, right = places // self._columns, places % self._columns
        sizes = self._rows, self._columns
        for number, key in enumerate(self._keys):
            left, right = right, (left + _mixed(right ^ key)) % sizes[number % 2]
        # An even number of rounds: the halves are back in their places.
        return left * self._columns + right


def _mixed(values: Tensor) -> Tensor:
    """32 bits that each depend on all bits of a 32-bit number."""
    # Multipliers below 2^31, so that no product overflows: https://github.com/skeeto/hash-prospector.
    values = values ^ (values >> 16)
    values = values * 0x21F0AAAD & _BITS
    values = values ^ (values >> 15)
    values = values * 0x735A2D97 & _BITS
    return values ^ (values >> 15)


def permutation(size: int, seed: int) -> Permutation:
    """The permutation of so many samples that a seed stands for."""
    return Held(size, seed) if size <= LARGEST_HELD else Feistel(size, seed)
