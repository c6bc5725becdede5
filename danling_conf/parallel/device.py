"""Device of a process: its type, and which one of the node's."""

from __future__ import annotations

import torch

from danling_conf.topology.violation import SettingError


def device_type(requested: str | None) -> str:
    """The device type of the run: `requested` (`parallel.mesh_device_type`), else this machine's accelerator, else
    `cpu`.

    Raises SettingError where the requested accelerator is not there.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    found = accelerator.type if accelerator is not None else "cpu"
    if requested is None:
        return found
    if requested not in ("cpu", found):
        raise SettingError(
            "parallel.mesh_device_type",
            requested,
            f"this machine has no usable {requested} device, only {found}",
            "leave the setting unset, or run where there is one",
        )
    return requested


def local_device(device_type: str, local_rank: int) -> torch.device:
    """The device of the process with this rank on its node, made the current one of its type.

    Some launchers show each process one device of its own; it is then taken whatever the rank.

    Raises SettingError where there are several devices but none for `local_rank`.
    """
    if device_type == "cpu":
        return torch.device("cpu")
    count = torch.accelerator.device_count()
    index = 0 if count == 1 else local_rank
    if index >= count:
        raise SettingError(
            "local_rank",
            local_rank,
            f"this node has {count} {device_type} devices",
            "start at most one process for each device",
        )
    torch.accelerator.set_device_index(index)
    return torch.device(device_type, index)
