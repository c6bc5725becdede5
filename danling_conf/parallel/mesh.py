"""The device mesh of a layout."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from danling_conf._torch_private.distributed import flatten_mesh, keep_quiet_about_order, split_mesh
from danling_conf.components.instantiate import section_from
from danling_conf.parallel.device import device_type as usable_device_type
from danling_conf.schema.layout import DATA_AXES, WORLD_AXES, Layout
from danling_conf.schema.parallel import ParallelConfig
from danling_conf.topology.layout import expert_axes, fill, layout_of_axes, mesh_axes
from danling_conf.topology.violation import ABSENT, SettingError

DATA = "data"
"""Name of the flattened replicate and shard axes: the ranks that see different samples."""

BATCH = "batch"
"""Name of the flattened replicate, shard and context axes: the ranks that see different tokens."""

WEIGHTS = "weights"
"""Name of the flattened shard and context axes: the ranks that FSDP shards over. Context ranks hold the same weights
otherwise, so that sharding over them is free."""


def make(layout: Layout, device_type: str, *, use_device_mesh: bool = True) -> DeviceMesh | None:
    """The mesh of a layout. Collective: every rank of the process group calls it.

    Its axes are those of `topology.layout.mesh_axes`. None where there are none, in a single process without a
    process group, and for a layout that only replicates without `use_device_mesh`.

    Raises SettingError where the layout's world size is not that of the process group, or needs a mesh without
    `use_device_mesh`.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if layout.world_size != world_size:
        degrees = ", ".join(f"{axis}={getattr(layout, axis)}" for axis in WORLD_AXES if getattr(layout, axis) != 1)
        raise SettingError(
            "parallel.axes",
            ABSENT,
            f"{degrees or 'a degree of 1 on every axis'} needs {layout.world_size} processes, and {world_size} were "
            f"started",
            "start as many processes as the product of the degrees",
        )
    axes = mesh_axes(layout)
    if not axes or not dist.is_initialized():
        return None
    if not use_device_mesh:
        if tuple(axes) != ("replicate",):
            raise SettingError(
                "parallel.use_device_mesh",
                False,
                f"the axes {' and '.join(axes)} need a device mesh",
                "leave it true, or choose parallel=ddp",
            )
        return None
    mesh = init_device_mesh(device_type, tuple(axes.values()), mesh_dim_names=tuple(axes))
    if len(axes) > 1:
        keep_quiet_about_order()
    # Made here, where every rank passes: making a process group is collective, so that one made on first use would hang
    # where some ranks never use it.
    data_mesh(mesh)
    batch_mesh(mesh)
    weights_mesh(mesh)
    return mesh


def make_expert(layout: Layout, mesh: DeviceMesh | None) -> DeviceMesh | None:
    """The mesh of the experts of the same ranks; None for a layout without expert axes. Collective.

    Its axes are (pipeline, replicate, expert_shard, expert, expert_tensor), also those of degree 1. The expert degrees
    take their ranks from shard x context x tensor; the remaining factor, expert_shard, shards each expert's weights.
    """
    if mesh is None or layout.expert * layout.expert_tensor == 1:
        return None
    keep_quiet_about_order()
    return split_mesh(_flattened(mesh, axes_of(mesh), "world"), expert_axes(layout))


def data_mesh(mesh: DeviceMesh | None) -> DeviceMesh | None:
    """The ranks that see different samples, as a mesh of one axis: replicate and shard flattened. None where all ranks
    see the same."""
    return _joined(mesh, DATA_AXES, DATA)


def batch_mesh(mesh: DeviceMesh | None) -> DeviceMesh | None:
    """The ranks that see different tokens, as a mesh of one axis: replicate, shard and context flattened. Gradients are
    averaged over them. None where all ranks see the same."""
    return _joined(mesh, (*DATA_AXES, "context"), BATCH)


def weights_mesh(mesh: DeviceMesh | None) -> DeviceMesh | None:
    """The ranks that FSDP shards over: shard and context flattened, in front of them the replicate axis if there is
    one. None where the mesh has no shard axis."""
    if mesh is None or "shard" not in axes_of(mesh):
        return None
    inner = _joined(mesh, ("shard", "context"), WEIGHTS)
    if "replicate" not in axes_of(mesh):
        return inner
    return mesh["replicate", "shard" if "context" not in axes_of(mesh) else WEIGHTS]


def axis(mesh: DeviceMesh | None, name: str) -> DeviceMesh | None:
    """One axis of a mesh; None where the mesh does not have it."""
    return mesh[name] if mesh is not None and name in axes_of(mesh) else None


def _joined(mesh: DeviceMesh | None, wanted: tuple[str, ...], name: str) -> DeviceMesh | None:
    axes = tuple(item for item in wanted if item in axes_of(mesh))
    return None if mesh is None or not axes else _flattened(mesh, axes, name)


def _flattened(mesh: DeviceMesh, axes: tuple[str, ...], name: str) -> DeviceMesh:
    return mesh[axes[0]] if len(axes) == 1 else flatten_mesh(mesh[axes], name)


def data_rank_and_degree(mesh: DeviceMesh | None) -> tuple[int, int]:
    """This process's rank among the ranks that see different samples, and their number."""
    data = data_mesh(mesh)
    return (0, 1) if data is None else (data.get_local_rank(), data.size())


def axes_of(mesh: DeviceMesh | None) -> tuple[str, ...]:
    """The names of a mesh's axes, outermost first; none for no mesh."""
    return () if mesh is None else tuple(mesh.mesh_dim_names or ())


def from_keywords(**keywords: Any) -> partial[DeviceMesh | None]:
    """`parallel` as `hydra.utils.instantiate` reads it: a partial that makes the mesh when called (`fsdp=True` keeps a
    shard axis of degree 1). An axis of -1 is filled from the process group."""
    return partial(_make_from_section, section_from(ParallelConfig, keywords, path="parallel"))


def _make_from_section(section: ParallelConfig, *, fsdp: bool | None = None) -> DeviceMesh | None:
    layout = layout_of_axes(section.axes, fsdp=section.axes.shard != 1 if fsdp is None else fsdp)
    layout = fill(layout, dist.get_world_size() if dist.is_initialized() else 1)
    return make(layout, usable_device_type(section.mesh_device_type), use_device_mesh=section.use_device_mesh)
