"""Membership of a run's replica groups: JSON lines in the attempt's folder, a line an event.

The command that starts groups appends when one is started, dies or is given up; a group appends when it joins, heals or
leaves. So it is known at any time which groups take part, and what a fault has cost.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path

from danling_conf.records.reading import is_moment, warn_of_damage
from danling_conf.schema.files import MEMBERSHIP, Damaged, no_links, parse_object, read_regular


class Event(str, Enum):
    """What happened to a replica group."""

    STARTED = "started"
    JOINED = "joined"
    """It takes part: from the first step on, or from that of another group, whose state it has taken over."""
    REFUSED = "refused"
    """It has refused a step, which is repeated."""
    DIED = "died"
    GIVEN_UP = "given up"
    """It has died more often than `ft.max_restarts` allows."""
    SHORT = "short"
    """There were too few groups for too long: it has left."""
    TRAINED = "trained"
    """It has done the last step of the run."""
    COMPLETE = "complete"
    """The run is saved and complete: whoever comes now comes too late."""
    LEFT = "left"

    def __str__(self) -> str:
        return self.value


TAKES_PART = "takes part"
"""State of a group that trains with the others."""
_EVENTS = {str(event): event for event in Event}
_TAKE_PART = (Event.JOINED, Event.REFUSED, Event.TRAINED, Event.COMPLETE)
GONE = (Event.DIED, Event.GIVEN_UP, Event.SHORT, Event.LEFT)
"""After these a group does not take part."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """A line."""

    time: float
    group: int
    event: Event
    step: int | None = None
    """Optimizer steps done by then, where the writer knows."""
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class Member:
    """One group, as its events tell."""

    group: int
    state: str
    """`takes part`, `starting`, or how it went."""
    since: float
    starts: int
    refused: int
    """Steps that it has refused."""
    why: str

    @property
    def takes_part(self) -> bool:
        return self.state == TAKES_PART


def note(attempt: Path, group: int, event: Event, *, step: int | None = None, why: str = "") -> None:
    """Append an event to the attempt's file. Raises OSError."""
    line = asdict(Change(time=time.time(), group=group, event=event, step=step, why=why))
    content = json.dumps({**line, "event": str(event)}).encode() + b"\n"
    # One write to a descriptor that appends: lines of several processes do not mix.
    with open(attempt / MEMBERSHIP, "ab", buffering=0, opener=no_links) as file:
        file.write(content)


def changes_of(attempt: Path) -> list[Change]:
    """The events of an attempt, in their order; none for one without replica groups. Lines that cannot be read are left
    out, with a warning."""
    changes, damage = _read(attempt)
    if damage is not None:
        warn_of_damage(attempt / MEMBERSHIP, damage)
    return changes


def _read(attempt: Path) -> tuple[list[Change], str | None]:
    """The events, and what is wrong with the file."""
    try:
        lines = read_regular(attempt / MEMBERSHIP, limit=None).splitlines(keepends=True)
    except Damaged as damage:
        return [], damage.reason
    except OSError:
        return [], None
    found = [_parsed(line) for line in lines]
    # The last one may be about to be written.
    damaged = sum(item is None and line.endswith(b"\n") for item, line in zip(found, lines, strict=True))
    reason = f"{damaged} of {len(lines)} lines cannot be read, and are left out" if damaged else None
    return [item for item in found if item is not None], reason


def _parsed(line: bytes) -> Change | None:
    try:
        found = parse_object(line)
    except ValueError:
        return None
    group, step, event = found.get("group"), found.get("step"), _EVENTS.get(str(found.get("event")))
    if event is None or not isinstance(group, int) or not 0 <= group < 1 << 20 or not is_moment(found.get("time")):
        return None
    return Change(
        time=found["time"],
        group=group,
        event=event,
        step=step if isinstance(step, int) else None,
        why=str(found.get("why", "")),
    )


def has_happened(attempt: Path, *events: Event) -> bool:
    """Whether any group has noted one of these events."""
    # The command asks several times a second: what is wrong with the file is not said here.
    return os.path.exists(attempt / MEMBERSHIP) and any(item.event in events for item in _read(attempt)[0])


def members_of(changes: list[Change]) -> list[Member]:
    """The groups of an attempt, by their number."""
    found: dict[int, list[Change]] = {}
    for item in changes:
        found.setdefault(item.group, []).append(item)
    return [_member(group, items) for group, items in sorted(found.items())]


def _member(group: int, items: list[Change]) -> Member:
    last = items[-1]
    state = TAKES_PART if last.event in _TAKE_PART else "starting" if last.event is Event.STARTED else str(last.event)
    begun = next((item.time for item in items if item.event is Event.JOINED), last.time)
    died = [item for item in items if item.event in GONE]
    since = last.time
    if state == TAKES_PART:
        joined = [item.time for item in items if item.event is Event.JOINED]
        since = joined[-1] if joined else begun
    return Member(
        group=group,
        state=state,
        since=since,
        starts=sum(item.event is Event.STARTED for item in items),
        refused=sum(item.event is Event.REFUSED for item in items),
        why=died[-1].why if died else "",
    )
