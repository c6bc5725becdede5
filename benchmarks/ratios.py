"""Ratios of two programs that were timed side by side."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

Times = tuple[float, float]
"""Wall-clock and CPU seconds of one measurement."""


def table(pairs: Sequence[tuple[Times, Times]], factor: float = 1.0) -> list[str]:
    """A line for each clock: medians of bare and ours (times `factor`), their ratio, quartiles of the pairs' ratios.

    Where the load of the machine changes during the run, the middle quartile is the one to trust: the two of a pair
    were timed one right after the other.
    """
    lines = []
    for index, clock in enumerate(("wall", "CPU")):
        bare, ours = ([pair[which][index] for pair in pairs] for which in (0, 1))
        quartiles = statistics.quantiles([mine / theirs for theirs, mine in zip(bare, ours, strict=True)], n=4)
        medians = statistics.median(bare), statistics.median(ours)
        shown = "  ".join(f"{quartile:.3f}" for quartile in quartiles)
        numbers = "".join(f"{factor * median:10.4g}" for median in medians)
        lines.append(f"{clock:5}{numbers}{medians[1] / medians[0]:8.3f}     {shown}")
    return lines


HEADER = f"{'':5}{'bare':>10}{'ours':>10}{'ratio':>8}     quartiles of the pairs' ratios"
