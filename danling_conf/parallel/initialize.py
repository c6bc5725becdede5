"""Values for a model that was built on the meta device: the same ones under every layout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from danling_conf.parallel.init_plan import Source, named_tensors, replace_tensors
from danling_conf.schema.imports import uncollected
from danling_conf.topology.violation import ABSENT, SettingError

_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")


@uncollected()
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

    Raises SettingError for a tensor that the source does not have.

    `parameter_device` is where parameters live if not on `device` (FSDP's CPU offload).
    """
    targets: dict[str, list[torch.Tensor]] = {}
    # A module that the model's author has compiled has the name of a wrapper in the source too.
    known = {_unwrapped(name): name for name, _ in named_tensors(source.model)}
    for part in parts:
        allocated = _allocate(part, device, parameter_device or device)
        for name, tensor in named_tensors(part):
            if (given := known.get(_unwrapped(name))) is not None:
                targets.setdefault(given, []).append(tensor)
            elif id(tensor) in allocated:
                raise SettingError(
                    "model",
                    ABSENT,
                    f"{name} of {type(part).__name__} is no tensor of the model that the factory returned, and has no "
                    f"value",
                    "make it in the factory",
                )
    for name, value in source.values(targets.keys()):
        for target in targets.get(name, ()):
            _store(value, target)


def _allocate(model: nn.Module, device: torch.device, parameter_device: torch.device) -> set[int]:
    """Returns the identities of the tensors that have no value yet."""

    def allocate(tensor: torch.Tensor) -> torch.Tensor:
        where = parameter_device if isinstance(tensor, nn.Parameter) else device
        return torch.empty_like(tensor, device=where) if tensor.device.type == "meta" else tensor

    return {id(tensor) for tensor in replace_tensors(model, allocate)}


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
