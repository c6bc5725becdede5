"""Backend of a sweep: the interface of the place where jobs run, so that one monitor serves this machine and Slurm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from danling_conf.records.job_file import JobFile
from danling_conf.records.ledger import Record


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a job ended, as its backend sees it."""

    status: str
    """One of `ledger.ENDED`."""
    error: str | None = None


class Backend(Protocol):
    """Starts jobs and reports how they end. Jobs that can, record their end in the ledger themselves."""

    interval: float
    """Seconds between two polls."""
    patience: float
    """Seconds after a job's end within which its own lines in the ledger become visible here.

    NFS clients cache a file for seconds; settled at once, a job that has just completed would be called lost.
    """

    def submit(self, jobs: Sequence[JobFile]) -> None:
        """Start or queue jobs, and add that to the ledger."""

    def endings(self, unfinished: Sequence[Record]) -> dict[str, Ending]:
        """The jobs that have ended, by key."""

    def proceed(self) -> None:
        """Start jobs that wait for free devices. Called after the monitor has found that the sweep does not stop."""

    def cancel(self, records: Sequence[Record]) -> None:
        """Cancel jobs: waiting ones never start, running ones receive a signal to save and exit."""
