"""Orphans: local jobs whose parent command is gone, found again through the environment of their processes.

A later command has no handle on them, and the process id in the ledger is not enough: the system may have reused it.
Each job's process has the path of its job file in its environment, which /proc shows.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path

from danling_conf.records.job_file import JobFile
from danling_conf.records.ledger import Record
from danling_conf.records.state import GONE
from danling_conf.records.status import Status
from danling_conf.records.sweep_lock import SweepLock
from danling_conf.schema.files import JOB_FILE, LEDGER
from danling_conf.sweep.backend import Ending
from danling_conf.topology.rank_environment import JOB_VARIABLE

NOT_STARTED = "not started: the command that monitored the sweep is gone"
_PROC = Path("/proc")


def is_here(record: Record) -> bool:
    """Whether a job was last started on this machine."""
    return record.facts.get("host") == os.uname().nodename


def running_here() -> dict[Path, int]:
    """Process ids of the jobs on this machine, by job file."""
    found: dict[Path, int] = {}
    for path in _PROC.glob("[0-9]*"):
        job = _job_of(path)
        # Ranks and DataLoader workers inherit the environment. The job's own process is the one whose parent has not.
        if job is not None and (job not in found or _job_of(_PROC / str(_parent(path))) != job):
            found[job] = int(path.name)
    return found


def process_of(record: Record, sweep: Path, running: dict[Path, int] | None = None) -> int | None:
    """The process id of a job on this machine; None where it has no process here.

    Args:
        running: what `running_here` returned, where many jobs are looked up.
    """
    job = (sweep / "jobs" / record.key / JOB_FILE).resolve()
    if _PROC.is_dir():
        return (running_here() if running is None else running).get(job)
    # Without /proc (macOS) the environment cannot be read: any live process with the recorded id has to do.
    pid = record.facts.get("pid") if record.status == Status.RUNNING and is_here(record) else None
    return pid if pid is not None and _answers(pid) else None


def tell_to_stop(pid: int) -> bool:
    """Signal a job to save and exit. Returns whether its process still existed."""
    try:
        os.kill(pid, signal.SIGTERM)
    except ProcessLookupError:
        return False
    return True


class LeftLocalJobs:
    """Backend of local jobs that another process started: it watches them, and starts none.

    While the command that started them is alive, that command records how they end.

    Args:
        sweep: the sweep's directory.
    """

    interval = 0.5
    patience = 2.0

    def __init__(self, sweep: Path) -> None:
        self._sweep = sweep
        self._lock = SweepLock(sweep)

    def submit(self, jobs: Sequence[JobFile]) -> None:
        raise NotImplementedError("jobs are started by their sweep's own command, or by danling-conf resume")

    def endings(self, unfinished: Sequence[Record]) -> dict[str, Ending]:
        """Jobs whose process is gone, and waiting jobs that no process will start."""
        if not self._lock.is_free() or not os.access(self._sweep / LEDGER, os.W_OK):
            return {}
        running, found = running_here(), {}
        for record in unfinished:
            elsewhere = record.status == Status.RUNNING and not is_here(record)
            if elsewhere or process_of(record, self._sweep, running) is not None:
                continue
            if record.status == Status.RUNNING:
                found[record.key] = Ending(status=Status.LOST, error=GONE)
            else:
                found[record.key] = Ending(status=Status.CANCELLED, error=NOT_STARTED)
        return found

    def proceed(self) -> None:
        """Does nothing: it starts no jobs."""

    def cancel(self, records: Sequence[Record]) -> None:
        running = running_here()
        for record in records:
            process = process_of(record, self._sweep, running)
            if process is not None:
                tell_to_stop(process)


def _job_of(process: Path) -> Path | None:
    """The job file in the environment of a live process; None for zombies and for other processes."""
    # In `stat`, the name of the program stands in parentheses and may contain blanks and parentheses itself, so the
    # fields are counted from the last one. A zombie has ended and only waits for its parent to collect it.
    try:
        if (process / "stat").read_text().rpartition(")")[2].split()[0] in "ZX":
            return None
        content = (process / "environ").read_bytes()
    except (OSError, IndexError):
        return None  # of another user, or just ended
    prefix = f"{JOB_VARIABLE}=".encode()
    found = next((item for item in content.split(b"\0") if item.startswith(prefix)), None)
    return None if found is None else Path(os.fsdecode(found[len(prefix) :])).resolve()


def _parent(process: Path) -> str:
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()[1]
    except (OSError, IndexError):
        return "0"


def _answers(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True
