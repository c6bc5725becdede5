"""Before anything is started: every job of a sweep composed and checked, all faults of all jobs found."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Union

from hydra.core.utils import filter_overrides
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from danling_conf.config.faults import all_faults
from danling_conf.config.hydra_adapter import Composer, shadowed_settings
from danling_conf.config.identity import layout_name
from danling_conf.config.job import Job
from danling_conf.config.launcher_settings import check_launcher, launcher_in
from danling_conf.config.resolve import inspect
from danling_conf.config.sweep_composer import SweepComposer
from danling_conf.schema import Layout, RunnerConfig
from danling_conf.schema.launcher import LauncherConfig, SlurmLauncherConfig
from danling_conf.sweep.policy import parse_on_failure
from danling_conf.topology.layout import fill
from danling_conf.topology.machine import Machine, this_machine
from danling_conf.topology.resources import Capacity, Shape, cluster_machine, shape_of
from danling_conf.topology.rules import Context
from danling_conf.topology.rules.world import known_layout
from danling_conf.topology.violation import ConfigRefused, Violation, unique

Nodes = Union[Capacity, Callable[[SlurmLauncherConfig], Capacity]]
"""What the nodes have and the partition allows: the same for all jobs, or asked for the settings of a job that runs on
Slurm, which raises ConfigRefused where there is no answer."""

_SAME_IN_ALL_JOBS = "${hydra.job.name}"
_UNKNOWN = Capacity(devices_per_node=8)
"""Fills layouts where nobody knows the nodes, so that nothing but this is refused for it."""


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A job of a sweep that was not accepted."""

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
) -> tuple[list[Job], list[Refused]]:
    """Compose and check every job of a sweep; the accepted ones and the others, each in order.

    Args:
        master: the sweep's own configuration.
        first: number of the first job.
        machine: where jobs would start; this machine when None.
        capacity: what the nodes have and the partition allows, for jobs that start on a cluster. Where it is asked for
            and refused, this is a fault of the jobs like others.

    Raises Hydra's errors where the sweep itself cannot be composed.
    """
    preflight = Preflight(composing, master, machine=machine, capacity=capacity)
    accepted, refused = [], []
    for number, overrides in enumerate(jobs, first):
        try:
            accepted.append(preflight.check(overrides, number))
        except ConfigRefused as refusal:
            refused.append(Refused(number=number, overrides=own(overrides), violations=refusal.violations))
    return accepted, refused


class Preflight:
    """Checks jobs of one sweep; what they have in common is looked at once."""

    def __init__(
        self, composing: Composer, master: DictConfig, *, machine: Machine | None, capacity: Nodes | None
    ) -> None:
        self._composing, self._master = composing, master
        self._jobs = SweepComposer(composing, master)
        self._here = machine or this_machine()
        self._nodes = capacity
        self._asked: dict[tuple[str | None, int | None], tuple[Capacity, list[Violation]]] = {}
        self._shadowed: dict[type[RunnerConfig], list[Violation]] = {}
        self._launchers: dict[str, tuple[LauncherConfig | None, list[Violation]]] = {}

    def check(self, overrides: Sequence[str], number: int) -> Job:
        """The accepted job. Raises ConfigRefused with all of its faults."""
        try:
            composed, hydra = self._jobs.compose_job(overrides, number)
            launcher, shown, violations = self._launcher(composed, hydra)
        except ConfigRefused:
            raise
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            settings = launcher_in(self._master)[0]
            capacity: Capacity | None = _UNKNOWN
            unanswered: list[Violation] = []
            known = not self._depends_on_jobs()
            if known:
                capacity, unanswered = self._capacity(settings)
            context = self._context(overrides, settings, capacity)

            def launcher_faults(config: RunnerConfig, composed: DictConfig) -> list[Violation]:
                launcher = launcher_in(composed)[0]
                if capacity is None or unanswered or not known:
                    return _policy_faults(launcher)
                return _policy_faults(launcher) + _shape_faults(config, context, capacity, launcher)

            faults = all_faults(
                self._composing, overrides, context, error, compose=self._jobs.compose, also=launcher_faults
            )
            raise ConfigRefused(unique([*faults, *unanswered])) from error
        declared = OmegaConf.get_type(composed)
        kind = declared if isinstance(declared, type) and issubclass(declared, RunnerConfig) else RunnerConfig
        capacity, unanswered = self._capacity(launcher)
        context = self._context(overrides, launcher, capacity)
        config, found = inspect(composed, kind=kind, context=context, spent=True)
        violations = self._hidden(kind) + violations + found + unanswered
        if config is not None and capacity is not None and not unanswered:
            violations += _shape_faults(config, context, capacity, launcher)
        if violations:
            raise ConfigRefused(violations)
        job = Job(number=number, overrides=own(overrides), config=config, hydra=hydra)
        if shown is not None:
            vars(job)["launcher"] = shown  # known already: asking the job would put its configuration together again
        return job

    def _launcher(
        self, composed: DictConfig, hydra: Mapping[str, Any]
    ) -> tuple[LauncherConfig | None, dict[str, Any] | None, list[Violation]]:
        """The launcher's settings, typed and plain, and their faults."""
        given = hydra["launcher"]
        plain = {key: hydra["job"]["name"] if value == _SAME_IN_ALL_JOBS else value for key, value in given.items()}
        if "${" in str(plain):
            whole: Any = OmegaConf.create({**OmegaConf.to_container(composed), "hydra": dict(hydra)})  # type: ignore[dict-item]
            resolved: Any = OmegaConf.to_container(whole.hydra.launcher, resolve=True)
            plain = resolved
        text = json.dumps(plain, sort_keys=True, default=str)
        if text not in self._launchers:
            typed, faults = check_launcher(plain)
            self._launchers[text] = typed, faults + _policy_faults(typed)
        return self._launchers[text][0], plain, list(self._launchers[text][1])

    def _context(self, overrides: Sequence[str], launcher: LauncherConfig | None, capacity: Capacity | None) -> Context:
        given = frozenset(item.partition("=")[0].lstrip("+~") for item in overrides)
        machine = self._here
        if capacity is not None:
            settings = launcher if isinstance(launcher, SlurmLauncherConfig) else SlurmLauncherConfig()
            machine = cluster_machine(machine, capacity, settings)
        return Context(machine=machine, given=given)

    def _depends_on_jobs(self) -> bool:
        """Whether settings of the jobs say on which nodes they run, which is not known of one that does not compose."""
        given: Any = OmegaConf.to_container(self._master.hydra.launcher)
        return callable(self._nodes) and any("${" in str(given.get(name)) for name in ("partition", "gpus_per_node"))

    def _capacity(self, launcher: LauncherConfig | None) -> tuple[Capacity | None, list[Violation]]:
        """What is known of a job's nodes, and why it is not where it had to be asked for; asked once a partition."""
        if not callable(self._nodes):
            return self._nodes, []
        if not isinstance(launcher, SlurmLauncherConfig):
            return None, []
        place = launcher.partition, launcher.gpus_per_node
        if place not in self._asked:
            try:
                self._asked[place] = self._nodes(launcher), []
            except ConfigRefused as refusal:
                self._asked[place] = _UNKNOWN, list(refusal.violations)
        capacity, unanswered = self._asked[place]
        return capacity, list(unanswered)

    def _hidden(self, kind: type[RunnerConfig]) -> list[Violation]:
        if kind not in self._shadowed:
            self._shadowed[kind] = shadowed_settings(self._composing, kind)
        return list(self._shadowed[kind])


def shapes_of(jobs: Sequence[Job], capacity: Nodes | None) -> dict[int, Shape]:
    """Shapes of accepted jobs by their numbers. A launcher that is not Slurm's counts as Slurm's with its defaults.

    Args:
        capacity: as for `check_jobs`; this machine is one node for jobs that are not on a cluster.

    Raises ConfigRefused where one does not fit, which `check_jobs` has told if it knew the capacity.
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


def _shape_faults(
    config: RunnerConfig, context: Context, capacity: Capacity, launcher: LauncherConfig | None
) -> list[Violation]:
    """What of a job does not fit the cluster, whatever else is wrong with it."""
    layout = known_layout(config)
    try:
        return (
            []
            if layout is None
            else _shape(fill(layout, context.machine.fill_world_size), config, capacity, launcher)[1]
        )
    except ValueError:
        return []  # the rule of world sizes says so


def _shape(
    layout: Layout, config: RunnerConfig, capacity: Capacity, launcher: LauncherConfig | None
) -> tuple[Shape, list[Violation]]:
    on_cpu = config.parallel.mesh_device_type == "cpu"
    settings = launcher if isinstance(launcher, SlurmLauncherConfig) else SlurmLauncherConfig()
    return shape_of(layout, on_cpu=on_cpu, capacity=capacity, launcher=settings, name=layout_name(layout))


def own(overrides: Sequence[str]) -> tuple[str, ...]:
    """The overrides of a job itself, without those of Hydra."""
    return tuple(item for item in filter_overrides(list(overrides)) if not item.lstrip("+~").startswith("hydra/"))


def _policy_faults(launcher: LauncherConfig | None) -> list[Violation]:
    if launcher is None:
        return []
    try:
        parse_on_failure(launcher.on_failure)
    except ValueError:
        rule = "it is continue, stop, or retry with how often"
        fix = "write continue, stop, or 'retry 2'"
        return [Violation("hydra.launcher.on_failure", launcher.on_failure, rule, fix)]
    return []
