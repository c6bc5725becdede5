"""History of a run in bounded memory: each metric as a curve of at most some thousands of points.

Pages show curves of runs that have logged for weeks. A curve keeps the smallest and the largest value of each interval,
so that no spike is lost, and doubles its intervals when they become too many.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from danling_conf.records.metrics import BASE, STATUS, Goodput, Span, counting_lines, is_measurement

MOST_INTERVALS = 1024
"""Of a curve, each of which has two points at most."""

_NO_CURVES = frozenset({*BASE, STATUS})

Point = tuple[float, float]
"""A step, and the value there."""


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
        if self._filled == self._size or not self._intervals:
            self._begin(newest)
            return
        self._filled += 1
        first, low, high = self._intervals[-1]
        if newest[1] < low[1]:
            self._intervals[-1] = (first, newest, high)
        elif newest[1] > high[1]:
            self._intervals[-1] = (first, low, newest)

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

    def _begin(self, point: Point) -> None:
        if len(self._intervals) == MOST_INTERVALS:
            self._halve()
        self._intervals.append((point, point, point))
        self._filled = 1

    def _halve(self) -> None:
        pairs = zip(self._intervals[::2], self._intervals[1::2], strict=True)
        self._intervals = [(a[0], min(a[1], b[1], key=_value), max(a[2], b[2], key=_value)) for a, b in pairs]
        self._size *= 2
        self._filled = self._size


def _value(point: Point) -> float:
    return point[1]


class History:
    """The curves of a run by their keys, the newest values of all keys, and what the lines say of each attempt."""

    def __init__(self) -> None:
        self.curves: dict[str, Curve] = {}
        self.last: dict[str, Any] = {}
        self.attempts: dict[str, Span] = {}
        self.goodput: float | None = None

    def points(self, key: str) -> list[Point]:
        """The points of a metric; none where it was not measured."""
        return self.curves[key].points if key in self.curves else []


def read_history(run: Path) -> History:
    """The history of a run, from one reading of its lines.

    Steps that a resumed attempt has trained again count as that attempt measured them.
    """
    history, goodput = History(), Goodput()
    curves, attempts = history.curves, history.attempts
    for line, counts in counting_lines(run):
        goodput.add(line, counts)
        span = attempts.get(line["attempt"])
        if span is None:
            span = attempts[line["attempt"]] = Span(line)
        span.add(line)
        if not counts or not is_measurement(line):
            continue
        history.last = line
        step = line["step"]
        for key, value in line.items():
            if value is None or key in _NO_CURVES:
                continue
            curve = curves.get(key)
            if curve is None:
                curve = curves[key] = Curve()
            curve.add(step, value)
    history.goodput = goodput.share
    return history
