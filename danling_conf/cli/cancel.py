"""`danling-conf cancel DIR [JOB...]`: jobs that wait do not start, those that run save and leave."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from pathlib import Path

from danling_conf.cli.runs_found import (
    asked_of,
    find,
    job_named,
    one_sweep,
    reachable_or_refuse,
    state_of_run,
    sweep_of,
)
from danling_conf.launch.slurm.queries import SlurmUnavailable
from danling_conf.records.attempts import is_live
from danling_conf.records.ledger import Record
from danling_conf.records.status import Status
from danling_conf.records.sweep_directory import SweepDirectory
from danling_conf.sweep.backend import Backend
from danling_conf.sweep.monitor import as_told
from danling_conf.sweep.orphans import is_here, process_of, running_here, tell_to_stop
from danling_conf.topology.violation import ConfigRefused, Violation

NOT_ENDED = 1
_BY = "by danling-conf cancel"
_ABOUT_TO_START_SECONDS = 0.3
_OWN_WORD_SECONDS = 3.0
"""How long after its process has gone a job's own word, or that of who looks after it, is waited for."""


def cancel(directory: str, jobs: Sequence[str], *, wait_seconds: float) -> int:
    """End jobs and wait until they have ended; gives the exit code: 1 where one has not.

    Raises ConfigRefused where there is no such sweep or job, or it cannot be reached from here.
    """
    found = find(directory)
    if found.run is not None:
        owner = sweep_of(found.run)
        if owner is None:
            return _run_of_its_own(found.run, wait_seconds)
        sweep, jobs = owner[0], jobs or [owner[1].key]
    else:
        sweep = one_sweep(found)
    cluster = str(asked_of(sweep)["cluster"])
    named = [job_named(sweep, name) for name in dict.fromkeys(jobs)] or list(sweep.ledger.records().values())
    for record in named:
        if record.ended and jobs:
            print(f"#{record.number} {record.status} before")
    chosen = [record for record in named if not record.ended]
    if not chosen:
        print(f"nothing to do: no job is live: {sweep.path}")
        return 0
    reachable_or_refuse(sweep, cluster)
    if cluster == "slurm":
        return _in_slurm(sweep, chosen, wait_seconds)
    return _here(sweep, chosen, wait_seconds)


def _run_of_its_own(run: Path, wait_seconds: float) -> int:
    """A run that its own command has started: whoever holds its lock is told."""
    if not is_live(run):
        print(f"nothing to do: the run is {state_of_run(run)[0]}: {run}")
        return 0
    # While the lock is held, the process that has written its number there lives.
    holder = re.match(r"process (\d+) on ([^,\s]+)", (run / "run.lock").read_text())
    if holder is None or holder[2] != os.uname().nodename:
        rule = f"it runs on {holder[2] if holder else 'another machine'}, out of reach from this one"
        raise ConfigRefused([Violation("DIR", str(run), rule, "cancel it there")])
    tell_to_stop(int(holder[1]))
    deadline = time.monotonic() + wait_seconds
    while is_live(run):
        if time.monotonic() > deadline:
            print(f"{run.name} was told to stop, and has not ended yet: process {holder[1]}")
            return NOT_ENDED
        time.sleep(0.2)
    state, error = state_of_run(run)
    print(f"{run.name} {state}" + (f": {error}" if error else ""))
    return 0


def _in_slurm(sweep: SweepDirectory, chosen: Sequence[Record], wait_seconds: float) -> int:
    from danling_conf.sweep.slurm_backend import SlurmJobs

    backend: Backend = SlurmJobs(sweep.path)
    sweep.ledger.add_all([(record.key, {"told": Status.CANCELLED}) for record in chosen])
    try:
        backend.cancel(chosen)
        for record in chosen:
            if "slurm" not in record.facts:
                sweep.ledger.settle(record.key, status=Status.CANCELLED, error=f"not started: cancelled {_BY}")
        return _wait(sweep, chosen, backend, wait_seconds)
    except SlurmUnavailable as error:
        fix = "cancel from a machine of the cluster"
        raise ConfigRefused([Violation("DIR", str(sweep.path), str(error), fix)]) from error


def _here(sweep: SweepDirectory, chosen: Sequence[Record], wait_seconds: float) -> int:
    away = [record for record in chosen if record.status == Status.RUNNING and not is_here(record)]
    if away:
        rule = f"job #{away[0].number} runs on {away[0].facts.get('host')}, out of reach from this machine"
        raise ConfigRefused([Violation("JOB", str(away[0].number), rule, "cancel it there")])
    waited = [record for record in chosen if record.status in (Status.PLANNED, Status.QUEUED)]
    lines: list[tuple[str, dict[str, str]]] = [(record.key, {"told": Status.CANCELLED}) for record in chosen]
    # Whoever would start them looks here first.
    lines += [(record.key, {"status": Status.CANCELLED, "error": f"not started: cancelled {_BY}"}) for record in waited]
    sweep.ledger.add_all(lines)
    _tell(sweep, chosen)
    if waited:  # one of them may just have been about to start; those that run are told once, a second signal ends them
        time.sleep(_ABOUT_TO_START_SECONDS)
        _tell(sweep, waited)
    return _wait(sweep, chosen, _Gone(sweep), wait_seconds)


def _tell(sweep: SweepDirectory, records: Sequence[Record]) -> None:
    running = running_here()
    for record in records:
        process = process_of(record, sweep.path, running)
        if process is not None:
            tell_to_stop(process)


class _Gone:
    """Jobs whose process has gone for a while without a word from anybody."""

    interval = 0.2

    def __init__(self, sweep: SweepDirectory) -> None:
        self._sweep = sweep
        self._since: dict[str, float] = {}

    def ended(self, records: Sequence[Record]) -> dict[str, str]:
        running, now = running_here(), time.monotonic()
        for record in records:
            if process_of(record, self._sweep.path, running) is not None:
                self._since.pop(record.key, None)
            else:
                self._since.setdefault(record.key, now)
        return {key: f"ended {_BY}" for key, since in self._since.items() if now - since > _OWN_WORD_SECONDS}


def _wait(sweep: SweepDirectory, chosen: Sequence[Record], backend: Backend | _Gone, wait_seconds: float) -> int:
    """Report each end; what nobody else writes down is written here."""
    deadline = time.monotonic() + wait_seconds
    waiting = {record.key for record in chosen}
    ledger = sweep.ledger
    while True:
        records = ledger.records()
        for key in sorted(waiting, key=lambda key: records[key].number):
            record = records[key]
            if record.ended:
                waiting.discard(key)
                error = record.facts.get("error")
                print(f"#{record.number} {record.status}" + (f": {error}" if error else ""), flush=True)
        if not waiting:
            return 0
        left = [records[key] for key in waiting]
        if isinstance(backend, _Gone):
            for key, why in backend.ended(left).items():
                if key in waiting:
                    ledger.settle(key, status=Status.CANCELLED, error=why)
        else:
            for key, ending in backend.endings(left).items():
                told = as_told(records[key], ending)
                ledger.settle(key, status=told.status, error=told.error)
        if time.monotonic() > deadline:
            for record in sorted(left, key=lambda record: record.number):
                print(f"#{record.number} was told to stop, and has not ended yet", flush=True)
            return NOT_ENDED
        time.sleep(backend.interval)
