"""Ledger of a sweep: its jobs, and every change of their status.

It is a file of JSON lines. Each line has new facts about one job, and the newest value of a fact holds. The command
that started the sweep, its jobs and its monitor append to it under a lock, and nobody rewrites it, so that neither
concurrent writers nor a crash lose anything.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

from danling_conf.records.reading import is_moment, is_number, read_result, warn_of_damage
from danling_conf.records.rebuilding import jobs_with_files, lost_lines
from danling_conf.records.run_directory import run_of_sweep
from danling_conf.records.status import ENDED, Status, is_consequence, written_status
from danling_conf.schema.files import (
    ATTEMPTS,
    LEDGER,
    SWEEP_FILE,
    Damaged,
    no_links,
    parse_object,
    read_regular,
)


@dataclass(kw_only=True)
class Record:
    """One job in the ledger."""

    key: str
    """The job's `job_id`; with a number appended where the sweep has the same job more than once."""
    facts: dict[str, Any] = field(default_factory=dict)
    """The newest value of every fact: job (its number), job_id, config_id, overrides, run, status, score, error, `told`
    (the signal or status with which a stop was requested), ..."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """All lines about it, in order."""

    @property
    def number(self) -> int:
        return int(self.facts["job"])

    @property
    def status(self) -> Status:
        return Status(self.facts.get("status", Status.PLANNED))

    @property
    def ended(self) -> bool:
        return self.status.ended

    @property
    def error(self) -> str | None:
        """Why it ended as it did; None where that is not recorded."""
        return self.facts.get("error")

    @property
    def stop_requested(self) -> bool:
        """Whether a stop was requested since it was last submitted."""
        return "told" in self.facts

    @property
    def score(self) -> float | None:
        return self.facts.get("score") if self.status == Status.COMPLETED else None

    @property
    def run(self) -> Path | None:
        return Path(self.facts["run"]) if self.facts.get("run") else None

    @property
    def attempt(self) -> Path | None:
        """The folder of the attempt that it started last; None before the first."""
        run, name = self.run, self.facts.get("attempt")
        return None if run is None or name is None else run / ATTEMPTS / str(name)

    @property
    def attempts(self) -> int:
        """How many times it was started."""
        return sum(line.get("status") == Status.RUNNING for line in self.history)

    @property
    def queued(self) -> int:
        """How many times it was submitted; requeues by the cluster, which have a `why`, do not count as retries."""
        return sum(line.get("status") == Status.QUEUED and "why" not in line for line in self.history)

    def since_queued(self) -> list[dict[str, Any]]:
        """The lines since it was last submitted."""
        starts = [i for i, line in enumerate(self.history) if line.get("status") == Status.QUEUED and "why" not in line]
        return self.history[starts[-1] :] if starts else self.history

    def ends(self) -> dict[str, tuple[Status, str | None]]:
        """Status and error with which its attempts ended, by the attempts' names."""
        found: dict[str, tuple[Status, str | None]] = {}
        attempt = None
        for line in self.history:
            attempt = line.get("attempt", attempt)
            if attempt is not None and line.get("status") in ENDED:
                found[attempt] = Status(line["status"]), line.get("error")
        return found

    def add(self, line: Mapping[str, Any]) -> None:
        """Apply a line of the ledger."""
        if self._overtaken(line):
            return
        self.history.append(dict(line))
        if line.get("status") in (Status.QUEUED, Status.RUNNING):
            for name in ("error", "score", "rank"):  # of an earlier attempt
                self.facts.pop(name, None)
        if line.get("status") == Status.QUEUED and "why" not in line:
            self.facts.pop("told", None)
        self.facts |= {name: value for name, value in line.items() if name not in ("key", "time")}

    def _overtaken(self, line: Mapping[str, Any]) -> bool:
        """Insert a late `queued` line before the job's own lines; returns whether it was late.

        sbatch returns the job's id only after the job may have started, so that `running` can precede `queued`. Taken
        as the newest line, `queued` would hide that the job runs.
        """
        if line.get("status") != Status.QUEUED or "why" in line or "slurm" not in line:
            return False
        for index, earlier in enumerate(self.history):
            if earlier.get("status") == Status.RUNNING and earlier.get("slurm") == line["slurm"]:
                self.history.insert(index, dict(line))
                return True
        return False


class Ledger:
    """The ledger in a sweep's directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / LEDGER
        self._records: dict[str, Record] = {}
        self._known: dict[str, Record] = {}
        self._lost: set[str] = set()
        self._read_to = self._lines = 0

    def add(self, key: str, **facts: Any) -> None:
        """Add a line about a job."""
        self.add_all([(key, facts)])

    def add_all(self, lines: list[tuple[str, dict[str, Any]]]) -> None:
        """Append lines about jobs. After a crash in the middle, the first ones are there and complete."""
        with self._locked() as file:
            _append(file, lines)

    def settle(self, key: str, *, status: str, error: str | None = None) -> bool:
        """Write the end of one job, as `settle_all` does. Returns whether it was written."""
        return key in self.settle_all({key: (status, error)})

    def settle_all(self, ends: Mapping[str, tuple[str, str | None]]) -> set[str]:
        """Write the ends of jobs that did not write their own. Returns the keys of those that were written.

        Every command and monitor that finds ended jobs calls this, so that all of them write the same:

        - An end that is already in the ledger stays.
        - Where the attempt wrote `result.json` but was killed before it could append here, the result holds.
        - A job that failed or vanished after a stop was requested was cancelled.

        Args:
            ends: by job key, how it ended as seen from outside, and why.
        """
        if not ends:
            return set()
        # Read and append under one lock: a job itself may be writing its end at this moment. One lock, one read and one
        # sync for all: a sweep of thousands may end at once.
        with self._locked() as file:
            self._refresh()
            unsettled = [key for key in ends if not self._known[key].ended]
            if unsettled:
                _append(file, [(key, _end_of(self._known[key], *ends[key])) for key in unsettled])
        return set(unsettled)

    @contextmanager
    def _locked(self) -> Iterator[FileIO]:
        # flock, not lockf: POSIX locks are dropped as soon as the process closes any descriptor of the file.
        try:
            with open(self.path, "ab+", buffering=0, opener=no_links) as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield file
        except OSError as error:
            error.filename = error.filename or str(self.path)  # a failed write does not name its file
            raise

    def records(self) -> dict[str, Record]:
        """All jobs by key, in the order in which they were planned. Reads what is new since the last call.

        A damaged line, or a damaged fact in a line, is skipped with a warning. A last line without a newline is still
        being written, and is read by the next call.
        """
        return dict(self._known) if self._refresh() else {}

    def _refresh(self) -> bool:
        """Read what is new. Returns whether there is a ledger."""
        try:
            new = read_regular(self.path, limit=None, start=self._read_to)
        except FileNotFoundError:
            new = b""
        except Damaged as damage:
            warn_of_damage(damage.path, damage.reason)
            return False
        whole = new.rfind(b"\n") + 1
        self._read_to += whole
        for line in new[:whole].splitlines():
            self._lines += 1
            found = self._read(line)
            if found is not None:
                key = found["key"]
                record = self._records.setdefault(key, Record(key=key))
                record.add(found)
                if "job" in record.facts:
                    self._known[key] = record
        self._rebuild()
        return True

    def _rebuild(self) -> None:
        """Take what lost lines told from the files of the jobs. A job whose first line, which says what it is, is lost,
        and whose files do not say so either, is left out."""
        if self._known and len(self._known) + len(self._lost) == len(self._records):
            return
        lost = [key for key in self._records if key not in self._known and key not in self._lost]
        # The request is written after the ledger: without it, the sweep is only being planned.
        if not self._known and (self.directory / SWEEP_FILE).exists():
            lost = list(dict.fromkeys([*jobs_with_files(self.directory), *lost]))
        rebuilt = []
        for key in lost:
            lines = [*lost_lines(self.directory, key)]
            if lines:
                later = self._records[key].history if key in self._records else []
                self._known[key] = self._records[key] = Record(key=key)
                for line in [*(lines[:1] if later else lines), *later]:
                    self._records[key].add(line)
                rebuilt.append(key)
        if rebuilt:
            self._known = dict(sorted(self._known.items(), key=lambda item: int(item[1].facts["job"])))
            jobs = "1 job" if len(rebuilt) == 1 else f"{len(rebuilt)} jobs"
            warn_of_damage(self.path, f"it lost what it said of {jobs}, which are shown as their own files have them")
        elif lost:
            warn_of_damage(self.path, f"it lost what it said of {', '.join(lost[:5])}, and their files do not tell")
        self._lost |= {key for key in lost if key in self._records} - set(rebuilt)

    def _read(self, line: bytes) -> dict[str, Any] | None:
        try:
            content = parse_object(line)
        except ValueError as error:  # the torn line of a writer that was killed, for instance
            if line.strip():
                warn_of_damage(self.path, f"line {self._lines}: {error}")
            return None
        wrong = [name for name, value in content.items() if name in _FACTS and not _FACTS[name](value)]
        if "run" in content and "run" not in wrong:
            content["run"] = str(run_of_sweep(self.directory, Path(content["run"])))
        if wrong or "key" not in content:
            warn_of_damage(self.path, f"line {self._lines}: {', '.join(wrong) or 'key'} missing or of another type")
        if "key" in wrong or "key" not in content:
            return None
        return {name: value for name, value in content.items() if name not in wrong}


def _end_of(record: Record, seen: str, error: str | None) -> dict[str, Any]:
    """The facts of the end of a job that did not write it itself."""
    status = Status(seen)
    result = None if record.attempt is None else read_result(record.attempt)
    own = written_status(result.text("status")) if result else None
    if result and own in ENDED:
        error_of_own = result.text("error")
        # An exit code says less than the job itself did, unless that was of a rank which only missed another.
        same = own is status or (status, own) == (Status.FAILED, Status.OUT_OF_MEMORY)
        if status is Status.LOST or (same and not is_consequence(error_of_own or "")):
            return {"status": own, "error": error_of_own, "score": result.number("score")}
    if status in (Status.LOST, Status.FAILED) and record.stop_requested:
        status = Status.CANCELLED
    return {"status": status, "error": error}


def _append(file: FileIO, lines: list[tuple[str, dict[str, Any]]]) -> None:
    stamp = round(time.time(), 3)
    text = "".join(json.dumps({"key": key, "time": stamp, **facts}) + "\n" for key, facts in lines)
    size = file.seek(0, os.SEEK_END)
    if size:
        file.seek(size - 1)
        if file.read(1) != b"\n":  # a writer was killed within a line: keep ours apart, or both would be unreadable
            text = "\n" + text
    content = memoryview(text.encode())
    try:
        while content:
            content = content[file.write(content) or 0 :]
    except OSError:
        file.truncate(size)  # a full disk takes the beginning of a line, which would then look damaged
        raise
    # A node that is lost next must not take the line with it: other nodes decide by it whether to retry.
    os.fsync(file.fileno())


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and "\0" not in value


def _is_name(value: Any) -> bool:
    """Whether a text is a plain file name: keys and attempts become parts of paths, which must not leave the sweep."""
    return _is_text(value) and value not in ("", ".", "..") and "/" not in value


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


_FACTS: dict[str, Callable[[Any], bool]] = {
    "key": _is_name,
    "time": is_moment,
    "job": _is_count,
    "job_id": _is_text,
    "config_id": _is_text,
    "overrides": lambda value: isinstance(value, list) and all(map(_is_text, value)),
    "run": _is_text,
    "status": lambda value: written_status(value) is not None,
    "error": lambda value: value is None or isinstance(value, str),
    "score": lambda value: value is None or is_number(value),
    "attempt": _is_name,
    "host": _is_text,
    "pid": _is_count,
    "rank": _is_count,
    "told": _is_text,
    "slurm": _is_text,
    "start": _is_count,
    "why": _is_text,
    "printed": _is_count,
    "nodes": lambda value: value is None or _is_text(value),
    "steps": lambda value: value is None or _is_count(value),
    "layout": _is_text,
    "epochs": lambda value: value is None or _is_count(value),
}
"""Checks of the facts that readers use."""
