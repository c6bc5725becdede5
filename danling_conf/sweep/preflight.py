"""Pre-flight of a sweep: composes and checks every job before the first one starts, and reports all faults at once.

A sweep that fails at its last job after hours in a queue has wasted them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Union

from hydra.core.utils import filter_overrides
from omegaconf import DictConfig, OmegaConf

from danling_conf.config.check import check_composed, context_of
from danling_conf.config.faults import all_faults
from danling_conf.config.hydra_adapter import COMPOSITION_ERRORS, Composer
from danling_conf.config.identity import layout_name
from danling_conf.config.job import Job, check_launcher, launcher_in, no_launcher
from danling_conf.config.resolve import declared_kind
from danling_conf.config.sweep_composer import SweepComposer
from danling_conf.schema import FILL, Layout, RunnerConfig, notes_of
from danling_conf.schema.launcher import LauncherConfig, SlurmLauncherConfig, SubmititLocalConfig
from danling_conf.sweep.monitor import parse_on_failure
from danling_conf.topology.layout import fill
from danling_conf.topology.machine import Machine, this_machine
from danling_conf.topology.resources import Capacity, Shape, cluster_machine, shape_of
from danling_conf.topology.rules import Context
from danling_conf.topology.rules.fault_tolerance import starts_groups
from danling_conf.topology.rules.world import known_layout
from danling_conf.topology.violation import ConfigRefused, Violation, unique

Nodes = Union[Capacity, Callable[[SlurmLauncherConfig], Capacity]]
"""Capacity of the nodes: the same for all jobs, or a function of a job's Slurm settings, which raises ConfigRefused
where Slurm does not answer."""

_SAME_IN_ALL_JOBS = "${hydra.job.name}"
_UNKNOWN = Capacity(devices_per_node=8)
"""Stands in where the nodes are unknown, so that the rules do not report faults that only follow from that."""


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A refused job of a sweep."""

    number: int
    """Its place in the sweep."""
    overrides: tuple[str, ...]
    violations: tuple[Violation, ...]


def check_jobs(
    composing: Composer,
    master: DictConfig,
    jobs: Sequence[Sequence[str]],
    first: int,
    *,
    machine: Machine | None = None,
    capacity: Nodes | None = None,
    plain_hydra: bool = False,
) -> tuple[list[Job], list[Refused]]:
    """Compose and check every job of a sweep.

    Args:
        master: the sweep's own configuration.
        jobs: overrides of each job.
        first: number of the first job.
        machine: where jobs would start; this machine when None.
        capacity: capacity of the nodes, for jobs on a cluster. Where Slurm does not answer, that is reported as a fault
            of the jobs.
        plain_hydra: as for `Preflight`.

    Returns:
        The accepted jobs and the refused ones, each in order.

    Raises:
        HydraException: the sweep itself cannot be composed.
    """
    preflight = Preflight(composing, master, machine=machine, capacity=capacity, plain_hydra=plain_hydra)
    accepted, refused = [], []
    for number, overrides in enumerate(jobs, first):
        try:
            accepted.append(preflight.check(overrides, number))
        except ConfigRefused as refusal:
            refused.append(Refused(number=number, overrides=own(overrides), violations=refusal.violations))
    return accepted, refused


class Preflight:
    """Checks the jobs of one sweep.

    Each configuration is checked like that of a single run. A sweep adds the settings of its launcher and the resources
    that each job takes. Whatever jobs have in common is looked up once.
    """

    def __init__(
        self,
        composing: Composer,
        master: DictConfig,
        *,
        machine: Machine | None,
        capacity: Nodes | None,
        plain_hydra: bool = False,
    ) -> None:
        """`plain_hydra`: whether the app's entry is `@hydra.main`; without our base config, its loop is its own."""
        self._plain_hydra = plain_hydra
        self._composing, self._master = composing, master
        self._jobs = SweepComposer(composing, master)
        self._here = machine or this_machine()
        self._nodes = capacity
        self._capacities: dict[tuple[str | None, int | None], tuple[Capacity, list[Violation]]] = {}
        self._launchers: dict[str, tuple[LauncherConfig | None, list[Violation]]] = {}

    def check(self, overrides: Sequence[str], number: int) -> Job:
        """The accepted job. Raises ConfigRefused with all of its faults."""
        try:
            composed, hydra, changed = self._jobs.compose_job(overrides, number)
            settings = _launcher_settings(composed, hydra)
            launcher, faults = self._check_launcher(settings)
        except ConfigRefused:
            raise
        except COMPOSITION_ERRORS as error:
            raise ConfigRefused(self._all_faults(overrides, error)) from error
        capacity, unanswered = self._capacity(launcher)
        context = context_of(overrides, self._machine(launcher, capacity), hydra["runtime"]["choices"])
        context = replace(context, own_loop=self._plain_hydra and declared_kind(composed) is None)

        def faults_of_job(config: RunnerConfig | None) -> list[Violation]:
            if config is not None and isinstance(launcher, SubmititLocalConfig):
                return faults + _local_faults(config, launcher)
            if config is None or capacity is None or unanswered:
                return faults + unanswered
            return faults + _shape_faults(config, context, capacity, launcher)

        config = check_composed(composed, context, faults_of_job, spent=True, changed=changed)
        return Job(number=number, overrides=own(overrides), config=config, hydra=hydra, launcher=settings)

    def _all_faults(self, overrides: Sequence[str], error: Exception) -> list[Violation]:
        """Every fault of a job that Hydra refuses to compose."""
        settings = launcher_in(self._master)[0]
        capacity: Capacity | None = _UNKNOWN
        unanswered: list[Violation] = []
        known = not self._nodes_depend_on_job()
        if known:
            capacity, unanswered = self._capacity(settings)
        context = context_of(overrides, self._machine(settings, capacity))

        def faults_of_job(config: RunnerConfig, composed: DictConfig) -> list[Violation]:
            launcher = launcher_in(composed)[0]
            if capacity is None or unanswered or not known:
                return _policy_faults(launcher)
            return _policy_faults(launcher) + _shape_faults(config, context, capacity, launcher)

        compose = self._jobs.compose
        faults = all_faults(self._composing, overrides, context, error, compose=compose, also=faults_of_job)
        return unique([*faults, *unanswered])

    def _check_launcher(self, settings: Mapping[str, Any]) -> tuple[LauncherConfig | None, list[Violation]]:
        """The launcher's settings, typed, and their faults."""
        text = json.dumps(settings, sort_keys=True, default=str)
        if text not in self._launchers:
            typed, faults = check_launcher(settings)
            self._launchers[text] = typed, faults + _policy_faults(typed)
        return self._launchers[text]

    def _machine(self, launcher: LauncherConfig | None, capacity: Capacity | None) -> Machine:
        """The machine that the rules check a job against."""
        if capacity is None:
            return self._here
        settings = launcher if isinstance(launcher, SlurmLauncherConfig) else SlurmLauncherConfig()
        return cluster_machine(self._here, capacity, settings)

    def _nodes_depend_on_job(self) -> bool:
        """Whether a job's own settings choose its nodes. Where such a job does not compose, its nodes are unknown."""
        given: Any = OmegaConf.to_container(self._master.hydra.launcher)
        return callable(self._nodes) and any("${" in str(given.get(name)) for name in ("partition", "gpus_per_node"))

    def _capacity(self, launcher: LauncherConfig | None) -> tuple[Capacity | None, list[Violation]]:
        """The capacity of a job's nodes, and faults where the cluster did not answer. One query for each partition."""
        if not callable(self._nodes):
            return self._nodes, []
        if not isinstance(launcher, SlurmLauncherConfig):
            return None, []
        place = launcher.partition, launcher.gpus_per_node
        if place not in self._capacities:
            try:
                self._capacities[place] = self._nodes(launcher), []
            except ConfigRefused as refusal:
                self._capacities[place] = _UNKNOWN, list(refusal.violations)
        return self._capacities[place]


def _launcher_settings(composed: DictConfig, hydra: Mapping[str, Any]) -> dict[str, Any]:
    """`hydra.launcher` of a job as plain values, interpolations resolved. Raises OmegaConf's errors."""
    given = hydra["launcher"]
    if not isinstance(given, Mapping):
        raise ConfigRefused([no_launcher(given)])
    # Most launchers refer to nothing but the job's name. Building the whole node to resolve that costs more than the
    # rest of the check.
    plain = {key: hydra["job"]["name"] if value == _SAME_IN_ALL_JOBS else value for key, value in given.items()}
    if "${" not in str(plain):
        return plain
    config: Any = OmegaConf.to_container(composed)
    whole = OmegaConf.create({**config, "hydra": dict(hydra)})
    resolved: Any = OmegaConf.to_container(whole.hydra.launcher, resolve=True)
    return dict(resolved)


def shapes_of(jobs: Sequence[Job], capacity: Nodes | None) -> dict[int, Shape]:
    """Shapes of accepted jobs by their numbers. Jobs of other launchers are shaped by Slurm's default settings.

    Args:
        capacity: as for `check_jobs`; for jobs that are not on a cluster, this machine counts as one node.

    Raises:
        ConfigRefused: a job does not fit; `check_jobs` has refused it already if it knew the capacity.
    """
    known: dict[str, tuple[LauncherConfig | None, Capacity]] = {}
    shapes = {}
    for job in jobs:
        text = json.dumps(job.launcher, sort_keys=True, default=str)
        if text not in known:
            launcher, nodes = check_launcher(job.launcher)[0], capacity
            if callable(nodes):
                nodes = nodes(launcher) if isinstance(launcher, SlurmLauncherConfig) else None
            known[text] = launcher, nodes or Capacity(devices_per_node=this_machine().devices)
        launcher, nodes = known[text]
        shapes[job.number], violations = _shape(job.layout, job.config, nodes, launcher)
        if violations:
            raise ConfigRefused(violations)
    return shapes


def _sound_layout(config: RunnerConfig) -> Layout | None:
    """The layout of a job; None where its degrees make none, as the rules report."""
    layout = known_layout(config)
    return None if layout is None or (layout.shard != 1 and not layout.fsdp) else layout


def _shape_faults(
    config: RunnerConfig, context: Context, capacity: Capacity, launcher: LauncherConfig | None
) -> list[Violation]:
    """Faults of a job that does not fit the cluster, reported next to its other faults."""
    layout = _sound_layout(config)
    if layout is None:
        return []
    try:
        filled = fill(layout, context.machine.fill_world_size)
    except ValueError:
        return []  # a degree of -1 that does not divide: the rule about world sizes reports it
    return _shape(filled, config, capacity, launcher)[1]


def _shape(
    layout: Layout, config: RunnerConfig, capacity: Capacity, launcher: LauncherConfig | None
) -> tuple[Shape, list[Violation]]:
    on_cpu = config.parallel.mesh_device_type == "cpu"
    settings = launcher if isinstance(launcher, SlurmLauncherConfig) else SlurmLauncherConfig()
    groups = config.ft.group_size if config.ft.enabled and starts_groups(config, this_machine()) else 0
    name = layout_name(layout)
    return shape_of(layout, on_cpu=on_cpu, capacity=capacity, launcher=settings, name=name, groups=groups)


def _local_faults(config: RunnerConfig, launcher: SubmititLocalConfig) -> list[Violation]:
    """Resources that `submitit_local` would give to a job, where its layout takes others."""
    layout = _sound_layout(config)
    if layout is None or FILL in layout.degrees().values():
        return []
    size = layout.world_size
    allowed = {"tasks_per_node": (size,), "gpus_per_node": (size, 0)}
    return [
        Violation(
            f"hydra.launcher.{name}",
            value,
            f"the layout {layout_name(layout)} has {size} rank{'s' if size > 1 else ''}, and each takes one device",
            f"leave it out, or write {size}",
        )
        for name, fitting in allowed.items()
        if (value := getattr(launcher, name)) is not None and value not in fitting
    ]


def notes_of_job(job: Job) -> list[str]:
    """What was set aside of an accepted job's settings, and settings of its launcher without an effect."""
    launcher = check_launcher(job.launcher)[0]
    unused = ("cpus_per_task", "mem_gb") if isinstance(launcher, SubmititLocalConfig) else ()
    return [
        *notes_of(job.config),
        *(
            f"hydra.launcher.{name} has no effect: jobs on this machine share its memory and cores"
            for name in unused
            if getattr(launcher, name) is not None
        ),
    ]


def own(overrides: Sequence[str]) -> tuple[str, ...]:
    """A job's own overrides, without those of Hydra."""
    return tuple(item for item in filter_overrides(list(overrides)) if not item.lstrip("+~").startswith("hydra/"))


def _policy_faults(launcher: LauncherConfig | None) -> list[Violation]:
    if launcher is None:
        return []
    try:
        parse_on_failure(launcher.on_failure)
    except ValueError:
        rule = "it must be continue, stop, or retry with a number"
        fix = "write continue, stop, or 'retry 2'"
        return [Violation("hydra.launcher.on_failure", launcher.on_failure, rule, fix)]
    return []
