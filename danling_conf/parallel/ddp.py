"""Data parallelism with replicated weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from danling_conf._torch_private import data_parallel
from danling_conf.parallel.blocks import repeated_blocks, sharing_parameters
from danling_conf.parallel.mesh import axes_of, batch_mesh
from danling_conf.parallel.process_group import is_distributed


def is_plain(mesh: DeviceMesh | None) -> bool:
    """Whether ranks differ in nothing but the samples they see: the case that DDP handles."""
    return axes_of(mesh) in ((), ("replicate",))


def replicate(model: nn.Module, mesh: DeviceMesh | None, *, find_unused: bool = False, fake: bool = False) -> nn.Module:
    """`model`, on its device and with values, wrapped by `DistributedDataParallel` over the replicate axis of `mesh`;
    without a mesh, over all ranks of the default process group.

    Gradients are views of the buckets they are reduced in, which saves a copy of them in memory and in time. Rank 0's
    weights and buffers go to the others. A model without a trainable parameter is returned as it is.

    Args:
        find_unused: whether some parameters may get no gradient, others in each step and on each rank.
        fake: whether tensors have no values to share, as in a plan.
    """
    if (mesh is None and not is_distributed()) or not is_plain(mesh):
        return model
    trainable = next((item for item in model.parameters() if item.requires_grad), None)
    if trainable is None:  # torch refuses it; the optimizer's builder says what to do
        return model
    device = trainable.device
    return data_parallel.Replicated(
        model,
        device_ids=None if device.type == "cpu" else [device.index],
        process_group=dist.group.WORLD if mesh is None else mesh["replicate"].get_group(),
        gradient_as_bucket_view=True,
        find_unused_parameters=find_unused,
        init_sync=not fake,
        forward_sync_buffers=not fake,
    )


def replicate_blocks(
    model: nn.Module, mesh: DeviceMesh | None, *, experts: Sequence[str] = (), expert_mesh: DeviceMesh | None = None
) -> nn.Module:
    """Average the gradients of `model` over the ranks that see other tokens (the replicate and context axes), block by
    block, in place: for weights that tensor, expert or pipeline axes shard, which DDP does not take.

    The modules named `experts` are averaged over the replicate axis of `expert_mesh` alone: they receive the tokens of
    other context ranks anyway. The model is unchanged where all ranks see the same tokens.
    """
    batch = batch_mesh(mesh)
    if batch is None:
        return model
    for name in experts if expert_mesh is not None else ():
        data_parallel.replicate(model.get_submodule(name), mesh=expert_mesh["replicate"])  # type: ignore[index]
    blocks = [block for _, block in reversed(repeated_blocks(model))]
    shared = sharing_parameters(model, blocks)
    for block in blocks:
        if block not in shared:
            data_parallel.replicate(block, mesh=batch)
    return data_parallel.replicate(model, mesh=batch)
