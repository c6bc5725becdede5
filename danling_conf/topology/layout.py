"""Arithmetic of layouts: mesh axes, coordinates of a rank, data ranks and random streams, derived from the degrees.

Pure Python, so that a layout is checked before torch is imported. Launcher and ranks must derive the same.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

from danling_conf.schema.layout import DATA_AXES, FILL, WORLD_AXES, Layout
from danling_conf.schema.parallel import AxesConfig
from danling_conf.schema.runner import RunnerConfig


def layout_of(config: RunnerConfig) -> Layout:
    """The layout of a configuration. Before it is resolved, one degree may be -1.

    A function and not a property of RunnerConfig: a subclass may well have a setting called `layout`.
    """
    return layout_of_axes(config.parallel.axes, fsdp=config.fsdp.enabled)


def layout_of_axes(axes: AxesConfig, *, fsdp: bool) -> Layout:
    """The layout with these degrees, with or without FSDP."""
    return Layout(fsdp=fsdp, **{axis: getattr(axes, axis) for axis in Layout().degrees()})


def fill(layout: Layout, world_size: int) -> Layout:
    """The layout with its degree of -1 replaced so that the product of all degrees is `world_size`.

    Raises ValueError where more than one degree is -1, or the others do not divide the world size.
    """
    unknown = [axis for axis in WORLD_AXES if getattr(layout, axis) == FILL]
    if not unknown:
        return layout
    if len(unknown) > 1:
        raise ValueError(f"only one degree can be filled from the world size, not {' and '.join(unknown)}")
    known = prod(getattr(layout, axis) for axis in WORLD_AXES if axis != unknown[0])
    if world_size % known:
        raise ValueError(f"the other degrees multiply to {known}, which does not divide a world size of {world_size}")
    return replace(layout, **{unknown[0]: world_size // known})


def mesh_axes(layout: Layout) -> dict[str, int]:
    """Axes of the device mesh and their degrees, outermost first. Axes of degree 1 are dropped, except for the shard
    axis of a layout with FSDP."""
    degrees = {axis: getattr(layout, axis) for axis in WORLD_AXES}
    # FSDP gets a mesh on one rank too, so that fsdp1 and fsdp8 run the same code.
    return {axis: degree for axis, degree in degrees.items() if degree > 1 or (axis == "shard" and layout.fsdp)}


def expert_axes(layout: Layout) -> dict[str, int]:
    """Axes of the mesh of the experts, outermost first: the ranks of shard x context x tensor in another order, so that
    expert_tensor, where it is not 1, is the tensor axis."""
    wanted = layout.expert * layout.expert_tensor
    return {
        "pipeline": layout.pipeline,
        "replicate": layout.replicate,
        "expert_shard": layout.shard * layout.context * layout.tensor // wanted,
        "expert": layout.expert,
        "expert_tensor": layout.expert_tensor,
    }


def coordinates(layout: Layout, rank: int) -> dict[str, int]:
    """The coordinate of a rank on each axis of the world (row-major: the last axis varies fastest)."""
    if not 0 <= rank < layout.world_size:
        raise ValueError(f"rank {rank} is outside a world of {layout.world_size}")
    result = {}
    for axis in reversed(WORLD_AXES):
        rank, result[axis] = divmod(rank, getattr(layout, axis))
    return {axis: result[axis] for axis in WORLD_AXES}


def rank_at(layout: Layout, coordinate: dict[str, int]) -> int:
    """The rank at a coordinate; inverse of `coordinates`."""
    rank = 0
    for axis in WORLD_AXES:
        rank = rank * getattr(layout, axis) + coordinate[axis]
    return rank


def data_rank(layout: Layout, rank: int) -> int:
    """Index of a rank among the data ranks; ranks that share it read the same samples."""
    position = coordinates(layout, rank)
    index = 0
    for axis in DATA_AXES:
        index = index * getattr(layout, axis) + position[axis]
    return index


def random_stream(layout: Layout, rank: int, *, sequence_parallel: bool = False) -> int:
    """Index of the random stream of a rank.

    Dropout must differ wherever activations do: between data, context and pipeline ranks. It must not differ between
    tensor ranks, which hold the same activations unless sequences are sharded.
    """
    position = coordinates(layout, rank)
    index = position["pipeline"]
    for axis in ("context", *(("tensor",) if sequence_parallel else ())):
        index = index * getattr(layout, axis) + position[axis]
    return index * layout.data_degree + data_rank(layout, rank)
