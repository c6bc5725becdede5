"""Replica groups of one run: a lighthouse where they meet, and the ranks of each group, here or in steps of a job.

A group is a world of its own, with its own rendezvous. When one of its ranks dies, the others are ended at once: with a
heartbeat and without all of its ranks, it would hold the other groups up. Then it is started again, and takes over the
state of a healthy group. The lighthouse is a thread of this process: it is there as long as the groups are.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from danling_conf.launch.rank_error import WorkersFailed, WorkersInterrupted
from danling_conf.launch.workers import POLL_SECONDS, Workers, signals_noted, threads
from danling_conf.records.membership import Event, changes_of, has_happened, members_of, note
from danling_conf.schema import RunnerConfig
from danling_conf.schema.fault_tolerance import LIGHTHOUSE_VARIABLE, FtConfig
from danling_conf.schema.files import FROZEN, error_file
from danling_conf.topology.machine import count_devices
from danling_conf.topology.rank_environment import FROZEN_VARIABLE, GROUP_VARIABLE
from danling_conf.topology.rendezvous import LOOPBACK, listen

_PAUSE_SECONDS = 10.0
"""Before a group is started again whose task is gone: the scheduler may not know yet what has happened."""
_LATE_SECONDS = 30.0
"""How long groups may still take to end when the run is complete; those that came too late then wait in vain."""
_DEVICES = "CUDA_VISIBLE_DEVICES"
"""Environment variable that names the accelerators of a process."""


class TaskGone(WorkersFailed):
    """What has watched the ranks of a group from nearby is gone without a word: a task of a scheduler's, or its node.

    Args:
        for_good: whether it cannot be started again.
    """

    def __init__(self, rank: int, message: str, log: Path, *, for_good: bool) -> None:
        # As if a signal had ended it: another start would not fail the same way.
        super().__init__(rank, -signal.SIGKILL, message, log)
        self.for_good = for_good


class Processes(Protocol):
    """The ranks of one group, wherever they run: `Workers`, or what watches them from afar."""

    @property
    def died(self) -> bool: ...

    def running(self) -> bool: ...

    def failure(self) -> WorkersFailed | WorkersInterrupted | None: ...

    def pass_on(self, number: int) -> None: ...

    def kill(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the groups of a command run: on this machine, if nothing else is said."""

    make: Callable[..., Processes] = Workers
    """Starts the ranks of a group; takes what `Workers` does."""
    address: str = LOOPBACK
    """Of this machine, at which the groups reach the lighthouse."""
    scheduled: bool = False
    """Whether a scheduler gives each group its cores and accelerators, and sends its signals to all of them."""


def run_groups(
    command: list[str], config: RunnerConfig, world_size: int, attempt: Path, place: Place | None = None
) -> None:
    """Run `command` as the ranks of `ft.group_size` replica groups, and wait for them.

    Args:
        command: starts a rank.
        world_size: ranks of one group.
        attempt: folder of the attempt, which holds its frozen configuration.
        place: where they run; None for this machine.

    Raises:
        WorkersFailed: no group is left that could go on, or the configuration is refused.
        WorkersInterrupted: a stop signal has reached this process or all groups, which have saved and left.
    """
    place = place or Place()
    with listen(place.address, 0) as free:
        port = free.getsockname()[1]
    groups = Groups(command, config.ft, world_size, attempt, place, lighthouse=f"http://{place.address}:{port}")
    with signals_noted() as received:
        try:
            groups.start()
            # While the ranks import torch, which the lighthouse's package imports too.
            lighthouse = _lighthouse(config.ft, f"{place.address}:{port}")
            try:
                groups.watch(received)
            finally:
                lighthouse.shutdown()
        finally:
            groups.kill()


def _lighthouse(section: FtConfig, bind: str) -> Any:
    # Before the import, which reads it: the lighthouse would say something of every quorum.
    os.environ.setdefault("RUST_LOG", "error")
    from torchft.coordination import LighthouseServer

    return LighthouseServer(
        bind=bind,
        min_replicas=section.min_replica_size,
        join_timeout_ms=1000 * section.join_timeout_seconds,
        heartbeat_timeout_ms=section.heartbeat_timeout_ms,
    )


class Groups:
    """The replica groups of an attempt.

    Args:
        command, world_size, attempt, place: see `run_groups`.
        lighthouse: its address.
    """

    def __init__(
        self, command: list[str], section: FtConfig, world_size: int, attempt: Path, place: Place, *, lighthouse: str
    ) -> None:
        self._section, self._attempt, self._place = section, attempt, place
        size = section.group_size
        environment = {FROZEN_VARIABLE: str(attempt / FROZEN), LIGHTHOUSE_VARIABLE: lighthouse}
        if not place.scheduled:
            environment |= threads(world_size * size)
        self._groups = [_Group(command, environment, index, size, world_size, attempt, place) for index in range(size)]
        self._failures: list[WorkersFailed | WorkersInterrupted] = []
        self._received: list[int] = []

    def start(self) -> None:
        """Start all groups."""
        for group in self._groups:
            group.start()

    def kill(self) -> None:
        """End all groups at once."""
        for group in self._groups:
            group.kill()

    def watch(self, received: list[int]) -> None:
        """Start groups that die again, and return when the run is complete. Raises as `run_groups`.

        Args:
            received: signals that this process receives, as they come.
        """
        self._received, passed, complete_since = received, 0, 0.0
        while any(group.runs or group.waits for group in self._groups):
            time.sleep(POLL_SECONDS)
            while passed < len(received):
                for group in self._groups:
                    group.pass_on(received[passed])
                passed += 1
            for group in self._groups:
                if group.runs and not group.running():
                    self._ended(group)
                elif group.waits and time.monotonic() >= group.again_at:
                    group.start()
            if received or (complete_since == 0 and self._complete):
                self._start_no_more()
            if complete_since == 0 and self._complete:
                complete_since = time.monotonic()
            if complete_since and time.monotonic() - complete_since > _LATE_SECONDS:
                self.kill()
        if received:
            raise WorkersInterrupted(received[0])
        if not self._complete:
            stopped = [error for error in self._failures if self._stops_all(error)]
            raise stopped[0] if stopped else self._failures[-1]  # of the group that could not go on

    def _start_no_more(self) -> None:
        for group in self._groups:
            group.waits = False

    @property
    def _complete(self) -> bool:
        return has_happened(self._attempt, Event.COMPLETE)

    def _stops_all(self, error: WorkersFailed | WorkersInterrupted) -> bool:
        """Whether what ended a group is a signal that the others get too."""
        return self._place.scheduled and isinstance(error, WorkersInterrupted)

    def _ended(self, group: _Group) -> None:
        """Start a group again that has died."""
        error = group.failure()
        if error is None:
            note(self._attempt, group.index, Event.LEFT)
            return
        if isinstance(error, WorkersFailed) and error.refused:
            self._failures = [error]
            self.kill()
            return
        self._failures.append(error)
        why = str(error).strip().splitlines()[0] if str(error).strip() else "no reason is known"
        note(self._attempt, group.index, Event.DIED, why=why)
        if self._received or self._complete or self._stops_all(error) or has_happened(self._attempt, Event.SHORT):
            return
        gone = isinstance(error, TaskGone)
        rank = f"rank {error.rank} " if isinstance(error, WorkersFailed) and not gone else ""
        said = f"group {group.index} died: {rank}{why}"
        began = has_happened(self._attempt, Event.JOINED)
        if not began and isinstance(error, WorkersFailed) and error.exit_code > 0:
            # It would fail again, as the others will: nothing has changed since.
            self.kill()
        elif began and not self._healthy():
            _say(f"{said}; no other group is left whose state it could take over")
            self.kill()
        elif isinstance(error, TaskGone) and error.for_good:
            note(self._attempt, group.index, Event.GIVEN_UP)
            _say(f"{said}; it is given up")
        elif group.starts > self._section.max_restarts:
            note(self._attempt, group.index, Event.GIVEN_UP)
            times = "once" if group.starts == 1 else f"{group.starts} times"
            _say(f"{said}; it was started {times}, and is given up (ft.max_restarts)")
        else:
            _say(f"{said}; starting it again ({group.starts} of {self._section.max_restarts})")
            group.start_in(_PAUSE_SECONDS if gone else 0.0)

    def _healthy(self) -> bool:
        """Whether a group is left that takes part, and could give its state to another."""
        members = {item.group: item for item in members_of(changes_of(self._attempt))}
        running = [group.index for group in self._groups if group.runs]
        return any(members[index].takes_part for index in running if index in members)


class _Group:
    """The ranks of one replica group."""

    def __init__(
        self,
        command: list[str],
        environment: dict[str, str],
        index: int,
        groups: int,
        world_size: int,
        attempt: Path,
        place: Place,
    ) -> None:
        self.index, self.starts, self.runs = index, 0, False
        self.waits, self.again_at = False, 0.0
        self._command, self._environment, self._groups = command, environment, groups
        self._world_size, self._attempt, self._place = world_size, attempt, place
        self._workers: Processes | None = None

    def start_in(self, seconds: float) -> None:
        """Start all ranks, or have them started after a while."""
        self.waits, self.again_at = seconds > 0, time.monotonic() + seconds
        if not self.waits:
            self.start()

    def start(self) -> None:
        """Start all ranks."""
        self.waits = False
        self.starts += 1
        first = self.index * self._world_size
        for rank in range(first, first + self._world_size):
            error_file(self._attempt, rank).unlink(missing_ok=True)
        note(self._attempt, self.index, Event.STARTED)
        own = {GROUP_VARIABLE: f"{self.index} {self._groups} {self.starts}"}
        if not self._place.scheduled:
            own |= share_of_devices(self.index, self._groups, self._world_size)
        self._workers = self._place.make(
            self._command, self._world_size, self._attempt, {**self._environment, **own}, numbered_from=first
        )
        self.runs = True

    def running(self) -> bool:
        """Whether a rank still runs. A group of which a rank was killed ends at once."""
        assert self._workers is not None
        self.runs = self._workers.running()
        if self.runs and self._workers.died:
            self.kill()
            self._workers.running()  # notices the ends
        return self.runs

    def failure(self) -> WorkersFailed | WorkersInterrupted | None:
        """What ended it; None where all of its ranks returned."""
        assert self._workers is not None
        return self._workers.failure()

    def pass_on(self, number: int) -> None:
        """Send a signal to all ranks."""
        if self.runs and self._workers is not None:
            self._workers.pass_on(number)

    def kill(self) -> None:
        """End all ranks at once."""
        if self._workers is not None:
            self._workers.kill()
        self.runs = self.waits = False


def share_of_devices(place: int, groups: int, world_size: int) -> dict[str, str]:
    """A variable with the accelerators of one of the groups on this machine; {} where it has not one for each rank."""
    given = os.environ.get(_DEVICES)
    count = count_devices(given)
    if count < groups * world_size:
        return {}
    names = given.split(",") if given else [str(number) for number in range(count)]
    return {_DEVICES: ",".join(names[place * world_size : (place + 1) * world_size])}


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
