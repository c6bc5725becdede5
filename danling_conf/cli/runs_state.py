"""How the jobs of a sweep stand when nobody has written it down: what Slurm, or this machine, says now."""

from __future__ import annotations

import os
import shutil

from danling_conf.records.attempts import read_json
from danling_conf.records.ledger import Record
from danling_conf.records.status import Status
from danling_conf.records.sweep_directory import SweepDirectory
from danling_conf.records.sweep_lock import FollowingLock
from danling_conf.sweep.backend import Backend, Ending
from danling_conf.sweep.monitor import as_told
from danling_conf.sweep.orphans import NOT_STARTED, LeftLocalJobs, is_here

NOT_STARTED_STATE = "not started"


def looked_after(sweep: SweepDirectory) -> bool:
    """Whether a process looks after the sweep."""
    return not FollowingLock(sweep.path).is_free()


def is_own(sweep: SweepDirectory) -> bool:
    """Whether the sweep is this user's: only of one's own jobs does Slurm say how they ended."""
    return sweep.path.stat().st_uid == os.getuid()


def ends_seen(sweep: SweepDirectory) -> tuple[dict[str, Ending], list[str]]:
    """Ends that are not in the ledger, by key, and what the user should be told.

    They are written down where nobody looks after the sweep. Jobs that nobody will start are not: they have not ended.
    """
    unfinished = [record for record in sweep.ledger.records().values() if not record.ended]
    cluster = str(read_json(sweep.path / "sweep.json").get("cluster", "local"))
    if not unfinished or not is_own(sweep):
        return {}, []
    if looked_after(sweep):
        return {}, []
    if cluster == "slurm":
        if shutil.which("squeue") is None:
            return {}, ["Slurm cannot be asked from this machine: what the ledger says may be old"]
        backend, notes = _slurm(sweep), []
    else:
        backend, notes = LeftLocalJobs(sweep.path), _of_others(unfinished)
    ends = {}
    records = {record.key: record for record in unfinished}
    for key, ending in backend.endings(unfinished).items():
        told = as_told(records[key], ending)
        if told.error == NOT_STARTED:
            ends[key] = Ending(status=NOT_STARTED_STATE)
        else:  # unless the job's own word comes first
            sweep.ledger.settle(key, status=told.status, error=told.error)
    if ends:
        notes.append(f"{NOT_STARTED.removeprefix('not started: ')}: nobody starts the jobs that it has not started")
    return ends, notes


def _slurm(sweep: SweepDirectory) -> Backend:
    from danling_conf.sweep.slurm_backend import SlurmJobs

    return SlurmJobs(sweep.path)


def _of_others(unfinished: list[Record]) -> list[str]:
    hosts = sorted({
        str(record.facts["host"]) for record in unfinished
        if record.status == Status.RUNNING and "host" in record.facts and not is_here(record)
    })  # fmt: skip
    return [f"on {', '.join(hosts)} jobs ran when last heard of: look from there"] if hosts else []
