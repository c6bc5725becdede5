"""`danling-conf resume DIR`: what a sweep or a run still lacks, in the same runs, from their newest checkpoints."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from danling_conf.cli.runs_found import (
    asked_of,
    file_of,
    find,
    one_sweep,
    reachable_or_refuse,
    read_json,
    state_of_run,
    sweep_of,
)
from danling_conf.config.identity import layout_name
from danling_conf.launch.slurm.queries import SlurmUnavailable
from danling_conf.records.code import CodeIdentity, code_identity
from danling_conf.records.heartbeats import newest_attempt
from danling_conf.records.job_file import JOB_FILE, JobFile, Program
from danling_conf.records.ledger import Record
from danling_conf.records.run_directory import RUN_FILE
from danling_conf.records.status import Status
from danling_conf.records.sweep_directory import SweepDirectory
from danling_conf.records.sweep_lock import FollowingLock
from danling_conf.schema import Layout
from danling_conf.sweep.monitor import as_told
from danling_conf.sweep.orphans import GONE, LeftLocalJobs, is_here, process_of, running_here
from danling_conf.sweep.supervise import backend_for, supervise
from danling_conf.topology.violation import ConfigRefused, Violation

FAILED = 1
_SAVING_SECONDS = 60.0
"""How long jobs are waited for that still save, as when the command that started them has just been killed."""


def resume(directory: str) -> int:
    """Start what is missing or has failed, and follow it; gives the exit code: 1 where a job did not complete.

    Raises ConfigRefused where nothing can be resumed.
    """
    found = find(directory)
    if found.run is None:
        return _resume(one_sweep(found), None)
    owner = sweep_of(found.run)
    if owner is not None:
        sweep, record = owner
        print(f"{found.run.name} is job #{record.number} of the sweep {sweep.path}", flush=True)
        return _resume(sweep, record.key)
    if state_of_run(found.run)[0] == Status.COMPLETED:
        print(f"nothing to do: the run has completed: {found.run}")
        return 0
    return _resume(sweep_for_run(found.run), None)


def _resume(sweep: SweepDirectory, only: str | None) -> int:
    asked = asked_of(sweep)
    launcher: Mapping[str, Any] = asked["launcher"]
    cluster = str(asked["cluster"])
    reachable_or_refuse(sweep, cluster)
    with FollowingLock(sweep.path) as lock:
        if not lock.acquire(tries=5):
            fix = f"see how it goes: danling-conf runs {sweep.path}; or end that process first"
            raise ConfigRefused([
                Violation("DIR", str(sweep.path), f"{lock.holder} looks after the sweep and would start jobs too", fix)
            ])  # fmt: skip
        try:
            live = _settle(sweep, cluster)
            records = {key: record for key, record in sweep.ledger.records().items() if only in (None, key)}
            again = [
                record for record in records.values() if record.status != Status.COMPLETED and record.key not in live
            ]
            if not again and not live & records.keys():
                print(f"nothing to do: {_completed(records.values())}: {sweep.path}")
                return 0
            files = {
                key: file_of(sweep, record) for key, record in records.items() if record.status != Status.COMPLETED
            }
            backend = backend_for(cluster, launcher, sweep.path)
            print(f"{_completed(records.values())}; {len(again)} to start: {sweep.path}", flush=True)
            if again:
                backend.submit([files[record.key] for record in again])
            if cluster != "slurm":  # here nobody can look after what another process has started
                files = {key: file for key, file in files.items() if key not in live}
            if launcher.get("detach"):
                return 0
            supervise(sweep, backend, files, launcher, lock=lock)
        except SlurmUnavailable as error:
            fix = "resume from a machine of the cluster"
            raise ConfigRefused([Violation("DIR", str(sweep.path), str(error), fix)]) from error
    records = {key: record for key, record in sweep.ledger.records().items() if only in (None, key)}
    return 0 if all(record.status == Status.COMPLETED for record in records.values()) else FAILED


def _completed(records: Any) -> str:
    listed: Sequence[Record] = list(records)
    count = sum(record.status == Status.COMPLETED for record in listed)
    return f"{count} of {len(listed)} job{'' if len(listed) == 1 else 's'} completed"


def _settle(sweep: SweepDirectory, cluster: str) -> set[str]:
    """Write down what ended without a word; gives the keys of the jobs that are live."""
    unfinished = [record for record in sweep.ledger.records().values() if not record.ended and record.queued]
    if not unfinished:
        return set()
    if cluster == "slurm":
        endings = backend_for(cluster, {}, sweep.path).endings(unfinished)
        for record in unfinished:
            if record.key in endings:
                ending = as_told(record, endings[record.key])
                sweep.ledger.settle(record.key, status=ending.status, error=ending.error)
        return {record.key for record in unfinished if record.key not in endings}
    return _live_here(sweep)


def _live_here(sweep: SweepDirectory) -> set[str]:
    """Jobs of a command that is gone: they were told to save and leave when it went, so they are waited for."""
    said: set[str] = set()
    deadline = time.monotonic() + _SAVING_SECONDS
    while True:
        running = running_here()
        records = [record for record in sweep.ledger.records().values() if not record.ended]
        live = {record.key: process_of(record, sweep.path, running) for record in records}
        for record in records:
            process = live[record.key]
            if process is None and record.status == Status.RUNNING and is_here(record):
                sweep.ledger.settle(record.key, status="lost", error=GONE)
            elif process is not None and record.key not in said:
                said.add(record.key)
                print(f"#{record.number} still runs (process {process}), and is waited for", flush=True)
        here = {key for key, process in live.items() if process is not None}
        elsewhere = {record.key for record in records if record.status == Status.RUNNING and not is_here(record)}
        if not here or time.monotonic() > deadline:
            for record in records:
                if record.key in elsewhere:
                    print(f"#{record.number} ran on {record.facts.get('host')} when last heard of: left alone")
            return here | elsewhere
        time.sleep(LeftLocalJobs.interval)


def sweep_for_run(run: Path) -> SweepDirectory:
    """A sweep of one job on this machine: the run, as its newest attempt was configured.

    Raises ConfigRefused where the run is live, or nothing says how it was started.
    """
    state, _ = state_of_run(run)
    if state == Status.RUNNING:
        fix = f"see how it goes: danling-conf runs {run}"
        raise ConfigRefused([Violation("DIR", str(run), "the run is live", fix)])
    attempt = newest_attempt(run)
    frozen = read_json(attempt / "frozen.json") if attempt is not None else {}
    words, hydra = (frozen.get("attempt") or {}).get("command"), frozen.get("hydra")
    if not words or not hydra or not {"job_id", "class", "config"} <= frozen.keys():
        rule = "its newest attempt does not say how it was started here"
        raise ConfigRefused([Violation("DIR", str(run), rule, f"start it with its own command and resume={run}")])
    directory = Path(hydra.get("runtime", {}).get("cwd") or os.getcwd())
    script = directory / words[0]
    if not script.is_file():
        rule = f"it was started by {script}, which is not there any more"
        raise ConfigRefused([Violation("DIR", str(run), rule, f"start it with its own command and resume={run}")])
    code = code_identity(script.parent)
    program = Program(words=(str(script),), directory=directory, code_id=code.code_id)
    sweep = SweepDirectory(path=run.parent / "sweeps" / datetime.now().strftime("%Y%m%d-%H%M%S-%f"))
    try:
        _write(sweep, run, frozen, list(words[1:]), program, code)
    except OSError as error:
        fix = "resume as a user who may write there"
        raise ConfigRefused([Violation("DIR", str(run), f"it cannot be written: {error}", fix)]) from error
    return sweep


def _write(
    sweep: SweepDirectory, run: Path, frozen: Mapping[str, Any], overrides: list[str], program: Program,
    code: CodeIdentity,
) -> None:  # fmt: skip
    config, key = frozen["config"], str(frozen["job_id"])
    axes = config["parallel"]["axes"]
    layout = Layout(**{name: axes[name] for name in Layout().degrees()}, fsdp=bool(config["fsdp"]["enabled"]))
    saved = any((run / config["checkpoint"]["dir_name"]).glob("ckpt-*"))
    launcher = {"on_failure": "continue", "skip_refused": False, "parallel_jobs": None}
    content = {
        "key": key, "job": 0, "overrides": overrides, "program": program.to_json(),
        "binding": {"run_directory": str(run), "restore": str(run) if saved else None, "notes": []},
        "world_size": layout.world_size, "launcher": launcher, "shape": None,
        **{name: frozen[name] for name in ("job_id", "class", "config", "hydra")},
    }  # fmt: skip
    job = JobFile(path=sweep.path / "jobs" / key / JOB_FILE, content=content)
    job.folder.mkdir(parents=True)
    job.path.write_text(json.dumps(content, indent=1) + "\n")
    command = ["danling-conf", "resume", str(run)]
    sweep.ask(command=command, program=program, code=code, cluster="local", launcher=launcher)
    sweep.ledger.add(
        key, job=0, job_id=key, config_id=read_json(run / RUN_FILE).get("config_id"), status=Status.PLANNED,
        overrides=overrides, run=str(run), layout=layout_name(layout), steps=config["steps"], epochs=config["epochs"],
    )  # fmt: skip
