"""State of a run: its present status, from the records on disk and from its lock.

Every command, page and live view calls `state_of`, so that they agree. What only Slurm or the process table knows about
a job of a sweep is not read here: `sweep.ends` looks it up and writes it to the ledger.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from danling_conf.records.find import sweep_of
from danling_conf.records.heartbeats import read_heartbeats
from danling_conf.records.ledger import Record
from danling_conf.records.metrics import end_in_metrics
from danling_conf.records.reading import read_json, read_result, warn_of_damage
from danling_conf.records.run_directory import newest_attempt
from danling_conf.records.run_lock import holder_of, is_live
from danling_conf.records.status import ENDED, Status, written_status
from danling_conf.schema.files import FROZEN

SILENT_INTERVALS = 3.0
"""A rank whose heartbeat is older than this many intervals has stopped writing: it is stopped, or gone."""
LEAST_SECONDS = 2.0
"""No rank counts as silent sooner: short intervals would make a busy file system look like a dead rank."""
GONE = "its process is gone, and wrote no result"


@dataclass(frozen=True, kw_only=True)
class RunState:
    """Status of a run or an attempt."""

    status: Status
    error: str | None = None
    """Why it ended as it did; None where it has not ended, completed, or left no reason."""
    score: float | None = None
    """Score of a completed run."""


def state_of(run: Path, now: float | None = None) -> RunState:
    """The state of a run, which is that of its newest attempt.

    The ledger of the sweep that the attempt belongs to comes first, since only it knows of a time limit or a lost node.
    Next is the run's lock, which the system releases however a process ends. What the attempt wrote comes last.

    Args:
        now: seconds since 1970; the present when None.
    """
    attempt = newest_attempt(run)
    record = _record_of(run, attempt)
    if record is not None and record.status != Status.RUNNING:
        return RunState(status=record.status, error=record.error, score=record.score)
    if attempt is None:
        return RunState(status=Status.EMPTY)
    if is_live(run):
        return RunState(status=Status.RUNNING)
    ended = written_end(attempt)
    if ended is not None:
        return ended
    if record is None and not read_json(attempt / FROZEN).get("hydra"):
        # No launcher started this attempt (a notebook, plain @hydra.main), so there is no result.json, and the runner's
        # last metrics line is the only record of its end. A launched attempt that has only this line was killed after
        # it: its function may have failed later.
        status = end_in_metrics(run, attempt.name)
        if status is not None:
            return RunState(status=status)
    # Without a held lock and a written end, the process is gone if it was on this machine. On another machine it may
    # live: not every file system shares locks between nodes.
    holder = holder_of(run)
    if holder is not None and not holder.here:
        if record is not None or any(_is_fresh(beat, now or time.time()) for beat in read_heartbeats(run).values()):
            return RunState(status=Status.RUNNING)
        return RunState(status=Status.UNKNOWN, error=f"its process ran on {holder.host}, and wrote no result")
    stopped = record is not None and record.stop_requested
    return RunState(status=Status.CANCELLED if stopped else Status.LOST, error=GONE)


def written_end(attempt: Path) -> RunState | None:
    """The end that an attempt wrote itself; None where it wrote none."""
    result = read_result(attempt)
    if not result:
        return None
    status = written_status(result.text("status"))
    if status not in ENDED:
        warn_of_damage(result.path, f"{result.values.get('status')!r} is not an end of a run")
        return None
    score = result.number("score") if status is Status.COMPLETED else None
    return RunState(status=status, error=result.text("error"), score=score)


def is_silent(beat: Mapping[str, Any], now: float) -> bool:
    """Whether a rank has not written its heartbeat for too long."""
    return bool(now - beat["written"] > max(LEAST_SECONDS, SILENT_INTERVALS * beat["interval"]))


def _is_fresh(beat: Mapping[str, Any], now: float) -> bool:
    return beat["state"] != "stopping" and not is_silent(beat, now)


def _record_of(run: Path, attempt: Path | None) -> Record | None:
    """The job of a sweep that the newest attempt belongs to; None for an attempt outside of any sweep."""
    owner = sweep_of(run)
    if owner is None:
        return None
    record = owner[1]
    return record if covers(record, attempt) else None


def covers(record: Record, attempt: Path | None) -> bool:
    """Whether a job of a sweep is responsible for a run's newest attempt: it started it, or will start the next one.

    A run may be resumed by hand after its sweep; the sweep's ledger then says nothing about the newer attempt.
    """
    if attempt is None or record.attempt == attempt or record.facts.get("attempt") == attempt.name:
        return True
    if "attempt" in record.facts:
        return False
    # A job that has not started yet: it is responsible unless somebody started the run after it was planned.
    last = max((line.get("time", 0.0) for line in record.history), default=0.0)
    return attempt.stat().st_mtime < last
