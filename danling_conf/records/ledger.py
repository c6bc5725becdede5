"""A sweep's ledger: what was asked for, and what has become of each job.

A file of lines of JSON, each saying something new about one job; the newest word on a fact holds. Lines are only ever
added, under a lock, by the command that started the sweep, by its jobs and by whoever looks after them, so that neither
two writers nor a crash lose anything.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from danling_conf.records.status import Status

LEDGER = "jobs.jsonl"


@dataclass(kw_only=True)
class Record:
    """One job, as the ledger has it."""

    key: str
    """The job's `job_id`; with a number behind it where the sweep asked for the same more than once."""
    facts: dict[str, Any] = field(default_factory=dict)
    """The newest value of everything that was said: job (its number), job_id, config_id, overrides, run, status, score,
    error, `told` once somebody has told it to stop, ..."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """All lines about it, in order."""

    @property
    def number(self) -> int:
        return int(self.facts["job"])

    @property
    def status(self) -> str:
        return str(self.facts.get("status", Status.PLANNED))

    @property
    def ended(self) -> bool:
        return Status(self.status).ended

    @property
    def score(self) -> float | None:
        return self.facts.get("score") if self.status == Status.COMPLETED else None

    @property
    def run(self) -> Path | None:
        return Path(self.facts["run"]) if self.facts.get("run") else None

    @property
    def attempts(self) -> int:
        """How many times it was started."""
        return sum(line.get("status") == Status.RUNNING for line in self.history)

    @property
    def queued(self) -> int:
        """How many times it was submitted; requeues by the cluster do not count."""
        return sum(line.get("status") == Status.QUEUED and "why" not in line for line in self.history)

    def since_queued(self) -> list[dict[str, Any]]:
        """The lines since it was last submitted."""
        starts = [i for i, line in enumerate(self.history) if line.get("status") == Status.QUEUED and "why" not in line]
        return self.history[starts[-1] :] if starts else self.history

    def add(self, line: Mapping[str, Any]) -> None:
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
        """Enter that a job was queued which has spoken already: it was quicker than the command that queued it."""
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
        self._read_to = 0

    def add(self, key: str, **facts: Any) -> None:
        """Add a line about a job."""
        self.add_all([(key, facts)])

    def add_all(self, lines: list[tuple[str, dict[str, Any]]]) -> None:
        """Add lines about jobs, all of them or, in a crash, the first ones whole."""
        with self._locked() as file:
            _append(file, lines)

    def settle(self, key: str, **facts: Any) -> bool:
        """Add a job's end unless somebody, or the job itself, has written one; says whether it was added."""
        with self._locked() as file:
            if self.records()[key].ended:
                return False
            _append(file, [(key, facts)])
            return True

    @contextmanager
    def _locked(self) -> Iterator[IO[bytes]]:
        with open(self.path, "ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file

    def records(self) -> dict[str, Record]:
        """All jobs by key, in the order in which they were planned. Reads what is new since the last call."""
        if not self.path.is_file():
            return {}
        with open(self.path, "rb") as file:
            file.seek(self._read_to)
            new = file.read()
        whole = new.rfind(b"\n") + 1
        self._read_to += whole
        for line in new[:whole].splitlines():
            try:
                content = json.loads(line)
                key = str(content["key"])
            except (ValueError, TypeError, KeyError):
                continue  # the torn line of a writer that was killed
            self._records.setdefault(key, Record(key=key)).add(content)
        # One whose first line was torn is unknown: nothing says what it was to be.
        return {key: record for key, record in self._records.items() if "job" in record.facts}


def _append(file: IO[bytes], lines: list[tuple[str, dict[str, Any]]]) -> None:
    stamp = round(time.time(), 3)
    text = "".join(json.dumps({"key": key, "time": stamp, **facts}) + "\n" for key, facts in lines)
    size = file.seek(0, os.SEEK_END)
    if size:
        file.seek(size - 1)
        if file.read(1) != b"\n":  # a writer was killed in the middle of a line: it stays by itself
            text = "\n" + text
    file.write(text.encode())
    file.flush()
    os.fsync(file.fileno())
