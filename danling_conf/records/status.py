"""Status of a run, an attempt or a job: the words, the exit codes, and what an exception means for both.

The ledger, `result.json`, the end record of `metrics.jsonl`, every command and every page use these words and no other.
How a run stands is `records.state`; the end of a job that wrote none is written by `Ledger.settle`.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from enum import Enum

from danling_conf.topology.violation import ConfigRefused

EXIT_FAILED = 1
"""Exit code where a run failed, a job of a sweep did not complete, or a command found something broken."""
EXIT_REFUSED = 2
"""Exit code of a refused configuration, and of a command that cannot do what it is asked."""
_EXIT_SIGNAL = 128
_INTERRUPT = 2
"""SIGINT, on every system."""


def exit_code_of_signal(number: int) -> int:
    """Exit code of a process that a signal stopped, as a shell reports it."""
    return _EXIT_SIGNAL + number


def signal_of_exit_code(code: int) -> int:
    """The signal that `exit_code_of_signal` was called with; not positive for the code of another end."""
    return code - _EXIT_SIGNAL


EXIT_INTERRUPTED = exit_code_of_signal(_INTERRUPT)
"""Exit code after Ctrl-C."""


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

    # Words of readers only: no record on disk holds them.
    EMPTY = "empty"
    """The run has no attempt yet."""
    NOT_STARTED = "not started"
    """It is planned or queued, and the command that would start it is gone."""
    UNKNOWN = "unknown"
    """Its process was on another machine and wrote nothing; from here nobody can tell."""

    def __str__(self) -> str:
        return self.value

    @property
    def live(self) -> bool:
        """Whether it waits or runs."""
        return self in (Status.QUEUED, Status.RUNNING)

    @property
    def ended(self) -> bool:
        """Whether it ran, or was given up, to an end."""
        return self in ENDED

    @property
    def fine(self) -> bool:
        """Whether nobody has to look after it: it waits, runs, or has completed."""
        return self.live or self in (Status.PLANNED, Status.EMPTY, Status.COMPLETED)


_OPEN = (
    Status.PLANNED,
    Status.QUEUED,
    Status.RUNNING,
    Status.EMPTY,
    Status.NOT_STARTED,
    Status.UNKNOWN,
)
ENDED = tuple(status for status in Status if status not in _OPEN)
"""The words for an end."""
WRITTEN = (*ENDED, Status.PLANNED, Status.QUEUED, Status.RUNNING)
"""The words that a record on disk can hold."""


def written_status(text: object) -> Status | None:
    """The status that a record on disk says; None for what is no such word."""
    return next((status for status in WRITTEN if status.value == text), None)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run, or a rank's part of it, ended."""

    status: Status
    exit_code: int
    message: str = ""
    """Why; "" where it completed."""

    @property
    def completed(self) -> bool:
        return self.status is Status.COMPLETED

    @property
    def reason(self) -> str:
        """The first line of `message`; all of a refusal's, whose lines are its faults."""
        return self.message if self.status is Status.REFUSED else self.message.partition("\n")[0]


class HasOutcome:
    """Mixin of exceptions that know how the run ends: `outcome_of` asks them."""

    @property
    @abstractmethod
    def outcome(self) -> Outcome:
        """What the exception means for the run."""


def outcome_of(error: BaseException | None) -> Outcome:
    """How a run ended that was left by an exception; None for a function that returned."""
    if error is None:
        return Outcome(status=Status.COMPLETED, exit_code=0)
    if isinstance(error, HasOutcome):
        return error.outcome
    if isinstance(error, ConfigRefused):
        return Outcome(status=Status.REFUSED, exit_code=EXIT_REFUSED, message=str(error))
    if isinstance(error, KeyboardInterrupt):
        return Outcome(status=Status.INTERRUPTED, exit_code=EXIT_INTERRUPTED, message="interrupted")
    if isinstance(error, SystemExit):
        return _of_exit(error.code)
    return Outcome(status=Status.FAILED, exit_code=EXIT_FAILED, message=f"{type(error).__name__}: {error}")


def _of_exit(code: object) -> Outcome:
    if code in (None, 0):
        return Outcome(status=Status.COMPLETED, exit_code=0)
    # A text is what Python prints, and it exits with 1; a number beyond a byte would wrap, perhaps to 0.
    number = code if isinstance(code, int) and 0 < code < 256 else EXIT_FAILED
    return Outcome(status=Status.FAILED, exit_code=number, message=f"exit {code}")
