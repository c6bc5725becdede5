"""Rank of a job on Slurm: it meets the others, runs the user's function, and exits so that Slurm sees the true end."""

from __future__ import annotations

import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from danling_conf.config.hydra_adapter import run_frozen
from danling_conf.config.identity import differences, job_id, plain
from danling_conf.launch.execute import open_job
from danling_conf.launch.rank import leave_at_once, run_rank
from danling_conf.launch.slurm import requeue
from danling_conf.launch.slurm.queries import own_job
from danling_conf.launch.store import announce, await_configuration, await_others, meet, say_done
from danling_conf.records.current import Current
from danling_conf.records.frozen import take_part_in, thaw
from danling_conf.records.job_file import CLUSTER_VARIABLE, JOB_VARIABLE, JobFile, is_consequence, write_error
from danling_conf.records.logs import rank_log, redirect_output
from danling_conf.records.run_directory import score_of
from danling_conf.records.run_lock import LostRun
from danling_conf.records.status import EXIT_FAILED, EXIT_REFUSED, Status, outcome_of
from danling_conf.records.stopped import Stopped, note_early_signals
from danling_conf.schema.files import FROZEN
from danling_conf.topology.rank_environment import RankEnvironment, started_rank
from danling_conf.topology.violation import ConfigRefused, Violation

_NOTICED_SECONDS = 400.0
"""More than Slurm takes to give up a node (SlurmdTimeout, 300 s by default)."""

if TYPE_CHECKING:
    from danling_conf.launch.app import App


def run_task(job_file: str) -> None:
    """Run one rank of a job; submitit pickles the call when the job is submitted."""
    # They replace submitit's handlers, which requeue on one signal only and save nothing.
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
    """Hide devices that are not this rank's: a job without GPUs may see those of others, and a rank uses one device,
    the first of its own."""
    if launcher["gpus_per_task"]:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.partition(",")[0]
    elif not shape["gpus_per_node"] and launcher["gres"] is None:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def run_slurm_rank(app: App, path: Path) -> Any:
    """Run as the rank of a job that Slurm says this process is.

    A rank that fails exits at once, and so ends the job: srun stops the others.
    """
    os.environ.pop(CLUSTER_VARIABLE, None)
    job = JobFile.read(path)
    ranks = started_rank()
    if ranks is None:
        raise RuntimeError("this process was not started by srun: its job's script must start it so")
    try:
        value = _lead(app, job, ranks) if ranks.main else _follow(app, job, ranks)
    except Stopped as stopped:
        requeue.leave(stopped, job, ranks)
    except LostRun as error:  # a later start of this job has the run, and writes in the ledger
        print(error, file=sys.stderr)
        sys.exit(EXIT_FAILED)
    except BaseException as error:
        outcome = outcome_of(error)
        if outcome.status is Status.REFUSED:
            if ranks.main and not requeue.another_runs(job):
                job.ledger.add(job.key, status=outcome.status, error=outcome.reason)
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


def _lead(app: App, job: JobFile, ranks: RankEnvironment) -> Any:
    if job.ledger.records()[job.key].status == Status.CANCELLED:
        print("the job was cancelled before it started", file=sys.stderr)
        _leave_at_once(EXIT_FAILED)
    start_number = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    slurm, several = own_job(), ranks.world_size > 1
    try:
        config, attempt, lock = open_job(
            job,
            app.script,
            fence=(slurm, start_number),
            slurm=slurm,
            start=start_number,
            nodes=os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST"),
            printed=os.fstat(2).st_size,  # what srun prints of this start comes after it
        )
    except ConfigRefused:
        if several:
            announce(meet(ranks), None, ranks.world_size)
        raise
    try:
        store = None
        if several:
            store = meet(ranks)
            announce(store, (attempt.directory / FROZEN).read_text(), ranks.world_size)
        current = Current(attempt=attempt, ranks=ranks, store=store, guard=lock.check, repeats_signals=True)
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
    if content is None:  # rank 0 prints why
        _leave_at_once(EXIT_REFUSED)
    config, attempt = thaw(content)
    compare_with_first(job, config, ranks)
    redirect_output(rank_log(attempt.directory, ranks.rank))
    take_part_in(content)
    current = Current(attempt=attempt, ranks=ranks, store=store, repeats_signals=True)
    try:
        value = run_rank(app.function, config, current, app.script.stem)
    except SystemExit as ending:
        if ending.code in (None, 0):  # the end of its function, too
            say_done(store)
        raise
    say_done(store)
    return value


def compare_with_first(job: JobFile, config: Any, ranks: RankEnvironment) -> None:
    """Raises ConfigRefused on a node that reads another job than the first node: it must not train by it."""
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
    """Write a failure: in the rank's output, beside the job, and, if no other rank was first, in the ledger.

    A rank that was killed writes nothing, and the others know only that it has gone: Slurm knows more, and its answer
    is what the monitor enters.
    """
    traceback.print_exc()
    message = f"{type(error).__name__}: {error}"
    write_error(job.folder, ranks.rank, message, traceback.format_exc())
    if is_consequence(message) or requeue.superseded(job):
        return
    if not job.ledger.records()[job.key].ended:
        outcome = outcome_of(error)
        job.ledger.add(job.key, status=outcome.status, error=outcome.reason, rank=ranks.rank)


def _await_the_end() -> None:
    """Wait, as a rank that misses another one: when that one has failed, srun ends this one within seconds; when its
    node was lost, Slurm notices after a while, and queues the job again. To exit before it does would fail the job."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(_NOTICED_SECONDS)


def _leave_at_once(code: int) -> NoReturn:
    # srun signals the ranks of a failed step: a handler of ours must not hold this one up on its way out.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    leave_at_once(code)
