"""Order of a pipeline's schedule: a step of a rank, put together of what its stages do with single microbatches.

How many microbatches are in flight, and so how many activations are kept, is up to the schedule. It is asked for its
own order of actions; each action is replaced by what the traced one of its kind added to memory and gave back.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from danling_conf.plan.extend import Place, Seen, Trace
from danling_conf.plan.figures import ACTIVATIONS, Moment

Action = tuple[int, str, "int | None"]
"""Stage, what, and microbatch."""

Memory = dict[str, int]


@dataclass(frozen=True)
class _Span:
    """The regions of one traced action."""

    before: Mapping[str, int]
    """Memory where it began."""
    regions: tuple[tuple[str, Seen], ...]


def in_order(
    trace: Trace, actions: Sequence[Action], *, steps: int, buffers: int
) -> tuple[list[Moment], list[tuple[Place, int]]]:
    """The time line of an optimizer step, and how often each traced region is run in it.

    Args:
        trace: of a rank's stages, each alone.
        actions: of one pass through the schedule.
        steps: such passes, of accumulated batches.
        buffers: bytes that are kept for what is received from other stages.
    """
    spans = _spans(trace)
    level: Memory = dict(next(iter(trace.values())).level)
    level[ACTIVATIONS] = level.get(ACTIVATIONS, 0) + buffers
    moments: list[Moment] = []
    counts: dict[str, int] = {}
    for step in range(steps):
        done: set[tuple[int, str]] = set()
        for stage, what, number in [*actions, *((index, "R", None) for index in sorted({a[0] for a in actions}))]:
            for name in _traced(spans, stage, what, first=(stage, what) not in done and (step == 0 or what != "B")):
                span = spans[name]
                counts[name] = counts.get(name, 0) + 1
                moments.append(_moment(level, span, "" if number is None else f", microbatch {number}"))
                level = _after(level, span)
            done.add((stage, what))
    tail = spans.get("")
    if tail is not None:
        for name, seen in tail.regions:
            moments.append(Moment(name, _added(level, tail.before, seen.memory)))
    times = [(place, counts.get(seen.action, 1 if not seen.action else 0)) for place, seen in trace.items()]
    return moments, times


def _spans(trace: Trace) -> dict[str, _Span]:
    """Traced regions by action; those of none, behind the actions, under an empty name."""
    found: dict[str, _Span] = {}
    before: Mapping[str, int] = {}
    for place, seen in trace.items():
        if seen.action or place[0] != "start":
            known = found.get(seen.action) or _Span(before, ())
            found[seen.action] = _Span(known.before, (*known.regions, (place[0], seen)))
        before = seen.level
    return found


def _traced(spans: Mapping[str, _Span], stage: int, what: str, *, first: bool) -> Iterator[str]:
    """The traced actions that stand for one of the schedule."""
    number = 0 if first else 1
    if what == "R":
        if f"{stage}R" in spans:
            yield f"{stage}R"
        return
    name = f"{stage}{what}{number}"
    if name in spans:
        yield name
    elif what == "B":  # a backward pass that was traced in its two parts
        yield from (part for part in (f"{stage}I{number}", f"{stage}W{number}") if part in spans)
    elif what == "W" and f"{stage}B{number}" in spans:  # the first stage, whose inputs need no gradient
        yield f"{stage}B{number}"


def _moment(level: Memory, span: _Span, which: str) -> Moment:
    name, seen = max(span.regions, key=lambda item: sum(item[1].memory.values()))
    return Moment(f"{re.sub(' of stage [0-9]+$', '', name)}{which}", _added(level, span.before, seen.memory))


def _after(level: Memory, span: _Span) -> Memory:
    return _added(level, span.before, span.regions[-1][1].level)


def _added(level: Memory, before: Mapping[str, int], after: Mapping[str, int]) -> Memory:
    """A level with what has changed from `before` to `after`."""
    names = {*level, *before, *after}
    found = {name: level.get(name, 0) + after.get(name, 0) - before.get(name, 0) for name in sorted(names)}
    return {name: value for name, value in found.items() if value > 0}
