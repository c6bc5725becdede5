"""Metrics of a run: JSON lines in one file for all attempts, to which rank 0 appends.

Each line is an object with `time` (seconds since 1970), `attempt` (the attempt's folder name), `step`, `epoch` and
dotted scalars (`train.loss`, `val.loss`, `train.lr`, `train.samples_per_second`). A line without scalars marks where an
attempt starts: at the step that it resumes from. A line with `status` is the attempt's last: how it ended.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from danling_conf.records.reading import is_moment, is_number, warn_of_damage
from danling_conf.records.status import Status, written_status
from danling_conf.schema.files import METRICS, Damaged, no_links, parse_object, read_regular

BASE = ("time", "attempt", "step", "epoch")
"""The keys that every line has."""
STATUS = "status"
"""Key that only the last line of an attempt has."""
PRODUCTIVE = "train.productive_seconds"
"""Seconds since the previous line that were spent in steps, without evaluation, checkpoints and compilation."""
_TAIL_BYTES = 1 << 16
_BLOCK_BYTES = 1 << 20


def metrics_file(run: Path) -> Path:
    """The file of a run."""
    return run / METRICS


def read_lines(run: Path) -> Iterator[dict[str, Any]]:
    """Yields all lines as they were written, including those of steps that were repeated; none where there is no file.

    A damaged line is skipped with a warning, given at the end.
    """
    reading = Reading(run)
    yield from reading.records()
    reading.warn()


class Reading:
    """A reading of a run's file, stretch by stretch, which gathers what is damaged.

    A last line without a newline is still being written, and is no damage. Lines are read block by block: a long run
    has millions.
    """

    def __init__(self, run: Path) -> None:
        self._path = metrics_file(run)
        self._number = 0
        self._bad: list[int] = []

    def records(self, start: int = 0, end: int | None = None) -> Iterator[dict[str, Any]]:
        """Yields the lines between two bytes, the end of the file where `end` is None."""
        torn = b""
        try:
            for block in file_blocks(self._path, start, end):
                *lines, torn = (torn + block).split(b"\n")
                for found in _parsed(lines):
                    self._number += 1
                    if isinstance(found, dict):
                        yield found
                    elif found:
                        self._bad.append(self._number)
        except FileNotFoundError:
            return
        except Damaged as damage:
            warn_of_damage(damage.path, damage.reason)
            return
        last = parse_line(torn)
        if last is not None:
            yield last

    def skip(self, lines: int) -> None:
        """Pass over so many lines, which are known to be whole."""
        self._number += lines

    def warn(self) -> None:
        """Warn of the lines that could not be read."""
        if self._bad:
            more = f", and {len(self._bad) - 1} more" if len(self._bad) > 1 else ""
            warn_of_damage(self._path, f"line {self._bad[0]}{more} cannot be read, and is left out")


def file_blocks(path: Path, start: int = 0, end: int | None = None) -> Iterator[bytes]:
    """Yields the bytes of a file from `start` to `end`, a block at a time. Raises as `read_regular` does."""
    while end is None or start < end:
        most = _BLOCK_BYTES if end is None else min(_BLOCK_BYTES, end - start)
        block = read_regular(path, limit=None, start=start, most=most)
        if not block:
            return
        start += len(block)
        yield block


def _parsed(lines: list[bytes]) -> Iterator[dict[str, Any] | bool]:
    """For each line its record; for one that has none, whether there is anything in it."""
    for found, line in zip(_at_once(lines), lines, strict=True):
        if isinstance(found, dict) and is_simple(found):
            yield found
        else:
            record = parse_line(line)
            yield bool(line.strip()) if record is None else record


def _at_once(lines: list[bytes]) -> list[Any]:
    """What is in lines as the runner writes them, parsed in one call; None for each of any other lines."""
    try:
        found = json.loads(b"[" + b",".join(lines) + b"]")
    except (ValueError, RecursionError):
        found = []
    if len(found) != len(lines) or not all(line[:1] == b"{" and line[-1:] == b"}" for line in lines):
        return [None] * len(lines)
    return list(found)


def is_simple(found: dict[str, Any]) -> bool:
    """Whether an object is a record as it stands: `parse_line` would change nothing."""
    for name, value in found.items():
        kind = type(value)
        if kind is float:
            if value - value != 0.0:
                return False
        elif kind is int:
            if not -(1 << 63) < value < 1 << 63:
                return False
        elif value is not None and not (kind is str and name == "attempt" and value.isascii()):
            return False
    return (
        is_moment(found.get("time"))
        and type(found.get("attempt")) is str
        and type(found.get("step")) is type(found.get("epoch")) is int
    )


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The record in a line, without values that are not numbers; None for a line that is not a record."""
    try:
        return _record(parse_object(line))
    except ValueError:
        return None


def _record(found: dict[str, Any]) -> dict[str, Any] | None:
    attempt, step, epoch = found.get("attempt"), found.get("step"), found.get("epoch")
    if not is_moment(found.get("time")) or not isinstance(attempt, str):
        return None
    if any(not isinstance(count, int) or isinstance(count, bool) for count in (step, epoch)):
        return None
    kept = {name: value for name, value in found.items() if name in BASE or value is None or is_number(value)}
    status = written_status(found.get(STATUS))
    return kept if status is None else {**kept, STATUS: status}


def last_line(run: Path) -> dict[str, Any] | None:
    """The last record of a run; None where there is none. Reads only the end of the file, which may be long."""
    path = metrics_file(run)
    try:
        lines = read_regular(path, limit=None, start=max(0, path.stat().st_size - _TAIL_BYTES)).splitlines()
    except OSError:
        return None
    except Damaged as damage:
        warn_of_damage(damage.path, damage.reason)
        return None
    return next((found for found in map(parse_line, reversed(lines)) if found is not None), None)


def end_metrics(run: Path, attempt: str, status: Status) -> None:
    """Append the end of an attempt as its last record, unless the runner wrote it. Does nothing without any record.

    A training loop of the user's own that raises never reaches the runner's last call, and a function can fail after
    it.
    """
    last = last_line(run)
    if last is None or last["attempt"] != attempt or last.get(STATUS) == status:
        return
    line = {"time": time.time(), "attempt": attempt, "step": last["step"], "epoch": last["epoch"], STATUS: status}
    with open(metrics_file(run), "ab+", opener=no_links) as file:
        # The attempt may have been killed within a line: without a newline both lines would be unreadable.
        file.seek(-1, os.SEEK_END)
        torn = file.read(1) != b"\n"
        file.write((b"\n" if torn else b"") + json.dumps(line).encode() + b"\n")


def end_in_metrics(run: Path, attempt: str) -> Status | None:
    """How a run's newest attempt ended by its last record; None where that does not say."""
    last = last_line(run)
    return last.get(STATUS) if last is not None and last["attempt"] == attempt else None


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The history of a run: one object a step, in the order of steps.

    Everything measured at one step is one object, with the newest value of each key. Where an attempt resumed from an
    earlier step, lines of previous attempts beyond that step are dropped: those steps were trained again.
    """
    by_step: dict[int, dict[str, Any]] = {}
    attempt, highest, in_order = None, -1, True
    for line in read_lines(run):
        if line["attempt"] != attempt:
            attempt = line["attempt"]
            # A marker says "resumed after step n", so step n stays; a measurement at step n replaces step n itself.
            first = line["step"] - (1 if is_measurement(line) else 0)
            # Steps were inserted in order, but for a few: all of them anew for each attempt would be quadratic.
            while by_step and next(reversed(by_step)) > first:
                by_step.popitem()
            if highest > first and not in_order:
                by_step = {step: found for step, found in by_step.items() if step <= first}
            highest = first
        if is_measurement(line):
            step = line["step"]
            in_order = in_order and (step >= highest or step in by_step)
            highest = max(highest, step)
            measured = {name: value for name, value in line.items() if name != STATUS}
            by_step[step] = {**by_step.get(step, {}), **measured}
    return [by_step[step] for step in sorted(by_step)]


def resumptions(run: Path) -> list[int]:
    """For each attempt in a run's file, in order, the step up to which earlier ones count.

    A marker says "resumed after step n", so step n stays; a measurement at step n replaces step n itself. Only lines
    that begin another attempt are parsed.
    """
    found: list[int] = []
    attempt, same, torn = None, b"\0", b""  # no line has that byte
    try:
        for block in file_blocks(metrics_file(run)):
            *lines, torn = (torn + block).split(b"\n")
            for text in lines:
                line = None if same in text else parse_line(text)
                if line is not None and line["attempt"] != attempt:
                    attempt = line["attempt"]
                    same = b'"attempt": ' + json.dumps(attempt).encode()
                    found.append(line["step"] - (1 if is_measurement(line) else 0))
    except (FileNotFoundError, Damaged):  # reading the lines themselves says so
        pass
    return found


def is_measurement(line: dict[str, Any]) -> bool:
    """Whether a line has any scalar, besides the keys that every line has and the status."""
    return len(line) - (STATUS in line) > len(BASE)


def series(history: list[dict[str, Any]], key: str, by: str = "step") -> list[tuple[float, float]]:
    """The points (`by`, value) of one metric in a history of `read_metrics`. Drops values that are not finite."""
    return [(line[by], line[key]) for line in history if is_number(line.get(key))]
