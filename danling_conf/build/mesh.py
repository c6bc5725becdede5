"""The device mesh of a layout."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from danling_conf.build._torch_private import flatten_mesh
from danling_conf.build.device import device_type as usable_device_type
from danling_conf.build.keywords import section_from
from danling_conf.schema.layout import DATA_AXES, WORLD_AXES, Layout
from danling_conf.schema.parallel import ParallelConfig
from danling_conf.topology.layout import fill, layout_of, mesh_axes

DATA = "data"
"""Name of the flattened replicate and shard axes."""


def make(layout: Layout, device_type: str) -> DeviceMesh | None:
    """The mesh of a layout. Collective: every rank of the process group calls it.

    Its axes are those of `topology.layout.mesh_axes`. None where there are none, and in a single process without a
    process group.

    Raises ValueError where the layout's world size is not that of the process group.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if layout.world_size != world_size:
        degrees = ", ".join(f"{axis}={getattr(layout, axis)}" for axis in WORLD_AXES if getattr(layout, axis) != 1)
        raise ValueError(
            f"parallel.axes: {degrees or 'every degree is 1'} needs {layout.world_size} processes, {world_size} were "
            f"started; start as many processes as the product of the degrees"
        )
    axes = mesh_axes(layout)
    if not axes or not dist.is_initialized():
        return None
    mesh = init_device_mesh(device_type, tuple(axes.values()), mesh_dim_names=tuple(axes))
    # Made here, where every rank is: a process group made on first use would hang the ranks that never use it.
    data_mesh(mesh)
    return mesh


def data_mesh(mesh: DeviceMesh | None) -> DeviceMesh | None:
    """The ranks that see different samples, as a mesh of one axis: replicate and shard flattened. None where all ranks
    see the same."""
    names = axes_of(mesh)
    axes = tuple(axis for axis in DATA_AXES if axis in names)
    if mesh is None or not axes:
        return None
    return mesh[axes[0]] if len(axes) == 1 else flatten_mesh(mesh[axes], DATA)


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
    layout = layout_of(section.axes, section.axes.shard != 1 if fsdp is None else fsdp)
    layout = fill(layout, dist.get_world_size() if dist.is_initialized() else 1)
    return make(layout, usable_device_type(section.mesh_device_type))
