"""Torch's caching allocator, replayed: how much a device has reserved for what a step allocates.

The rules are those of its code (c10/cuda/CUDACachingAllocator.cpp of https://github.com/pytorch/pytorch):
sizes are rounded to 512 bytes; up to 1 MiB come out of segments of 2 MiB, up to 10 MiB out of segments of 20 MiB, and
larger ones get a segment of their own, rounded to 2 MiB. A free block is taken where it is the smallest that is large
enough, and cut where at least 512 bytes (of a small segment) or more than 1 MiB are left. Neighbours that are free
become one. A stream takes blocks of its own only. Segments are not given back while the device has memory.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

_SMALL = 1 << 20
_MIDDLE = 10 << 20
_ROUNDED = 512
_SMALL_SEGMENT, _MIDDLE_SEGMENT, _STEP = 2 << 20, 20 << 20, 2 << 20

Pool = tuple[int, bool]
"""A stream, and whether its blocks are small."""


@dataclass(eq=False)
class _Block:
    size: int
    pool: Pool
    before: _Block | None = None
    behind: _Block | None = None
    free: bool = False
    number: int = 0


class Allocator:
    """A device's blocks.

    Attributes:
        reserved: bytes of all segments.
        allocated: bytes of the blocks that are taken.
    """

    def __init__(self) -> None:
        self.reserved = self.allocated = 0
        self._free: dict[Pool, list[tuple[int, int, _Block]]] = defaultdict(list)
        self._count = 0

    def take(self, size: int, stream: int = 0) -> _Block:
        """A block of at least so many bytes."""
        size = max(_ROUNDED, -(-size // _ROUNDED) * _ROUNDED)
        pool = stream, size <= _SMALL
        free = self._free[pool]
        place = bisect_left(free, (size, 0))
        if place < len(free):
            block = free.pop(place)[2]
            block.free = False
        else:
            block = _Block(_segment(size), pool)
            self.reserved += block.size
        left = block.size - size
        if left >= _ROUNDED if pool[1] else left > _SMALL:
            rest = _Block(left, pool, before=block, behind=block.behind)
            if block.behind is not None:
                block.behind.before = rest
            block.behind, block.size = rest, size
            self._put(rest)
        self.allocated += block.size
        return block

    def give_back(self, block: _Block) -> None:
        """A block is free again."""
        self.allocated -= block.size
        for neighbour in (block.before, block.behind):
            if neighbour is not None and neighbour.free:
                block = self._joined(block, neighbour)
        self._put(block)

    def _joined(self, block: _Block, neighbour: _Block) -> _Block:
        free = self._free[neighbour.pool]
        free.pop(bisect_left(free, (neighbour.size, neighbour.number)))
        first, second = (neighbour, block) if block.before is neighbour else (block, neighbour)
        first.size += second.size
        first.behind = second.behind
        if first.behind is not None:
            first.behind.before = first
        return first

    def _put(self, block: _Block) -> None:
        self._count += 1
        block.free, block.number = True, self._count
        insort(self._free[block.pool], (block.size, block.number, block))


def _segment(size: int) -> int:
    if size <= _SMALL:
        return _SMALL_SEGMENT
    return _MIDDLE_SEGMENT if size < _MIDDLE else -(-size // _STEP) * _STEP


def unused(held: Iterable[tuple[int, int]], step: Iterable[tuple[int, int]], streams: dict[int, int]) -> int:
    """Bytes that are reserved beyond the most that are allocated at once, after two steps.

    Args:
        held: numbers and bytes of what is there before a step and stays.
        step: numbers, and bytes that are taken or given back, in their order.
        streams: of numbers, where it is not the first one.
    """
    device = Allocator()
    blocks = {number: device.take(size) for number, size in held}
    most = device.allocated
    changes = list(step)
    for _ in range(2):
        taken: set[int] = set()
        for number, size in changes:
            if size > 0:
                if number in blocks:  # it grew
                    device.give_back(blocks.pop(number))
                blocks[number] = device.take(size, streams.get(number, 0))
                taken.add(number)
                most = max(most, device.allocated)
            elif number in blocks:
                device.give_back(blocks.pop(number))
                taken.discard(number)
        for number in taken:  # the next step makes its own
            device.give_back(blocks.pop(number))
    return device.reserved - most
