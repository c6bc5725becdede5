"""Extension of traces with few blocks to a model's real depth.

What is linear in the number of blocks is extended region by region, since the moment of the peak may be another one in
a deep model: activations that grow with depth overtake what the optimizer needs at its step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from danling_conf.plan.depth import FEW, Run
from danling_conf.plan.ledger import Ledger

Key = TypeVar("Key")
Place = tuple[str, int]
"""Name of a region, and which of those of that name."""
Calls = tuple[str, tuple[int, ...]]
"""Kind of a collective, and its ranks."""


@dataclass(frozen=True)
class Seen:
    """What one region did."""

    memory: Mapping[str, int]
    """At its peak, by category."""
    level: Mapping[str, int]
    """At its end."""
    action: str = ""
    flops: Mapping[str, int] = field(default_factory=dict)
    recomputed: int = 0
    hbm_bytes: int = 0
    collectives: Mapping[Calls, tuple[int, int]] = field(default_factory=dict)
    """Calls and bytes."""


Trace = dict[Place, Seen]
"""Regions in the order in which they came."""


def trace_of(ledger: Ledger) -> Trace:
    """The regions of a step; neighbours of one name are one."""
    found: Trace = {}
    counts: dict[str, int] = {}
    before: Place | None = None
    for region, (memory, level) in zip(ledger.regions, ledger.memory(), strict=True):
        seen = Seen(
            memory,
            level,
            region.action,
            dict(region.flops),
            region.recomputed,
            region.hbm_bytes,
            dict(region.collectives),
        )
        if before is not None and before[0] == region.name and found[before].action == region.action:
            found[before] = _joined(found[before], seen)
            continue
        before = region.name, counts.get(region.name, 0)
        counts[region.name] = before[1] + 1
        found[before] = seen
    return found


def extended(runs: Sequence[Run], names: Sequence[Sequence[Sequence[str]]], traces: Sequence[Trace]) -> Trace:
    """The regions of the whole model.

    Args:
        runs: of the whole model.
        names: by trace, by run: the names of the blocks that were traced.
        traces: the first with `FEW` units of each long run, then one with a unit more of each long run, in order.
    """
    long = [index for index, run in enumerate(runs) if run.long]
    factors = [runs[index].units - FEW for index in long]
    base = traces[0]
    found: Trace = {}
    counterparts = [_counterpart(runs, names, number, index) for number, index in enumerate(long, start=1)]

    def whole(place: Place, others: Sequence[Place]) -> Seen | None:
        """The region at the full depth, from those that are alike in each trace."""
        more = [trace.get(other) for trace, other in zip(traces[1:], others, strict=True)]
        if place not in base or any(item is None for item in more):
            return None
        return _extended(base[place], [item for item in more if item is not None], factors)

    traced = _positions(runs, names[0])
    for place in base:
        kind, _, block = place[0].partition(" ")
        where = traced.get(block)
        if where is None or not runs[where[0]].long:
            seen = whole(place, [other(place) for other in counterparts])
            if seen is not None:
                found[place] = seen
            continue
        run, slot = where
        # A long run is inserted where its first traced block of this pass stands, in the pass's order.
        first = 0 if kind == "forward" else FEW * runs[run].period - 1
        if slot == first:
            found.update(_of_run(runs, names, run, kind, place[1], whole, long))
    return found


def _of_run(
    runs: Sequence[Run],
    names: Sequence[Sequence[Sequence[str]]],
    run: int,
    kind: str,
    occurrence: int,
    whole: Callable[[Place, Sequence[Place]], Seen | None],
    long: Sequence[int],
) -> Trace:
    """The regions of all blocks of a long run, in the order of a pass."""
    blocks, period, units = runs[run].blocks, runs[run].period, runs[run].units
    known: dict[int, Seen] = {}
    for index in range(len(blocks)):
        if 2 <= index // period < units - 2:
            continue
        place = (f"{kind} {names[0][run][runs[run].slot(index, FEW)]}", occurrence)
        others = []
        for number, changed in enumerate(long, start=1):
            count = FEW + 1 if changed == run else FEW
            others.append((f"{kind} {names[number][run][runs[run].slot(index, count)]}", occurrence))
        seen = whole(place, others)
        if seen is None:
            return {}
        known[index] = seen
    found: Trace = {}
    order = range(len(blocks)) if kind == "forward" else reversed(range(len(blocks)))
    for index in order:
        if index not in known:
            unit, inside = divmod(index, period)
            start, end = known[period + inside], known[(units - 2) * period + inside]
            known[index] = _between(start, end, (unit - 1) / (units - 3))
        found[f"{kind} {blocks[index]}", occurrence] = known[index]
    return found


def _positions(runs: Sequence[Run], names: Sequence[Sequence[str]]) -> dict[str, tuple[int, int]]:
    return {name: (number, slot) for number, of_run in enumerate(names) for slot, name in enumerate(of_run)}


def _counterpart(
    runs: Sequence[Run], names: Sequence[Sequence[Sequence[str]]], number: int, changed: int
) -> Callable[[Place], Place]:
    """Finds, for a region of the first trace that is no block of a long run, the one of another trace."""
    positions = _positions(runs, names[0])

    def other(place: Place) -> Place:
        kind, _, block = place[0].partition(" ")
        if block not in positions:
            return place
        run, slot = positions[block]
        return f"{kind} {names[number][run][slot]}", place[1]

    return other


def _extended(base: Seen, more: Sequence[Seen], factors: Sequence[int]) -> Seen:
    def mix(value: Callable[[Seen], int]) -> int:
        first = value(base)
        return first + sum(factor * (value(item) - first) for factor, item in zip(factors, more, strict=True))

    everything = (base, *more)
    kinds = {key for seen in everything for key in (*seen.memory, *seen.level)}
    dtypes = {key for seen in everything for key in seen.flops}
    calls = {key: None for seen in everything for key in seen.collectives}

    def held(of: Callable[[Seen], Mapping[str, int]]) -> dict[str, int]:
        found = {key: mix(lambda seen, key=key: of(seen).get(key, 0)) for key in sorted(kinds)}  # type: ignore[misc]
        return {key: value for key, value in found.items() if value > 0}

    return Seen(
        held(lambda seen: seen.memory),
        held(lambda seen: seen.level),
        base.action,
        {key: mix(lambda seen, key=key: seen.flops.get(key, 0)) for key in sorted(dtypes)},  # type: ignore[misc]
        mix(lambda seen: seen.recomputed),
        mix(lambda seen: seen.hbm_bytes),
        {
            key: (
                mix(lambda seen, key=key: seen.collectives.get(key, (0, 0))[0]),  # type: ignore[misc]
                mix(lambda seen, key=key: seen.collectives.get(key, (0, 0))[1]),  # type: ignore[misc]
            )
            for key in calls
        },
    )


def _between(start: Seen, end: Seen, share: float) -> Seen:
    def mix(first: Mapping[str, int], last: Mapping[str, int]) -> dict[str, int]:
        keys = sorted({*first, *last})
        return {key: round(first.get(key, 0) + share * (last.get(key, 0) - first.get(key, 0))) for key in keys}

    memory, level = mix(start.memory, end.memory), mix(start.level, end.level)
    return Seen(memory, level, start.action, start.flops, start.recomputed, start.hbm_bytes, start.collectives)


def _joined(first: Seen, second: Seen) -> Seen:
    larger = max(first.memory, second.memory, key=lambda memory: sum(memory.values()))
    return Seen(
        larger,
        second.level,
        first.action,
        added(first.flops, second.flops),
        first.recomputed + second.recomputed,
        first.hbm_bytes + second.hbm_bytes,
        calls_added(first.collectives, second.collectives),
    )


def added(first: Mapping[Key, int], second: Mapping[Key, int], times: int = 1) -> dict[Key, int]:
    """The sum of two mappings, the second one counted so many times."""
    return {key: first.get(key, 0) + times * second.get(key, 0) for key in dict.fromkeys((*first, *second))}


def calls_added(
    first: Mapping[Calls, tuple[int, int]], second: Mapping[Calls, tuple[int, int]], times: int = 1
) -> dict[Calls, tuple[int, int]]:
    """The same of calls and bytes."""
    found = dict(first)
    for key, (count, size) in second.items():
        before = found.get(key, (0, 0))
        found[key] = (before[0] + times * count, before[1] + times * size)
    return found
