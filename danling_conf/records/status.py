"""How a run, an attempt or a job stands: the words, each said once."""

from __future__ import annotations

from enum import Enum


class Status(str, Enum):
    """A word of the ledger, of `result.json`, and of every command and page that shows a run."""

    PLANNED = "planned"
    """Known to a sweep, not submitted yet."""
    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    REFUSED = "refused"
    """Its configuration was refused."""
    CANCELLED = "cancelled"
    """Somebody ended it, or it never started."""
    INTERRUPTED = "interrupted"
    """A signal asked it to stop, and it stopped in order."""
    TIMED_OUT = "timed out"
    OUT_OF_MEMORY = "out of memory"
    NODE_LOST = "node lost"
    PREEMPTED = "preempted"
    LOST = "lost"
    """Its process is gone and wrote nothing, as after SIGKILL."""

    def __str__(self) -> str:
        return self.value

    @property
    def live(self) -> bool:
        """Whether it waits or runs."""
        return self in (Status.QUEUED, Status.RUNNING)

    @property
    def ended(self) -> bool:
        """Whether it ran, or was given up, to an end."""
        return not self.live and self is not Status.PLANNED


ENDED = tuple(status for status in Status if status.ended)
