"""Jobs of a sweep's directory, started and followed: by the command that asked for them, or by one that comes later."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from danling_conf.launch.slurm.queries import SlurmUnavailable
from danling_conf.records.job_file import JobFile
from danling_conf.records.ledger import Record
from danling_conf.records.status import Status
from danling_conf.records.stopped import STOPPING, Stopped
from danling_conf.records.sweep_directory import SweepDirectory
from danling_conf.records.sweep_lock import FollowingLock
from danling_conf.sweep.backend import Backend
from danling_conf.sweep.live_table import shown
from danling_conf.sweep.local_backend import LocalJobs
from danling_conf.sweep.monitor import Following
from danling_conf.sweep.orphans import LeftLocalJobs
from danling_conf.sweep.policy import parse_on_failure


def backend_for(cluster: str, launcher: Mapping[str, Any], directory: Path) -> Backend:
    """Where the jobs of a sweep run."""
    if cluster == "slurm":
        from danling_conf.sweep.slurm_backend import SlurmJobs

        return SlurmJobs(directory)
    return LocalJobs(launcher.get("parallel_jobs"))


def follow(
    directory: SweepDirectory,
    backend: Backend,
    jobs: Mapping[str, JobFile],
    launcher: Mapping[str, Any],
    *,
    lock: FollowingLock | None = None,
) -> list[Record]:
    """Look after jobs that were submitted until all have ended, and say what becomes of them; gives their records.

    A signal ends it, and the process with 128 + its number: jobs on this machine are told to save and leave, jobs of a
    cluster go on without anybody to look after them.

    Args:
        lock: of the sweep, where this process has it already.
    """
    only_looks = isinstance(backend, LeftLocalJobs)
    with lock or FollowingLock(directory.path) as held, _stopped_by_signals(), shown(directory, jobs) as view:
        following = Following(
            directory.ledger, backend, jobs, parse_on_failure(launcher["on_failure"]), view.say,
            may_act=(lambda: True) if only_looks else held.acquire, after_look=view.refresh,
        )  # fmt: skip
        try:
            records = following.to_the_end()
        except Stopped as stopped:
            _leave(stopped, directory, backend, following)
            raise
        except SlurmUnavailable as error:
            print(f"{error}\nSlurm has not answered for minutes; the jobs go on without anybody to look after them: "
                  f"danling-conf runs {directory.path} --watch", file=sys.stderr)  # fmt: skip
            sys.exit(1)
    completed = sum(record.status == Status.COMPLETED for record in records)
    print(f"sweep done: {completed} of {len(records)} jobs completed: {directory.path}", flush=True)
    return records


def _leave(stopped: Stopped, directory: SweepDirectory, backend: Backend, following: Following) -> None:
    if not isinstance(backend, LocalJobs):
        print(f"{stopped}; the jobs go on: danling-conf runs {directory.path}", file=sys.stderr)
        return
    live = [record for record in directory.ledger.records().values() if not record.ended]
    directory.ledger.add_all([(record.key, {"told": stopped.name}) for record in live])
    backend.cancel(live)
    print(f"{stopped}; the jobs are told to save and leave", file=sys.stderr, flush=True)
    try:
        backend.wait()
    except Stopped:  # a second time: at once
        backend.cancel(list(directory.ledger.records().values()))
        backend.wait()
    while following.look():
        pass
    print(f"to go on: danling-conf resume {directory.path}", file=sys.stderr)


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Signals raise Stopped, wherever this process is."""

    def stop(number: int, frame: Any) -> None:
        raise Stopped(number)

    numbers = [getattr(signal, name) for name in STOPPING]
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
