"""Ranks of a run, seen through their heartbeats: which one is slowest, and which ones are stuck."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from danling_conf.records.heartbeats import heartbeat_folder, heartbeat_settings, read_heartbeats
from danling_conf.records.membership import Member, changes_of, members_of
from danling_conf.records.run_directory import newest_attempt
from danling_conf.records.state import RunState, is_silent, state_of
from danling_conf.records.status import Status

GONE_WITH_GROUP = "gone with its group"
"""State of a rank whose replica group has died, and has not begun to train again."""
CLEAR_SHARE = 0.15
"""The slowest rank waits less than every other, by at least this share of its time."""


@dataclass(frozen=True, kw_only=True)
class RankSeen:
    """One rank, from its newest heartbeat."""

    rank: int
    host: str
    pid: int
    step: int
    total_steps: int | None
    epoch: int
    state: str
    state_seconds: float
    """How long it has been in that state."""
    step_seconds_ago: float | None
    """Since its last optimizer step; None before the first."""
    memory_bytes: int
    waiting_share: float | None
    """Share of the time since the previous heartbeat spent waiting for other ranks; None where it is not known."""
    written_seconds_ago: float
    stuck: str
    """Why it counts as stuck; "" where it does not."""


@dataclass(frozen=True, kw_only=True)
class RunSeen:
    """The ranks of a run's newest attempt."""

    run: str
    attempt: str | None
    status: Status
    """State of the run, see `state_of`."""
    error: str | None
    """Why it ended as it did."""
    world_size: int
    ranks: list[RankSeen]
    missing: list[int]
    """Ranks that have not written a heartbeat."""
    slowest: int | None
    """The rank that the others wait for, since it is steps behind or waits least; None where none stands out."""
    stuck: list[int]
    note: str
    """Why there are no heartbeats; "" where there are."""
    groups: list[Member] = field(default_factory=list)
    """Its replica groups, if it has any."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def look_at(run: Path, now: float | None = None, state: RunState | None = None) -> RunSeen:
    """The ranks of a run as they are now.

    Args:
        now: seconds since 1970; the present when None.
        state: state of the run; `state_of(run)` when None.
    """
    now = time.time() if now is None else now
    state = state or state_of(run, now)
    attempt = newest_attempt(run)
    beats = read_heartbeats(run, heartbeat_folder(run))
    if attempt is not None:
        beats = {rank: beat for rank, beat in beats.items() if beat["attempt"] == attempt.name}
    world = next((int(beat["world_size"]) for beat in beats.values()), 0)
    live = state.status is Status.RUNNING
    groups = [] if attempt is None else members_of(changes_of(attempt))
    away = {member.group: member.since for member in groups if not member.takes_part}
    # The last words of a replica group's start that has ended: nobody waits for it.
    gone = {rank for rank, beat in beats.items() if beat["written"] <= away.get(_group_of(beat), -math.inf)}
    present = {rank: beat for rank, beat in beats.items() if rank not in gone}
    peers = _Peers.of(present)
    ranks = [_rank(beat, now, peers, live=live and rank not in gone) for rank, beat in beats.items()]
    ranks = [replace(each, state=GONE_WITH_GROUP) if live and each.rank in gone else each for each in ranks]
    missing = [rank for rank in range(world) if rank not in beats]
    stuck = [each.rank for each in ranks if each.stuck] + (missing if live else [])
    note = ""
    if not beats:
        enabled = heartbeat_settings(run).flag("enabled")
        note = "no heartbeat yet" if enabled else "no heartbeats: heartbeat=default writes them"
    return RunSeen(
        run=str(run),
        attempt=None if attempt is None else attempt.name,
        status=state.status,
        error=state.error,
        world_size=world,
        ranks=ranks,
        missing=missing,
        slowest=_slowest(present) if live else None,
        stuck=sorted(stuck),
        note=note,
        groups=groups,
    )


def _group_of(beat: dict[str, Any]) -> int:
    """The replica group of a rank; 0 without."""
    group = beat.get("group")
    return group if isinstance(group, int) else 0


@dataclass(frozen=True)
class _Peers:
    """What a rank is judged by, gathered once: per rank it would be quadratic in the world size."""

    count: int
    lowest_step: int
    waiting: int
    """Ranks that wait for peers."""
    longest_wait: float

    @classmethod
    def of(cls, beats: dict[int, dict[str, Any]]) -> _Peers:
        waits = [beat["written"] - beat["state_since"] for beat in beats.values() if _waits(beat)]
        lowest = min((beat["step"] for beat in beats.values()), default=0)
        return cls(len(beats), lowest, len(waits), max(waits, default=0.0))


def _waits(beat: dict[str, Any]) -> bool:
    return bool(beat["state"].startswith("waiting"))


def _rank(beat: dict[str, Any], now: float, peers: _Peers, *, live: bool) -> RankSeen:
    last = beat["last_step_time"]
    return RankSeen(
        rank=beat["rank"],
        host=beat["host"],
        pid=beat["pid"],
        step=beat["step"],
        total_steps=beat.get("total_steps"),
        epoch=beat["epoch"],
        state=beat["state"],
        state_seconds=max(0.0, beat["written"] - beat["state_since"]),
        step_seconds_ago=None if last is None else max(0.0, now - last),
        memory_bytes=beat["memory_bytes"],
        waiting_share=beat.get("waiting_share"),
        written_seconds_ago=max(0.0, now - beat["written"]),
        stuck=_stuck(beat, now, peers) if live else "",
    )


def _stuck(beat: dict[str, Any], now: float, peers: _Peers) -> str:
    """Why a rank counts as stuck: it is silent, or it is behind and busy while others wait for it. "" otherwise."""
    if is_silent(beat, now):
        return "" if beat["state"] == "stopping" else f"silent for {now - beat['written']:.0f} s: stopped, or gone"
    # A rank that is busy is none of those that wait, and none is behind one that is at the lowest step.
    behind = peers.count > 1 and beat["step"] == peers.lowest_step
    patience = max(10.0, 2 * beat["interval"])
    if behind and peers.waiting and not _waits(beat) and peers.longest_wait > patience:
        ranks = f"{peers.waiting} rank{'' if peers.waiting == 1 else 's'}"
        return f"{ranks} have waited for it for {peers.longest_wait:.0f} s"
    return ""


def _slowest(beats: dict[int, dict[str, Any]]) -> int | None:
    """The rank that holds the others up; None where none stands out.

    In this order: one that is more than a step behind, one that is busy while all others wait, one that waits clearly
    least.
    """
    if len(beats) < 2:
        return None
    every = list(beats.values())
    last = min(every, key=lambda beat: (beat["step"], beat["rank"]))
    # Ranks in step may differ by one, and an older heartbeat proves nothing: its rank may have moved on since.
    ahead = [beat for beat in every if beat["step"] > last["step"] + 1 and beat["written"] <= last["written"]]
    if ahead:
        return int(last["rank"])
    busy = [beat for beat in every if not _waits(beat)]
    if len(busy) == 1:
        return int(busy[0]["rank"])
    shares = sorted((beat["waiting_share"], beat["rank"]) for beat in every if beat.get("waiting_share") is not None)
    if len(shares) == len(every) and shares[1][0] - shares[0][0] >= CLEAR_SHARE:
        return int(shares[0][1])
    return None
