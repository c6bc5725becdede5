"""Lookup of the directory that a user named: a sweep, a run, or a directory above several of them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from danling_conf.records.find import has
from danling_conf.records.job_file import JobFile
from danling_conf.records.ledger import Record
from danling_conf.records.sweep_directory import SweepDirectory
from danling_conf.schema.files import LEDGER, RUN_FILE, SWEEP_FILE, Damaged
from danling_conf.schema.printable import override, shell_line
from danling_conf.sweep.monitor import parse_on_failure
from danling_conf.topology.violation import ConfigRefused, Violation

_GIVE = "name a run's directory, a sweep's, or one above them"


@dataclass(frozen=True, kw_only=True)
class Found:
    """Sweeps and runs in a directory."""

    path: Path
    sweeps: list[SweepDirectory]
    runs: list[Path]
    """Runs that belong to none of these sweeps; the run itself where the directory is one."""

    @property
    def run(self) -> Path | None:
        """The run that the directory is, or the only one in it, if it belongs to no sweep."""
        return self.runs[0] if len(self.runs) == 1 and not self.sweeps else None


def find(directory: str) -> Found:
    """The sweeps and runs of a directory. Raises ConfigRefused where it does not exist or has none."""
    path = Path(os.path.abspath(Path(directory).expanduser()))
    if not path.is_dir():
        raise ConfigRefused([Violation("DIR", directory, "there is no such directory", _GIVE)])
    if has(path, RUN_FILE):
        return Found(path=path, sweeps=[], runs=[path])
    if has(path, LEDGER) or has(path, SWEEP_FILE):
        return Found(path=path, sweeps=[SweepDirectory(path=path)], runs=[])
    sweeps, runs = [], []
    for folder, inside, files in os.walk(path):
        inside.sort()
        names = {*inside, *files}  # a damaged record may be a directory in the file's place
        if LEDGER in names or SWEEP_FILE in names:
            sweeps.append(SweepDirectory(path=Path(folder)))
        elif RUN_FILE in names:
            runs.append(Path(folder))
        else:
            continue
        inside.clear()  # do not descend: everything below belongs to it
    if not sweeps and not runs:
        raise ConfigRefused([Violation("DIR", directory, "there is no run and no sweep in it", _GIVE)])
    sweeps.sort(key=lambda sweep: sweep.path.name)
    owned = {record.run for sweep in sweeps for record in sweep.ledger.records().values()}
    return Found(path=path, sweeps=sweeps, runs=[run for run in runs if run not in owned])


def one_sweep(found: Found) -> SweepDirectory:
    """The only sweep of a directory. Raises ConfigRefused, with their names, where there are several or none."""
    if len(found.sweeps) == 1:
        return found.sweeps[0]
    if not found.sweeps:
        rule, fix = "there is no sweep in it", "name a sweep's directory, or a run's"
    else:
        rule = f"there are {len(found.sweeps)} sweeps in it, and this command takes one"
        fix = "name one of them: " + ", ".join(str(sweep.path) for sweep in found.sweeps)
    raise ConfigRefused([Violation("DIR", str(found.path), rule, fix)])


def job_named(sweep: SweepDirectory, name: str) -> Record:
    """The job with a number, key or run id. Raises ConfigRefused, with the existing ones."""
    records = sweep.ledger.records()
    for record in records.values():
        if name in (str(record.number), f"#{record.number}", record.key, record.run.name if record.run else None):
            return record
    begun = [record for record in records.values() if len(name) >= 4 and record.key.startswith(name)]
    if len(begun) == 1:
        return begun[0]
    known = ", ".join(f"{record.number} ({record.key})" for record in list(records.values())[:20])
    more = f", and {len(records) - 20} more" if len(records) > 20 else ""
    rule = f"the sweep {sweep.path} has no such job"
    raise ConfigRefused([Violation("JOB", name, rule, f"use a number, key or run id: {known}{more}")])


def file_of(sweep: SweepDirectory, record: Record, *, to_start: bool = False) -> JobFile:
    """The job file of a job. Raises ConfigRefused where it is damaged, or lacks something that a start needs."""
    try:
        job = sweep.job(record.key)
        if not to_start:
            return job
        job.require_startable()
    except Damaged as damage:
        fix = "restore the file, or start this configuration again"
        raise ConfigRefused([Violation("JOB", str(record.number), str(damage), fix)]) from damage
    needed = [Path(job.directory), *([Path(job.directory, job.argv[0])] if job.argv[0] != "-m" else [])]
    for path in needed:
        if not path.exists():
            rule = f"it starts {job.argv[0]} in {job.directory}, and there is no {path} any more"
            again = shell_line("python", "TRAIN.py", *job.overrides, override("resume", job.binding.run_directory))
            raise ConfigRefused([Violation("JOB", str(record.number), rule, f"move it back, or go on by {again}")])
    return job


@dataclass(frozen=True, kw_only=True)
class SweepRequest:
    """The request with which a sweep was started."""

    cluster: str
    """`slurm` or `local`."""
    launcher: Mapping[str, Any]
    """Settings of the launcher."""

    @property
    def on_slurm(self) -> bool:
        return self.cluster == "slurm"


def request_of(sweep: SweepDirectory) -> SweepRequest:
    """The request with which a sweep was started. Raises ConfigRefused where it cannot be read."""
    cluster, launcher = sweep.request.text("cluster"), sweep.request.table("launcher")
    try:
        if cluster not in ("slurm", "local"):
            raise ValueError(f"cluster is {cluster!r}")
        parse_on_failure(launcher.text("on_failure") or "")
    except ValueError as error:
        rule = f"its {SWEEP_FILE} is missing or broken, so it is unknown where its jobs run: {error}"
        raise ConfigRefused([Violation("DIR", str(sweep.path), rule, "start the sweep again")]) from error
    return SweepRequest(
        cluster=cluster, launcher={**launcher.values, "parallel_jobs": launcher.integer("parallel_jobs")}
    )


def reachable_or_refuse(sweep: SweepDirectory, request: SweepRequest) -> None:
    """Raises ConfigRefused where this user, or this machine, cannot act on a sweep's jobs."""
    ledger = sweep.path / LEDGER
    if not os.access(sweep.path, os.W_OK) or (ledger.exists() and not os.access(ledger, os.W_OK)):
        rule, fix = f"its ledger, {LEDGER}, cannot be written by this user", "ask whoever started the sweep"
    elif request.on_slurm and shutil.which("squeue") is None:
        rule, fix = "its jobs run on Slurm, whose commands are not installed here", "use a machine of the cluster"
    else:
        return
    raise ConfigRefused([Violation("DIR", str(sweep.path), rule, fix)])
