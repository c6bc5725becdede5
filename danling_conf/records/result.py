"""Result of an attempt: how it ended, written also where the disk is full by then.

Room for it is kept from the start on, in a file of its own that this process holds open.
"""

from __future__ import annotations

import json
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from danling_conf.records.logs import position, show_unwritable
from danling_conf.records.metrics import end_metrics, metrics_file
from danling_conf.records.reading import read_result
from danling_conf.records.status import Outcome
from danling_conf.schema.files import RESERVE, RESULT, no_links, write_whole

_RESERVED_BYTES = 8192
_rooms: dict[Path, IO[bytes]] = {}
"""The rooms for results that this process holds open, by their attempts."""


def write_result(attempt: Path, outcome: Outcome, value: Any = None) -> None:
    """Write how an attempt ended, as its result and as the last record of its metrics.

    Args:
        value: what the user's function returned.
    """
    content = {"status": outcome.status, "score": score_of(value), "error": outcome.message or None}
    place = position()
    if place is not None:  # the metrics may miss it, on a full disk
        content["step"], content["epoch"] = place
    try:
        write_whole(attempt / RESULT, json.dumps(content) + "\n")
        (attempt / RESERVE).unlink(missing_ok=True)
    except OSError as error:
        if outcome.message:
            content["error"] = outcome.message[: _RESERVED_BYTES // 16]  # JSON writes a letter as up to twelve bytes
        try:
            _write_into_reserve(attempt, json.dumps(content).encode())
        except OSError:
            if read_result(attempt).text("status") != outcome.status:  # a rank may have written the same end
                show_unwritable(attempt / RESULT, error)
    try:
        end_metrics(attempt.parent.parent, attempt.name, outcome.status, place)
    except OSError as error:
        show_unwritable(metrics_file(attempt.parent.parent), error)
    if attempt in _rooms:
        _rooms.pop(attempt).close()


def reserve_result(attempt: Path) -> None:
    """Keep room on the disk for the result of an attempt, and keep it open."""
    with open(attempt / RESERVE, "wb") as file:
        file.write(b" " * _RESERVED_BYTES)
        os.fsync(file.fileno())  # file systems may allocate blocks only now
    hold_room(attempt)


def hold_room(attempt: Path) -> None:
    """Open the room for an attempt's result, if there is any, for as long as this process lives: what is open can be
    written where a folder is made read-only later."""
    with suppress(OSError):
        descriptor = no_links(str(attempt / RESERVE), os.O_WRONLY)
        _rooms[attempt] = open(descriptor, "wb", buffering=0)  # noqa: SIM115  closed with the process, or its successor


def _write_into_reserve(attempt: Path, content: bytes) -> None:
    room = _rooms.get(attempt)
    # Its name is gone where a rank has written the result.
    if room is None or not os.fstat(room.fileno()).st_nlink:
        room = open(attempt / RESERVE, "r+b", buffering=0, opener=no_links)  # noqa: SIM115  see above
    os.pwrite(room.fileno(), content, 0)
    room.truncate(len(content))
    with suppress(OSError):  # `read_result` finds it in either place
        os.replace(attempt / RESERVE, attempt / RESULT)


def score_of(value: Any) -> float | None:
    """The score in what a user's function returned; None unless it is a finite number, since JSON has no others."""
    number = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
    return number if number is not None and math.isfinite(number) else None
