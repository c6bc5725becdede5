"""Index of a run's metrics: what each stretch of a few hundred lines says, summed up as the run writes it.

A run that logs each step has millions of lines, and parsing them takes longer than anybody waits for a page. A reader
checks the bytes of a stretch against their checksum, and takes its sums instead of its lines. So a file that was cut,
edited or written by two processes is never taken for what the index says of it: stretches that do not fit are parsed,
as are lines of which there is no entry. Nothing is lost without the index.
"""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from danling_conf.records.logs import show_unwritable
from danling_conf.records.metrics import (
    BASE,
    PRODUCTIVE,
    STATUS,
    Reading,
    file_blocks,
    is_measurement,
    is_simple,
    metrics_file,
    parse_line,
    resumptions,
)
from danling_conf.records.status import Status, written_status
from danling_conf.schema.files import METRICS_INDEX, Damaged, no_links, read_regular

_log = logging.getLogger(__name__)
LINES = 256
"""Of a stretch."""
FEWEST = 128
"""Stretches for which an index is read. Fewer are parsed in no time, and curves show each of their points."""
_FORMAT = 1
"""Entries of another format are passed over."""
NO_CURVES = frozenset({*BASE, STATUS})
"""Keys that are no metric."""

Point = tuple[float, float]
"""A step, and the value there."""


class Extremes:
    """One metric in a stretch: how many values, the first, the smallest and the largest of them; and the newest, which
    is kept apart, as a later line may measure the same step again."""

    __slots__ = ("count", "first", "high", "low", "newest")

    def __init__(self, newest: Point) -> None:
        self.count = 0
        self.first = self.low = self.high = self.newest = newest

    def add(self, step: float, value: float) -> None:
        """Add a value; of one step the newest counts."""
        newest = self.newest
        self.newest = (step, value)
        if newest[0] == step:
            return
        self.count += 1
        if self.count == 1:
            self.first = self.low = self.high = newest
        elif newest[1] < self.low[1]:
            self.low = newest
        elif newest[1] > self.high[1]:
            self.high = newest

    def written(self) -> list[float]:
        """As numbers in a row; `read` is the opposite."""
        return [self.count, *self.first, *self.low, *self.high, *self.newest]

    @staticmethod
    def read(numbers: list[float]) -> Extremes:
        count, *flat = numbers
        first, low, high, newest = zip(flat[::2], flat[1::2], strict=True)
        found = Extremes(newest)
        found.count, found.first, found.low, found.high = int(count), first, low, high
        return found


class Stretch:
    """What consecutive lines of one attempt say together.

    Attributes:
        start, end: bytes of the file that the lines take.
        lines: their number.
        begin, until: the earliest and the latest time.
        first_step, last_step: the smallest and the largest step.
        status: how the attempt ended, where one of the lines says so.
        measured: step and epoch of the last measurement; None without any.
        productive: seconds spent in steps, of which a step counts once.
        productive_from: the first step with such seconds; None without any.
        productive_newest: the last such step, and its seconds.
        curves: each metric.
    """

    def __init__(self, attempt: str, start: int) -> None:
        self.attempt, self.start, self.end, self.lines, self._sum = attempt, start, start, 0, 0
        self.begin = self.until = 0.0
        self.first_step = self.last_step = 0
        self.status: Status | None = None
        self.measured: tuple[int, int] | None = None
        self.productive = 0.0
        self.productive_from: int | None = None
        self.productive_newest: Point = (-1, 0.0)
        self.curves: dict[str, Extremes] = {}

    def add(self, record: dict[str, Any], line: bytes) -> None:
        """Add a record, and the bytes that it was parsed from, with the newline."""
        at, step = record["time"], record["step"]
        if not self.lines:
            self.begin = self.until = at
            self.first_step = self.last_step = step
        self.lines += 1
        self.end += len(line)
        self._sum = zlib.crc32(line, self._sum)
        self.begin, self.until = min(self.begin, at), max(self.until, at)
        self.first_step, self.last_step = min(self.first_step, step), max(self.last_step, step)
        self.status = record.get(STATUS, self.status)
        self._add_productive(step, record.get(PRODUCTIVE))
        if not is_measurement(record):
            return
        self.measured = (step, record["epoch"])
        for key, value in record.items():
            if value is None or key in NO_CURVES:
                continue
            curve = self.curves.get(key)
            if curve is None:
                self.curves[key] = Extremes((step, value))
            else:
                curve.add(step, value)

    def _add_productive(self, step: int, seconds: float | None) -> None:
        if not seconds:
            return
        if self.productive_from is None:
            self.productive_from = step
        if step == self.productive_newest[0]:
            self.productive -= self.productive_newest[1]
        self.productive_newest = (step, seconds)
        self.productive += seconds

    def fits(self, path: Path) -> bool:
        """Whether a file has just these bytes, as whole lines, where they were written. Raises as `read_regular`
        does."""
        if self.start and read_regular(path, limit=None, start=self.start - 1, most=1) != b"\n":
            return False
        found = 0
        for block in file_blocks(path, self.start, self.end):
            found = zlib.crc32(block, found)
        return found == self._sum

    def written(self) -> bytes:
        """As a line of the index, which carries its own checksum; `read` is the opposite."""
        content = {
            "format": _FORMAT,
            "attempt": self.attempt,
            "bytes": [self.start, self.end],
            "lines": self.lines,
            "crc32": self._sum,
            "times": [self.begin, self.until],
            "steps": [self.first_step, self.last_step],
            "status": self.status,
            "measured": self.measured,
            "productive": [self.productive, self.productive_from, *self.productive_newest],
            "curves": {key: curve.written() for key, curve in self.curves.items()},
        }
        text = json.dumps(content, separators=(",", ":")).encode()
        return b"%08x %s\n" % (zlib.crc32(text), text)

    @staticmethod
    def read(line: bytes) -> Stretch | None:
        """The stretch in a line of the index; None where it holds none, or is damaged."""
        checksum, _, text = line.partition(b" ")
        if not text or checksum != b"%08x" % zlib.crc32(text):
            return None
        content = json.loads(text)
        if content["format"] != _FORMAT:
            return None
        found = Stretch(content["attempt"], content["bytes"][0])
        found.end, found.lines, found._sum = content["bytes"][1], content["lines"], content["crc32"]
        found.begin, found.until = content["times"]
        found.first_step, found.last_step = content["steps"]
        found.status = written_status(content["status"])
        found.measured = None if content["measured"] is None else tuple(content["measured"])
        found.productive, found.productive_from, step, seconds = content["productive"]
        found.productive_newest = (step, seconds)
        found.curves = {key: Extremes.read(numbers) for key, numbers in content["curves"].items()}
        return found


class IndexWriter:
    """Writes the index of one attempt's lines, as they are written.

    Args:
        run: directory of the run.
        attempt: name of the attempt's folder.
    """

    def __init__(self, run: Path, attempt: str) -> None:
        self._path, self._attempt = run / METRICS_INDEX, attempt
        self._stretch: Stretch | None = None
        self._failed = False

    def add(self, line: bytes, end: int, written: dict[str, Any] | None = None) -> None:
        """Take a line that was written, with its newline, and where the file ends now.

        Args:
            written: what the line was made of, where that is at hand: it need not be parsed then.
        """
        record = written if written is not None and is_simple(written) else parse_line(line)
        if record is None or self._failed:
            self._stretch = None
            return
        start = end - len(line)
        if self._stretch is None or self._stretch.end != start:  # at first; or another process has written as well
            self._stretch = Stretch(self._attempt, start)
        self._stretch.add(record, line)
        if self._stretch.lines == LINES:
            self._append(self._stretch.written())
            self._stretch = None

    def _append(self, entry: bytes) -> None:
        try:
            with open(self._path, "ab", buffering=0, opener=no_links) as file:
                file.write(entry)
        except OSError as error:
            self._failed = True
            show_unwritable(self._path, error, so="a report of this run takes longer")


def counting(run: Path) -> Iterator[tuple[dict[str, Any] | Stretch, bool]]:
    """Yields what is in a run's file, in order: lines, and stretches of lines that the index sums up. Each with whether
    its steps count: no later attempt began before them."""
    limits: list[float] = [float("inf")]
    for first in reversed(resumptions(run)[1:]):
        limits.append(min(limits[-1], first))
    walk, reading, position = _Limit(limits), Reading(run), 0
    for stretch in _fitting(run):
        yield from walk.judged(reading.records(position, stretch.start))
        limit = walk.of(stretch.attempt)
        if stretch.first_step <= limit < stretch.last_step:
            yield from walk.judged(reading.records(stretch.start, stretch.end))
        else:
            reading.skip(stretch.lines)
            yield stretch, stretch.last_step <= limit
        position = stretch.end
    yield from walk.judged(reading.records(position))
    reading.warn()


class _Limit:
    """The last step that counts, of the attempt that a reading has come to."""

    def __init__(self, limits: list[float]) -> None:
        self._limits, self._limit = limits, float("inf")
        self._attempt: str | None = None

    def of(self, attempt: str) -> float:
        if attempt != self._attempt:
            self._attempt, self._limit = attempt, self._limits.pop() if self._limits else float("inf")
        return self._limit

    def judged(self, lines: Iterator[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], bool]]:
        for line in lines:
            yield line, line["step"] <= self.of(line["attempt"])


def _fitting(run: Path) -> Iterator[Stretch]:
    """Yields the stretches of a run's index that fit its file, in its order; none of a short index."""
    path, position = run / METRICS_INDEX, 0
    try:
        if sum(block.count(b"\n") for block in file_blocks(path)) < FEWEST:
            return
        rest = b""
        for block in file_blocks(path):
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                stretch = Stretch.read(line)
                if stretch is not None and stretch.start >= position and stretch.fits(metrics_file(run)):
                    position = stretch.end
                    yield stretch
    except FileNotFoundError:
        return
    except Damaged as damage:
        _log.info("%s: %s: all lines are parsed", damage.path, damage.reason)
