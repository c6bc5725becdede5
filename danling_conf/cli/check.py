"""`danling-conf check`: composes and checks an app's configuration, or all jobs of its sweep, and starts nothing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from hydra.errors import HydraException

from danling_conf.cli.check_memory import memory_faults
from danling_conf.cli.inspect_app import inspect_app
from danling_conf.config.check import compose_or_refuse, warnings_of
from danling_conf.config.hydra_adapter import ConfigSearch, composer, overrides_of
from danling_conf.config.hydra_directories import run_directory_faults
from danling_conf.config.identity import config_id, difference_from_defaults, job_id
from danling_conf.config.job import check_launcher
from danling_conf.config.resolve import stack_of
from danling_conf.groups.layout_names import name_of
from danling_conf.launch.app import App
from danling_conf.launch.slurm.queries import SlurmUnavailable
from danling_conf.schema.launcher import SlurmLauncherConfig
from danling_conf.schema.printable import shell_line
from danling_conf.sweep.preflight import Preflight, check_jobs, shapes_of
from danling_conf.sweep.preflight_tables import SweepRefused, shape_table, varying
from danling_conf.sweep.slurm_backend import capacity_of
from danling_conf.sweep.submit import check_directory, launcher_override
from danling_conf.topology.hardware import GPUS_PER_NODE, Cluster, find_gpu
from danling_conf.topology.resources import Capacity
from danling_conf.topology.violation import ABSENT, ConfigRefused, Violation, show

_NUMBERS = ("--gpus-per-node", "--cpus-per-node")


@dataclass(frozen=True, kw_only=True)
class _Request:
    """The overrides of a command line, and the options among them."""

    overrides: list[str]
    multirun: bool
    capacity: Capacity | None
    cluster: Cluster | None
    """Devices that jobs must fit; None where that is not asked for."""


def check_app(script: str, argv: list[str]) -> list[str]:
    """Check an app. Returns lines that describe what would run.

    Args:
        argv: overrides, and anywhere among them `-m`, `--gpus-per-node N`, `--cpus-per-node N` and `--gpu NAME`.

    Raises ConfigRefused with all violations; for a sweep, with those of all its jobs.
    """
    request = _parse(argv)
    look = _check_sweep if request.multirun else _check
    return inspect_app(script, request.overrides, partial(look, request))


def _check(request: _Request, app: App, search: ConfigSearch, overrides: list[str]) -> list[str]:
    with composer(search) as composing:
        master = compose_or_refuse(composing, overrides)
        capacity = request.capacity or _nodes_of
        # Hydra's own overrides belong to the sweep's configuration, all others to its only job.
        given = overrides_of(master, "task")
        faults = run_directory_faults(master)
        try:
            job = Preflight(composing, master, machine=None, capacity=capacity).check(given, 0)
        except ConfigRefused as refusal:
            raise ConfigRefused([*faults, *refusal.violations]) from refusal
        if faults:
            raise ConfigRefused(faults)
    config, layout = job.config, job.layout
    differing = difference_from_defaults(config).items()
    # What `stack=auto` stands for was given by nobody.
    changed = [f"  {path}={show(value)}" for path, value in differing if (path, value) != ("stack", stack_of(layout))]
    processes = "1 process" if layout.world_size == 1 else f"{layout.world_size} processes"
    lines = [
        f"accepted: {shell_line(app.script.name, *overrides)}",
        f"layout {name_of(layout)}, {processes}; config {config_id(config)}, job {job_id(config)}",
    ]
    if request.capacity is not None or isinstance(check_launcher(job.launcher)[0], SlurmLauncherConfig):
        lines += shape_table([job], shapes_of([job], capacity))
    if request.cluster is not None:
        unfit, fitting = memory_faults(app, [job], request.cluster)
        if unfit:
            raise ConfigRefused(unfit[0].violations)
        lines += [line.partition(" ")[2] for line in fitting]
    warned = (f"warning: {line}" for line in warnings_of(config))
    return [*lines, "differs from the defaults in:", *changed, *warned]


def _check_sweep(request: _Request, app: App, search: ConfigSearch, overrides: list[str]) -> list[str]:
    with composer(search) as composing:
        given = [*overrides, *launcher_override(composing, overrides)]
        master = compose_or_refuse(composing, given, multirun=True)
        check_directory(composing, given)
        try:
            jobs = composing.sweep_jobs(master)
        except HydraException as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigRefused([Violation("sweep", ABSENT, reason, "fix the sweep's overrides")]) from error
        capacity = request.capacity or _nodes_of
        accepted, refused = check_jobs(composing, master, jobs, 0, capacity=capacity)
    if refused:
        raise SweepRefused(refused, of=len(jobs))
    fitting: list[str] = []
    if request.cluster is not None:
        refused, fitting = memory_faults(app, accepted, request.cluster)
        if refused:
            raise SweepRefused(refused, of=len(jobs))
    lines = [
        f"accepted: {len(jobs)} job{'' if len(jobs) == 1 else 's'} of {shell_line(app.script.name, *overrides)}",
        "",
    ]
    lines += shape_table(accepted, shapes_of(accepted, capacity))
    lines += ["", *fitting] if fitting else []
    varied = varying(jobs)
    return [*lines, "", "varies:", *(f"  {line}" for line in varied)] if varied else lines


def _nodes_of(launcher: SlurmLauncherConfig) -> Capacity:
    """Capacity of the partition from Slurm; without Slurm, from the launcher's settings of its nodes."""
    try:
        return capacity_of(launcher.partition)
    except ConfigRefused as refusal:
        if launcher.gpus_per_node is None or not isinstance(refusal.__cause__, SlurmUnavailable):
            raise
        return Capacity(devices_per_node=launcher.gpus_per_node)


def _parse(argv: list[str]) -> _Request:
    overrides, multirun = [], False
    given: dict[str, int | None] = dict.fromkeys(_NUMBERS, None)
    gpu: str | None = None
    rest = iter(argv)
    for word in rest:
        name, equals, value = word.partition("=")
        if word in ("-m", "--multirun"):
            multirun = True
        elif name in _NUMBERS:
            given[name] = _number(name, value if equals else next(rest, ""))
        elif name == "--gpu":
            gpu = value if equals else next(rest, "")
        else:
            overrides.append(word)
    gpus, cpus = (given[name] for name in _NUMBERS)
    capacity = None if gpus is None and cpus is None else Capacity(devices_per_node=gpus or 0, cpus_per_node=cpus)
    cluster = None if gpu is None else Cluster(gpu=find_gpu(gpu), gpus_per_node=gpus or GPUS_PER_NODE)
    return _Request(overrides=overrides, multirun=multirun, capacity=capacity, cluster=cluster)


def _number(name: str, text: str) -> int:
    if text.isdecimal() and (int(text) or name == "--gpus-per-node"):
        return int(text)
    raise ConfigRefused([Violation(name, text or ABSENT, "it is a whole number", f"write {name} 8")])
