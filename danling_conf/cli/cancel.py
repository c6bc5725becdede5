"""`danling-conf cancel DIR [JOB...]`: queued jobs never start, and running ones save and exit."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from danling_conf.cli.runs_found import find, job_named, one_sweep, reachable_or_refuse, request_of
from danling_conf.launch.slurm.queries import SlurmUnavailable
from danling_conf.records.find import sweep_of
from danling_conf.records.ledger import Record
from danling_conf.records.logs import on_any_disk
from danling_conf.records.run_lock import holder_of, is_held, is_live
from danling_conf.records.state import state_of
from danling_conf.records.status import EXIT_FAILED, Status
from danling_conf.records.sweep_directory import SweepDirectory
from danling_conf.schema.files import RUN_LOCK
from danling_conf.schema.printable import printable_lines
from danling_conf.sweep.backend import Backend
from danling_conf.sweep.ends import settle_ends
from danling_conf.sweep.orphans import is_here, process_of, running_here, tell_to_stop
from danling_conf.topology.violation import ConfigRefused, Violation

_BY = "by danling-conf cancel"
_ABOUT_TO_START_SECONDS = 0.3
_OWN_WORD_SECONDS = 3.0
"""After a job's process has ended, how long to wait for the ledger's line of the job itself or of its monitor."""


def cancel(directory: str, jobs: Sequence[str], *, wait_seconds: float) -> int:
    """Cancel jobs and wait until they have ended. Returns the exit code: 1 where one has not ended.

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
    request = request_of(sweep)
    settle_ends(sweep)  # first: a job that has ended already must not be recorded as cancelled
    named = [job_named(sweep, name) for name in dict.fromkeys(jobs)] or list(sweep.ledger.records().values())
    for record in named:
        if record.ended and jobs:
            print(f"#{record.number} {record.status} before")
    chosen = [record for record in named if not record.ended]
    if not chosen:
        print(f"nothing to do: no job is live: {sweep.path}")
        return 0
    reachable_or_refuse(sweep, request)
    if request.on_slurm:
        return _in_slurm(sweep, chosen, wait_seconds)
    return _here(sweep, chosen, wait_seconds)


def _run_of_its_own(run: Path, wait_seconds: float) -> int:
    """Stop a run outside of any sweep: send SIGTERM to the process that holds its lock."""
    if not is_live(run):
        print(f"nothing to do: the run is {state_of(run).status}: {run}")
        return 0
    # As long as its lock is held, the process whose number is in it is alive, so the number cannot have been reused.
    holder = holder_of(run)
    if holder is None or not holder.here:
        rule = f"it runs on {holder.host if holder else 'another machine'}, out of reach from this one"
        raise ConfigRefused([Violation("DIR", str(run), rule, "cancel it there")])
    if is_held(run / RUN_LOCK):  # its ranks may live on alone; they stop without being told
        tell_to_stop(holder.process)
    deadline = time.monotonic() + wait_seconds
    while is_live(run):
        if time.monotonic() > deadline:
            print(f"{run.name} was signalled to stop, and has not ended yet: process {holder.process}")
            return EXIT_FAILED
        time.sleep(0.2)
    state = state_of(run)
    print(printable_lines(f"{run.name} {state.status}" + (f": {state.error}" if state.error else "")))
    return 0


def _in_slurm(sweep: SweepDirectory, chosen: Sequence[Record], wait_seconds: float) -> int:
    from danling_conf.sweep.slurm_backend import SlurmJobs

    backend: Backend = SlurmJobs(sweep.path)
    sweep.ledger.add_all([(record.key, {"told": Status.CANCELLED}) for record in chosen])
    try:
        backend.cancel(chosen)
        why = f"not started: cancelled {_BY}"
        unsent = {record.key: (Status.CANCELLED, why) for record in chosen if "slurm" not in record.facts}
        sweep.ledger.settle_all(unsent)
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
    # The command that would start queued jobs reads the ledger before each start.
    lines += [(record.key, {"status": Status.CANCELLED, "error": f"not started: cancelled {_BY}"}) for record in waited]
    with on_any_disk(sweep.ledger.path):  # a full one may be why the jobs are cancelled
        sweep.ledger.add_all(lines)
    _tell(sweep, chosen)
    # A queued job may have started meanwhile. Running ones are signalled once: a second signal would skip their save.
    if waited:
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
    """Jobs whose process has been gone for a while, and whose end is not in the ledger."""

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
    """Report each end, and write those that no other process writes."""
    deadline = time.monotonic() + wait_seconds
    waiting = {record.key for record in chosen}
    ledger = sweep.ledger
    while True:
        records = ledger.records()
        for key in sorted(waiting, key=lambda key: records[key].number):
            record = records[key]
            if record.ended:
                waiting.discard(key)
                print(f"#{record.number} {record.status}" + (f": {record.error}" if record.error else ""), flush=True)
        if not waiting:
            return 0
        left = [records[key] for key in waiting]
        if isinstance(backend, _Gone):
            gone = backend.ended(left)
            with on_any_disk(ledger.path):
                ledger.settle_all({key: (Status.CANCELLED, why) for key, why in gone.items() if key in waiting})
        else:
            ledger.settle_all({key: (end.status, end.error) for key, end in backend.endings(left).items()})
        if time.monotonic() > deadline:
            for record in sorted(left, key=lambda record: record.number):
                print(f"#{record.number} was signalled to stop, and has not ended yet", flush=True)
            return EXIT_FAILED
        time.sleep(backend.interval)
