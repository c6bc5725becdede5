"""Unsharded tensors on the main rank, one at a time: for one file, and for exports."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as distributed
from torch import Tensor
from torch.distributed.tensor import DTensor

from danling_conf.schema.layout import Layout
from danling_conf.topology.layout import coordinates


def leads(layout: Layout, rank: int) -> bool:
    """Whether a rank is the first of its pipeline stage: it speaks for what all ranks of the stage hold alike.

    Buffers follow each rank's own samples; what is saved is what rank 0, or the first rank of a stage, has.
    """
    return not any(position for axis, position in coordinates(layout, rank).items() if axis != "pipeline")


def gathered(tensors: Mapping[str, Tensor], layout: Layout, rank: int) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the whole model, on the CPU of rank 0; other ranks get none, and only take part. Collective.

    A tensor that is whole on rank 0's CPU already is given as it is, not copied.
    """
    leader, shared = leads(layout, rank), set[str]()
    for stage in range(layout.pipeline):
        here = coordinates(layout, rank)["pipeline"] == stage
        source = _leader_of(layout, stage)
        described = [(name, tuple(item.shape), item.dtype) for name, item in tensors.items()] if here else []
        if layout.pipeline > 1:
            message = [described]
            distributed.broadcast_object_list(message, src=source)
            described = message[0]
        for name, shape, dtype in described:
            found = None
            if here:
                found = tensors[name]
                found = found.full_tensor() if isinstance(found, DTensor) else found
                found = found.detach().cpu() if leader else None
            if name in shared:  # a name that an earlier stage gave: the same tensor
                continue
            if source != 0 and rank == source and found is not None:
                distributed.send(found.contiguous(), dst=0)
            elif source != 0 and rank == 0:
                found = torch.empty(shape, dtype=dtype)
                distributed.recv(found, src=source)
            if rank == 0 and found is not None:
                yield name, found
        shared |= {name for name, _, _ in described}


def _leader_of(layout: Layout, stage: int) -> int:
    return next(
        rank
        for rank in range(layout.world_size)
        if leads(layout, rank) and coordinates(layout, rank)["pipeline"] == stage
    )


def address(tensor: Tensor) -> int:
    """Where a tensor's memory on this rank begins."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.untyped_storage().data_ptr()
