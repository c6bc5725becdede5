"""Sampler of every split: the order of an epoch, sharded over the data ranks, resumable at any sample."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Sampler

from danling_conf.components.permutation import Identity, Permutation, permutation

UNEVEN = "uneven"
REPEAT = "repeat"
DROP = "drop"
_AHEAD = 1024
"""Samples that are looked up at once."""


class ShardedSampler(Sampler[int]):
    """Shards the order of an epoch over data ranks: rank `r` of `degree` takes the samples at `r`, `r + degree`, ...

    So the batches of all ranks at a step are, together, the batch that one process with a batch of `degree` times the
    size would take. Up to 2^23 samples the order is that of `torch.utils.data.DistributedSampler`; a larger data set is
    shuffled by a permutation that takes no memory (see `components.permutation`).

    The position is saved as the number of samples that all ranks together have taken, with the epoch; the rest of the
    epoch is sharded from there. So a state of any rank restores any other, and fits another degree: no sample is seen
    twice or never, except for what `remainder` does at the end of every epoch. (The samplers of torchdata 0.11 save the
    position of one rank; after a state saved at the end of an epoch, StatefulDistributedSampler skips the whole next
    one.)

    Args:
        size: number of samples.
        remainder: what happens to the samples that the degree does not divide. `drop`: they are left out, and ranks
            have equally many. `repeat`: the first samples fill up, and ranks have equally many. `uneven`: the first
            ranks have one sample, and perhaps one batch, more: every sample is seen once, as metrics need.
        generator: reseeded with each epoch from the seed, the rank and the epoch, where given. A data loader draws the
            seeds of its workers from it.
    """

    def __init__(
        self,
        size: int,
        *,
        rank: int = 0,
        degree: int = 1,
        shuffle: bool = False,
        seed: int = 0,
        remainder: str = UNEVEN,
        generator: torch.Generator | None = None,
    ) -> None:
        if not 0 <= rank < degree:
            raise ValueError(f"data rank {rank}: it must be at least 0 and below the data degree, {degree}")
        if remainder not in (UNEVEN, REPEAT, DROP):
            raise ValueError(f"remainder={remainder!r}: it must be {UNEVEN}, {REPEAT} or {DROP}")
        self.size = size
        self.rank = rank
        self.degree = degree
        self.shuffle = shuffle
        self.seed = seed
        self.remainder = remainder
        self.generator = generator
        self._held: tuple[int, Permutation] | None = None
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration; call it before each epoch."""
        self.epoch, self._begins_at = epoch, 0
        if self.generator is not None:
            self.generator.manual_seed(seed_of(self.seed, self.rank, epoch))

    def __len__(self) -> int:
        return self.left(0)

    def begin_at(self, taken_by_all: int) -> None:
        """Let iterations begin after so many samples of all ranks together, until the next epoch is chosen."""
        self._begins_at = taken_by_all

    def __iter__(self) -> Iterator[int]:
        return _Position(self, self._begins_at)

    def samples(self, epoch: int, first: int, count: int, taken: int = 0) -> list[int]:
        """So many samples of this rank in an epoch from its `first` on, after the first `taken` of all ranks
        together."""
        last = min(first + count, self.left(taken))
        places = torch.arange(first, max(first, last)) * self.degree + self.rank + taken
        if self.remainder == REPEAT:
            places = torch.where(places < self.size, places, (places - self.size) % max(1, self.size))
        return self._permutation(epoch).at(places).tolist()

    def left(self, taken: int) -> int:
        """Samples of this rank in an epoch, after the first `taken` of all ranks together."""
        rest = max(0, self.size - taken)
        if self.remainder == DROP:
            return rest // self.degree
        if self.remainder == REPEAT:
            return -(-rest // self.degree)
        return len(range(self.rank, rest, self.degree))

    def _permutation(self, epoch: int) -> Permutation:
        if not self.shuffle:
            return Identity()
        # Drawn once an epoch, whoever asks: the iteration, a resume, or the record of a bad batch.
        if self._held is None or self._held[0] != epoch:
            self._held = epoch, permutation(self.size, self.seed + epoch)
        return self._held[1]


class _Position(Iterator[int]):
    """A place in one epoch of a sampler; it keeps its own epoch, whatever the sampler is set to meanwhile."""

    def __init__(self, sampler: ShardedSampler, taken_by_all: int) -> None:
        self._sampler = sampler
        self._start(sampler.epoch, taken_by_all)

    def _start(self, epoch: int, taken_by_all: int) -> None:
        self._epoch, self._began = epoch, min(taken_by_all, self._sampler.size)
        self._taken = 0
        self._ahead: deque[int] = deque()

    def __iter__(self) -> _Position:
        return self

    def __next__(self) -> int:
        if not self._ahead:
            self._ahead.extend(self._sampler.samples(self._epoch, self._taken, _AHEAD, self._began))
            if not self._ahead:
                raise StopIteration
        self._taken += 1
        return self._ahead.popleft()

    def state_dict(self) -> dict[str, Any]:
        # A rank that ran out one sample before the others is at the end of the data, as they are.
        return {"epoch": self._epoch, "taken_by_all": self._began + self._taken * self._sampler.degree}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # The rest is sharded anew: under the same degree as before, under another without a gap or a repetition.
        self._start(state["epoch"], state["taken_by_all"])


def seed_of(seed: int, rank: int, epoch: int) -> int:
    """A seed of its own for each rank and epoch, the same in every run: neighbouring seeds, as `seed + rank`, would
    give rank 0 of one run what rank 1 of another has."""
    state = seed % 2**64
    for part in (rank, epoch):
        # The mixing step of SplitMix64 (G. Steele et al., https://doi.org/10.1145/2714064.2660195).
        state = (state + (part + 1) * 0x9E3779B97F4A7C15) % 2**64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % 2**64
        state ^= state >> 31
    return state % 2**63
