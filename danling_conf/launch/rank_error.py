"""Errors of ranks: how a rank leaves its own to the process that started it, and what that process raises.

A rank may fail since the disk is full. So room for its error is kept on the disk from its start.
"""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from danling_conf.records.logs import show_unwritable
from danling_conf.records.reading import Fields, read_fields
from danling_conf.records.status import EXIT_FAILED, HasOutcome, Outcome, Status, exit_code_of_signal
from danling_conf.schema.files import no_links, parse_object, write_whole
from danling_conf.topology.violation import PlainError, trace_of

ERROR_VARIABLE = "DANLING_CONF_ERROR"
"""Environment variable that names the file of a worker's error."""
_ROOM_BYTES = 4096
"""Of each rank on the disk for why it fails, which may be that the disk is full."""


class WorkersFailed(HasOutcome, RuntimeError):
    """A rank failed; the others were stopped."""

    def __init__(self, rank: int, exit_code: int, message: str, log: Path, status: Status = Status.FAILED) -> None:
        self.rank, self.exit_code, self.log, self.status = rank, exit_code, log, status
        super().__init__(message)

    @property
    def refused(self) -> bool:
        return self.status is Status.REFUSED

    @property
    def outcome(self) -> Outcome:
        # The exit code of a rank that a signal ended is negative.
        return Outcome(status=self.status, exit_code=max(self.exit_code, EXIT_FAILED), message=str(self))


class WorkersInterrupted(HasOutcome, RuntimeError):
    """The workers were stopped by a signal.

    Not a `Stopped`: Hydra's `run_job` catches no SystemExit, and its callbacks would not see the end of the job.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(f"stopped by {signal.Signals(number).name}")

    @property
    def outcome(self) -> Outcome:
        return Outcome(status=Status.INTERRUPTED, exit_code=exit_code_of_signal(self.number), message=str(self))


def record_failure(error: Exception, outcome: Outcome) -> None:
    """Write why this rank failed, for the process that started it."""
    content = {
        "raised_at": time.time(),
        # A plain error says it all, for a user.
        "message": str(error) if isinstance(error, PlainError) else f"{type(error).__name__}: {error}",
        "traceback": trace_of(error),
        "status": outcome.status,
        "reason": outcome.message,
    }
    path = Path(os.environ[ERROR_VARIABLE])
    try:
        write_whole(path, json.dumps(content) + "\n")
    except OSError as failed:
        content["traceback"] = ""
        while len(text := json.dumps(content).encode()) > _ROOM_BYTES:
            content |= {name: str(content[name])[: len(str(content[name])) // 2] for name in ("message", "reason")}
        try:
            if _own_room is None:
                raise
            os.pwrite(_own_room, text.ljust(_ROOM_BYTES), 0)
        except OSError:
            show_unwritable(path, failed)


_own_room: int | None = None
"""Descriptor of the room for this rank's own error."""


def hold_own_room() -> None:
    """In a rank: open the room for its error, which cannot be opened later where its folder is made read-only."""
    global _own_room
    with suppress(OSError):
        _own_room = no_links(str(_room_of(Path(os.environ[ERROR_VARIABLE]))), os.O_WRONLY)


def _room_of(error: Path) -> Path:
    return error.with_name(f".{error.name}")


def made_room(error: Path) -> IO[bytes] | None:
    """Keep room on the disk for the error of a rank; None where there is none left."""
    try:
        room = open(_room_of(error), "w+b", buffering=0, opener=no_links)  # noqa: SIM115  until the ranks have ended
        room.write(b" " * _ROOM_BYTES)
    except OSError:
        return None
    return room


def remove_room(error: Path, room: IO[bytes]) -> None:
    """Give back the room for the error of a rank that has ended."""
    room.close()
    with suppress(OSError):  # it is small, and hidden
        _room_of(error).unlink(missing_ok=True)


def written_error(error: Path, room: IO[bytes] | None) -> Fields:
    """What a rank has written of its error; empty where it has not."""
    if error.exists() or room is None:
        return read_fields(error)
    try:
        return Fields(error, parse_object(os.pread(room.fileno(), _ROOM_BYTES, 0)))
    except ValueError:  # blank
        return Fields(error)
