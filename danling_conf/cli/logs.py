"""`danling-conf logs DIR JOB`: prints the log of a rank of a job, and can follow it."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

from danling_conf.cli.runs_found import file_of, find, job_named, one_sweep
from danling_conf.records.find import sweep_of
from danling_conf.records.ledger import Record
from danling_conf.records.logs import rank_log
from danling_conf.records.reading import warn_of_damage
from danling_conf.records.run_directory import attempts_in, newest_attempt
from danling_conf.records.state import state_of
from danling_conf.records.status import Status
from danling_conf.records.sweep_directory import SweepDirectory
from danling_conf.schema.files import ATTEMPTS, Damaged, read_regular
from danling_conf.schema.printable import printable_output, shell_line
from danling_conf.sweep.live_table import logs_of
from danling_conf.topology.violation import ABSENT, ConfigRefused, Violation

_SECONDS = 0.3


def show_logs(directory: str, job: str | None, *, rank: int, attempt: str | None, follow: bool) -> int:
    """Print a rank's log of the newest or the named attempt. Its path goes to standard error.

    Args:
        job: number, key or run id; None where the directory has only one job.
        follow: print new lines until the job has ended.

    Raises ConfigRefused where there is no such job, attempt or rank, with the ones that exist.
    """
    found = find(directory)
    owner = sweep_of(found.run) if found.run is not None else None
    run: Path | None
    if found.run is not None and job is None:
        run = found.run
    else:
        sweep = owner[0] if owner is not None else one_sweep(found)
        owner = sweep, _job(sweep, job)
        run = owner[1].run
    log = _log(run, owner, rank, attempt)
    print(f"==> {log}", file=sys.stderr, flush=True)
    _print(log, _still_live(run, owner) if follow else lambda: False)
    return 0


def _job(sweep: SweepDirectory, name: str | None) -> Record:
    records = list(sweep.ledger.records().values())
    if name is not None:
        return job_named(sweep, name)
    if len(records) == 1:
        return records[0]
    example = shell_line("danling-conf", "logs", sweep.path, records[0].number if records else 0)
    fix = f"add its number, key or run id: {example}"
    raise ConfigRefused([Violation("JOB", ABSENT, f"the sweep has {len(records)} jobs, and a log belongs to one", fix)])


def _log(run: Path | None, owner: tuple[SweepDirectory, Record] | None, rank: int, name: str | None) -> Path:
    attempts = [path.name for path in attempts_in(run)] if run is not None else []
    if name is not None and name not in attempts:
        fix = f"choose one of {', '.join(attempts)}" if attempts else "leave it out: the job has not started yet"
        raise ConfigRefused([Violation("--attempt", name, f"{run} has no such attempt", fix)])
    folder = newest_attempt(run) if run is not None else None
    if owner is not None and name is None and run is not None:
        # The run may have attempts from before the sweep, or from after it.
        folder = owner[1].attempt
    if name is not None and run is not None:
        folder = run / ATTEMPTS / name
    if folder is not None and rank_log(folder, rank).is_file():
        return rank_log(folder, rank)
    if folder is not None and rank_log(folder, rank).exists():
        try:
            read_regular(rank_log(folder, rank), limit=None)
        except Damaged as damage:
            warn_of_damage(damage.path, damage.reason)
    ranks = _ranks_with_logs(folder) if folder is not None else []
    if ranks:
        rule = f"there is no log of it in {folder}"
        shown = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        raise ConfigRefused([Violation("--rank", rank, rule, f"choose a rank of {shown}")])
    if owner is not None and name is None:
        log = logs_of(owner[1], file_of(*owner), rank)
        if log.is_file():
            return log
        rule = f"job #{owner[1].number} is {owner[1].status}, and has printed nothing yet"
        raise ConfigRefused(
            [Violation("JOB", owner[1].number, rule, f"see {shell_line('danling-conf', 'runs', owner[0].path)}")]
        )
    rule = f"{folder or run} has no logs"
    raise ConfigRefused([Violation("--rank", rank, rule, f"see {shell_line('danling-conf', 'runs', run)}")])


def _ranks_with_logs(attempt: Path) -> list[int]:
    found = (re.fullmatch(r"rank-(\d{1,9})\.log", path.name) for path in attempt.glob("rank-*.log") if path.is_file())
    return sorted(int(match[1]) for match in found if match is not None)


def _still_live(run: Path | None, owner: tuple[SweepDirectory, Record] | None) -> Callable[[], bool]:
    if owner is not None:
        ledger, key = owner[0].ledger, owner[1].key
        return lambda: not ledger.records()[key].ended
    return lambda: run is not None and state_of(run).status is Status.RUNNING


def _print(log: Path, is_live: Callable[[], bool]) -> None:
    # A file or a pipe takes the log as it is.
    shown = printable_output if sys.stdout.isatty() else str
    try:
        opened = open(log, errors="replace", newline="")  # noqa: SIM115  closed below
    except OSError as error:
        rule = f"it cannot be read: {error.strerror}"
        raise ConfigRefused([Violation(str(log), ABSENT, rule, "give yourself the permission to read it")]) from error
    with opened as file:
        try:
            while True:
                # Before the read: lines that are written between a read and the end would be lost.
                more = is_live()
                for text in iter(lambda: file.read(1 << 16), ""):
                    sys.stdout.write(shown(text))
                sys.stdout.flush()
                if not more:
                    return
                time.sleep(_SECONDS)
        except KeyboardInterrupt:
            return
