"""A rank of a job on Slurm: it meets the others, runs the user's function, and leaves so that Slurm knows the truth."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from danling_conf.config.hydra_adapter import run_frozen
from danling_conf.config.identity import differences, job_id, plain
from danling_conf.launch.opening import open_job
from danling_conf.launch.rank import run_rank, score_of
from danling_conf.launch.slurm import requeue
from danling_conf.launch.slurm.queries import own_job
from danling_conf.launch.store import announce, await_configuration, await_others, meet, say_done
from danling_conf.records.current import Current
from danling_conf.records.frozen import FROZEN, take_part_in, thaw
from danling_conf.records.job_file import CLUSTER_VARIABLE, JobFile, is_consequence, write_error
from danling_conf.records.logs import rank_log, redirect_output
from danling_conf.records.run_lock import LostRun
from danling_conf.records.status import Status
from danling_conf.records.stopped import Stopped
from danling_conf.topology.rank_environment import RankEnvironment, started_rank
from danling_conf.topology.violation import ConfigRefused, Violation

_NOTICED_SECONDS = 400.0
"""More than Slurm takes to give up a node (SlurmdTimeout, 300 s by default)."""

if TYPE_CHECKING:
    from danling_conf.launch.app import App


def run_slurm_rank(app: App, path: Path) -> Any:
    """Take part in the job of a job file as the rank that Slurm says.

    A rank that fails leaves at once, with the process, and by that with the job: the others are stopped by srun.
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
    except LostRun as error:  # a later start of this job has the run and the ledger's word
        print(error, file=sys.stderr)
        sys.exit(1)
    except ConfigRefused as refusal:
        if ranks.main and not requeue.another_runs(job):
            job.ledger.add(job.key, status=Status.REFUSED, error=str(refusal))
        print(refusal.report(), file=sys.stderr)
        _leave_at_once(2)
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code in (None, 0):
            value = None
        else:
            _tell(job, ranks, error)
            if is_consequence(str(error)):
                _await_the_end()
            _leave_at_once(1)
    if ranks.main and not requeue.superseded(job):
        job.ledger.add(job.key, status=Status.COMPLETED, score=score_of(value))
    return value


def _lead(app: App, job: JobFile, ranks: RankEnvironment) -> Any:
    if job.ledger.records()[job.key].status == Status.CANCELLED:
        print("the job was cancelled before it started", file=sys.stderr)
        _leave_at_once(1)
    start_number = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    slurm, several = own_job(), ranks.world_size > 1
    try:
        config, attempt, lock = open_job(
            job, app.script, fence=(slurm, start_number), slurm=slurm, start=start_number,
            nodes=os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST"),
            printed=os.fstat(2).st_size,  # srun's words on this start come behind it
        )  # fmt: skip
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
            job.content["hydra"], job.content["config"],
            lambda _: run_rank(app.function, config, current, app.script.stem), attempt.directory,
        )  # fmt: skip
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
    if content is None:  # rank 0 says why
        _leave_at_once(2)
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
    """Every node reads the job for itself: one that sees another file than the first node's must not train by it."""
    if job.content["job_id"] == job_id(config):
        return
    changed = differences(job.content["config"], plain(config))
    node = os.environ.get("SLURMD_NODENAME", os.uname().nodename)
    raise ConfigRefused(
        [
            Violation(path, mine, f"rank {ranks.rank} on {node} reads this, and rank 0 has {theirs}",
                      f"let all nodes see the same {job.path}")
            for path, (mine, theirs) in changed.items()
        ]
    )  # fmt: skip


def _tell(job: JobFile, ranks: RankEnvironment, error: BaseException) -> None:
    """Leave word of a failure: in the rank's output, beside the job, and, if no other rank was first, in the ledger.

    A rank that was killed leaves none, and the others know only that it has gone: Slurm knows more, and has the word.
    """
    traceback.print_exc()
    message = f"{type(error).__name__}: {error}"
    write_error(job.folder, ranks.rank, message, traceback.format_exc())
    if is_consequence(message) or requeue.superseded(job):
        return
    if not job.ledger.records()[job.key].ended:
        job.ledger.add(job.key, status=Status.FAILED, error=message.partition("\n")[0], rank=ranks.rank)


def _await_the_end() -> None:
    """Of a rank that misses another one: when that has failed, srun ends this one within seconds; when its node was
    lost, Slurm notices after a while, and queues the job again. To exit before it does would be the job's failure.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(_NOTICED_SECONDS)


def _leave_at_once(code: int) -> NoReturn:
    """Others may be waiting for this rank in a collective: no clean-up that would wait for them."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
