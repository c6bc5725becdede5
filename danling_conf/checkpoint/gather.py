"""Gather of sharded tensors on the main rank, one at a time, for checkpoints of one file and for exports.

One at a time: no rank ever holds a second copy of the whole model on its device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as distributed
from torch import Tensor
from torch.distributed.tensor import DTensor

from danling_conf.parallel.waiting import waiting
from danling_conf.schema.layout import Layout
from danling_conf.topology.layout import coordinates


def leads(layout: Layout, rank: int) -> bool:
    """Whether a rank is the first of its pipeline stage, which saves everything that all ranks of the stage share.

    Buffers such as running statistics differ between ranks; those of the leader are saved.
    """
    return not any(position for axis, position in coordinates(layout, rank).items() if axis != "pipeline")


def gather(tensors: Mapping[str, Tensor], layout: Layout, rank: int) -> Iterator[tuple[str, Tensor]]:
    """Yields every tensor of the whole model on the CPU of rank 0. Other ranks only take part. Collective.

    A tensor that is already whole on rank 0's CPU is not copied.
    """
    leader, shared = leads(layout, rank), set[str]()
    for stage in range(layout.pipeline):
        here = coordinates(layout, rank)["pipeline"] == stage
        source = _leader_of(layout, stage)
        described = [(name, tuple(item.shape), item.dtype) for name, item in tensors.items()] if here else []
        if layout.pipeline > 1:
            message = [described]
            with waiting("the tensors of a stage"):
                distributed.broadcast_object_list(message, src=source)
            described = message[0]
        for name, shape, dtype in described:
            with waiting("a tensor of the checkpoint"):
                found = _unsharded(tensors[name], leader) if here else None
                if name in shared:  # an earlier stage has it as well: a tied weight or a shared buffer
                    continue
                found = _on_main_rank(found, shape, dtype, source, rank)
            if rank == 0 and found is not None:
                yield name, found
        shared |= {name for name, _, _ in described}


def _unsharded(tensor: Tensor, leader: bool) -> Tensor | None:
    """The whole tensor on the CPU of the stage's leader; None on its other ranks. Collective where it is sharded."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().cpu() if leader else None


def _on_main_rank(
    found: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, source: int, rank: int
) -> Tensor | None:
    """The tensor of rank `source`, sent to rank 0 if that is another rank."""
    if source == 0:
        return found
    if rank == source and found is not None:
        distributed.send(found.contiguous(), dst=0)
    elif rank == 0:
        found = torch.empty(shape, dtype=dtype)
        distributed.recv(found, src=source)
    return found


def _leader_of(layout: Layout, stage: int) -> int:
    return next(
        rank
        for rank in range(layout.world_size)
        if leads(layout, rank) and coordinates(layout, rank)["pipeline"] == stage
    )


def address(tensor: Tensor) -> int:
    """Address of a tensor's storage on this rank."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.untyped_storage().data_ptr()
