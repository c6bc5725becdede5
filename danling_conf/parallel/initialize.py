"""Values for a model that was built on the meta device: the same ones under every layout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from danling_conf.parallel.init_plan import Source, named_tensors, replace_tensors

_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")


def materialize(
    parts: Sequence[nn.Module],
    *,
    device: torch.device,
    source: Source,
    parameter_device: torch.device | None = None,
) -> None:
    """Give every meta-device parameter and buffer of this rank's models its value, in place.

    `parts` are the model of the `source` or stages of it, sharded or not; each rank keeps the part that is its own. So
    the values depend on neither layout nor device. Tied parameters stay tied. Collective where the source is.

    `parameter_device` is where parameters live if not on `device` (FSDP's CPU offload).
    """
    targets: dict[str, list[torch.Tensor]] = {}
    for part in parts:
        _allocate(part, device, parameter_device or device)
        for name, tensor in named_tensors(part):
            targets.setdefault(_unwrapped(name), []).append(tensor)
    for name, value in source.values(targets.keys()):
        for target in targets.get(name, ()):
            _store(value, target)


def _allocate(model: nn.Module, device: torch.device, parameter_device: torch.device) -> None:
    def allocate(tensor: torch.Tensor) -> torch.Tensor:
        where = parameter_device if isinstance(tensor, nn.Parameter) else device
        return torch.empty_like(tensor, device=where) if tensor.device.type == "meta" else tensor

    replace_tensors(model, allocate)


def _store(value: torch.Tensor, target: torch.Tensor) -> None:
    """Copy this rank's part of a full value into `target`."""
    with torch.no_grad():
        if not isinstance(target, DTensor):
            target.copy_(value)
            return
        # Every rank has the whole value: each cuts out its part, and none sends.
        part = distribute_tensor(value.detach(), target.device_mesh, target.placements, src_data_rank=None)
        target.to_local().copy_(part.to_local())


def _unwrapped(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name
