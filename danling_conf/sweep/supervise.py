"""Supervision of a sweep from a command: the monitor with a view on the terminal, the sweep's lock, and signals.

The command that starts a sweep supervises it; `danling-conf runs --watch` and `resume` do the same later.
"""

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
from danling_conf.records.sweep_lock import SweepLock
from danling_conf.sweep.backend import Backend
from danling_conf.sweep.live_table import view_of
from danling_conf.sweep.local_backend import LocalJobs
from danling_conf.sweep.monitor import Monitor, parse_on_failure
from danling_conf.sweep.orphans import LeftLocalJobs


def backend_for(cluster: str, launcher: Mapping[str, Any], directory: Path) -> Backend:
    """The backend that starts the jobs of a sweep."""
    if cluster == "slurm":
        from danling_conf.sweep.slurm_backend import SlurmJobs

        return SlurmJobs(directory)
    return LocalJobs(launcher.get("parallel_jobs"))


def supervise(
    directory: SweepDirectory,
    backend: Backend,
    jobs: Mapping[str, JobFile],
    launcher: Mapping[str, Any],
    *,
    lock: SweepLock | None = None,
) -> list[Record]:
    """Monitor submitted jobs until all have ended, and show every change.

    A signal ends it, and the process with 128 + its number: jobs on this machine are asked to save and exit, jobs of a
    cluster continue without a monitor.

    Args:
        jobs: by key.
        launcher: `hydra.launcher` of the sweep.
        lock: of the sweep, where this process has it already.

    Returns:
        The jobs' records, in the order of the sweep.
    """
    # The backend of local jobs whose starter is gone looks at the lock itself, and would find it taken by this process.
    only_watches = isinstance(backend, LeftLocalJobs)
    with lock or SweepLock(directory.path) as held, _stopped_by_signals(), view_of(directory, jobs) as view:
        monitor = Monitor(
            directory.ledger,
            backend,
            jobs,
            parse_on_failure(launcher["on_failure"]),
            view.show,
            may_act=(lambda: True) if only_watches else held.acquire,
            after_poll=view.refresh,
        )
        try:
            records = monitor.run()
        except Stopped as stopped:
            _stop(stopped, directory, backend, monitor)
            raise
        except SlurmUnavailable as error:
            resumed = f"danling-conf runs {directory.path} --watch"
            print(
                f"{error}\nSlurm has not answered for minutes; the jobs continue without a monitor: {resumed}",
                file=sys.stderr,
            )
            sys.exit(1)
    completed = sum(record.status == Status.COMPLETED for record in records)
    print(f"sweep done: {completed} of {len(records)} jobs completed: {directory.path}", flush=True)
    return records


def _stop(stopped: Stopped, directory: SweepDirectory, backend: Backend, monitor: Monitor) -> None:
    """End the jobs of this machine, which end with their command; those of a cluster do not need it."""
    if not isinstance(backend, LocalJobs):
        print(f"{stopped}; the jobs continue: danling-conf runs {directory.path}", file=sys.stderr)
        return
    live = [record for record in directory.ledger.records().values() if not record.ended]
    directory.ledger.add_all([(record.key, {"told": stopped.name}) for record in live])
    backend.cancel(live)
    print(f"{stopped}; the jobs are asked to save and exit", file=sys.stderr, flush=True)
    try:
        backend.wait()
    except Stopped:  # a second signal: the jobs take it as an order to exit without saving
        backend.cancel(list(directory.ledger.records().values()))
        backend.wait()
    while monitor.poll():
        pass
    print(f"to go on: danling-conf resume {directory.path}", file=sys.stderr)


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Let signals raise Stopped, wherever this process is."""

    def stop(number: int, frame: Any) -> None:
        raise Stopped(number)

    numbers = [getattr(signal, name) for name in STOPPING]
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
