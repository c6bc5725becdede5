"""Where jobs run, as whoever looks after a sweep sees it: this machine, or Slurm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from danling_conf.records.job_file import JobFile
from danling_conf.records.ledger import Record


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a job ended, as far as can be told from outside."""

    status: str
    """One of `ledger.ENDED`."""
    error: str | None = None


class Backend(Protocol):
    """Starts jobs and tells how they end; the jobs themselves write in the ledger what they know."""

    interval: float
    """Seconds between two looks."""
    patience: float
    """Seconds in which what a job has written in the ledger becomes visible here after its end."""

    def submit(self, jobs: Sequence[JobFile]) -> None:
        """Start or queue jobs, and say so in the ledger."""

    def endings(self, unfinished: Sequence[Record]) -> dict[str, Ending]:
        """The jobs that have ended, by key."""

    def proceed(self) -> None:
        """Start jobs that were waiting for room here, now that it is known that they are wanted."""

    def cancel(self, records: Sequence[Record]) -> None:
        """End jobs: those that wait do not start, those that run are told to save and leave."""
