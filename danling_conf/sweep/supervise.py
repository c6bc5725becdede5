"""Supervision of a sweep by a command: the monitor, with a view on the terminal, the sweep's lock, and signals.

The command that starts a sweep supervises it. `danling-conf runs --watch` and `resume` can do so later.
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
from danling_conf.records.logs import on_any_disk
from danling_conf.records.status import Status
from danling_conf.records.stopped import STOPPING, Stopped
from danling_conf.records.sweep_directory import SweepDirectory
from danling_conf.records.sweep_lock import SweepLock
from danling_conf.schema.printable import shell_line
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

    A signal ends the monitor, and the process exits with 128 + its number. Jobs on this machine receive a signal to
    save and exit; jobs on a cluster continue without a monitor.

    Args:
        jobs: job files by key.
        launcher: `hydra.launcher` of the sweep.
        lock: the sweep's lock, where this process holds it already.

    Returns:
        The jobs' records, in the order of the sweep.
    """
    # LeftLocalJobs acts only while the lock is free. If this process took it, the backend would wait for ever.
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
            resumed = shell_line("danling-conf", "runs", directory.path, "--watch")
            print(
                f"{error}\nSlurm has not answered for ten minutes; the jobs continue without a monitor: {resumed}",
                file=sys.stderr,
            )
            sys.exit(1)
    completed = sum(record.status == Status.COMPLETED for record in records)
    print(f"sweep done: {completed} of {len(records)} jobs completed: {directory.path}", flush=True)
    return records


def _stop(stopped: Stopped, directory: SweepDirectory, backend: Backend, monitor: Monitor) -> None:
    """Stop the jobs of this machine, which end with their command. Jobs on a cluster do not depend on it."""
    if not isinstance(backend, LocalJobs):
        print(f"{stopped}; the jobs continue: {shell_line('danling-conf', 'runs', directory.path)}", file=sys.stderr)
        return
    live = [record for record in directory.ledger.records().values() if not record.ended]
    # First the ledger, if it can be written, then the signal: a job that dies before it can write its end is then
    # cancelled, not failed.
    with on_any_disk(directory.ledger.path):
        directory.ledger.add_all([(record.key, {"told": stopped.name}) for record in live])
    backend.cancel(live)
    print(f"{stopped}; waiting for the jobs to save and exit", file=sys.stderr, flush=True)
    try:
        backend.wait()
    except Stopped:  # a second signal makes the jobs exit without saving
        backend.cancel(list(directory.ledger.records().values()))
        backend.wait()
    with on_any_disk(directory.ledger.path):
        while monitor.poll():
            pass
    print(f"to resume: {shell_line('danling-conf', 'resume', directory.path)}", file=sys.stderr)


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Let stop signals raise Stopped at whatever line this process is."""

    def stop(number: int, frame: Any) -> None:
        raise Stopped(number)

    numbers = [getattr(signal, name) for name in STOPPING]
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
