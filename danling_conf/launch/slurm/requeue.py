"""How a rank leaves a job that was told to stop: why it was told, and whether the job is to be queued again.

Slurm ends a job that it preempts, requeues or that has reached its limit by signals, and so does a user. Which it was,
`scontrol` knows. A job that is still running is put back into the queue by rank 0, and then no rank leaves: a process
that exits would be taken for the job's end. All wait for Slurm to end them.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn, TypeVar

from danling_conf.launch.slurm.queries import SlurmUnavailable, own_job, run, show, time_of
from danling_conf.records.job_file import JobFile
from danling_conf.records.status import Status
from danling_conf.records.stopped import Stopped
from danling_conf.topology.rank_environment import RankEnvironment

Answer = TypeVar("Answer")
PREEMPTED, TIME_LIMIT, REQUEUED, ASKED = "preempted", "time limit", "requeued", "asked by a signal"
_WAIT_SECONDS = 600.0
_INSISTING_SECONDS = 300.0
_EARLY_SECONDS = 75.0
"""Slurm signals up to a minute before it was told to."""


@dataclass(frozen=True, kw_only=True)
class Cause:
    """Why a job was told to stop."""

    why: str
    """One of the causes above, or the ledger's word for an end."""
    requeue: bool
    """Whether it is for the job itself to go back into the queue."""


def cause_of(shown: Mapping[str, str], *, start: int, warning_seconds: float, now: float) -> Cause:
    """Why Slurm, or a user, has told a job to stop.

    Args:
        shown: what `scontrol show job` says now.
        start: which start of the job this is, from 0.
        warning_seconds: how long before its limit the job is warned.
    """
    preempted = time_of(shown.get("PreemptTime", "")) is not None
    if shown.get("JobState") != "RUNNING":
        if preempted:
            return Cause(why=PREEMPTED, requeue=False)
        if shown.get("JobState") == "TIMEOUT" or shown.get("Reason") == "TimeLimit":
            return Cause(why=Status.TIMED_OUT, requeue=False)
        if int(shown.get("Restarts", "0")) > start:
            return Cause(why=REQUEUED, requeue=False)
        return Cause(why=Status.CANCELLED, requeue=False)
    if preempted:
        return Cause(why=PREEMPTED, requeue=True)
    end = time_of(shown.get("EndTime", ""))
    if end is not None and now >= end - warning_seconds - _EARLY_SECONDS:
        return Cause(why=TIME_LIMIT, requeue=True)
    return Cause(why=ASKED, requeue=True)


def leave(stopped: Stopped, job: JobFile, ranks: RankEnvironment) -> NoReturn:
    """Leave a run that was stopped in order, what was to be saved being saved. Every rank calls it."""
    if not ranks.main:
        # Whatever rank 0 decides, the end of this process comes from Slurm.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(_WAIT_SECONDS)
        sys.exit(128 + stopped.number)
    start, name = int(os.environ.get("SLURM_RESTART_COUNT", "0")), own_job()
    if superseded(job):
        sys.exit(128 + stopped.number)
    try:
        shown = insist(lambda: show(name))
    except SlurmUnavailable as error:
        _end(job, Status.FAILED, f"{stopped}; whether to requeue cannot be asked: {error}", 128 + stopped.number)
    warning = float(job.content["shape"]["signal_delay_s"])
    cause = cause_of(shown, start=start, warning_seconds=warning, now=time.time())
    if cause.why in (Status.CANCELLED, Status.TIMED_OUT):
        _end(job, cause.why, f"{stopped}; {_WORDS[cause.why]}", 128 + stopped.number)
    if cause.why == TIME_LIMIT:
        reached = 1 + sum(line.get("why") == TIME_LIMIT for line in job.ledger.records()[job.key].since_queued())
        most = int(job.content["launcher"]["max_num_timeout"])
        if reached > most:
            times = "once" if reached == 1 else f"{reached} times"
            fix = "raise hydra.launcher.timeout_min or max_num_timeout"
            _end(
                job, Status.TIMED_OUT, f"it has reached its time limit {times}, and max_num_timeout is {most}: {fix}", 1
            )
    job.ledger.add(job.key, status=Status.QUEUED, why=cause.why, slurm=name, start=start)
    print(f"{cause.why} ({stopped}): the job goes back into the queue", flush=True)
    if cause.requeue:
        try:
            insist(lambda: requeue(name, start))
        except SlurmUnavailable as error:
            _end(job, Status.FAILED, f"{cause.why}, and Slurm does not requeue: {error}", 128 + stopped.number)
    time.sleep(_WAIT_SECONDS)
    sys.exit(128 + stopped.number)


def insist(ask: Callable[[], Answer]) -> Answer:
    """Ask Slurm until it answers: when many jobs reach their limit together its controller is busy. All is saved by
    now, and Slurm ends this process when it means it. Raises SlurmUnavailable after some minutes."""
    deadline = time.monotonic() + _INSISTING_SECONDS
    while True:
        try:
            return ask()
        except SlurmUnavailable:
            if time.monotonic() > deadline:
                raise
            time.sleep(5)


def requeue(name: str, start: int) -> None:
    """Put a job back into the queue, if nobody else has. Raises SlurmUnavailable."""
    try:
        run("scontrol", "requeue", name)
    except SlurmUnavailable:
        shown = show(name)  # the answer may have been lost, or somebody else was first
        if shown.get("JobState") == "RUNNING" and int(shown.get("Restarts", "0")) <= start:
            raise


def another_runs(job: JobFile) -> bool:
    """Whether another start of this job is under way."""
    record = job.ledger.records()[job.key]
    start, name = int(os.environ.get("SLURM_RESTART_COUNT", "0")), own_job()
    return record.status == Status.RUNNING and (record.facts.get("slurm"), record.facts.get("start")) != (name, start)


def superseded(job: JobFile) -> bool:
    """Whether a later start of this job runs, which alone has a word to say: this one is on a node that was lost."""
    start, name = int(os.environ.get("SLURM_RESTART_COUNT", "0")), own_job()
    history = job.ledger.records()[job.key].history
    starts = [(line.get("slurm"), line.get("start")) for line in history if line.get("status") == Status.RUNNING]
    return (name, start) in starts and starts[-1] != (name, start)


_WORDS: dict[str, str] = {
    Status.CANCELLED: "the job was cancelled",
    Status.TIMED_OUT: "the job has reached its time limit",
}


def _end(job: JobFile, status: str, error: str, code: int) -> NoReturn:
    job.ledger.add(job.key, status=status, error=error)
    print(error, file=sys.stderr, flush=True)
    sys.exit(code)
