"""Ends of jobs that did not record their own: looked up in Slurm or the process table, and written to the ledger.

The first command that looks writes the end, and every later one reads the same from the ledger.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from danling_conf.launch.slurm.queries import SlurmUnavailable
from danling_conf.records.find import sweep_of
from danling_conf.records.ledger import Record
from danling_conf.records.run_directory import newest_attempt
from danling_conf.records.state import GONE, RunState, covers, state_of
from danling_conf.records.status import Status
from danling_conf.records.sweep_directory import SweepDirectory
from danling_conf.records.sweep_lock import SweepLock
from danling_conf.sweep.backend import Backend, Ending
from danling_conf.sweep.orphans import NOT_STARTED, LeftLocalJobs, is_here, process_of, running_here

_SAVING_SECONDS = 60.0
"""How long to wait for jobs that are still saving, as after the command that started them was killed."""


def is_monitored(sweep: SweepDirectory) -> bool:
    """Whether a process monitors the sweep."""
    return not SweepLock(sweep.path).is_free()


def is_own(sweep: SweepDirectory) -> bool:
    """Whether the sweep belongs to this user: `squeue --me` and sacct show no one else's jobs."""
    return sweep.path.stat().st_uid == os.getuid()


def cluster_of(sweep: SweepDirectory) -> str:
    """Where a sweep's jobs run: `slurm` or `local`."""
    return sweep.request.text("cluster") or "local"


def standing_of(run: Path) -> RunState:
    """The state of a run: `state_of`, after a missing end of its job was settled."""
    return Standings().of([run])[0]


class Standings:
    """States of runs for a live view: `state_of` each, after missing ends of their jobs were settled.

    Args:
        every: least number of seconds between two queries of Slurm or of the process table.
    """

    def __init__(self, every: float = 0.0) -> None:
        self._every = every
        self._queried = -math.inf
        self._unstarted: set[tuple[Path, str]] = set()

    def of(self, runs: Sequence[Path]) -> list[RunState]:
        """The present state of each run."""
        if time.monotonic() - self._queried >= self._every:
            self._queried = time.monotonic()
            self._settle(runs)
        return [self._of(run) for run in runs]

    def _settle(self, runs: Sequence[Path]) -> None:
        # Once for all jobs of a sweep: each settling runs squeue, or reads the whole process table.
        owners = [owner for owner in map(sweep_of, runs) if owner is not None and not owner[1].ended]
        sweeps = {sweep.path: sweep for sweep, _ in owners}
        self._unstarted = {(path, key) for path, sweep in sweeps.items() for key in settle_ends(sweep)[0]}

    def _of(self, run: Path) -> RunState:
        owner = sweep_of(run)
        if owner is None or owner[1].ended or (owner[0].path, owner[1].key) not in self._unstarted:
            return state_of(run)
        is_next = covers(owner[1], newest_attempt(run))
        return RunState(status=Status.NOT_STARTED) if is_next else state_of(run)


def settle_ends(sweep: SweepDirectory) -> tuple[dict[str, Ending], list[str]]:
    """Write the ends of jobs that did not write their own; does nothing where another process monitors the sweep.

    Returns:
        The jobs that no process will start, by key: they have not ended, so that no end is written. And notes for the
        user.
    """
    unfinished = [record for record in sweep.ledger.records().values() if not record.ended]
    if not unfinished or not is_own(sweep) or is_monitored(sweep):
        return {}, []
    if not os.access(sweep.ledger.path, os.W_OK):
        return {}, []
    backend: Backend
    notes: list[str] = []
    if cluster_of(sweep) == "slurm":
        if shutil.which("squeue") is None or shutil.which("sbatch") is None:
            return {}, ["Slurm cannot be queried from this machine: the ledger may be out of date"]
        from danling_conf.sweep.slurm_backend import SlurmJobs

        backend = SlurmJobs(sweep.path)
    else:
        backend, notes = LeftLocalJobs(sweep.path), _on_other_hosts(unfinished)
    try:
        endings = backend.endings(unfinished)
    except SlurmUnavailable as error:
        return {}, [f"Slurm does not answer, so the ledger may be out of date: {error}"]
    unstarted = {key: Ending(status=Status.NOT_STARTED) for key, end in endings.items() if end.error == NOT_STARTED}
    sweep.ledger.settle_all({key: (end.status, end.error) for key, end in endings.items() if key not in unstarted})
    if unstarted:
        notes.append(f"{NOT_STARTED.removeprefix('not started: ')}: the jobs that it has not started will not start")
    return unstarted, notes


def live_jobs(sweep: SweepDirectory, backend: Backend) -> set[str]:
    """The keys of the jobs that are queued or running, after the ends of all others were written.

    Raises SlurmUnavailable where Slurm has to be queried and does not answer.
    """
    unfinished = [record for record in sweep.ledger.records().values() if not record.ended and record.queued]
    if not unfinished:
        return set()
    if cluster_of(sweep) != "slurm":
        return _live_here(sweep)
    endings = backend.endings(unfinished)
    sweep.ledger.settle_all({key: (end.status, end.error) for key, end in endings.items()})
    return {record.key for record in unfinished if record.key not in endings}


def _live_here(sweep: SweepDirectory) -> set[str]:
    """Local jobs whose command is gone. Their parent death signal made them save and exit, so wait until they have."""
    shown: set[str] = set()
    deadline = time.monotonic() + _SAVING_SECONDS
    while True:
        running = running_here()
        records = [record for record in sweep.ledger.records().values() if not record.ended]
        live = {record.key: process_of(record, sweep.path, running) for record in records}
        lost = {}
        for record in records:
            process = live[record.key]
            if process is None and record.status == Status.RUNNING and is_here(record):
                lost[record.key] = (Status.LOST, GONE)
            elif process is not None and record.key not in shown:
                shown.add(record.key)
                print(f"#{record.number} is still running (process {process}): waiting for it", flush=True)
        sweep.ledger.settle_all(lost)
        here = {key for key, process in live.items() if process is not None}
        elsewhere = {record.key for record in records if record.status == Status.RUNNING and not is_here(record)}
        if not here or time.monotonic() > deadline:
            for record in records:
                if record.key in elsewhere:
                    print(f"#{record.number} was last seen running on {record.facts.get('host')}: not touched")
            return here | elsewhere
        time.sleep(LeftLocalJobs.interval)


def _on_other_hosts(unfinished: list[Record]) -> list[str]:
    hosts = sorted(
        {
            str(record.facts["host"])
            for record in unfinished
            if record.status == Status.RUNNING and "host" in record.facts and not is_here(record)
        }
    )
    return [f"jobs were last seen running on {', '.join(hosts)}: look from there"] if hosts else []
