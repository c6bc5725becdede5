"""Requeue of a job that received a stop signal: finds out why, and puts the job back into the queue if it should be.

Slurm signals a job that is preempted, requeued or out of time, and a user can signal it too; `scontrol` knows which.
Rank 0 requeues a job that is still running. Then no rank exits: an exit with 0 within the grace time would make the job
COMPLETED, and it would never be requeued. All ranks wait for Slurm to kill them.
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
from danling_conf.records.result import write_result
from danling_conf.records.status import EXIT_FAILED, Outcome, Status, outcome_of
from danling_conf.records.stopped import Stopped
from danling_conf.topology.rank_environment import RankEnvironment

Answer = TypeVar("Answer")
TIME_LIMIT, REQUEUED, ASKED = "time limit", "requeued", "asked by a signal"
_WAIT_SECONDS = 600.0
_INSISTING_SECONDS = 300.0
_EARLY_SECONDS = 75.0
"""Slurm may send the warning signal up to a minute early: its events have that resolution."""


@dataclass(frozen=True, kw_only=True)
class Cause:
    """Why a job received a stop signal."""

    why: str
    """One of the causes above, or a status."""
    requeue: bool
    """Whether the job has to request the requeue itself."""


def cause_of(shown: Mapping[str, str], *, start: int, warning_seconds: float, now: float) -> Cause:
    """Why Slurm, or a user, signalled a job to stop.

    Args:
        shown: fields of `scontrol show job` now.
        start: which start of the job this is, from 0.
        warning_seconds: how long before its limit the job is warned.
    """
    # A job that is not RUNNING any more is being ended by Slurm, which requeues it itself where it means to.
    preempted = time_of(shown.get("PreemptTime", "")) is not None
    if shown.get("JobState") != "RUNNING":
        if preempted:
            return Cause(why=Status.PREEMPTED, requeue=False)
        if shown.get("JobState") == "TIMEOUT" or shown.get("Reason") == "TimeLimit":
            return Cause(why=Status.TIMED_OUT, requeue=False)
        if int(shown.get("Restarts", "0")) > start:
            return Cause(why=REQUEUED, requeue=False)
        return Cause(why=Status.CANCELLED, requeue=False)
    if preempted:
        return Cause(why=Status.PREEMPTED, requeue=True)
    end = time_of(shown.get("EndTime", ""))
    if end is not None and now >= end - warning_seconds - _EARLY_SECONDS:
        return Cause(why=TIME_LIMIT, requeue=True)
    return Cause(why=ASKED, requeue=True)


def leave(stopped: Stopped, job: JobFile, ranks: RankEnvironment) -> NoReturn:
    """Leave a run that stopped in order and has saved. Every rank calls it."""
    code = outcome_of(stopped).exit_code
    if not ranks.main:
        # Rank 0 decides, and Slurm ends this process. Exiting here would end the step before the requeue.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(_WAIT_SECONDS)
        sys.exit(code)
    start, name = int(os.environ.get("SLURM_RESTART_COUNT", "0")), own_job()
    if superseded(job):
        sys.exit(code)
    try:
        shown = insist(lambda: show(name))
    except SlurmUnavailable as error:
        _end(job, Status.FAILED, f"{stopped}; Slurm does not say whether to requeue: {error}", code)
    warning = float(job.content["shape"]["signal_delay_s"])
    cause = cause_of(shown, start=start, warning_seconds=warning, now=time.time())
    if cause.why in (Status.CANCELLED, Status.TIMED_OUT):
        _end(job, Status(cause.why), f"{stopped}; {_WORDS[cause.why]}", code)
    if cause.why == TIME_LIMIT:
        reached = 1 + sum(line.get("why") == TIME_LIMIT for line in job.ledger.records()[job.key].since_queued())
        most = int(job.content["launcher"]["max_num_timeout"])
        if reached > most:
            times = "once" if reached == 1 else f"{reached} times"
            fix = "raise hydra.launcher.timeout_min or max_num_timeout"
            rule = f"it has reached its time limit {times}, and max_num_timeout is {most}"
            _end(job, Status.TIMED_OUT, f"{rule}: {fix}", EXIT_FAILED)
    # Before the requeue: Slurm may kill this process as soon as it has accepted it.
    job.ledger.add(job.key, status=Status.QUEUED, why=cause.why, slurm=name, start=start)
    print(f"{cause.why} ({stopped}): the job goes back into the queue", flush=True)
    if cause.requeue:
        try:
            insist(lambda: requeue(name, start))
        except SlurmUnavailable as error:
            _end(job, Status.FAILED, f"{cause.why}, and Slurm does not requeue: {error}", code)
    time.sleep(_WAIT_SECONDS)
    sys.exit(code)


def insist(ask: Callable[[], Answer]) -> Answer:
    """Call `ask` until Slurm answers; its controller is busy when many jobs reach their limit together.

    Everything is saved by now, so waiting costs nothing, and Slurm kills this process when its time is over.

    Raises:
        SlurmUnavailable: no answer for five minutes.
    """
    deadline = time.monotonic() + _INSISTING_SECONDS
    while True:
        try:
            return ask()
        except SlurmUnavailable:
            if time.monotonic() > deadline:
                raise
            time.sleep(5)


def requeue(name: str, start: int) -> None:
    """Put a job back into the queue, unless it is there already. Raises SlurmUnavailable."""
    try:
        run("scontrol", "requeue", name)
    except SlurmUnavailable:
        shown = show(name)  # the answer may have been lost, or someone else was first: neither is a failure
        if shown.get("JobState") == "RUNNING" and int(shown.get("Restarts", "0")) <= start:
            raise


def another_runs(job: JobFile) -> bool:
    """Whether another start of this job is running."""
    record = job.ledger.records()[job.key]
    start, name = int(os.environ.get("SLURM_RESTART_COUNT", "0")), own_job()
    return record.status == Status.RUNNING and (record.facts.get("slurm"), record.facts.get("start")) != (name, start)


def record_refusal(job: JobFile, outcome: Outcome) -> None:
    """Add to the ledger that the job's configuration is refused, unless another start of it runs."""
    if not another_runs(job):
        job.ledger.add(job.key, status=outcome.status, error=outcome.reason)


def superseded(job: JobFile) -> bool:
    """Whether a later start of this job is running. This one is then on a lost node, and must not write any more."""
    start, name = int(os.environ.get("SLURM_RESTART_COUNT", "0")), own_job()
    history = job.ledger.records()[job.key].history
    starts = [(line.get("slurm"), line.get("start")) for line in history if line.get("status") == Status.RUNNING]
    return (name, start) in starts and starts[-1] != (name, start)


_WORDS: dict[str, str] = {
    Status.CANCELLED: "the job was cancelled",
    Status.TIMED_OUT: "the job has reached its time limit",
}


def _end(job: JobFile, status: Status, error: str, code: int) -> NoReturn:
    attempt = job.ledger.records()[job.key].attempt
    if attempt is not None:
        # The rank recorded `interrupted`; only now is it known what the signal meant.
        write_result(attempt, Outcome(status=status, exit_code=code, message=error))
    job.ledger.add(job.key, status=status, error=error)
    print(error, file=sys.stderr, flush=True)
    sys.exit(code)
