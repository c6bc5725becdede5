"""Equally many batches on every rank, where nothing but the ranks' own data says how many there are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
import torch.distributed as distributed

Batch = TypeVar("Batch")


def aligned(
    iterator: Iterator[Batch], device: torch.device, *, uneven: Callable[[], None] = lambda: None
) -> Iterator[Batch]:
    """Batches for as long as every rank has one; what a rank has beyond that is not used. Collective.

    `uneven` is called, on every rank, where some ranks have a batch left that others have not.

    For training on an iterable data set, whose shares may differ: a rank that goes on alone would reduce gradients with
    ranks that are past it. One number is reduced before each batch: with `device` the CPU, over gloo and without
    waiting for an accelerator.
    """
    if not (distributed.is_initialized() and distributed.get_world_size() > 1):
        yield from iterator
        return
    while True:
        batch = next(iterator, None)
        least, most = _extremes(int(batch is not None), device)
        if not least:
            if most:
                uneven()
            return
        assert batch is not None  # every rank has one
        yield batch


def agreed_length(length: int | None, device: torch.device) -> int | None:
    """Batches of an epoch on the rank that has fewest; None where a rank does not know (None). Collective."""
    if not (distributed.is_initialized() and distributed.get_world_size() > 1):
        return length
    least, _ = _extremes(-1 if length is None else length, device)
    return None if least < 0 else least


def _extremes(value: int, device: torch.device) -> tuple[int, int]:
    shared = torch.tensor([value, -value], device=device)
    distributed.all_reduce(shared, op=distributed.ReduceOp.MIN)
    least, most = shared.tolist()
    return least, -most
