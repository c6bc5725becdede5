"""Number of jobs of a sweep, counted before they are made."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hydra.core.override_parser.types import Override, RangeSweep

from danling_conf.topology.violation import ABSENT, ConfigRefused, Violation

MOST_JOBS = 100_000
"""Most jobs of a sweep. All are checked, and get a folder each, before the first one starts."""


def check_size(overrides: Sequence[Override]) -> None:
    """Raises ConfigRefused where the combinations are none, or more than a sweep may have.

    Counted before they are made: Hydra would make a list of all, and `range(0, 1e9)` alone fills the memory.
    """
    counts = {item.get_key_element(): _values_in(item) for item in overrides if item.is_discrete_sweep()}
    if 0 in counts.values():
        key = next(key for key, count in counts.items() if count == 0)
        raise ConfigRefused([Violation(key, ABSENT, "it has no values, so the sweep has no jobs", "give one or more")])
    jobs = math.prod(counts.values())
    if math.isinf(jobs):
        key = next(key for key, count in counts.items() if math.isinf(count))
        raise ConfigRefused([Violation(key, ABSENT, "its range has no end", "give it a finite end and a step")])
    if jobs > MOST_JOBS:
        key = max(counts, key=lambda each: counts[each])
        values = f"{_readable(counts[key])} values of {key} among them"
        rule = f"it has {_readable(jobs)} jobs, {values}, and a sweep has at most {MOST_JOBS}"
        raise ConfigRefused([Violation("sweep", ABSENT, rule, "give fewer values, or split it into several sweeps")])


def _readable(count: float) -> str:
    return f"{count:g}" if count > MOST_JOBS else f"{count:.0f}"


def _values_in(override: Override) -> float:
    """The number of values of a sweep's override; infinity where a range has no end."""
    values = override.value()
    if not isinstance(values, RangeSweep):
        return sum(1 for _ in override.sweep_iterator())
    try:
        start, stop, step = (float(item or 0) for item in (values.start, values.stop, values.step))
    except OverflowError:
        return math.inf
    if not all(map(math.isfinite, (start, stop, step))):
        return math.inf
    return max(0, math.ceil((stop - start) / step)) if step else math.inf
