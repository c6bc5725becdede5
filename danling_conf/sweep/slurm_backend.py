"""Slurm backend: submits jobs through submitit, one array for all jobs of a shape, and reads their ends from Slurm."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

from danling_conf.launch.slurm import queries
from danling_conf.launch.slurm.queries import ENDS, JobState, SlurmUnavailable, first_death
from danling_conf.launch.slurm.rank import run_task
from danling_conf.records.job_file import JobFile
from danling_conf.records.ledger import Record
from danling_conf.records.status import Status
from danling_conf.schema.launcher import SlurmLauncherConfig
from danling_conf.sweep.backend import Ending
from danling_conf.topology.resources import Capacity, Shape
from danling_conf.topology.violation import ConfigRefused, Violation

FOLDER = "slurm"
"""Folder of a sweep for submitit's files and the output of tasks."""
_WARNING_SECONDS = 120
"""How long before its time limit a job is signalled to save; a fifth of short limits."""
_UNREACHABLE_SECONDS = 600.0
"""The monitor gives up when Slurm has not answered for this long."""
_CANCELLED_AT_ONCE = 500
"""Jobs in one `scancel`: the length of a command line is limited."""
_HELD = ("REQUEUE_HOLD", "SPECIAL_EXIT")
_NEVER = re.compile(r"DependencyNeverSatisfied|BadConstraints|requeued.held|HoldMaxRequeue|PerJob")
"""Reasons of pending jobs that will never start. Slurm keeps them in the queue, so waiting for them would never end."""
_OF_THIS_PROCESS = re.compile(
    r"(MASTER_|LOCAL_|SUBMITIT_|DANLING_CONF_|TORCHELASTIC_|SLURM_(?!CONF$|CLUSTERS$))|(RANK|WORLD_SIZE|GROUP_RANK)$"
)
"""Variables of this process that jobs must not inherit, such as its Slurm allocation, rank and rendezvous."""
_EXPLANATIONS = {
    Status.CANCELLED: "cancelled in Slurm",
    Status.TIMED_OUT: "it has reached its time limit",
    Status.OUT_OF_MEMORY: "it used more memory than it had requested",
    Status.NODE_LOST: "a node was lost",
}


_PASSED_ON = (
    *("partition", "qos", "account", "constraint", "exclude", "nodelist", "gres", "gpus_per_task", "cpus_per_gpu"),
    *("mem_per_gpu", "mem_per_cpu", "comment", "dependency", "exclusive", "setup", "array_parallelism"),
)
"""Settings of the launcher that submitit takes under the same name."""


class SlurmJobs:
    """Submits jobs, and finds in Slurm how they end.

    Args:
        sweep: the sweep's directory.
    """

    interval = 2.0
    patience = 10.0  # shared file systems may show what other nodes wrote only after seconds

    def __init__(self, sweep: Path) -> None:
        if shutil.which("sbatch") is None:
            raise SlurmUnavailable("sbatch is not installed here: submit from a machine of the cluster")
        self._folder = sweep / FOLDER
        self._unreachable_since: float | None = None

    def submit(self, jobs: Sequence[JobFile]) -> None:
        """Queue jobs, those of one shape as one array. Raises SlurmUnavailable with the error of `sbatch`."""
        import submitit
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        # Slurm rejects arrays beyond its MaxArraySize, so larger groups are split.
        most = queries.largest_array()
        for parameters, group in _by_parameters(jobs).items():
            for start in range(0, len(group), most):
                part = group[start : start + most]
                executor = submitit.SlurmExecutor(folder=self._folder)
                executor.update_parameters(**json.loads(parameters))
                paths = [str(job.path) for job in part]
                with _uninterrupted(), own_environment():
                    try:
                        submitted = executor.map_array(run_task, paths)
                    except (FailedJobError, FailedSubmissionError) as error:
                        raise SlurmUnavailable(f"sbatch: {error}") from error
                    ids = [item.job_id for item in submitted]
                    part[0].ledger.add_all(
                        [
                            (job.key, {"status": Status.QUEUED, "slurm": job_id})
                            for job, job_id in zip(part, ids, strict=True)
                        ]
                    )

    def endings(self, unfinished: Sequence[Record]) -> dict[str, Ending]:
        """Raises SlurmUnavailable when Slurm has not answered for ten minutes."""
        # A job without an id has not been submitted yet: it is in the ledger before sbatch returns.
        by_id = {record.facts["slurm"]: record for record in unfinished if "slurm" in record.facts}
        try:
            found = queries.states(by_id)
        except SlurmUnavailable as error:
            now = time.monotonic()
            if self._unreachable_since is None:
                self._unreachable_since = now
                print(f"Slurm does not answer, trying again: {error}", file=sys.stderr, flush=True)
            if now - self._unreachable_since > _UNREACHABLE_SECONDS:
                raise
            return {}
        self._unreachable_since = None
        endings = {}
        for job_id, record in by_id.items():
            ending = _ending(job_id, found.get(job_id))
            if ending is not None and ending.status == Status.FAILED:
                # Where no rank could record an error, srun's log names the task that died first. The log grows with
                # every requeue, so look only at what was printed since the last start.
                log = self._folder / f"{job_id}_0_log.err"
                death = first_death(log, int(record.facts.get("printed", 0)))
                ending = ending if death is None else Ending(status=Status.FAILED, error=death)
            if ending is not None:
                endings[record.key] = ending
        return endings

    def proceed(self) -> None:
        """Does nothing: Slurm runs the queue."""

    def cancel(self, records: Sequence[Record]) -> None:
        ids = [record.facts["slurm"] for record in records if "slurm" in record.facts]
        for start in range(0, len(ids), _CANCELLED_AT_ONCE):
            queries.run("scancel", *ids[start : start + _CANCELLED_AT_ONCE])


def _ending(job_id: str, state: JobState | None) -> Ending | None:
    if state is None:
        # Neither in squeue, which forgets a job MinJobAge seconds after its end (300 by default), nor in accounting.
        return Ending(status=Status.LOST, error="Slurm no longer knows the job, and it recorded no end")
    # A held job keeps its place in the queue for ever: cancel it, so that it cannot start after its end was recorded.
    if state.state in _HELD or (state.state == "PENDING" and _NEVER.search(state.reason)):
        queries.run("scancel", job_id)
        return Ending(status=Status.FAILED, error=f"Slurm will never start it: {state.reason}")
    status = ENDS.get(state.state)
    if status is None:
        return None
    if status == Status.FAILED:
        return Ending(status=Status.FAILED, error=_failure(job_id, state))
    return Ending(status=status, error=_EXPLANATIONS.get(status))


def _failure(job_id: str, state: JobState) -> str:
    """The error of a job that failed and did not record one."""
    code = state.exit_code
    if not code:
        try:
            code = queries.show(job_id).get("ExitCode", "")
        except SlurmUnavailable:
            return "it failed and recorded no error"
    status, _, number = code.partition(":")
    if status == "137" or number == "9":
        return "a rank was killed (SIGKILL): memory may have run out"
    return f"it ended with exit code {status}" + (f", by signal {number}" if number not in ("", "0") else "")


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Delay signals: between sbatch and the ledger's line, an interrupt would leave a job that nobody knows of."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def own_environment() -> Iterator[None]:
    """Hide variables of this process from `sbatch`, which exports its environment to the job."""
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if _OF_THIS_PROCESS.match(name)}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _by_parameters(jobs: Sequence[JobFile]) -> dict[str, list[JobFile]]:
    groups: dict[str, list[JobFile]] = {}
    for job in jobs:
        groups.setdefault(json.dumps(parameters_of(job.content), sort_keys=True), []).append(job)
    return groups


def parameters_of(job: Mapping[str, Any]) -> dict[str, Any]:
    """submitit's parameters for a job, from its shape and the launcher's settings."""
    launcher, shape = job["launcher"], job["shape"]
    parameters: dict[str, Any] = {
        "job_name": launcher["name"],
        "time": launcher["timeout_min"],
        "nodes": shape["nodes"],
        "ntasks_per_node": shape["tasks_per_node"],
        "signal_delay_s": shape["signal_delay_s"],
        # --requeue: every job can be preempted, and is then queued again. --kill-on-bad-exit: without it the other
        # ranks run on after one has failed, and wait for it in their next collective.
        "additional_parameters": _additional(launcher["additional_parameters"]),
        "srun_args": ["--kill-on-bad-exit=1", *(launcher["srun_args"] or [])],
    }
    if shape.get("groups"):
        # The job's own process starts a step for each group. Groups outlive the nodes of others.
        parameters["use_srun"] = False
        parameters["additional_parameters"].setdefault("no-kill", True)
    for name in _PASSED_ON:
        if launcher[name] not in (None, False):
            parameters[name] = launcher[name]
    if launcher["mem_gb"] is not None:
        parameters["mem"] = f"{round(launcher['mem_gb'] * 1024)}MB"
    if shape["gpus_per_node"] and launcher["gres"] is None and launcher["gpus_per_task"] is None:
        parameters["gpus_per_node"] = shape["gpus_per_node"]
    if shape["cpus_per_task"] and launcher["cpus_per_gpu"] is None:
        parameters["cpus_per_task"] = shape["cpus_per_task"]
        # Since Slurm 22.05 srun no longer inherits it from sbatch, and a rank would get one core.
        parameters["srun_args"].append(f"--cpus-per-task={shape['cpus_per_task']}")
    return parameters


def _additional(given: Mapping[str, Any]) -> dict[str, Any]:
    """Further options of `sbatch`; `false` omits an option."""
    options = {name.replace("_", "-"): value for name, value in given.items()}
    if "no-requeue" not in options:
        options.setdefault("requeue", True)
    return {name: value for name, value in options.items() if value is not False}


@cache
def capacity_of(name: str | None) -> Capacity:
    """Capacity of a partition, queried once. Raises ConfigRefused where it does not exist or Slurm does not answer."""
    try:
        found = queries.partition(name)
    except LookupError as error:
        fix = "choose one of these" if name else "choose one: hydra.launcher.partition=NAME"
        raise ConfigRefused([Violation("hydra.launcher.partition", name, str(error.args[0]), fix)]) from error
    except SlurmUnavailable as error:
        fix = "submit from a machine of the cluster; `danling-conf check SCRIPT -m ... --gpus-per-node N` checks here"
        raise ConfigRefused([Violation("hydra/launcher", "danling_slurm", str(error), fix)]) from error
    minutes = None if found.minutes is None else int(found.minutes)
    return Capacity(
        devices_per_node=found.gpus_per_node,
        cpus_per_node=found.cpus_per_node,
        nodes=found.nodes,
        minutes=minutes,
        name=found.name,
    )


def capacity_for(launcher: SlurmLauncherConfig) -> Capacity:
    """Capacity of the partition in a launcher's settings. Raises like `capacity_of`."""
    return capacity_of(launcher.partition)


def frozen_shape(shape: Shape, launcher: Mapping[str, Any]) -> dict[str, Any]:
    """A shape as it is stored in a job file.

    Args:
        launcher: `hydra.launcher` of the job, checked.
    """
    known = {item.name for item in fields(SlurmLauncherConfig)}
    settings = SlurmLauncherConfig(**{name: value for name, value in launcher.items() if name in known})
    limit = 60 * settings.timeout_min
    return {
        "nodes": shape.nodes,
        "tasks_per_node": shape.tasks_per_node,
        "gpus_per_node": shape.gpus_per_node,
        "cpus_per_task": shape.cpus_per_task,
        "groups": shape.groups,
        "signal_delay_s": settings.signal_delay_s or min(_WARNING_SECONDS, limit // 5),
    }
