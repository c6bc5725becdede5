"""Resources of a job on a cluster: derives nodes, tasks, GPUs and CPUs from the layout, and checks that they exist.

A request that no node can satisfy would not fail in Slurm: it would wait in the queue.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from danling_conf.schema.launcher import SlurmLauncherConfig
from danling_conf.schema.layout import FILL, WORLD_AXES, Layout
from danling_conf.topology.machine import Machine
from danling_conf.topology.violation import ABSENT, Violation

_LAUNCHER = "hydra.launcher"


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """Capacity of a node and limits of its partition. None means unknown, and refuses nothing."""

    devices_per_node: int
    """GPUs of a node; 0 where jobs run on CPUs."""
    cpus_per_node: int | None = None
    nodes: int | None = None
    """Most nodes of one job."""
    minutes: int | None = None
    """Longest time limit."""
    name: str | None = None
    """Name of the partition."""

    def for_jobs(self, launcher: SlurmLauncherConfig) -> Capacity:
        """This capacity, with a node's values replaced by those that the launcher's settings give."""
        return self if launcher.gpus_per_node is None else replace(self, devices_per_node=launcher.gpus_per_node)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The resources that one job requests; one task for each rank, or for each replica group with all of its ranks."""

    nodes: int
    tasks_per_node: int
    gpus_per_node: int
    """0 for a job on CPUs."""
    cpus_per_task: int
    minutes: int
    """Time limit."""
    groups: int = 0
    """Replica groups that are the tasks; 0 where ranks are."""

    @property
    def task(self) -> str:
        """What a task is, for messages."""
        return "replica group" if self.groups else "rank"

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def gpu_hours(self) -> float:
        """GPU hours that the job takes at most."""
        return self.gpus * self.minutes / 60


def cluster_machine(here: Machine, capacity: Capacity, launcher: SlurmLauncherConfig) -> Machine:
    """The machine that the rules see for a job on a cluster: its nodes in place of this machine.

    Args:
        here: this machine; its installed packages are assumed for the cluster as well.
    """
    capacity = capacity.for_jobs(launcher)
    ranks = launcher.tasks_per_node or capacity.devices_per_node or 1
    return replace(
        here,
        devices=capacity.devices_per_node,
        started_world_size=None,
        launcher=None,
        compiler=True,  # unknown from here, so do not refuse
        cluster_world_size=(launcher.nodes or 1) * ranks,
    )


def shape_of(
    layout: Layout,
    *,
    on_cpu: bool,
    capacity: Capacity,
    launcher: SlurmLauncherConfig,
    name: str | None = None,
    groups: int = 0,
) -> tuple[Shape, list[Violation]]:
    """The shape of a layout's job, and its violations; with any, it must not be submitted.

    Explicit settings of the launcher win over derived values.

    Args:
        layout: layout with all degrees known.
        on_cpu: whether ranks run on CPUs, even where nodes have GPUs.
        name: name of the layout, for messages.
        groups: replica groups that the job starts, each a task of one node; 0 without fault tolerance.
    """
    if any(getattr(layout, axis) == FILL for axis in WORLD_AXES):
        raise ValueError(f"{layout} has a degree that is still to be filled")
    capacity = capacity.for_jobs(launcher)
    on_cpu = on_cpu or not capacity.devices_per_node
    in_task = layout.world_size if groups else 1
    cpus = in_task * _cpus_per_task(on_cpu, capacity, launcher)
    most = _most_tasks(on_cpu, cpus, capacity, in_task)
    nodes, tasks, violations = _spread(groups or layout.world_size, bool(groups), most, launcher, name)
    gpus = 0 if on_cpu else tasks * in_task * (launcher.gpus_per_task or 1)
    shape = Shape(
        nodes=nodes,
        tasks_per_node=tasks,
        gpus_per_node=gpus,
        cpus_per_task=cpus,
        minutes=launcher.timeout_min,
        groups=groups,
    )
    if groups:
        violations = [*_groups_beyond_node(shape, layout.world_size, capacity, launcher, name), *violations]
    if not violations:
        about = shape, capacity, launcher, name
        violations = [*_beyond_node(*about), *_beyond_partition(*about)]
    return shape, violations


def _cpus_per_task(on_cpu: bool, capacity: Capacity, launcher: SlurmLauncherConfig) -> int:
    if launcher.cpus_per_task is not None:
        return launcher.cpus_per_task
    if on_cpu or not capacity.cpus_per_node:
        return 1
    if launcher.cpus_per_gpu is not None:
        return launcher.cpus_per_gpu * (launcher.gpus_per_task or 1)
    return max(1, capacity.cpus_per_node // capacity.devices_per_node) * (launcher.gpus_per_task or 1)


def _most_tasks(on_cpu: bool, cpus: int, capacity: Capacity, in_task: int) -> int | None:
    """Tasks of so many ranks that fit on a node, at least one; None where its CPUs are unknown."""
    if not on_cpu:
        return max(1, capacity.devices_per_node // in_task)
    return None if capacity.cpus_per_node is None else max(1, capacity.cpus_per_node // cpus)


def _groups_beyond_node(
    shape: Shape, ranks: int, capacity: Capacity, launcher: SlurmLauncherConfig, name: str | None
) -> Iterator[Violation]:
    """What would cut a replica group of so many ranks, which is one task of a node."""
    if launcher.gpus_per_task is not None:
        rule = f"a task is a replica group, whose {_count(ranks, 'rank')} take a GPU each"
        yield Violation(f"{_LAUNCHER}.gpus_per_task", launcher.gpus_per_task, rule, "leave it out")
    has = None
    if shape.gpus_per_node and ranks > capacity.devices_per_node:
        has = _count(capacity.devices_per_node, "GPU")
    elif capacity.cpus_per_node is not None and shape.cpus_per_task > capacity.cpus_per_node:
        has = _count(capacity.cpus_per_node, "CPU")
    if has is not None:
        rule = f"a replica group of {_count(ranks, 'rank')} is started on one node, and a node has {has}"
        fix = "choose a smaller layout, or start each group as a job of its own (ft.lighthouse)"
        yield Violation("parallel", name or ABSENT, rule, fix)


def _spread(
    ranks: int, in_groups: bool, most: int | None, launcher: SlurmLauncherConfig, name: str | None
) -> tuple[int, int, list[Violation]]:
    """Number of nodes, tasks on each, and violations where the tasks cannot be spread like that."""
    nodes, tasks = launcher.nodes, launcher.tasks_per_node
    unit = "replica group" if in_groups else "rank"
    what = f"{'the run' if in_groups else name or 'the layout'} has {_count(ranks, unit)}"
    if nodes is not None and tasks is not None:
        rule = f"{what}, and {_count(nodes, 'node')} of {_count(tasks, 'task')} are {nodes * tasks}"
        fault = Violation(f"{_LAUNCHER}.tasks_per_node", tasks, rule, "leave out one of nodes and tasks_per_node")
        return nodes, tasks, [fault] if nodes * tasks != ranks else []
    if nodes is not None:
        fault = Violation(
            f"{_LAUNCHER}.nodes",
            nodes,
            f"{what}, which do not divide evenly over {_count(nodes, 'node')}",
            f"leave it out, or choose a divisor of {ranks}",
        )
        return nodes, max(1, ranks // nodes), [fault] if ranks % nodes else []
    if tasks is not None:
        fault = Violation(
            f"{_LAUNCHER}.tasks_per_node",
            tasks,
            f"{what}, which do not fill nodes of {_count(tasks, 'task')}",
            f"leave it out, or choose a divisor of {ranks}",
        )
        return max(1, ranks // tasks), tasks, [fault] if ranks % tasks else []
    nodes = 1 if most is None else -(-ranks // most)  # rounded up
    if ranks % nodes == 0:
        return nodes, ranks // nodes, []
    even = next(count for count in range(nodes, ranks + 1) if ranks % count == 0)
    if in_groups:
        return even, ranks // even, []
    fault = Violation(
        "parallel",
        name or ABSENT,
        f"{_count(ranks, 'rank')} do not divide evenly over {nodes} nodes of {most}",
        f"choose a multiple of {most} ranks, or {_LAUNCHER}.nodes={even} ({_count(ranks // even, 'rank')} on each)",
    )
    return nodes, max(1, ranks // nodes), [fault]


def _beyond_node(
    shape: Shape, capacity: Capacity, launcher: SlurmLauncherConfig, name: str | None
) -> Iterator[Violation]:
    """Faults of requesting more than a node has. Each names the setting that decides, or that spread the ranks."""
    spread = _first_set(launcher, "tasks_per_node", "nodes") or ("parallel", name or ABSENT)
    ranks = _count(shape.tasks_per_node, shape.task)
    if shape.gpus_per_node > capacity.devices_per_node:
        several = launcher.gpus_per_task is not None and launcher.gpus_per_task > 1
        path, value = (f"{_LAUNCHER}.gpus_per_task", launcher.gpus_per_task) if several else spread
        rule = f"{ranks} on a node take {_count(shape.gpus_per_node, 'GPU')}"
        has = _count(capacity.devices_per_node, "GPU")
        yield Violation(path, value, f"{rule}, and a node has {has}", f"at most {capacity.devices_per_node} on a node")
    cpus = shape.tasks_per_node * shape.cpus_per_task
    if capacity.cpus_per_node is not None and cpus > capacity.cpus_per_node:
        asked = ("cpus_per_task", "cpus_per_gpu") if shape.gpus_per_node else ("cpus_per_task",)
        path, value = _first_set(launcher, *asked) or spread
        cores = _count(shape.cpus_per_task, "CPU")
        rule = f"{ranks} of {cores} take {cpus} CPUs, and a node has {capacity.cpus_per_node}"
        yield Violation(path, value, rule, _fewer_cpus(shape, capacity.cpus_per_node))


def _beyond_partition(
    shape: Shape, capacity: Capacity, launcher: SlurmLauncherConfig, name: str | None
) -> Iterator[Violation]:
    """What a partition does not allow."""
    where = f"the partition {capacity.name}" if capacity.name else "the partition"
    if capacity.nodes is not None and shape.nodes > capacity.nodes:
        path, value = _first_set(launcher, "nodes") or ("parallel", name or ABSENT)
        rule = f"it takes {_count(shape.nodes, 'node')}, and a job in {where} may have {capacity.nodes}"
        yield Violation(path, value, rule, "choose a smaller layout, or another partition")
    if capacity.minutes is not None and shape.minutes > capacity.minutes:
        rule = f"jobs in {where} may take {capacity.minutes} minutes"
        fix = f"at most {capacity.minutes}: a run that reaches it is saved and requeued"
        yield Violation(f"{_LAUNCHER}.timeout_min", shape.minutes, rule, fix)


def _first_set(launcher: SlurmLauncherConfig, *names: str) -> tuple[str, Any] | None:
    """Path and value of the first of these settings that is set; None where none is."""
    given = ((f"{_LAUNCHER}.{name}", getattr(launcher, name)) for name in names)
    return next((item for item in given if item[1] is not None), None)


def _fewer_cpus(shape: Shape, cpus_per_node: int) -> str:
    fitting = cpus_per_node // shape.tasks_per_node
    return f"{_LAUNCHER}.cpus_per_task={fitting}, or more nodes" if fitting else "spread the ranks over more nodes"


def _count(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
