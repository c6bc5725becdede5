"""Ratios of two things that were timed side by side."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

Times = tuple[float, float]
"""Wall-clock and CPU seconds of one measurement."""


def rows(pairs: Sequence[tuple[Times, Times]]) -> list[tuple[str, float, float, float, float, float]]:
    """For each clock: its name, the medians of bare and ours, their ratio, and the quartiles of the pairs' ratios."""
    found = []
    for index, clock in enumerate(("wall", "CPU")):
        bare, ours = ([pair[which][index] for pair in pairs] for which in (0, 1))
        low, _, high = statistics.quantiles([mine / theirs for theirs, mine in zip(bare, ours, strict=True)], n=4)
        medians = statistics.median(bare), statistics.median(ours)
        found.append((clock, *medians, medians[1] / medians[0], low, high))
    return found
