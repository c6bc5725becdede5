"""Degrees, mesh axes, ranks and their coordinates, and what a layout needs of a cluster."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from danling_conf.schema import FILL, Layout
from danling_conf.schema.layout import WORLD_AXES
from danling_conf.schema.parallel import AxesConfig
from danling_conf.topology.layout import (
    coordinates,
    data_rank,
    expert_axes,
    fill,
    layout_of_axes,
    mesh_axes,
    random_stream,
    rank_at,
)

layouts = st.builds(Layout, **{axis: st.sampled_from([1, 2, 3, 4]) for axis in Layout().degrees()}, fsdp=st.booleans())


@given(layouts, st.sampled_from(WORLD_AXES))
def test_a_degree_is_filled_so_that_the_world_is_full(layout, axis):
    asked = Layout(**{**layout.degrees(), axis: FILL}, fsdp=layout.fsdp)
    assert not asked.filled
    assert fill(asked, layout.world_size) == layout
    assert fill(layout, 12345) == layout


@given(layouts, st.sampled_from(WORLD_AXES), st.integers(1, 300))
def test_a_world_that_the_other_degrees_do_not_divide_is_refused(layout, axis, world_size):
    asked = Layout(**{**layout.degrees(), axis: FILL})
    others = layout.world_size // getattr(layout, axis)
    if world_size % others:
        with pytest.raises(
            ValueError, match=f"multiply to {others}, which does not divide a world size of {world_size}"
        ):
            fill(asked, world_size)
    else:
        assert fill(asked, world_size).world_size == world_size


def test_two_degrees_to_fill_are_refused_by_name():
    with pytest.raises(ValueError, match="replicate and shard"):
        fill(Layout(replicate=FILL, shard=FILL), 8)


def test_a_world_size_needs_all_degrees():
    with pytest.raises(ValueError, match="fill it first"):
        _ = Layout(shard=FILL).world_size


def test_the_experts_borrow_their_ranks():
    assert Layout(shard=8, expert=4, expert_tensor=2).world_size == 8
    assert mesh_axes(Layout(shard=8, expert=4)) == {"shard": 8}


def test_mesh_axes_are_outermost_first_without_ones():
    layout = Layout(tensor=2, pipeline=3, shard=4)
    assert list(mesh_axes(layout).items()) == [("pipeline", 3), ("shard", 4), ("tensor", 2)]
    assert mesh_axes(Layout()) == {}
    assert mesh_axes(Layout(fsdp=True)) == {"shard": 1}
    assert list(mesh_axes(Layout(tensor=2, replicate=3, fsdp=True)).items()) == [
        ("replicate", 3),
        ("shard", 1),
        ("tensor", 2),
    ]


@given(layouts)
def test_coordinates_and_ranks_are_inverse(layout):
    seen = [coordinates(layout, rank) for rank in range(layout.world_size)]
    assert [rank_at(layout, position) for position in seen] == list(range(layout.world_size))
    assert all(0 <= position[axis] < getattr(layout, axis) for position in seen for axis in WORLD_AXES)
    assert len({tuple(position.values()) for position in seen}) == layout.world_size


def test_neighbours_differ_in_the_tensor_axis():
    layout = Layout(replicate=2, shard=2, tensor=2)
    positions = [coordinates(layout, rank) for rank in range(4)]
    assert [(item["shard"], item["tensor"]) for item in positions] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert coordinates(layout, 4)["replicate"] == 1


@pytest.mark.parametrize("rank", [-1, 8])
def test_a_rank_outside_the_world(rank):
    with pytest.raises(ValueError, match=f"rank {rank} is outside a world of 8"):
        coordinates(Layout(shard=8), rank)


@given(layouts)
def test_data_ranks_are_shared_by_the_ranks_of_one_model_copy(layout):
    """Each data rank is held by as many ranks as one copy of the model has; they agree on both data axes."""
    ranks = [data_rank(layout, rank) for rank in range(layout.world_size)]
    assert sorted(set(ranks)) == list(range(layout.data_degree))
    assert all(ranks.count(index) == layout.world_size // layout.data_degree for index in range(layout.data_degree))
    for rank, index in enumerate(ranks):
        position = coordinates(layout, rank)
        assert divmod(index, layout.shard) == (position["replicate"], position["shard"])


@given(layouts)
def test_the_axes_of_a_configuration_are_its_layout(layout):
    assert layout_of_axes(AxesConfig(**layout.degrees()), fsdp=layout.fsdp) == layout


def test_streams_of_random_numbers_differ_where_activations_do():
    layout = Layout(replicate=2, context=2, pipeline=2, tensor=2)

    def streams(**options):
        return [random_stream(layout, rank, **options) for rank in range(layout.world_size)]

    # Tensor ranks are next to each other.
    assert streams()[0::2] == streams()[1::2]
    assert len(set(streams())) == 8
    assert len(set(streams(sequence_parallel=True))) == 16
    # Data ranks draw what they would alone.
    assert [random_stream(Layout(replicate=4), rank) for rank in range(4)] == [0, 1, 2, 3]


def test_experts_borrow_the_ranks_of_the_dense_axes():
    assert expert_axes(Layout(shard=4, tensor=2, expert=2, expert_tensor=2, pipeline=2)) == {
        "pipeline": 2, "replicate": 1, "expert_shard": 2, "expert": 2, "expert_tensor": 2
    }  # fmt: skip
