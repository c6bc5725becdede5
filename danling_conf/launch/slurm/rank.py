"""Rank of a job on Slurm: meets the other ranks, runs the user's function, and exits so that Slurm sees the true
end."""

from __future__ import annotations

import os
import runpy
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from danling_conf.config.hydra_job import run_frozen
from danling_conf.config.identity import differences, job_id, plain
from danling_conf.launch.execute import open_job
from danling_conf.launch.rank import leave_at_once, run_rank
from danling_conf.launch.slurm import requeue
from danling_conf.launch.slurm.queries import own_job
from danling_conf.launch.store import announce, await_configuration, await_others, meet, say_done
from danling_conf.records.current import Current
from danling_conf.records.frozen import take_part_in, thaw
from danling_conf.records.job_file import JobFile, write_error
from danling_conf.records.logs import rank_log, redirect_output
from danling_conf.records.result import score_of
from danling_conf.records.run_directory import Attempt
from danling_conf.records.run_lock import LostRun, RunLock
from danling_conf.records.status import EXIT_FAILED, EXIT_REFUSED, Status, is_consequence, outcome_of
from danling_conf.records.stopped import Stopped, note_early_signals
from danling_conf.schema import RunnerConfig
from danling_conf.schema.files import FROZEN
from danling_conf.topology.rank_environment import CLUSTER_VARIABLE, JOB_VARIABLE, RankEnvironment, started_rank
from danling_conf.topology.violation import ConfigRefused, Violation, trace_of

_NOTICED_SECONDS = 400.0
"""Longer than Slurm takes to declare a node down (SlurmdTimeout, 300 s by default)."""

if TYPE_CHECKING:
    from danling_conf.launch.app import App


def run_task(job_file: str) -> None:
    """Run one rank of a job. submitit pickles the call when the job is submitted."""
    # Replaces submitit's handlers: they ignore SIGTERM and SIGCONT, so a preempted or requeued job would save nothing.
    note_early_signals()
    job = JobFile.read(Path(job_file))
    os.chdir(job.directory)
    os.environ[JOB_VARIABLE], os.environ[CLUSTER_VARIABLE] = job_file, "slurm"
    see_own_devices(job.content["shape"], job.content["launcher"])
    argv = job.argv
    if argv[0] == "-m":
        sys.path[0] = job.directory
        sys.argv = argv[1:]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(argv[0]).parent)
        sys.argv = argv
        runpy.run_path(argv[0], run_name="__main__")


def see_own_devices(shape: Mapping[str, Any], launcher: Mapping[str, Any]) -> None:
    """Hide devices that are not this rank's.

    On a cluster that does not confine devices, a job without GPUs sees those of other jobs. A rank uses one device, the
    first of its own.
    """
    if launcher["gpus_per_task"]:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.partition(",")[0]
    elif not shape["gpus_per_node"] and launcher["gres"] is None:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def run_slurm_rank(app: App, path: Path) -> Any:
    """Run as the rank of a job that Slurm's variables name.

    A rank that fails exits at once: srun then stops the others and ends the job.
    """
    # A process that the user's function starts must not take itself for a rank of this job.
    os.environ.pop(CLUSTER_VARIABLE, None)
    job = JobFile.read(path)
    ranks = started_rank()
    if ranks is None:
        raise RuntimeError("this process was not started by srun, as the ranks of a Slurm job must be")
    try:
        value = _lead(app, job, ranks) if ranks.main else _follow(app, job, ranks)
    except Stopped as stopped:
        requeue.leave(stopped, job, ranks)
    except LostRun as error:  # a later start of this job has taken over the run, and its ledger entries
        print(error, file=sys.stderr)
        sys.exit(EXIT_FAILED)
    except BaseException as error:
        outcome = outcome_of(error)
        if outcome.status is Status.REFUSED:
            if ranks.main:
                requeue.record_refusal(job, outcome)
            print(outcome.message, file=sys.stderr)
            _leave_at_once(outcome.exit_code)
        if not outcome.completed:
            _record_failure(job, ranks, error)
            if is_consequence(str(error)):
                _await_the_end()
            _leave_at_once(EXIT_FAILED)
        value = None
    if ranks.main and not requeue.superseded(job):
        job.ledger.add(job.key, status=Status.COMPLETED, score=score_of(value))
    return value


def open_here(app: App, job: JobFile) -> tuple[RunnerConfig, Attempt, RunLock]:
    """Open an attempt of the job's run, as this start of the job. Raises ConfigRefused like `open_job`."""
    if job.ledger.records()[job.key].status == Status.CANCELLED:
        print("the job was cancelled before it started", file=sys.stderr)
        _leave_at_once(EXIT_FAILED)
    start_number, slurm = int(os.environ.get("SLURM_RESTART_COUNT", "0")), own_job()
    return open_job(
        job,
        app.script,
        fence=(slurm, start_number),
        slurm=slurm,
        start=start_number,
        nodes=os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST"),
        printed=os.fstat(2).st_size,  # everything that srun prints about this start comes after it
    )


def _lead(app: App, job: JobFile, ranks: RankEnvironment) -> Any:
    several = ranks.world_size > 1
    try:
        config, attempt, lock = open_here(app, job)
    except ConfigRefused:
        if several:
            announce(meet(ranks), None, ranks.world_size)
        raise
    try:
        store = None
        if several:
            store = meet(ranks)
            announce(store, (attempt.directory / FROZEN).read_text(), ranks.world_size)
        current = Current(attempt=attempt, ranks=ranks, store=store, repeats_signals=True)
        outcome = run_frozen(
            job.content["hydra"],
            job.content["config"],
            lambda _: run_rank(app.function, config, current, app.script.stem),
            attempt.directory,
        )
        if isinstance(outcome._return_value, Exception):
            raise outcome._return_value
        if store is not None:
            await_others(store, ranks.world_size)
        return outcome._return_value
    finally:
        lock.release()


def _follow(app: App, job: JobFile, ranks: RankEnvironment) -> Any:
    store = meet(ranks)
    content = await_configuration(store)
    if content is None:  # rank 0 prints the reason
        _leave_at_once(EXIT_REFUSED)
    config, attempt = thaw(content)
    compare_with_first(job, config, ranks)
    redirect_output(rank_log(attempt.directory, ranks.rank))
    take_part_in(content)
    current = Current(attempt=attempt, ranks=ranks, store=store, repeats_signals=True)
    try:
        value = run_rank(app.function, config, current, app.script.stem)
    except SystemExit as ending:
        if ending.code in (None, 0):  # `sys.exit()` is a way to complete, too
            say_done(store)
        raise
    say_done(store)
    return value


def compare_with_first(job: JobFile, config: Any, ranks: RankEnvironment) -> None:
    """Raises ConfigRefused on a node whose copy of the job differs from that of rank 0.

    A stale cache of a shared file system, or a path that is local to each node, would make ranks train differently.
    """
    if job.content["job_id"] == job_id(config):
        return
    changed = differences(job.content["config"], plain(config))
    node = os.environ.get("SLURMD_NODENAME", os.uname().nodename)
    raise ConfigRefused(
        [
            Violation(
                path,
                mine,
                f"rank {ranks.rank} on {node} reads this, and rank 0 has {theirs}",
                f"let all nodes see the same {job.path}",
            )
            for path, (mine, theirs) in changed.items()
        ]
    )


def _record_failure(job: JobFile, ranks: RankEnvironment, error: BaseException) -> None:
    """Write a failure to the rank's output, next to the job file and, unless another rank was first, to the ledger.

    A lost peer does not go to the ledger: a killed rank writes nothing, and the others only know that it is gone. The
    monitor records what Slurm says about it.
    """
    message, trace = f"{type(error).__name__}: {error}", trace_of(error)
    print(trace.rstrip() or message, file=sys.stderr)
    write_error(job.folder, ranks.rank, message, trace)
    if is_consequence(message) or requeue.superseded(job):
        return
    if not job.ledger.records()[job.key].ended:
        outcome = outcome_of(error)
        job.ledger.add(job.key, status=outcome.status, error=outcome.reason, rank=ranks.rank)


def _await_the_end() -> None:
    """Wait for Slurm to end this rank, which lost a peer.

    If the peer failed, srun ends this rank within seconds. If its node was lost, Slurm notices only after minutes, and
    requeues the job; had this rank exited before, the job would have failed instead.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(_NOTICED_SECONDS)


def _leave_at_once(code: int) -> NoReturn:
    # srun sends SIGTERM to all ranks of a failed step. Our handler only sets a flag, and would keep this one alive.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    leave_at_once(code)
