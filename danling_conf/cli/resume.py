"""`danling-conf resume DIR`: starts the unfinished jobs of a sweep, or a run, from their newest checkpoints."""

from __future__ import annotations

from collections.abc import Iterable

from danling_conf.cli.runs_found import file_of, find, one_sweep, reachable_or_refuse, request_of
from danling_conf.launch.slurm.queries import SlurmUnavailable
from danling_conf.records.find import sweep_of
from danling_conf.records.ledger import Record
from danling_conf.records.state import state_of
from danling_conf.records.status import EXIT_FAILED, Status
from danling_conf.records.sweep_directory import SweepDirectory
from danling_conf.records.sweep_lock import SweepLock
from danling_conf.schema.printable import shell_line
from danling_conf.sweep.ends import live_jobs
from danling_conf.sweep.single import sweep_for_run
from danling_conf.sweep.supervise import backend_for, supervise
from danling_conf.topology.violation import ConfigRefused, Violation


def resume(directory: str) -> int:
    """Start jobs that have not completed, and monitor them. Returns the exit code: 1 where a job did not complete.

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
    if state_of(found.run).status is Status.COMPLETED:
        print(f"nothing to do: the run has completed: {found.run}")
        return 0
    return _resume(sweep_for_run(found.run), None)


def _resume(sweep: SweepDirectory, only: str | None) -> int:
    request = request_of(sweep)
    reachable_or_refuse(sweep, request)
    with SweepLock(sweep.path) as lock:
        if not lock.acquire(tries=5):
            fix = f"see how it goes: {shell_line('danling-conf', 'runs', sweep.path)}; or end that process first"
            raise ConfigRefused(
                [Violation("DIR", str(sweep.path), f"{lock.holder} monitors the sweep and would start jobs too", fix)]
            )
        try:
            backend = backend_for(request.cluster, request.launcher, sweep.path)
            live = live_jobs(sweep, backend)
            records = {key: record for key, record in sweep.ledger.records().items() if only in (None, key)}
            again = [
                record for record in records.values() if record.status != Status.COMPLETED and record.key not in live
            ]
            if not again and not live & records.keys():
                print(f"nothing to do: {_completed(records.values())}: {sweep.path}")
                return 0
            files = {
                key: file_of(sweep, record, to_start=key not in live)
                for key, record in records.items()
                if record.status != Status.COMPLETED
            }
            print(f"{_completed(records.values())}; {len(again)} to start: {sweep.path}", flush=True)
            if again:
                backend.submit([files[record.key] for record in again])
            # A process can wait only for its own children, and local jobs end with their command.
            if not request.on_slurm:
                files = {key: file for key, file in files.items() if key not in live}
            if request.launcher.get("detach"):
                return 0
            supervise(sweep, backend, files, request.launcher, lock=lock)
        except SlurmUnavailable as error:
            fix = "resume from a machine of the cluster"
            raise ConfigRefused([Violation("DIR", str(sweep.path), str(error), fix)]) from error
    records = {key: record for key, record in sweep.ledger.records().items() if only in (None, key)}
    return 0 if all(record.status == Status.COMPLETED for record in records.values()) else EXIT_FAILED


def _completed(records: Iterable[Record]) -> str:
    listed = list(records)
    count = sum(record.status == Status.COMPLETED for record in listed)
    return f"{count} of {len(listed)} job{'' if len(listed) == 1 else 's'} completed"
