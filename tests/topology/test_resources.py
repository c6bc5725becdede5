"""The shape of a job: from its layout, from settings that are given, and what a partition refuses."""

from __future__ import annotations

from typing import Any

import pytest

from danling_conf.schema.launcher import SlurmLauncherConfig
from danling_conf.schema.layout import Layout
from danling_conf.topology.machine import Machine
from danling_conf.topology.resources import Capacity, Shape, cluster_machine, shape_of

GPUS = Capacity(devices_per_node=8, cpus_per_node=64, nodes=4, minutes=600, name="gpu")
CPUS = Capacity(devices_per_node=0, cpus_per_node=16, nodes=4)


def shape(ranks: int, capacity: Capacity = GPUS, *, on_cpu: bool = False, **given: Any) -> tuple[Shape, list[str]]:
    found, violations = shape_of(
        Layout(shard=ranks), on_cpu=on_cpu, capacity=capacity, launcher=SlurmLauncherConfig(**given), name="it"
    )
    assert all(item.fix and item.rule for item in violations)
    return found, [item.path for item in violations]


@pytest.mark.parametrize(
    ("ranks", "capacity", "given", "expected"),
    [
        (8, GPUS, {}, (1, 8, 8, 8)),
        (3, GPUS, {}, (1, 3, 3, 8)),
        (16, GPUS, {}, (2, 8, 8, 8)),
        (12, GPUS, {}, (2, 6, 6, 8)),
        (8, GPUS, {"nodes": 2}, (2, 4, 4, 8)),
        (8, GPUS, {"tasks_per_node": 2}, (4, 2, 2, 8)),
        (8, GPUS, {"nodes": 2, "tasks_per_node": 4, "cpus_per_task": 3}, (2, 4, 4, 3)),
        (8, GPUS, {"gpus_per_node": 4}, (2, 4, 4, 16)),
        (8, GPUS, {"gpus_per_node": 0}, (1, 8, 0, 1)),
        (9, GPUS, {"nodes": 3}, (3, 3, 3, 8)),
        (16, CPUS, {}, (1, 16, 0, 1)),
        (16, CPUS, {"cpus_per_task": 4}, (4, 4, 0, 4)),
        (100, Capacity(devices_per_node=0), {}, (1, 100, 0, 1)),
        (8, Capacity(devices_per_node=8), {}, (1, 8, 8, 1)),
    ],
)
def test_what_a_job_takes(
    ranks: int, capacity: Capacity, given: dict[str, Any], expected: tuple[int, int, int, int]
) -> None:
    found, paths = shape(ranks, capacity, **given)
    assert (found.nodes, found.tasks_per_node, found.gpus_per_node, found.cpus_per_task) == expected
    assert paths == []


@pytest.mark.parametrize(
    ("ranks", "capacity", "given", "paths"),
    [
        (9, GPUS, {}, ["parallel"]),
        (64, GPUS, {}, ["parallel"]),
        (64, GPUS, {"nodes": 8}, ["hydra.launcher.nodes"]),
        (8, GPUS, {"nodes": 3}, ["hydra.launcher.nodes"]),
        (8, GPUS, {"tasks_per_node": 3}, ["hydra.launcher.tasks_per_node"]),
        (8, GPUS, {"nodes": 2, "tasks_per_node": 8}, ["hydra.launcher.tasks_per_node"]),
        (16, GPUS, {"tasks_per_node": 16, "cpus_per_task": 1}, ["hydra.launcher.tasks_per_node"]),
        (16, GPUS, {"nodes": 1, "cpus_per_task": 1}, ["hydra.launcher.nodes"]),
        (8, GPUS, {"cpus_per_task": 9}, ["hydra.launcher.cpus_per_task"]),
        (8, GPUS, {"gpus_per_task": 2, "cpus_per_task": 1}, ["hydra.launcher.gpus_per_task"]),
        (8, GPUS, {"timeout_min": 601}, ["hydra.launcher.timeout_min"]),
        (16, CPUS, {"cpus_per_task": 17}, ["hydra.launcher.cpus_per_task", "parallel"]),
        (16, CPUS, {"tasks_per_node": 16, "cpus_per_task": 2}, ["hydra.launcher.cpus_per_task"]),
        (64, GPUS, {"timeout_min": 601}, ["parallel", "hydra.launcher.timeout_min"]),
    ],
)
def test_what_does_not_fit(ranks: int, capacity: Capacity, given: dict[str, Any], paths: list[str]) -> None:
    assert shape(ranks, capacity, **given)[1] == paths


def test_ranks_on_cpus_take_no_gpus() -> None:
    found, paths = shape(16, on_cpu=True)
    assert (found.nodes, found.tasks_per_node, found.gpus, found.gpu_hours) == (1, 16, 0, 0)
    assert paths == []


def test_what_a_job_costs() -> None:
    assert shape(16, timeout_min=90)[0].gpu_hours == 24


def test_jobs_of_one_shape_are_told_by_it() -> None:
    assert len({shape(8)[0], shape(8)[0], shape(4)[0]}) == 2


def test_a_degree_to_be_filled_is_no_shape() -> None:
    with pytest.raises(ValueError, match="still to be filled"):
        shape(-1)


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, 8), ({"nodes": 2}, 16), ({"nodes": 2, "tasks_per_node": 3}, 6), ({"gpus_per_node": 4}, 4)],
)
def test_world_size_that_a_cluster_fills(given: dict[str, Any], expected: int) -> None:
    machine = cluster_machine(Machine(started_world_size=3, launcher="srun"), GPUS, SlurmLauncherConfig(**given))
    assert machine.fill_world_size == expected
    assert machine.started_world_size is None


@pytest.mark.parametrize(
    ("groups", "ranks", "capacity", "given", "expected"),
    [
        (3, 2, GPUS, {}, (1, 3, 6, 16)),
        (3, 2, GPUS, {"nodes": 3}, (3, 1, 2, 16)),
        (3, 8, GPUS, {}, (3, 1, 8, 64)),
        (3, 4, GPUS, {}, (3, 1, 4, 32)),  # two on a node would leave one for the other node
        (4, 4, GPUS, {}, (2, 2, 8, 32)),
        (2, 2, CPUS, {"cpus_per_task": 3}, (1, 2, 0, 6)),
        (2, 8, CPUS, {"cpus_per_task": 2}, (2, 1, 0, 16)),
    ],
)
def test_replica_groups_are_tasks_with_all_of_their_ranks(
    groups: int, ranks: int, capacity: Capacity, given: dict[str, Any], expected: tuple[int, int, int, int]
) -> None:
    launcher = SlurmLauncherConfig(**given)
    found, faults = shape_of(Layout(shard=ranks), on_cpu=False, capacity=capacity, launcher=launcher, groups=groups)
    assert (found.nodes, found.tasks_per_node, found.gpus_per_node, found.cpus_per_task) == expected
    assert (found.groups, faults) == (groups, [])


@pytest.mark.parametrize(
    ("ranks", "capacity", "given", "path", "text"),
    [
        (16, GPUS, {}, "parallel", "a replica group of 16 ranks is started on one node, and a node has 8 GPUs"),
        (16, CPUS, {"cpus_per_task": 2}, "parallel", "a node has 16 CPUs"),
        (2, GPUS, {"gpus_per_task": 1}, "hydra.launcher.gpus_per_task", "a task is a replica group"),
        (2, GPUS, {"nodes": 2}, "hydra.launcher.nodes", "the run has 3 replica groups"),
    ],
)
def test_replica_groups_that_nodes_cannot_hold(
    ranks: int, capacity: Capacity, given: dict[str, Any], path: str, text: str
) -> None:
    launcher = SlurmLauncherConfig(**given)
    _, faults = shape_of(Layout(shard=ranks), on_cpu=False, capacity=capacity, launcher=launcher, groups=3)
    assert path in {item.path for item in faults}
    assert text in " ".join(item.rule for item in faults)
