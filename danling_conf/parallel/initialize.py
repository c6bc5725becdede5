"""Values for a model that was built on the meta device: the same ones under every layout."""

from __future__ import annotations

import copy
import hashlib
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from danling_conf.parallel.init_plan import Blueprint, Unit, named_tensors, shortened
from danling_conf.topology.violation import ABSENT, SettingError

_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")


def materialize(
    model: nn.Module,
    *,
    device: torch.device,
    seed: int,
    blueprint: Blueprint,
    parameter_device: torch.device | None = None,
) -> nn.Module:
    """Give every meta-device parameter and buffer of `model` its value, in place; no communication.

    `model` is the model of the `blueprint` or a stage of it, sharded or not. Each module's own initialiser
    (`reset_parameters`) runs on a full copy of that module alone, on the CPU, with a random generator seeded by `seed`
    and the module's name; each rank keeps the part that is its own. So the values depend on neither layout nor device.
    Tied parameters stay tied.

    `parameter_device` is where parameters live if not on `device` (FSDP's CPU offload).

    Raises SettingError where the blueprint says that initialisers are missing.
    """
    if blueprint.missing:
        raise SettingError(
            "model",
            ABSENT,
            f"{len(blueprint.missing)} tensors cannot be initialised after a build on the meta device: "
            f"{shortened(blueprint.missing)}",
            "give their modules a reset_parameters() that sets them and that the constructor calls",
        )
    _allocate(model, device, parameter_device or device)
    targets = {_unwrapped(name): tensor for name, tensor in named_tensors(model)}
    for unit in blueprint.units:
        if not any(name in targets for name in unit.tensors):
            continue  # of another pipeline stage
        for name, value in _values(unit, blueprint.model, seed):
            if name in targets:
                _store(value, targets[name])
    return model


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The random generators of torch's CPU, Python and numpy start from `seed` inside, and go on as if nothing had
    happened after."""
    state, python = torch.get_rng_state(), random.getstate()
    # Only where it is in use.
    numpy = sys.modules["numpy"].random if "numpy" in sys.modules else None
    numpys = None if numpy is None else numpy.get_state()
    # Not `torch.manual_seed`, which would seed the accelerators too.
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    if numpy is not None:
        numpy.seed(seed % 2**32)
    try:
        yield
    finally:
        torch.set_rng_state(state)
        random.setstate(python)
        if numpy is not None:
            numpy.set_state(numpys)


def seed_of(seed: int, name: str) -> int:
    """A seed of 63 bits for the module of this name; the same in every process and Python version."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1


def _values(unit: Unit, drawn: nn.Module, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """The full values of a unit's tensors, on the CPU."""
    alone = len(unit.calls) == 1 and all(name.rpartition(".")[0] == unit.name for name in unit.tensors)
    root = _real_copy(drawn.get_submodule(unit.name), deep=not alone)
    prefix = f"{unit.name}." if unit.name else ""
    with torch.device("cpu"), torch.no_grad():
        for name, method in unit.calls:
            module = root if name == unit.name else root.get_submodule(name.removeprefix(prefix))
            with seeded(seed_of(seed, name)):
                getattr(module, method)()
    values = dict(named_tensors(root))
    for name in unit.tensors:
        yield name, values[name.removeprefix(prefix)]


def _real_copy(module: nn.Module, *, deep: bool) -> nn.Module:
    """A copy of a meta-device module whose tensors have memory on the CPU; unless `deep`, its children are left as they
    are."""
    copied = copy.deepcopy(module) if deep else copy.copy(module)
    if not deep:
        copied.__dict__["_parameters"] = dict(module._parameters)
        copied.__dict__["_buffers"] = dict(module._buffers)
    _replace(copied, lambda tensor: torch.empty_like(tensor, device="cpu"), recurse=deep)
    return copied


def _allocate(model: nn.Module, device: torch.device, parameter_device: torch.device) -> None:
    def allocate(tensor: torch.Tensor) -> torch.Tensor:
        where = parameter_device if isinstance(tensor, nn.Parameter) else device
        return torch.empty_like(tensor, device=where) if tensor.device.type == "meta" else tensor

    _replace(model, allocate, recurse=True)


def _replace(module: nn.Module, function: Callable[[torch.Tensor], torch.Tensor], *, recurse: bool) -> None:
    """Replace each parameter and buffer by `function` of it, tied ones once (`nn.Module.to_empty` would untie them)."""
    # The old tensor stays in the pair: were it freed, a new one could take over its identity.
    pairs: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for owner in module.modules() if recurse else (module,):
        for name, tensor in [*owner._parameters.items(), *owner._buffers.items()]:
            if tensor is None:
                continue
            if id(tensor) not in pairs:
                pairs[id(tensor)] = (tensor, _like(tensor, function(tensor)))
            # By attribute: modules such as nn.LSTM follow what is set on them.
            setattr(owner, name, pairs[id(tensor)][1])


def _like(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    if new is old or not isinstance(old, nn.Parameter):
        return new
    parameter = nn.Parameter(new, requires_grad=old.requires_grad)
    # Marks that the model's author set on the parameter.
    parameter.__dict__.update(old.__dict__)
    return parameter


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
