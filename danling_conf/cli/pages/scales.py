"""Scales of charts: map values to pixels, and choose the numbers along an axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """Maps values onto a length of pixels, linearly or by their logarithm."""

    low: float
    high: float
    begin: float
    """Pixel of `low`."""
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        place = math.log10(max(value, self.low)) if self.log else value
        return self.begin + (place - low) / (high - low) * (self.end - self.begin)

    def ticks(self, count: int) -> list[float]:
        """About this many round values."""
        if self.log:
            return _log_ticks(self.low, self.high, count)
        step = _round((self.high - self.low) / max(1, count))
        first = math.ceil(self.low / step - 1e-9)
        found = [number * step for number in range(first, math.floor(self.high / step + 1e-9) + 1)]
        return [0.0 if abs(value) < step * 1e-9 else value for value in found]


def scale_of(values: Sequence[float], begin: float, end: float, *, log: bool = False, pad: float = 0.0) -> Scale:
    """A scale that covers all values. `pad` is the room at both ends, as a share. Logarithmic only if all are
    positive."""
    low, high = min(values), max(values)
    if log and low > 0:
        if high / low < 1.01:
            low, high = low / 2, high * 2
        room = (high / low) ** pad
        return Scale(low / room, high * room, begin, end, log=True)
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
        low, high = (low - abs(low) * 0.1, high + abs(high) * 0.1) if low else (-1.0, 1.0)
    room = (high - low) * pad
    return Scale(low - room, high + room, begin, end)


def short(value: float) -> str:
    """A number for an axis: 1.5k, 2M, 1e-4."""
    size = abs(value)
    if value == 0:
        return "0"
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit:
            return f"{value / limit:.4g}{suffix}"
    if size < 1e-3:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"


def thinned(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most about this many points. Of each interval it keeps the smallest and the largest, so that no spike is
    lost."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(2 * len(points) / most)
    kept: list[tuple[float, float]] = []
    for begin in range(0, len(points), size):
        part = points[begin : begin + size]
        ends = {min(range(len(part)), key=lambda i: part[i][1]), max(range(len(part)), key=lambda i: part[i][1])}
        kept += [part[index] for index in sorted(ends)]
    return [*kept, points[-1]] if kept[-1] != points[-1] else kept


def _round(step: float) -> float:
    size = 10.0 ** math.floor(math.log10(step))
    return next(size * factor for factor in (1, 2, 5, 10) if size * factor >= 0.7 * step)


def _log_ticks(low: float, high: float, count: int) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, (last - first) // max(1, count))
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    found = [factor * 10.0**power for power in range(first, last + 1, every) for factor in factors]
    return [value for value in found if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)] or [low, high]
