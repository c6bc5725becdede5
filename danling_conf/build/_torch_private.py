"""Everything of torch that has no public name, in one place."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from torch.distributed import ProcessGroup, distributed_c10d
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import lr_scheduler


def process_groups() -> list[ProcessGroup]:
    """Every process group this rank is a member of; torch keeps the list but does not publish it."""
    return list(distributed_c10d._world.pg_map)


def set_timeout(group: ProcessGroup, timeout: timedelta) -> None:
    """Change the time limit of a group's later collectives; torch publishes it for new groups only."""
    distributed_c10d._set_pg_timeout(timeout, group)


def scheduled_rates(scheduler: Any) -> list[float]:
    """The learning rates of a schedule at its current position, not computed from those before it."""
    if hasattr(scheduler, "_get_closed_form_lr"):
        return list(scheduler._get_closed_form_lr())
    with lr_scheduler._enable_get_lr_call(scheduler):
        return scheduler.get_lr()


def flatten_mesh(mesh: DeviceMesh, name: str) -> DeviceMesh:
    """The axes of `mesh` as one axis called `name`; its process group is made once and kept by the root mesh."""
    return mesh._flatten(name)


def storage_identity(tensor: torch.Tensor) -> int:
    """What views and `.data` of one tensor have in common; meta tensors have no address to compare."""
    return tensor.untyped_storage()._cdata
