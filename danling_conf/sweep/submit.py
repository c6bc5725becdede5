"""Submission of a sweep: Hydra's sweeper makes the jobs, all of them are checked, and the launcher's backend starts
them.

Hydra receives the scores, so that sweepers that learn from them work; the process exits with 1 if a job failed.
"""

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
from danling_conf.config.hydra_adapter import COMPOSITION_ERRORS, Composer, knows_all_jobs, overrides_of
from danling_conf.config.hydra_directories import (
    chosen_run_directory,
    chosen_sweep_directory,
    make_directory,
    sweep_directory_faults,
)
from danling_conf.config.job import Job
from danling_conf.launch.app import App, worker_command
from danling_conf.launch.slurm.queries import SlurmUnavailable
from danling_conf.records.code import code_identity
from danling_conf.records.job_file import Program
from danling_conf.records.ledger import Record
from danling_conf.records.logs import is_full
from danling_conf.records.run_directory import refusing_unwritable
from danling_conf.records.status import Status
from danling_conf.records.sweep_directory import SweepDirectory
from danling_conf.records.sweep_lock import SweepLock
from danling_conf.schema.files import LEDGER
from danling_conf.schema.printable import shell_line
from danling_conf.sweep.hydra_launcher import JobsLauncher, LaunchesJobs
from danling_conf.sweep.preflight import Preflight, Refused, check_jobs, notes_of_job, own, shapes_of
from danling_conf.sweep.preflight_tables import SweepRefused, fault_table, shape_table
from danling_conf.sweep.slurm_backend import capacity_for, frozen_shape
from danling_conf.sweep.supervise import backend_for, supervise
from danling_conf.topology.rules.launcher import folder_faults
from danling_conf.topology.violation import ABSENT, ConfigRefused, Violation, unique

# Hydra creates the sweep's directory, and writes to it, before it launches the first job. No configuration object
# exists at that time, so the path is an interpolation of settings. Microseconds in the stamp keep two sweeps apart.
_DIRECTORY = "hydra.sweep.dir='${{workspace_root}}/${{lineage}}/${{experiment}}/sweeps/{stamp}'"
_EXAMINED = 16
"""Most jobs of a refused sweep to compose one by one in search of faults; thousands would take minutes."""


@dataclass
class Sweep(LaunchesJobs):
    """A sweep of an app. Hydra passes it to our launchers as the task function."""

    app: App
    composing: Composer
    arguments: list[str]
    """Arguments of the command line."""
    __name__: str = "sweep"  # Hydra reads the name of a task function

    def __call__(self, config: DictConfig) -> Any:
        raise TypeError("this sweep runs with the launchers of danling-conf: hydra/launcher=danling_local")

    def launch(self, master: DictConfig, jobs: list[list[str]], first: int) -> list[JobReturn]:
        """Check and run a batch of jobs; scores are the return values.

        Raises:
            ConfigRefused: before any job starts, with the faults of all jobs.
        """
        cluster = cluster_of(master)
        if master.hydra.launcher.get("detach") and not knows_all_jobs(master):
            sweeper = str(master.hydra.sweeper._target_).rpartition(".")[2]
            rule = f"{sweeper} chooses jobs by the scores of earlier ones, which a detached sweep does not wait for"
            raise ConfigRefused([Violation("hydra.launcher.detach", True, rule, "leave it out")])
        capacity = capacity_for if cluster == "slurm" else None
        accepted, refused = check_jobs(self.composing, master, jobs, first, capacity=capacity)
        if refused and not (accepted and master.hydra.launcher.skip_refused):
            raise SweepRefused(refused, of=len(jobs))
        if refused:
            print("\n".join(fault_table(refused, of=len(jobs))), file=sys.stderr)
            print("skipping them, since hydra.launcher.skip_refused is true", file=sys.stderr)
        for note in dict.fromkeys(note for job in accepted for note in notes_of_job(job)):
            print(f"warning: {note}", file=sys.stderr)
        directory = SweepDirectory(path=Path(master.hydra.sweep.dir).absolute())
        started = start_jobs(self, directory, accepted, cluster)
        records = dict(zip([job.number for job in accepted], started, strict=True))
        return [
            _outcome(overrides, records.get(number), score_wanted=not knows_all_jobs(master))
            for number, overrides in enumerate(jobs, first)
        ]


def run_sweep(app: App, composing: Composer, overrides: Sequence[str]) -> None:
    """Run a sweep. Exits with 1 when a job failed; raises ConfigRefused when one is refused."""
    arguments = list(overrides)
    arguments += launcher_override(composing, arguments)
    if not check_directory(composing, arguments):
        arguments.append(_DIRECTORY.format(stamp=datetime.now().strftime("%Y%m%d-%H%M%S-%f")))
        try:
            check_directory(composing, arguments)
        except ConfigRefused as refusal:  # of the workspace, which every job has
            raise _refusal_of(composing, arguments, refusal) from refusal
    sweep = Sweep(app=app, composing=composing, arguments=["-m", *overrides])
    try:
        _make_directory(composing, arguments)
        composing.multirun(arguments, sweep)
    except (HydraException, OmegaConfBaseException) as error:
        _remove_unused(composing, arguments)
        raise _refusal_of(composing, arguments, error) from error
    except ConfigRefused:
        _remove_unused(composing, arguments)
        raise
    except OSError as error:
        if not is_full(error):
            raise
        _remove_unused(composing, arguments)
        rule = f"the sweep's directory cannot be written: {error.strerror}"
        fix = "make room there, or choose another directory"
        raise ConfigRefused([Violation("hydra.sweep.dir", ABSENT, rule, fix)]) from error
    except JobFailed:
        sys.exit(1)


def launcher_override(composing: Composer, arguments: Sequence[str]) -> list[str]:
    """The override that replaces Hydra's default launcher with ours; none where the user chose one of ours.

    Raises ConfigRefused for any other launcher, which would run unchecked jobs.
    """
    # An override, since `hydra/launcher` cannot be a default of this package: the defaults list is the app's.
    ours = "hydra/launcher=danling_local"
    try:
        composed = composing.compose(arguments, multirun=True)
        kind = get_class(composed.hydra.launcher._target_)
    except COMPOSITION_ERRORS:
        # The sweep will hit the same error and report the faults of all jobs.
        return [] if any(item.startswith("hydra/launcher=") for item in arguments) else [ours]
    if knows_all_jobs(composed):
        composing.check_size(composed)
    chosen = composed.hydra.runtime.choices.get("hydra/launcher")
    if issubclass(kind, JobsLauncher):
        return []
    if chosen != "basic" or any(item.startswith("hydra/launcher=") for item in arguments):
        rule = "it would run jobs without checking all of them first, and cannot start a layout's processes"
        raise ConfigRefused([Violation("hydra/launcher", chosen, rule, f"leave it out, or write {ours}")])
    return [ours]


def check_directory(composing: Composer, arguments: Sequence[str]) -> bool:
    """Whether the app or the command line names the sweep's directory.

    Raises ConfigRefused where Hydra, which writes there before jobs are checked, should not.
    """
    try:
        master = composing.compose(arguments, multirun=True)
    except COMPOSITION_ERRORS:  # the sweep will hit the same error and report the faults of all jobs
        return any(item.startswith("hydra.sweep.dir=") for item in arguments)
    if faults := sweep_directory_faults(master):
        raise ConfigRefused(faults)
    path = chosen_sweep_directory(master)
    if path is None:
        return False
    found = {item.name for item in path.iterdir()} - {"multirun.yaml"} if path.is_dir() else set()
    if found and LEDGER not in found:
        fix = "choose a directory of its own for the sweep, or leave it out"
        rule = "it has files of something else"
        raise ConfigRefused([Violation("hydra.sweep.dir", str(path), rule, fix)])
    return True


def _make_directory(composing: Composer, arguments: Sequence[str]) -> None:
    """Make a sweep's directory. Raises ConfigRefused where the file system does not let it."""
    try:
        path = chosen_sweep_directory(composing.compose(arguments, multirun=True))
    except COMPOSITION_ERRORS:
        return
    if path is not None:
        make_directory("hydra.sweep.dir", path)


class JobFailed(RuntimeError):
    """A job of the sweep did not complete. The reason has been printed."""


def start_jobs(sweep: Sweep, directory: SweepDirectory, jobs: Sequence[Job], cluster: str) -> list[Record]:
    """Freeze accepted jobs in a sweep's directory, start them, and monitor them to their end unless they are detached.

    Returns:
        Their records, in order.

    Raises:
        ConfigRefused: Slurm rejects them.
    """
    shapes = None
    if cluster == "slurm":
        if faults := list(folder_faults(directory.path)):
            raise ConfigRefused(faults)
        found = shapes_of(jobs, capacity_for)
        print("\n".join(shape_table(jobs, found)), flush=True)
        shapes = {job.number: frozen_shape(found[job.number], job.launcher) for job in jobs}
    launcher = jobs[0].launcher
    argv = worker_command()[2 : -len(sys.argv[1:]) or None]  # without the interpreter, its -u, and the overrides
    code = code_identity(sweep.app.script.parent)
    program = Program(argv=tuple(argv), directory=Path.cwd(), code_id=code.code_id)
    with refusing_unwritable(jobs[0].config):
        files = directory.plan(jobs, program, shapes)
        directory.write_request(
            command=[*argv, *sweep.arguments], program=program, code=code, cluster=cluster, launcher=launcher
        )
    print(f"sweep of {len(jobs)} job{'s' if len(jobs) > 1 else ''}: {directory.path}", flush=True)
    with SweepLock(directory.path) as lock:
        lock.acquire()  # before submission: another command must not mistake jobs that are still starting for lost ones
        with _refusing():
            backend = backend_for(cluster, launcher, directory.path)
            backend.submit(list(files.values()))
        if not launcher.get("detach"):
            return supervise(directory, backend, files, launcher, lock=lock)
    print(f"detached; to monitor it: {shell_line('danling-conf', 'runs', directory.path, '--watch')}", flush=True)
    return list(directory.ledger.records().values())[-len(jobs) :]


def run_one(app: App, composing: Composer, composed: DictConfig, overrides: Sequence[str]) -> None:
    """Run a single configuration on Slurm as a sweep of one job. Exits with 1 if it did not complete."""
    if chosen_run_directory(composed) is not None:
        print("warning: hydra.run.dir has no effect on Slurm: the attempt has a directory of its own", file=sys.stderr)
    given = overrides_of(composed, "task")
    job = Preflight(composing, composed, machine=None, capacity=capacity_for).check(given, 0)
    stamp, config = datetime.now().strftime("%Y%m%d-%H%M%S-%f"), job.config
    path = Path(config.workspace_root).expanduser() / config.lineage / config.experiment / "sweeps" / stamp
    with refusing_unwritable(config):
        path.mkdir(parents=True)
    sweep = Sweep(app=app, composing=composing, arguments=list(overrides))
    (record,) = start_jobs(sweep, SweepDirectory(path=path.absolute()), [job], "slurm")
    if record.ended and record.status != Status.COMPLETED:
        sys.exit(1)


@contextmanager
def _refusing() -> Iterator[None]:
    """Turn Slurm's errors into refusals: the user has to change the launcher's settings, or the machine."""
    try:
        yield
    except SlurmUnavailable as error:
        fix = "fix the launcher's settings; the ledger has the jobs queued so far: danling-conf cancel ends them"
        raise ConfigRefused([Violation("hydra.launcher", ABSENT, str(error), fix)]) from error


def cluster_of(composed: DictConfig) -> str:
    """The cluster of a configuration's launcher: `slurm` or `local`."""
    return str(getattr(get_class(composed.hydra.launcher._target_), "cluster", "local"))


def _outcome(overrides: list[str], record: Record | None, *, score_wanted: bool) -> JobReturn:
    """The result of a job for Hydra's sweeper; `record` is None for a refused job that was skipped."""
    outcome = JobReturn(overrides=list(overrides), status=JobStatus.COMPLETED)
    if record is None:
        outcome.return_value = None
        if score_wanted:
            outcome.status, outcome.return_value = JobStatus.FAILED, JobFailed("the job was refused")
    elif record.status == Status.COMPLETED or not record.ended:  # a detached job has not ended yet
        outcome.return_value = record.score
    else:
        outcome.status = JobStatus.FAILED
        outcome.return_value = JobFailed(f"{record.status}: {record.facts.get('error')}")
    return outcome


def _remove_unused(composing: Composer, arguments: list[str]) -> None:
    """Remove the directory that Hydra created for a sweep that started no job."""
    try:
        directory = Path(composing.compose(arguments, multirun=True).hydra.sweep.dir)
    except COMPOSITION_ERRORS:
        return  # the sweep itself does not compose, so Hydra created nothing
    if directory.is_dir() and {item.name for item in directory.iterdir()} <= {"multirun.yaml", "jobs"}:
        shutil.rmtree(directory)


def _refusal_of(composing: Composer, overrides: Sequence[str], error: Exception) -> ConfigRefused:
    """The faults of a sweep that Hydra does not compose, and the jobs that have them.

    A fault of the whole sweep shows in its first jobs as well, so only those are examined.
    """
    try:
        jobs = composing.split_jobs(overrides)
    except HydraException:
        jobs = [list(overrides)]
    refused = []
    for number, job in enumerate(jobs[:_EXAMINED]):
        try:
            check(composing, compose_or_refuse(composing, job), job)
        except ConfigRefused as refusal:
            refused.append(Refused(number=number, overrides=own(job), violations=refusal.violations))
    if refused and len(jobs) <= _EXAMINED:
        return SweepRefused(refused, of=len(jobs))
    if refused:
        return ConfigRefused(unique(item for job in refused for item in job.violations))
    rule = str(error).strip().splitlines()[0]
    return ConfigRefused([Violation("sweep", " ".join(overrides), rule, "fix the sweep's overrides")])
