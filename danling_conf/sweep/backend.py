"""Backend of a sweep: what the monitor needs of the place where jobs run, this machine or Slurm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from danling_conf.records.job_file import JobFile
from danling_conf.records.ledger import Record


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a job ended, as seen from outside of it."""

    status: str
    """One of `ledger.ENDED`."""
    error: str | None = None


class Backend(Protocol):
    """Starts jobs and reports how they end. The jobs record in the ledger what they know themselves."""

    interval: float
    """Seconds between two polls."""
    patience: float
    """Seconds after a job's end within which its own lines in the ledger become visible here."""

    def submit(self, jobs: Sequence[JobFile]) -> None:
        """Start or queue jobs, and record that in the ledger."""

    def endings(self, unfinished: Sequence[Record]) -> dict[str, Ending]:
        """The jobs that have ended, by key."""

    def proceed(self) -> None:
        """Start jobs that waited for room. Called once the monitor has seen that the sweep does not stop."""

    def cancel(self, records: Sequence[Record]) -> None:
        """End jobs: waiting ones never start, running ones are asked to save and exit."""
