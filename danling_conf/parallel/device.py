"""The device a process trains on."""

from __future__ import annotations

import torch


def device_type(requested: str | None) -> str:
    """The device type of the run: `requested` (`parallel.mesh_device_type`), else this machine's accelerator, else
    `cpu`.

    Raises ValueError where the requested accelerator is not there.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    found = accelerator.type if accelerator is not None else "cpu"
    if requested is None:
        return found
    if requested not in ("cpu", found):
        raise ValueError(
            f"parallel.mesh_device_type={requested}: this machine has no usable {requested} device, only {found}; "
            f"leave the setting unset, or run where there is one"
        )
    return requested


def local_device(device_type: str, local_rank: int) -> torch.device:
    """The device of the process with this rank on its node, made the current one of its type.

    A launcher may show each process one device of its own; it is then taken whatever the rank. Raises ValueError where
    there are several devices but none for `local_rank`.
    """
    if device_type == "cpu":
        return torch.device("cpu")
    count = torch.accelerator.device_count()
    index = 0 if count == 1 else local_rank
    if index >= count:
        raise ValueError(
            f"local rank {local_rank}: this node has {count} {device_type} devices; start at most one process on each"
        )
    torch.accelerator.set_device_index(index)
    return torch.device(device_type, index)
