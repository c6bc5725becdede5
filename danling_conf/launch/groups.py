"""Replica groups of one run on this machine: a lighthouse where they meet, and the ranks of each group.

A group is a world of its own, with its own rendezvous. When one of its ranks dies, the others are ended at once: with a
heartbeat and without all of its ranks, it would hold the other groups up. Then it is started again, and takes over the
state of a healthy group. The lighthouse is a thread of this process: it is there as long as the groups are.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from danling_conf.launch.parent import as_parent
from danling_conf.launch.workers import FROZEN_VARIABLE, WorkersFailed, WorkersInterrupted, first_failure, threads
from danling_conf.records.membership import Event, changes_of, has_happened, members_of, note
from danling_conf.records.stopped import STOPPING, is_stop, note_stop
from danling_conf.schema import RunnerConfig
from danling_conf.schema.fault_tolerance import LIGHTHOUSE_VARIABLE, FtConfig
from danling_conf.schema.files import FROZEN, error_file
from danling_conf.topology.machine import count_devices
from danling_conf.topology.rank_environment import GROUP_VARIABLE
from danling_conf.topology.rendezvous import LOOPBACK, listen

_POLL_SECONDS = 0.05
_LATE_SECONDS = 30.0
"""How long groups may still take to end when the run is complete; those that came too late then wait in vain."""
_RAISING_SECONDS = 3.0
_SAVING_SECONDS = 24 * 3600.0
_DEVICES = "CUDA_VISIBLE_DEVICES"


def run_groups(command: list[str], config: RunnerConfig, world_size: int, attempt: Path) -> None:
    """Run `command` as the ranks of `ft.group_size` replica groups, and wait for them.

    Args:
        command: starts a rank.
        world_size: ranks of one group.
        attempt: folder of the attempt, which holds its frozen configuration.

    Raises:
        WorkersFailed: no group is left that could go on, or the configuration is refused.
        WorkersInterrupted: this process received a stop signal, and the groups have saved and left.
    """
    # Before the import, which reads it: the lighthouse would say something of every quorum.
    os.environ.setdefault("RUST_LOG", "error")
    from torchft.coordination import LighthouseServer

    section = config.ft
    lighthouse = LighthouseServer(
        bind=f"{LOOPBACK}:0",
        min_replicas=section.min_replica_size,
        join_timeout_ms=1000 * section.join_timeout_seconds,
        heartbeat_timeout_ms=section.heartbeat_timeout_ms,
    )
    # It calls itself by the machine's name, which need not lead to the loopback interface.
    port = lighthouse.address().rpartition(":")[2]
    try:
        Groups(command, section, world_size, attempt, lighthouse=f"http://{LOOPBACK}:{port}").run()
    finally:
        lighthouse.shutdown()


class Groups:
    """The replica groups of an attempt.

    Args:
        command, world_size, attempt: see `run_groups`.
        lighthouse: its address.
    """

    def __init__(
        self, command: list[str], section: FtConfig, world_size: int, attempt: Path, *, lighthouse: str
    ) -> None:
        self._section, self._attempt = section, attempt
        environment = {
            FROZEN_VARIABLE: str(attempt / FROZEN),
            LIGHTHOUSE_VARIABLE: lighthouse,
            **as_parent(),
            **threads(world_size * section.group_size),
        }
        size = section.group_size
        self._groups = [_Group(command, environment, index, size, world_size, attempt) for index in range(size)]
        self._signals: list[int] = []
        self._failures: list[WorkersFailed | WorkersInterrupted] = []

    def run(self) -> None:
        """Start the groups, start those that die again, and return when the run is complete. Raises as
        `run_groups`."""
        handlers = {name: signal.getsignal(getattr(signal, name)) for name in STOPPING}
        for name in STOPPING:
            signal.signal(getattr(signal, name), lambda number, frame: self._signals.append(number))
        try:
            for group in self._groups:
                group.start()
            self._watch()
        finally:
            for group in self._groups:
                group.kill()
            for name, handler in handlers.items():
                signal.signal(getattr(signal, name), handler)

    def _watch(self) -> None:
        passed_on, complete_since = 0, 0.0
        while any(group.runs for group in self._groups):
            time.sleep(_POLL_SECONDS)
            while passed_on < len(self._signals):
                note_stop()
                for group in self._groups:
                    group.send(self._signals[passed_on])
                passed_on += 1
            for group in self._groups:
                if group.runs:
                    self._look_at(group)
            if complete_since == 0 and self._complete:
                complete_since = time.monotonic()
            if complete_since and time.monotonic() - complete_since > _LATE_SECONDS:
                for group in self._groups:
                    group.kill()
        if self._signals:
            raise WorkersInterrupted(self._signals[0])
        if not self._complete:
            raise self._failures[0]

    @property
    def _complete(self) -> bool:
        return has_happened(self._attempt, Event.COMPLETE)

    def _look_at(self, group: _Group) -> None:
        """Start a group again that has died."""
        error = group.ended()
        if group.runs:
            return
        if error is None:
            note(self._attempt, group.index, Event.LEFT)
            return
        if isinstance(error, WorkersFailed) and error.refused:
            self._failures = [error]
            for other in self._groups:
                other.kill()
            return
        self._failures.append(error)
        why = str(error).strip().splitlines()[0] if str(error).strip() else "no reason is known"
        note(self._attempt, group.index, Event.DIED, why=why)
        if self._signals or self._complete or has_happened(self._attempt, Event.SHORT):
            return
        rank = f"rank {error.rank} " if isinstance(error, WorkersFailed) else ""
        said = f"group {group.index} died: {rank}{why}"
        began = has_happened(self._attempt, Event.JOINED)
        if not began and isinstance(error, WorkersFailed) and error.exit_code > 0:
            # It would fail again, as the others will: nothing has changed since.
            self._give_up()
        elif began and not self._healthy():
            _say(f"{said}; no other group is left whose state it could take over")
            self._give_up()
        elif group.starts > self._section.max_restarts:
            note(self._attempt, group.index, Event.GIVEN_UP)
            _say(f"{said}; it was started {group.starts} times, and is given up (ft.max_restarts)")
        else:
            _say(f"{said}; starting it again ({group.starts} of {self._section.max_restarts})")
            group.start()

    def _healthy(self) -> bool:
        """Whether a group is left that takes part, and could give its state to another."""
        members = {item.group: item for item in members_of(changes_of(self._attempt))}
        running = [group.index for group in self._groups if group.runs]
        return any(members[index].takes_part for index in running if index in members)

    def _give_up(self) -> None:
        for group in self._groups:
            group.kill()


class _Group:
    """The ranks of one replica group."""

    def __init__(
        self, command: list[str], environment: dict[str, str], index: int, groups: int, world_size: int, attempt: Path
    ) -> None:
        self.index, self.starts = index, 0
        self._command, self._environment, self._groups = command, environment, groups
        self._world_size, self._attempt = world_size, attempt
        self._ranks: list[subprocess.Popen[bytes]] = []
        self._store: Any = None
        self._failed_at = 0.0

    @property
    def runs(self) -> bool:
        return bool(self._ranks)

    def number(self, rank: int) -> int:
        """Index of a rank among those of all groups."""
        return self.index * self._world_size + rank

    def start(self) -> None:
        """Start all ranks, with a store of their own to meet at."""
        from torch.distributed import TCPStore

        listening = listen(LOOPBACK, 0)
        port = listening.getsockname()[1]
        self._store = TCPStore(
            LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
        )
        self.starts += 1
        self._failed_at = 0.0
        note(self._attempt, self.index, Event.STARTED)
        for rank in range(self._world_size):
            failure = error_file(self._attempt, self.number(rank))
            failure.unlink(missing_ok=True)
            own = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": self._world_size,
                "LOCAL_WORLD_SIZE": self._world_size,
                "MASTER_ADDR": LOOPBACK,
                "MASTER_PORT": port,
                # As torch elastic sets them for its ranks: the store is served by who started them.
                "TORCHELASTIC_RUN_ID": f"{self._attempt.name}-{self.index}",
                "TORCHELASTIC_RESTART_COUNT": self.starts - 1,
                "TORCHELASTIC_USE_AGENT_STORE": True,
                "TORCHELASTIC_ERROR_FILE": failure,
                GROUP_VARIABLE: f"{self.index} {self._groups} {self.starts}",
                **self._devices(),
            }
            environment = {**os.environ, **self._environment, **{name: str(value) for name, value in own.items()}}
            # A session of their own: Ctrl-C in the terminal reaches them once, through this process.
            self._ranks.append(subprocess.Popen(self._command, env=environment, start_new_session=True))

    def _devices(self) -> dict[str, str]:
        """The accelerators of this group, where the machine has any."""
        given = os.environ.get(_DEVICES)
        count = count_devices(given)
        if count < self._groups * self._world_size:
            return {}
        names = given.split(",") if given else [str(number) for number in range(count)]
        return {_DEVICES: ",".join(names[self.number(0) : self.number(self._world_size)])}

    def send(self, number: int) -> None:
        """Send a signal to all ranks."""
        for process in self._ranks:
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    process.send_signal(number)

    def kill(self) -> None:
        """End all ranks at once."""
        self.send(signal.SIGKILL)
        for process in self._ranks:
            process.wait()
        self._ranks, self._store = [], None

    def ended(self) -> WorkersFailed | WorkersInterrupted | None:
        """Look whether the group has ended. Where a rank has failed, the others are ended with it.

        Returns:
            The error of the rank that failed first; None where none has. `runs` says whether the group still runs.
        """
        codes = [process.poll() for process in self._ranks]
        if all(code == 0 for code in codes):
            self.kill()
            return None
        bad = {rank: code for rank, code in enumerate(codes) if code}
        if not bad or (None in codes and time.monotonic() < self._deadline(list(bad.values()))):
            return None
        failures = {self.number(rank): _failure(self._attempt, self.number(rank), code) for rank, code in bad.items()}
        self.kill()
        return first_failure(failures, self._attempt)

    def _deadline(self, codes: list[int]) -> float:
        """Until when the other ranks may end by themselves: those of a rank that saved and left are doing the same, and
        those of one that raised an exception may have raised it too."""
        self._failed_at = self._failed_at or time.monotonic()
        if any(code < 0 for code in codes):
            return 0.0
        return self._failed_at + (_SAVING_SECONDS if all(map(is_stop, codes)) else _RAISING_SECONDS)


def _failure(attempt: Path, number: int, code: int) -> Any:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    file = error_file(attempt, number)
    try:
        return ProcessFailure(local_rank=number, pid=0, exitcode=code, error_file=str(file))
    except (OSError, ValueError, KeyError, TypeError):  # it was killed while it wrote the file
        file.unlink(missing_ok=True)
        return ProcessFailure(local_rank=number, pid=0, exitcode=code, error_file=str(file))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
