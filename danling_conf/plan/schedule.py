"""Order of a pipeline's schedule: a step of a rank, put together of what its stages do with single microbatches.

How many microbatches are in flight, and so how many activations are kept, is up to the schedule. It is asked for its
own order of actions; each action is replaced by what the traced one of its kind added to memory and gave back.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from danling_conf.plan.extend import Place, Seen, Trace
from danling_conf.plan.figures import ACTIVATIONS, GRADIENTS, Moment

Action = tuple[int, str, "int | None"]
"""Stage, what, and microbatch."""

Memory = dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Passed:
    """What the stages of a rank pass to others, and how long torch keeps it.

    A traced action ends without what it passes on: an output is let go of behind the backward pass of its microbatch,
    the gradient of an input behind `B` or `W`.

    Attributes:
        size: bytes of what is passed on for one microbatch.
        buffers: bytes for what is received, of all microbatches. A stage of the same rank puts its own tensor into such
            a buffer's place.
        forward: stages whose outputs are sent to another rank.
        backward: stages whose inputs' gradients are.
        handed_forward: stages whose outputs go to a stage of this rank.
        handed_backward: the same of gradients.
        waits: what a schedule waits for before the end of a pass: `sends` (each, behind the next action), `outputs`, or
            nothing.
    """

    size: int = 0
    buffers: int = 0
    forward: frozenset[int] = frozenset()
    backward: frozenset[int] = frozenset()
    handed_forward: frozenset[int] = frozenset()
    handed_backward: frozenset[int] = frozenset()
    waits: str = ""

    def sent_after(self, stage: int, what: str, *, first: bool) -> int:
        """Bytes more, from an action to the end of the pass, since they are being sent."""
        if what not in _MAKE_GRADIENTS:
            return 0
        gradient = stage in self.backward and (first or self.waits != "sends")
        return self.size * (gradient + (stage in self.forward and not self.waits))

    def handed_after(self, stage: int, what: str) -> int:
        """Bytes more, or less, behind an action, since a stage of this rank has its result."""
        found = 0
        if stage in self.handed_forward:
            found += {"F": -1, "B": 1, "W": 1}.get(what, 0)
        if stage in self.handed_backward:
            found += {"I": -1, "W": 1}.get(what, 0)
        return found * self.size


_MAKE_GRADIENTS = ("B", "W")


@dataclass(frozen=True)
class _Span:
    """The regions of one traced action."""

    before: Mapping[str, int]
    """Memory where it began."""
    regions: tuple[tuple[str, Seen], ...]


def in_order(
    trace: Trace, actions: Sequence[Action], *, steps: int, passed: Passed
) -> tuple[list[Moment], list[tuple[Place, int]]]:
    """The time line of an optimizer step, and how often each traced region is run in it.

    Args:
        trace: of a rank's stages, each alone.
        actions: of one pass through the schedule.
        steps: such passes, of accumulated batches.
        passed: what the stages pass on.
    """
    spans = _spans(trace)
    level: Memory = dict(next(iter(trace.values())).level)
    level[ACTIVATIONS] = level.get(ACTIVATIONS, 0) + passed.buffers
    moments: list[Moment] = []
    counts: dict[str, int] = {}
    reduced: int | None = None
    for step in range(steps):
        done: set[tuple[int, str]] = set()
        kept = 0
        for stage, what, number in actions:
            first = (stage, what) not in done
            if what in _MAKE_GRADIENTS:
                # Gradients that FSDP has reduced are made anew in the next pass; others are added to.
                first = not any((stage, other) in done for other in _MAKE_GRADIENTS)
                first = first and (step == 0 or _frees_gradients(spans.get(f"{stage}R")))
            name = _traced(spans, stage, what, first=first)
            if name is not None:
                span = spans[name]
                counts[name] = counts.get(name, 0) + 1
                moments.append(_moment(level, span, "" if number is None else f", microbatch {number}"))
                level = _after(level, span)
            sent = passed.sent_after(stage, what, first=(stage, what) not in done)
            level[ACTIVATIONS] = level.get(ACTIVATIONS, 0) + sent + passed.handed_after(stage, what)
            kept += sent
            done.add((stage, what))
        level[ACTIVATIONS] -= kept
        # Later passes add to the reduced gradients of the first one.
        reduced = level.get(GRADIENTS, 0) if reduced is None else reduced
        level[GRADIENTS] = reduced
    tail = spans.get("")
    if tail is not None:
        for name, seen in tail.regions:
            moments.append(Moment(name, _added(level, tail.before, seen.memory)))
    times = [(place, counts.get(seen.action, 1 if not seen.action else 0)) for place, seen in trace.items()]
    return moments, times


def _frees_gradients(reduction: _Span | None) -> bool:
    """Whether a reduction leaves a share of the gradients: half at most, where there are several ranks."""
    if reduction is None:
        return False
    return reduction.regions[-1][1].level.get(GRADIENTS, 0) < 0.75 * reduction.before.get(GRADIENTS, 0)


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


def _traced(spans: Mapping[str, _Span], stage: int, what: str, *, first: bool) -> str | None:
    """The traced action that stands for one of the schedule."""
    name = f"{stage}R" if what == "R" else f"{stage}{what}{0 if first else 1}"
    if name not in spans and what == "W":  # the first stage, whose inputs need no gradient
        name = f"{stage}B{0 if first else 1}"
    return name if name in spans else None


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
