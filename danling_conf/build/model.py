"""A model made ready for training under a layout."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from danling_conf.build import activation_checkpointing as recomputation
from danling_conf.build import compile as compilation
from danling_conf.build import ddp
from danling_conf.build import fsdp as sharding
from danling_conf.build.blueprint import Blueprint, blueprint_of, draw, made_by, named_tensors, shortened
from danling_conf.build.initialize import materialize, seeded
from danling_conf.build.mesh import axes_of
from danling_conf.schema.activation_checkpointing import ActivationCheckpointingConfig
from danling_conf.schema.compile import CompileConfig
from danling_conf.schema.fsdp import FsdpConfig
from danling_conf.schema.layout import Layout

_log = logging.getLogger(__name__)

_PLANNED_AXES = ("pipeline", "context", "tensor", "expert", "expert_tensor")


def assemble(
    model: nn.Module | Callable[[], nn.Module],
    *,
    layout: Layout,
    mesh: DeviceMesh | None,
    device: torch.device,
    seed: int,
    fsdp: FsdpConfig,
    compile: CompileConfig,
    activation_checkpointing: ActivationCheckpointingConfig,
    precision: str | None = None,
) -> nn.Module:
    """The model on its device, wrapped, compiled and with values, as the layout and the sections say.

    `model` is a factory without arguments, which is called on the meta device so that no rank holds the whole model, or
    a module, which is taken over with rank 0's weights. A factory's weights depend on `seed` alone: where the modules'
    own initialisers cannot repeat what the constructor did, the model is built in full on the CPU of every rank, under
    one seed and with rank 0's weights, and the log says which modules are to blame.

    The order: plan of the other axes, activation checkpointing, compile per block, FSDP2 or DDP, values, compile of a
    whole model. (DDP takes values before it wraps.) `precision` reaches FSDP's policy; under DDP and in a single
    process it is the caller's autocast.

    Raises ValueError where the layout asks for what nothing implements, or shards without FSDP.
    """
    _check(layout, mesh, fsdp)
    blueprint: Blueprint | None = None
    if not isinstance(model, nn.Module):
        built, blueprint = _build(model, seed)
    else:
        built = model
        if any(tensor.device.type == "meta" for _, tensor in named_tensors(model)):
            blueprint = blueprint_of(model)
    if blueprint is None and fsdp.enabled:
        _share_weights(built, device)
    apply_plan(built, mesh, layout)
    recomputation.apply(built, activation_checkpointing)
    per_block = compilation.is_per_block(built, compile)
    compilation.configure(compile)
    if per_block:
        compilation.apply(built, compile)
    sharding.shard(built, fsdp, mesh, precision=precision)
    if blueprint is not None:
        offloaded = torch.device("cpu") if sharding.offloads(fsdp) else None
        materialize(built, device=device, seed=seed, blueprint=blueprint, parameter_device=offloaded)
    elif not fsdp.enabled:
        built.to(device)
    wrapped = built if fsdp.enabled else ddp.replicate(built, mesh)
    return wrapped if per_block else compilation.apply(wrapped, compile)


def apply_plan(model: nn.Module, mesh: DeviceMesh | None, layout: Layout) -> nn.Module:
    """Lay the model out over the axes other than replicate and shard. Nothing does so yet.

    Raises ValueError for a degree above 1: an axis that is silently ignored would train something else.
    """
    for axis in _PLANNED_AXES:
        degree = getattr(layout, axis)
        if degree > 1:
            raise ValueError(
                f"parallel.axes.{axis}={degree}: nothing lays {type(model).__name__} out over the {axis} axis; set the "
                f"degree to 1"
            )
    return model


def _check(layout: Layout, mesh: DeviceMesh | None, fsdp: FsdpConfig) -> None:
    if layout.shard > 1 and not fsdp.enabled:
        raise ValueError(
            f"fsdp.enabled=false: a layout with parallel.axes.shard={layout.shard} shards by FSDP; choose it by name "
            f"(parallel=fsdp{layout.shard}), or use the replicate axis for DDP"
        )
    absent = [axis for axis in ("replicate", "shard") if getattr(layout, axis) > 1 and axis not in axes_of(mesh)]
    if absent:
        raise ValueError(
            f"parallel.axes.{absent[0]}={getattr(layout, absent[0])}: the mesh has no {absent[0]} axis; make it from "
            f"the same layout (build.mesh.make)"
        )


def _build(factory: Callable[[], nn.Module], seed: int) -> tuple[nn.Module, Blueprint | None]:
    """The factory's model: on the meta device with its blueprint, or else in full on the CPU."""
    try:
        with seeded(seed):  # what it draws outside torch is drawn on meta too
            model, blueprint = draw(factory)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        # The constructor needs values (`.item()`, `.numpy()`), which meta tensors lack. If something else is wrong, the
        # build on the CPU says so.
        _log.info("model: built in full on the CPU of every rank, since it cannot be built on meta: %s", error)
    else:
        if not blueprint.missing:
            return model, blueprint
        _log.info(
            "model: built in full on the CPU of every rank. For a build on the meta device, give these modules a "
            "reset_parameters() that sets the tensor and that the constructor calls last: %s",
            shortened(blueprint.missing),
        )
    with torch.device("cpu"), seeded(seed):
        return made_by(factory), None


def _share_weights(model: nn.Module, device: torch.device) -> None:
    """Give every rank rank 0's values: FSDP2 cuts out of each rank's own, which need not be the same."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    with torch.no_grad():
        for tensor in {id(tensor): tensor for _, tensor in named_tensors(model)}.values():
            shared = tensor.detach().to(device, copy=True)
            dist.broadcast(shared, src=0)
            tensor.copy_(shared)
