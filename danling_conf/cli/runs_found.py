"""What a directory stands for: a sweep, a run, or all that is below it."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from danling_conf.launch.rank import RESULT
from danling_conf.records.attempts import is_live, read_json
from danling_conf.records.heartbeats import newest_attempt
from danling_conf.records.job_file import JobFile
from danling_conf.records.ledger import LEDGER, Record
from danling_conf.records.run_directory import RUN_FILE
from danling_conf.records.status import Status
from danling_conf.records.sweep_directory import SweepDirectory
from danling_conf.topology.violation import ConfigRefused, Violation

_GIVE = "give a run's directory, a sweep's, or one above them"


@dataclass(frozen=True, kw_only=True)
class Found:
    """Sweeps and runs in a directory."""

    path: Path
    sweeps: list[SweepDirectory]
    runs: list[Path]
    """Of no sweep among these; the run itself where the directory is one."""

    @property
    def run(self) -> Path | None:
        """The run that the directory is, or the only one in it, where that belongs to no sweep."""
        return self.runs[0] if len(self.runs) == 1 and not self.sweeps else None


def find(directory: str) -> Found:
    """What a user's directory holds. Raises ConfigRefused where there is none, or nothing in it."""
    path = Path(os.path.abspath(Path(directory).expanduser()))
    if not path.is_dir():
        raise ConfigRefused([Violation("DIR", directory, "there is no such directory", _GIVE)])
    if (path / RUN_FILE).is_file():
        return Found(path=path, sweeps=[], runs=[path])
    if (path / LEDGER).is_file():
        return Found(path=path, sweeps=[SweepDirectory(path=path)], runs=[])
    sweeps, runs = [], []
    for folder, inside, files in os.walk(path):
        inside.sort()
        if LEDGER in files:
            sweeps.append(SweepDirectory(path=Path(folder)))
        elif RUN_FILE in files:
            runs.append(Path(folder))
        else:
            continue
        inside.clear()  # what is below is its own
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
        rule, fix = "there is no sweep in it", "give a sweep's directory, or a run's"
    else:
        rule = f"there are {len(found.sweeps)} sweeps in it, and this is for one"
        fix = "give one of them: " + ", ".join(str(sweep.path) for sweep in found.sweeps)
    raise ConfigRefused([Violation("DIR", str(found.path), rule, fix)])


def sweep_of(run: Path) -> tuple[SweepDirectory, Record] | None:
    """The newest sweep that a run is a job of, and which; None for a run of its own."""
    folders = {path.parent for path in (run.parent / "sweeps").glob(f"*/{LEDGER}")}
    attempt = newest_attempt(run)
    if attempt is not None:
        with contextlib.suppress(KeyError, TypeError):  # it may have been put elsewhere
            hydra = read_json(attempt / "frozen.json")["hydra"]
            folders.add(Path(hydra["runtime"]["cwd"]) / hydra["sweep"]["dir"])
    for folder in sorted(folders, key=lambda folder: folder.name, reverse=True):
        sweep = SweepDirectory(path=folder)
        for record in sweep.ledger.records().values():
            if record.run is not None and record.run.resolve() == run.resolve():
                return sweep, record
    return None


def job_named(sweep: SweepDirectory, name: str) -> Record:
    """The job with a number, key or run id. Raises ConfigRefused, with those there are."""
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
    raise ConfigRefused([Violation("JOB", name, rule, f"give a number, key or run id: {known}{more}")])


def file_of(sweep: SweepDirectory, record: Record) -> JobFile:
    """The job file of a job. Raises ConfigRefused where it cannot be read."""
    try:
        return sweep.job(record.key)
    except ValueError as error:
        fix = "restore the file, or start this configuration anew"
        raise ConfigRefused([Violation("JOB", str(record.number), str(error), fix)]) from error


def asked_of(sweep: SweepDirectory) -> Mapping[str, Any]:
    """What was asked of a sweep. Raises ConfigRefused where nothing says it."""
    asked = read_json(sweep.path / "sweep.json")
    if not {"cluster", "launcher"} <= asked.keys():
        rule = "its sweep.json is missing or broken, so that nothing says where its jobs run"
        raise ConfigRefused([Violation("DIR", str(sweep.path), rule, "start the sweep anew")])
    return asked


def reachable_or_refuse(sweep: SweepDirectory, cluster: str) -> None:
    """Raises ConfigRefused where this user, or this machine, can do nothing for a sweep's jobs."""
    if not os.access(sweep.path, os.W_OK) or not os.access(sweep.path / LEDGER, os.W_OK):
        rule, fix = "its ledger cannot be written by this user", "ask whoever started the sweep"
    elif cluster == "slurm" and shutil.which("squeue") is None:
        rule, fix = "its jobs are Slurm's, whose commands are not installed here", "go to a machine of the cluster"
    else:
        return
    raise ConfigRefused([Violation("DIR", str(sweep.path), rule, fix)])


def state_of_run(run: Path) -> tuple[str, str | None]:
    """How a run that no ledger knows stands, and why: by what its newest attempt has written, else by who holds it."""
    attempt = newest_attempt(run)
    if attempt is None:
        return "empty", None
    if is_live(run):
        return Status.RUNNING, None
    result = read_json(attempt / RESULT)
    if result:
        return str(result.get("status")), result.get("error")
    holder = ""
    with contextlib.suppress(OSError):
        holder = (run / "run.lock").read_text()
    host = holder.partition(",")[0].rpartition(" on ")[2]
    if host and host != os.uname().nodename:
        return "unknown", f"its process ran on {host}, and has left no word"
    return Status.LOST, "its process is gone, and has left no word"
