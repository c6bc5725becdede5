"""Timeout of a collective: which ranks did not come, instead of an error of a library's socket."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from danling_conf.records.heartbeats import read_heartbeats
from danling_conf.records.run_directory import Attempt
from danling_conf.records.stopped import stop_is_noted
from danling_conf.runner.state import TrainState
from danling_conf.runner.world import World
from danling_conf.schema import RunnerConfig
from danling_conf.schema.files import write_whole
from danling_conf.topology.rank_environment import RankEnvironment

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")
_log = logging.getLogger(__name__)
_TIMED_OUT = re.compile(r"timed? ?out", re.IGNORECASE)
_LOST = re.compile(r"connection (closed|reset|refused)|broken pipe|connect(ion)? fail", re.IGNORECASE)
_GRACE_SECONDS = 3.0
"""How long a rank waits for the notes of others, whose limits end a little later."""
_POLL_SECONDS = 0.05


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where this rank was."""

    step: int = 0
    starting: bool = True
    """Whether the limit of the start still holds: until the first step is done."""
    waited_for: dict[str, Any] | None = None
    """The collective that the heartbeat saw it wait in; None without a heartbeat."""


class CollectiveTimedOut(RuntimeError):
    """Some ranks did not come to a collective within its time limit. The message names them."""


class Placed(Protocol):
    """An object of a run that knows where this rank is."""

    config: RunnerConfig
    world: World

    def place(self) -> Place: ...


Owner = TypeVar("Owner", bound=Placed)


def named(
    method: Callable[Concatenate[Owner, Arguments], Result],
) -> Callable[Concatenate[Owner, Arguments], Result]:
    """Decorate a method: where a collective in it times out, the error names the ranks that did not come."""

    @wraps(method)
    def called(owner: Owner, /, *arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
        try:
            return method(owner, *arguments, **options)
        except RuntimeError as error:
            explain(error, owner.world.attempt, owner.world.ranks, owner.config, owner.place())
            raise

    return called


def place_of(state: TrainState, waited_for: dict[str, Any] | None) -> Place:
    """Where the rank with this state is."""
    return Place(step=state.step, starting=not state.past_first_step, waited_for=waited_for)


def explain(error: RuntimeError, attempt: Attempt, ranks: RankEnvironment, config: RunnerConfig, place: Place) -> None:
    """Raise CollectiveTimedOut where `error` is that of a collective that timed out.

    Every rank that waited leaves a note in the attempt's folder; those without one did not come. Their last step is
    that of their heartbeat. The first rank that times out closes its connections: by its note, one that has only lost
    them knows why.
    """
    text = str(error)
    timed_out = bool(_TIMED_OUT.search(text))
    if ranks.world_size == 1 or isinstance(error, CollectiveTimedOut) or not (timed_out or _LOST.search(text)):
        return
    folder = attempt.directory if ranks.groups == 1 else attempt.directory / f"group-{ranks.group}.{ranks.starts}"
    note = {"rank": ranks.rank, "step": place.step, "time": time.time(), "collective": None, "timed_out": timed_out}
    try:
        folder.mkdir(exist_ok=True)
        write_whole(_note(folder, ranks.rank), json.dumps(note) + "\n")
    except OSError as fault:
        _log.warning("no note could be left for the other ranks: %s", fault)
    if not timed_out and not _another_timed_out(folder, ranks):
        return
    _log.error("a collective timed out: %s", text)
    notes = _notes_of(folder, ranks.world_size)
    limit = None if place.starting else config.comm.train_timeout_seconds
    setting = "comm.train_timeout_seconds" if limit else "comm.init_timeout_seconds"
    limit = limit or config.comm.init_timeout_seconds
    beats = _beats_of(attempt, config, ranks)
    # What failed is no longer under way; the heartbeat has seen it.
    notes[ranks.rank] = {**note, "collective": place.waited_for}
    text = message(notes, beats, ranks.world_size, limit=limit, setting=setting, now=time.time())
    raise CollectiveTimedOut(text) from None


def message(
    notes: dict[int, dict[str, Any]],
    beats: dict[int, dict[str, Any]],
    world_size: int,
    *,
    limit: int | None,
    setting: str,
    now: float,
) -> str:
    """Names the ranks that did not come, with the last that is known of each; and where those that came are.

    Args:
        notes: of the ranks that waited, by rank.
        beats: heartbeats, by rank; {} where none are written.
        limit: seconds after which the collective timed out, by `setting`; None for torch's own.
    """
    missing = [rank for rank in range(world_size) if rank not in notes]
    came = sorted(notes)
    within = f"within {limit} s ({setting})" if limit else f"within torch's own time limit ({setting} sets another)"
    steps = {notes[rank]["step"] for rank in came}
    where = f"step {steps.pop()}" if len(steps) == 1 else f"steps {min(steps)} to {max(steps)}"
    what = next((notes[rank]["collective"] for rank in came if notes[rank].get("collective")), None)
    lines = [f"{_name(what)} timed out: not all ranks came to it {within}"]
    lines += [f"  rank {rank} did not come: {_last_of(beats.get(rank), now)}" for rank in missing]
    if not missing:
        lines.append("  every rank was waiting: they wait in different collectives, or one came too late")
        held = {rank: notes[rank].get("collective") or beats.get(rank, {}).get("collective") for rank in came}
        lines += [f"  rank {rank} waited in {_name(each)}" for rank, each in held.items() if each]
    waited = "rank" if len(came) == 1 else "ranks"
    lines.append(f"  {waited} {', '.join(map(str, came))} waited, after {where}")
    if missing and not beats:
        lines.append("  heartbeat=default would say where a rank was last")
    elif missing:
        lines.append("  see what a rank that still runs does with: py-spy dump --pid PID, on its host")
    return "\n".join(lines)


def late(
    attempt: Attempt, config: RunnerConfig, ranks: RankEnvironment, collective: dict[str, Any], waited: float
) -> str:
    """Names the ranks that have not come to a collective that will time out soon, as far as heartbeats show."""
    beats = _beats_of(attempt, config, ranks)
    lines = [f"{_name(collective)} is waited for since {waited:.0f} s, and will time out"]
    for rank in range(ranks.world_size):
        beat = beats.get(rank)
        if beat is None or not beat["state"].startswith("waiting"):
            lines.append(f"  rank {rank} has not come: {_last_of(beat, time.time())}")
    return "\n".join(lines)


def _beats_of(attempt: Attempt, config: RunnerConfig, ranks: RankEnvironment) -> dict[int, dict[str, Any]]:
    """The heartbeats of this attempt's ranks, of one replica group, by their rank in it."""
    beats = read_heartbeats(attempt.run_directory, attempt.run_directory / config.heartbeat.dir_name)
    first = ranks.number - ranks.rank
    own = {rank - first: beat for rank, beat in beats.items() if beat["attempt"] == attempt.directory.name}
    return {rank: beat for rank, beat in own.items() if 0 <= rank < ranks.world_size}


def _name(collective: dict[str, Any] | None) -> str:
    if collective is None:
        return "a collective"
    return f"{collective['name']} number {collective['number']} of {collective['group']}"


def _last_of(beat: dict[str, Any] | None, now: float) -> str:
    if beat is None:
        return "nothing more is known of it"
    ago = now - beat["written"]
    silent = f", silent for {ago:.0f} s" if ago > 2 * beat["interval"] else ""
    total = f"/{beat['total_steps']}" if beat.get("total_steps") else ""
    return f"last at step {beat['step']}{total}, {beat['state']}, on {beat['host']}, pid {beat['pid']}{silent}"


def _another_timed_out(folder: Path, ranks: RankEnvironment) -> bool:
    """Whether the note of a rank says so within the grace period. Not where this rank is told to end meanwhile: another
    has failed by an error of its own."""
    deadline = time.monotonic() + _GRACE_SECONDS
    while not any(note["timed_out"] for note in _notes(folder, ranks.world_size).values()):
        if stop_is_noted() or time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def _notes_of(folder: Path, world_size: int) -> dict[int, dict[str, Any]]:
    """The notes of all ranks that write one within the grace period."""
    deadline = time.monotonic() + _GRACE_SECONDS
    while True:
        found = _notes(folder, world_size)
        if len(found) == world_size or time.monotonic() > deadline:
            return found
        time.sleep(_POLL_SECONDS)


def _notes(folder: Path, world_size: int) -> dict[int, dict[str, Any]]:
    """The notes that are there, by rank."""
    paths = {rank: _note(folder, rank) for rank in range(world_size)}
    return {rank: json.loads(path.read_text()) for rank, path in paths.items() if path.is_file()}


def _note(folder: Path, rank: int) -> Path:
    return folder / f"waited-rank-{rank}.json"
