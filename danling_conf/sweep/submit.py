"""A sweep: every job checked, then run where its launcher says; true exit code, scores for Hydra's sweepers."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.utils import get_class
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from danling_conf.config.check import check, compose_or_refuse
from danling_conf.config.hydra_adapter import Composer
from danling_conf.config.job import Job
from danling_conf.launch.app import App
from danling_conf.launch.slurm.queries import SlurmUnavailable
from danling_conf.launch.workers import worker_command
from danling_conf.records.code import code_identity
from danling_conf.records.job_file import Program
from danling_conf.records.ledger import Record
from danling_conf.records.status import Status
from danling_conf.records.sweep_directory import SweepDirectory
from danling_conf.records.sweep_lock import FollowingLock
from danling_conf.sweep.hydra_launcher import JobsLauncher
from danling_conf.sweep.preflight import Preflight, Refused, check_jobs, own, shapes_of
from danling_conf.sweep.preflight_tables import fault_table, shape_table
from danling_conf.sweep.run import backend_for, follow
from danling_conf.sweep.slurm_shapes import capacity_for, frozen_shape, settings_of
from danling_conf.sweep.sweep_refused import SweepRefused
from danling_conf.topology.violation import ABSENT, ConfigRefused, Violation, unique

# Hydra makes the sweep's directory before it launches; its name must be known without a configuration object.
_DIRECTORY = "hydra.sweep.dir='${{workspace_root}}/${{lineage}}/${{experiment}}/sweeps/{stamp}'"
_LOOKED_AT = 16
"""Jobs of a refused sweep whose faults are collected one by one."""


@dataclass
class Sweep:
    """What the launcher needs to run jobs; Hydra carries it where it expects a task function."""

    app: App
    composing: Composer
    arguments: list[str]
    """Of the command line."""
    __name__: str = "sweep"

    def __call__(self, config: DictConfig) -> Any:
        raise TypeError("this sweep runs with the launchers of danling-conf: hydra/launcher=danling_local")


def run_sweep(app: App, composing: Composer, overrides: Sequence[str]) -> None:
    """Run Hydra's sweep over this machine. Exits with 1 when a job failed; raises ConfigRefused when one is refused."""
    arguments = list(overrides)
    arguments += _launcher(composing, arguments)
    if not any(item.startswith("hydra.sweep.dir=") for item in arguments):
        arguments.append(_DIRECTORY.format(stamp=datetime.now().strftime("%Y%m%d-%H%M%S-%f")))
    sweep = Sweep(app=app, composing=composing, arguments=["-m", *overrides])
    try:
        composing.multirun(arguments, sweep)
    except (HydraException, OmegaConfBaseException) as error:
        _remove_unused(composing, arguments)
        raise _refusal_of(composing, arguments, error) from error
    except ConfigRefused:
        _remove_unused(composing, arguments)
        raise
    except JobFailed:
        sys.exit(1)


def _launcher(composing: Composer, arguments: list[str]) -> list[str]:
    """The override that chooses our launcher in place of Hydra's default one; none where the user chose one of ours.

    Raises ConfigRefused for any other launcher, which would run jobs that nobody has checked.
    """
    ours = "hydra/launcher=danling_local"
    try:
        composed = composing.compose(arguments, multirun=True)
        kind = get_class(composed.hydra.launcher._target_)
    except (HydraException, OmegaConfBaseException, ValueError):
        # Whatever is wrong is told of all jobs, by the sweep.
        return [] if any(item.startswith("hydra/launcher=") for item in arguments) else [ours]
    chosen = composed.hydra.runtime.choices.get("hydra/launcher")
    if issubclass(kind, JobsLauncher):
        return []
    if chosen != "basic" or any(item.startswith("hydra/launcher=") for item in arguments):
        rule = "it would run jobs without checking all of them first, and cannot start a layout's processes"
        raise ConfigRefused([Violation("hydra/launcher", chosen, rule, f"leave it out, or write {ours}")])
    return [ours]


class JobFailed(RuntimeError):
    """A job of the sweep did not complete; why has been shown."""


def run_jobs(sweep: Sweep, master: DictConfig, jobs: list[list[str]], first: int) -> list[JobReturn]:
    """Check all jobs, then run them where the launcher says; gives their results in order, scores as return values.

    Raises ConfigRefused, before any job starts, with the faults of all jobs.
    """
    cluster = cluster_of(master)
    if master.hydra.launcher.get("detach") and not _is_basic(master):
        sweeper = str(master.hydra.sweeper._target_).rpartition(".")[2]
        rule = f"{sweeper} chooses jobs by the scores of those before, which a detached sweep does not wait for"
        raise ConfigRefused([Violation("hydra.launcher.detach", True, rule, "leave it out")])
    capacity = capacity_for if cluster == "slurm" else None
    accepted, refused = check_jobs(sweep.composing, master, jobs, first, capacity=capacity)
    if refused and not (accepted and master.hydra.launcher.skip_refused):
        raise SweepRefused(refused, of=len(jobs))
    if refused:
        print("\n".join(fault_table(refused, of=len(jobs))), file=sys.stderr)
        print("they are left out, as hydra.launcher.skip_refused says", file=sys.stderr)
    directory = SweepDirectory(path=Path(master.hydra.sweep.dir).absolute())
    records = dict(zip([job.number for job in accepted], start_jobs(sweep, directory, accepted, cluster), strict=True))
    return [
        _outcome(overrides, records.get(number), score_wanted=not _is_basic(master))
        for number, overrides in enumerate(jobs, first)
    ]


def start_jobs(sweep: Sweep, directory: SweepDirectory, jobs: Sequence[Job], cluster: str) -> list[Record]:
    """Plan accepted jobs in a sweep's directory, start them, and follow them to their end unless they are detached.

    Raises ConfigRefused when Slurm does not take them.
    """
    shapes = None
    if cluster == "slurm":
        asked = shapes_of(jobs, capacity_for)
        print("\n".join(shape_table(jobs, asked)), flush=True)
        shapes = {job.number: frozen_shape(asked[job.number], settings_of(job.launcher)) for job in jobs}
    launcher = jobs[0].launcher
    words = worker_command()[2 : -len(sys.argv[1:]) or None]
    code = code_identity(sweep.app.script.parent)
    program = Program(argv=tuple(words), directory=Path.cwd(), code_id=code.code_id)
    files = directory.plan(jobs, program, shapes)
    directory.ask(command=[*words, *sweep.arguments], program=program, code=code, cluster=cluster, launcher=launcher)
    print(f"sweep of {len(jobs)} job{'s' if len(jobs) > 1 else ''}: {directory.path}", flush=True)
    with FollowingLock(directory.path) as lock:
        lock.acquire()
        with _refusing():
            backend = backend_for(cluster, launcher, directory.path)
            backend.submit(list(files.values()))
        if not launcher.get("detach"):
            return follow(directory, backend, files, launcher, lock=lock)
    print(f"detached; to look after it: danling-conf runs {directory.path} --watch", flush=True)
    return list(directory.ledger.records().values())[-len(jobs) :]


def run_one(app: App, composing: Composer, composed: DictConfig, overrides: Sequence[str]) -> None:
    """A single run on Slurm, as a sweep of one job. Exits with 1 where it did not complete."""
    given = [str(item) for item in composed.hydra.overrides.task]
    job = Preflight(composing, composed, machine=None, capacity=capacity_for).check(given, 0)
    stamp, config = datetime.now().strftime("%Y%m%d-%H%M%S-%f"), job.config
    path = Path(config.workspace_root).expanduser() / config.lineage / config.experiment / "sweeps" / stamp
    path.mkdir(parents=True)
    sweep = Sweep(app=app, composing=composing, arguments=list(overrides))
    (record,) = start_jobs(sweep, SweepDirectory(path=path.absolute()), [job], "slurm")
    if record.ended and record.status != Status.COMPLETED:
        sys.exit(1)


@contextmanager
def _refusing() -> Iterator[None]:
    """What Slurm does not take, or does not answer, is the user's to mend."""
    try:
        yield
    except SlurmUnavailable as error:
        fix = "mend the launcher's settings; what was queued before it is in the ledger: danling-conf cancel ends it"
        raise ConfigRefused([Violation("hydra.launcher", ABSENT, str(error), fix)]) from error


def cluster_of(composed: DictConfig) -> str:
    """Where the launcher of a configuration runs jobs: `slurm` or `local`."""
    return str(getattr(get_class(composed.hydra.launcher._target_), "cluster", "local"))


def _is_basic(master: DictConfig) -> bool:
    """Whether the sweeper knows all jobs beforehand."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    return bool(get_class(master.hydra.sweeper._target_) is BasicSweeper)


def _outcome(overrides: list[str], record: Record | None, *, score_wanted: bool) -> JobReturn:
    """What Hydra's sweeper is told of a job; `record` is None for one that was left out."""
    outcome = JobReturn(overrides=list(overrides), status=JobStatus.COMPLETED)
    if record is None:
        outcome.return_value = None
        if score_wanted:
            outcome.status, outcome.return_value = JobStatus.FAILED, JobFailed("the job was refused")
    elif record.status == Status.COMPLETED or not record.ended:  # a detached one has not ended yet
        outcome.return_value = record.score
    else:
        outcome.status = JobStatus.FAILED
        outcome.return_value = JobFailed(f"{record.status}: {record.facts.get('error')}")
    return outcome


def _remove_unused(composing: Composer, arguments: list[str]) -> None:
    """Remove the directory that Hydra has made for a sweep of which no job was started."""
    try:
        directory = Path(composing.compose(arguments, multirun=True).hydra.sweep.dir)
    except (HydraException, OmegaConfBaseException, ValueError):
        return  # the sweep itself could not be composed, so nothing was made
    if directory.is_dir() and [item.name for item in directory.iterdir()] == ["multirun.yaml"]:
        shutil.rmtree(directory)


def _refusal_of(composing: Composer, overrides: Sequence[str], error: Exception) -> ConfigRefused:
    """The faults of a sweep that Hydra would not compose, and the jobs that have them.

    What Hydra minds in the sweep as a whole is in its first jobs; composing a thousand one by one would take minutes.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    try:
        parsed = OverridesParser.create(config_loader=composing.loader).parse_overrides(list(overrides))
        jobs = BasicSweeper.split_arguments(parsed, None)[0]
    except HydraException:
        jobs = [list(overrides)]
    refused = []
    for number, job in enumerate(jobs[:_LOOKED_AT]):
        try:
            check(composing, compose_or_refuse(composing, job), job)
        except ConfigRefused as refusal:
            refused.append(Refused(number=number, overrides=own(job), violations=refusal.violations))
    if refused and len(jobs) <= _LOOKED_AT:
        return SweepRefused(refused, of=len(jobs))
    if refused:
        return ConfigRefused(unique(item for job in refused for item in job.violations))
    said = str(error).strip().splitlines()[0]
    return ConfigRefused([Violation("sweep", " ".join(overrides), said, "mend the sweep's overrides")])
