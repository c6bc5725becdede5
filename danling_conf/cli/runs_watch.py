"""`danling-conf runs DIR --watch`: monitors a sweep that another command started."""

from __future__ import annotations

import time

from danling_conf.cli.runs import look
from danling_conf.cli.runs_found import file_of, find, reachable_or_refuse, request_of
from danling_conf.records.status import EXIT_FAILED, EXIT_INTERRUPTED, Status
from danling_conf.records.sweep_directory import SweepDirectory
from danling_conf.schema.printable import printable
from danling_conf.sweep.backend import Backend
from danling_conf.sweep.ends import is_own
from danling_conf.sweep.live_table import drawn
from danling_conf.sweep.orphans import LeftLocalJobs
from danling_conf.sweep.supervise import backend_for, supervise
from danling_conf.topology.violation import ConfigRefused, Violation

_SECONDS = 1.0


def watch_runs(directory: str) -> int:
    """Monitor a sweep like the command that started it; in other directories, only show the runs.

    Returns the exit code: 1 where a job did not complete. Raises ConfigRefused where there is nothing.
    """
    found = find(directory)
    if len(found.sweeps) == 1 and not found.runs and is_own(found.sweeps[0]):
        return _supervise(found.sweeps[0])
    return _look_on(directory)


def _supervise(sweep: SweepDirectory) -> int:
    records = sweep.ledger.records()
    if not records:
        raise ConfigRefused([Violation("DIR", str(sweep.path), "its ledger holds no job", "start the sweep again")])
    request = request_of(sweep)
    files = {key: file_of(sweep, record) for key, record in records.items()}
    launcher = dict(request.launcher)
    reachable_or_refuse(sweep, request)
    backend: Backend
    if request.on_slurm:
        backend = backend_for(request.cluster, launcher, sweep.path)
    else:
        # Local jobs are children of the command that started them, so only that command, or `resume`, starts more.
        backend, launcher["on_failure"] = LeftLocalJobs(sweep.path), "continue"
    ended = supervise(sweep, backend, files, launcher)
    return 0 if all(record.status == Status.COMPLETED for record in ended) else EXIT_FAILED


def _look_on(directory: str) -> int:
    """Show a table of all runs until none is live; on a terminal it is redrawn in place."""
    from rich.console import Console
    from rich.live import Live

    console = Console()
    try:
        with Live(console=console, auto_refresh=False, transient=False) as live:
            printed: dict[str, str] = {}
            while True:
                seen = look(directory)
                if console.is_terminal:
                    live.update(drawn(seen.rows, console), refresh=True)
                else:
                    for row in seen.rows:
                        if printed.get(str(row.run)) != row.state:
                            printed[str(row.run)] = row.state
                            print(printable(f"{row.run}: {row.state}"), flush=True)
                if not any(row.live for row in seen.rows):
                    break
                time.sleep(_SECONDS)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return 0 if all(row.state == Status.COMPLETED for row in seen.rows) else EXIT_FAILED
