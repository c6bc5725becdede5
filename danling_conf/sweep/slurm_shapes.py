"""What each job of a sweep asks of Slurm: from its layout, its launcher's settings, and what its partition offers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import Any

from danling_conf.launch.slurm.queries import SlurmUnavailable, partition
from danling_conf.schema.launcher import SlurmLauncherConfig
from danling_conf.topology.resources import Capacity, Shape
from danling_conf.topology.violation import ConfigRefused, Violation

_WARNING_SECONDS = 120


def settings_of(launcher: Mapping[str, Any]) -> SlurmLauncherConfig:
    """The launcher's settings, typed; `launcher` is `hydra.launcher`, resolved."""
    known = {item.name for item in fields(SlurmLauncherConfig)}
    return SlurmLauncherConfig(**{name: value for name, value in launcher.items() if name in known})


@cache
def capacity_of(name: str | None) -> Capacity:
    """What a partition offers, asked of Slurm once. Raises ConfigRefused where there is none, or no Slurm."""
    try:
        found = partition(name)
    except LookupError as error:
        fix = "choose one of these" if name else "choose one: hydra.launcher.partition=NAME"
        raise ConfigRefused([Violation("hydra.launcher.partition", name, str(error.args[0]), fix)]) from error
    except SlurmUnavailable as error:
        fix = "submit from a machine of the cluster; `danling-conf check SCRIPT -m ... --gpus-per-node N` checks here"
        raise ConfigRefused([Violation("hydra/launcher", "danling_slurm", str(error), fix)]) from error
    minutes = None if found.minutes is None else int(found.minutes)
    return Capacity(
        devices_per_node=found.gpus_per_node, cpus_per_node=found.cpus_per_node, nodes=found.nodes, minutes=minutes,
        name=found.name,
    )  # fmt: skip


def capacity_for(launcher: SlurmLauncherConfig) -> Capacity:
    """What the partition of a launcher's settings offers. Raises as `capacity_of`."""
    return capacity_of(launcher.partition)


def frozen_shape(shape: Shape, launcher: SlurmLauncherConfig) -> dict[str, Any]:
    """What a job file says of a shape."""
    limit = 60 * launcher.timeout_min
    return {
        "nodes": shape.nodes,
        "tasks_per_node": shape.tasks_per_node,
        "gpus_per_node": shape.gpus_per_node,
        "cpus_per_task": shape.cpus_per_task,
        "signal_delay_s": launcher.signal_delay_s or min(_WARNING_SECONDS, limit // 5),
    }
