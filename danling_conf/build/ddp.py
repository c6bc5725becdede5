"""Data parallelism with replicated weights (DDP)."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from danling_conf.build.mesh import axes_of


def replicate(model: nn.Module, mesh: DeviceMesh | None) -> nn.Module:
    """`model`, on its device and with values, wrapped by `DistributedDataParallel` over the replicate axis of `mesh`.
    Unchanged where there is no such axis.

    Gradients are views of the buckets they are reduced in, which saves a copy of them in memory and in time. Rank 0's
    weights and buffers go to the others.
    """
    if mesh is None or "replicate" not in axes_of(mesh):
        return model
    device = next(model.parameters()).device
    return DistributedDataParallel(
        model,
        device_ids=None if device.type == "cpu" else [device.index],
        process_group=mesh["replicate"].get_group(),
        gradient_as_bucket_view=True,
    )
