"""History of a run in bounded memory: each metric as a curve of at most some thousands of points.

Pages show curves of runs that have logged for weeks. A curve keeps the smallest and the largest value of each interval,
so that no spike is lost, and doubles its intervals when they become too many.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from danling_conf.records.metrics import PRODUCTIVE, STATUS, is_measurement
from danling_conf.records.metrics_index import NO_CURVES, Extremes, Point, Stretch, counting
from danling_conf.records.status import Status

MOST_INTERVALS = 1024
"""Of a curve, each of which has two points at most."""


class Curve:
    """One metric over the steps of a run."""

    def __init__(self) -> None:
        self._intervals: list[tuple[Point, Point, Point]] = []  # of each the first, the smallest and the largest
        self._size, self._filled = 1, 0
        self._newest: Point | None = None  # kept apart: a later line may measure the same step again

    def add(self, step: float, value: float) -> None:
        """Add a value; of one step the newest counts."""
        newest = self._newest
        self._newest = (step, value)
        if newest is None or newest[0] == step:
            return
        # Called for every value of every line: an interval is made anew only where a value widens it.
        if self._filled >= self._size or not self._intervals:
            self._begin((newest, newest, newest))
            self._filled = 1
            return
        self._filled += 1
        first, low, high = self._intervals[-1]
        if newest[1] < low[1]:
            self._intervals[-1] = (first, newest, high)
        elif newest[1] > high[1]:
            self._intervals[-1] = (first, low, newest)

    def add_many(self, many: Extremes) -> None:
        """Add the values of many lines, of which the extremes are known."""
        if many.count:
            if self._newest is not None:
                self.add(many.first[0], many.first[1])  # settles the newest, unless it is of the same step
            self._newest = None
            # Intervals of this size from now on, or the beginning of a long run would be coarser than its end.
            self._size = max(self._size, many.count + 1)
            if self._filled + many.count > self._size or not self._intervals:
                self._begin((many.first, many.low, many.high))
                self._filled = many.count
            else:
                first, low, high = self._intervals[-1]
                self._intervals[-1] = (first, min(low, many.low, key=_value), max(high, many.high, key=_value))
                self._filled += many.count
        self.add(*many.newest)

    @property
    def points(self) -> list[Point]:
        """The points, in the order of steps."""
        kept = {point for _, low, high in self._intervals for point in (low, high)}
        return sorted(kept | ({self._newest} if self._newest is not None else set()))

    @property
    def last(self) -> float:
        return self.points[-1][1]

    @property
    def least(self) -> Point:
        """The smallest value, with its first step."""
        return min(self.points, key=lambda point: point[1])

    @property
    def most(self) -> float:
        return max(value for _, value in self.points)

    @property
    def median(self) -> float:
        """The median; of a sample at even distances where there are more values than intervals."""
        newest = [] if self._newest is None else [self._newest[1]]
        values = sorted([first[1] for first, _, _ in self._intervals] + newest)
        return values[len(values) // 2]

    def _begin(self, interval: tuple[Point, Point, Point]) -> None:
        if len(self._intervals) == MOST_INTERVALS:
            self._halve()
        self._intervals.append(interval)

    def _halve(self) -> None:
        pairs = zip(self._intervals[::2], self._intervals[1::2], strict=True)
        self._intervals = [(a[0], min(a[1], b[1], key=_value), max(a[2], b[2], key=_value)) for a, b in pairs]
        self._size *= 2


def _value(point: Point) -> float:
    return point[1]


class Span:
    """What the lines of one attempt say of it: from when to when, which steps, and how it ended."""

    def __init__(self, begin: float, step: int) -> None:
        self.begin = self.end = begin
        self.first_step = self.last_step = step
        self.status: Status | None = None

    def add(self, line: dict[str, Any]) -> None:
        """Add a line."""
        at, step = line["time"], line["step"]
        if at > self.end:
            self.end = at
        elif at < self.begin:
            self.begin = at
        if step > self.last_step:
            self.last_step = step
        elif step < self.first_step:
            self.first_step = step
        if STATUS in line:
            self.status = line[STATUS]

    def add_stretch(self, stretch: Stretch) -> None:
        """Add lines that are summed up."""
        self.begin, self.end = min(self.begin, stretch.begin), max(self.end, stretch.until)
        self.first_step = min(self.first_step, stretch.first_step)
        self.last_step = max(self.last_step, stretch.last_step)
        self.status = stretch.status or self.status


class Goodput:
    """Share of a run's wall time spent in steps that count, over all attempts.

    Wall time is summed over attempts, from the first line of each to its last; time between them (in a queue) does not
    count. Steps that were repeated after a restart count once.
    """

    def __init__(self) -> None:
        self._wall = self._productive = self._began = self._ended = 0.0
        self._attempt: str | None = None
        self._newest: tuple[float, float] = (-1, 0.0)  # a later line may say it again of the same step

    def add(self, line: dict[str, Any], counts: bool) -> None:
        """Add a line, and whether its step counts, as `counting` yields them."""
        at = line["time"]
        if line["attempt"] != self._attempt:
            self._begin(line["attempt"], at, at)
        elif at > self._ended:
            self._ended = at
        elif at < self._began:
            self._began = at
        seconds = line.get(PRODUCTIVE)
        if seconds and counts:
            self._spend(line["step"], seconds, (line["step"], seconds))

    def add_stretch(self, stretch: Stretch, counts: bool) -> None:
        """Add lines that are summed up, and whether their steps count."""
        if stretch.attempt != self._attempt:
            self._begin(stretch.attempt, stretch.begin, stretch.until)
        self._began, self._ended = min(self._began, stretch.begin), max(self._ended, stretch.until)
        if stretch.productive_from is not None and counts:
            self._spend(stretch.productive_from, stretch.productive, stretch.productive_newest)

    def _begin(self, attempt: str, began: float, ended: float) -> None:
        self._wall += self._ended - self._began
        self._attempt, self._began, self._ended = attempt, began, ended

    def _spend(self, step: int, seconds: float, newest: tuple[float, float]) -> None:
        if step == self._newest[0]:
            self._productive -= self._newest[1]
        self._newest = newest
        self._productive += seconds

    @property
    def share(self) -> float | None:
        """None without lines."""
        wall = self._wall + self._ended - self._began
        return self._productive / wall if wall > 0 else None


def goodput(run: Path) -> float | None:
    """The goodput of a run, see `Goodput`."""
    found = Goodput()
    for piece, counts in counting(run):
        if isinstance(piece, Stretch):
            found.add_stretch(piece, counts)
        else:
            found.add(piece, counts)
    return found.share


class History:
    """The curves of a run by their keys, where it stands, and what the lines say of each attempt.

    Attributes:
        measured: step and epoch of the newest measurement that counts; None without any.
    """

    def __init__(self) -> None:
        self.curves: dict[str, Curve] = {}
        self.measured: tuple[int, int] | None = None
        self.attempts: dict[str, Span] = {}
        self.goodput: float | None = None

    def points(self, key: str) -> list[Point]:
        """The points of a metric; none where it was not measured."""
        return self.curves[key].points if key in self.curves else []

    def add(self, line: dict[str, Any], counts: bool) -> None:
        """Add a line, and whether its step counts."""
        span = self.attempts.get(line["attempt"])
        if span is None:
            span = self.attempts[line["attempt"]] = Span(line["time"], line["step"])
        span.add(line)
        if not counts or not is_measurement(line):
            return
        step, curves = line["step"], self.curves
        self.measured = (step, line["epoch"])
        for key, value in line.items():
            if value is None or key in NO_CURVES:
                continue
            curve = curves.get(key)
            if curve is None:
                curve = curves[key] = Curve()
            curve.add(step, value)

    def add_stretch(self, stretch: Stretch, counts: bool) -> None:
        """Add lines that are summed up, and whether their steps count."""
        span = self.attempts.setdefault(stretch.attempt, Span(stretch.begin, stretch.first_step))
        span.add_stretch(stretch)
        if not counts:
            return
        self.measured = stretch.measured or self.measured
        for key, extremes in stretch.curves.items():
            self.curves.setdefault(key, Curve()).add_many(extremes)


def read_history(run: Path) -> History:
    """The history of a run, from one reading of its lines.

    Steps that a resumed attempt has trained again count as that attempt measured them.
    """
    history, goodput = History(), Goodput()
    for piece, counts in counting(run):
        if isinstance(piece, Stretch):
            history.add_stretch(piece, counts)
            goodput.add_stretch(piece, counts)
        else:
            history.add(piece, counts)
            goodput.add(piece, counts)
    history.goodput = goodput.share
    return history
