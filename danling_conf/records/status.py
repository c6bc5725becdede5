"""Status of a run, an attempt or a job: the status words, the exit codes, and what an exception means for both.

The ledger, `result.json`, the last line of `metrics.jsonl`, every command and every page use these words and no others.
`records.state` finds the state of a run, and `Ledger.settle` writes the end of a job that wrote none itself.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from dataclasses import dataclass
from enum import Enum

from danling_conf.topology.violation import ConfigRefused

# When one rank dies, the others fail in their next collective with one of these. NCCL, Gloo and the store word it
# differently, and none of them has an error class for it.
_GONE = re.compile(
    r"connection (closed|reset|refused|was likely closed)|broken pipe|remote process exit|ncclRemoteError|"
    r"communicator was aborted|socket.{0,20}(reset|closed)",
    re.IGNORECASE,
)

EXIT_FAILED = 1
"""Exit code where a run failed, a job of a sweep did not complete, or a command found something broken."""
EXIT_REFUSED = 2
"""Exit code of a refused configuration, and of a command with arguments that it cannot follow."""
_EXIT_SIGNAL = 128
_INTERRUPT = 2
"""SIGINT, the same on every system."""


def exit_code_of_signal(number: int) -> int:
    """Exit code of a process that a signal stopped, as a shell reports it."""
    return _EXIT_SIGNAL + number


def signal_of_exit_code(code: int) -> int:
    """The inverse of `exit_code_of_signal`: the signal, or a number <= 0 where no signal stopped the process."""
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
    """A user ended it, or it never started."""
    INTERRUPTED = "interrupted"
    """It received a stop signal and stopped in order."""
    TIMED_OUT = "timed out"
    OUT_OF_MEMORY = "out of memory"
    NODE_LOST = "node lost"
    PREEMPTED = "preempted"
    LOST = "lost"
    """Its process is gone and wrote nothing, as after SIGKILL."""

    # Only shown by commands: no record on disk holds them.
    EMPTY = "empty"
    """The run has no attempt yet."""
    NOT_STARTED = "not started"
    """It is planned or queued, and the command that would start it is gone."""
    UNKNOWN = "unknown"
    """Its process was on another machine and wrote nothing, so its state cannot be seen from here."""

    # A str enum formats as `Status.FAILED` from Python 3.11 on; messages and JSON need the word.
    def __str__(self) -> str:
        return self.value

    @property
    def live(self) -> bool:
        """Whether it is in a queue or running."""
        return self in (Status.QUEUED, Status.RUNNING)

    @property
    def ended(self) -> bool:
        """Whether it is over, in whatever way."""
        return self in ENDED

    @property
    def fine(self) -> bool:
        """Whether it needs no attention: it waits, runs, or has completed."""
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
"""Every status that is an end."""
WRITTEN = (*ENDED, Status.PLANNED, Status.QUEUED, Status.RUNNING)
"""Every status that a record on disk can hold."""


def written_status(text: object) -> Status | None:
    """The status that a record on disk holds; None for anything that is not a status word."""
    return next((status for status in WRITTEN if status.value == text), None)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run, or a rank's part of it, ended."""

    status: Status
    exit_code: int
    message: str = ""
    """Why it ended; "" where it completed."""

    @property
    def completed(self) -> bool:
        return self.status is Status.COMPLETED

    @property
    def reason(self) -> str:
        """The first line of `message`; all of a refusal's, whose lines are its faults."""
        return self.message if self.status is Status.REFUSED else self.message.partition("\n")[0]


def is_consequence(message: str) -> bool:
    """Whether an error only reports that another rank is gone."""
    return _GONE.search(message) is not None


def in_short(status: str, error: str | None) -> str:
    """Why a run or job ended, in one line: the first of an error's, and all of a refusal's, whose first says
    nothing."""
    lines = [line.strip() for line in (error or "").splitlines()]
    return "; ".join(lines if status == Status.REFUSED else lines[:1])


class HasOutcome:
    """Mixin of exceptions that know the outcome of the run. `outcome_of` reads it, and needs no list of their
    classes."""

    @property
    @abstractmethod
    def outcome(self) -> Outcome:
        """What the exception means for the run."""


def outcome_of(error: BaseException | None) -> Outcome:
    """The outcome of a run whose function raised `error`, or returned where `error` is None."""
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
    # `sys.exit("text")` exits with 1. An exit code is one byte: 256 would wrap to 0, and a failure look like success.
    number = code if isinstance(code, int) and 0 < code < 256 else EXIT_FAILED
    return Outcome(status=Status.FAILED, exit_code=number, message=f"exit {code}")
