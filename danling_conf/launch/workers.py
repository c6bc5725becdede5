"""Workers: the ranks of a run on this machine, started, watched and ended together.

Each has its own log. When several fail, the earliest error is shown, since the others follow from it. The process that
watches them imports no torch: its import takes as long as that of a rank, and no rank would start before.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from danling_conf.launch.forked import (
    ForkedRank,
    NotForkedError,
    RankStart,
    WarmEndedError,
    WarmProcess,
    can_fork,
)
from danling_conf.launch.parent import as_parent
from danling_conf.launch.rank_error import (
    ERROR_VARIABLE,
    WorkersFailed,
    WorkersInterrupted,
    made_room,
    remove_room,
    written_error,
)
from danling_conf.launch.store import SERVED_VARIABLE
from danling_conf.records.logs import log_descriptor, rank_log
from danling_conf.records.status import (
    EXIT_FAILED,
    Status,
    signal_of_exit_code,
    written_status,
)
from danling_conf.records.stopped import STOPPING, is_stop, note_stop
from danling_conf.schema.files import error_file
from danling_conf.topology.rank_environment import FROZEN_VARIABLE
from danling_conf.topology.rendezvous import LOOPBACK, listen

_PASSED_ON = (*STOPPING, "SIGHUP", "SIGQUIT")
"""Signals that the ranks get too. They are in sessions of their own, out of reach of the terminal's Ctrl-C."""
POLL_SECONDS = 0.05
_GRACE_SECONDS = 30.0
"""How long ranks may take to end once another has failed, or after a second signal."""
_NOTICED_SECONDS = 0.5
"""How long before it is noticed a rank may have died: other ranks record the loss within milliseconds."""


@dataclass
class _Rank:
    """One process, and when its end was noticed, in seconds since 1970."""

    process: subprocess.Popen[bytes] | ForkedRank
    error: Path
    room: IO[bytes] | None
    """Where the error stands that could not be written as a file."""
    ended_at: float = math.inf
    told: bool = False
    """Whether it was told to end, since another rank had failed or by a signal of the user's."""


class Workers:
    """The ranks of one world on this machine, as processes.

    Several are forked from one process that has imported torch, where that is safe (`launch.forked`).

    Args:
        command: argv of every rank, as of `worker_command`.
        world_size: how many.
        attempt: directory of their logs and errors.
        environment: further variables of every rank.
        numbered_from: number of rank 0 in the names of logs and errors, of worlds that share a directory.
    """

    def __init__(
        self,
        command: Sequence[str],
        world_size: int,
        attempt: Path,
        environment: Mapping[str, str],
        *,
        numbered_from: int = 0,
    ) -> None:
        self._command, self._attempt, self._numbered_from = command, attempt, numbered_from
        self._ranks: list[_Rank] = []
        self._rooms: list[IO[bytes] | None] = []
        self._warm: WarmProcess | None = None
        self._not_begun: WorkersFailed | WorkersInterrupted | None = None
        self._end_at = self._kill_at = math.inf
        with ExitStack() as opened:
            # Rank 0 serves the store at a socket that listens already: nobody else can take the port, and ranks that
            # are earlier than rank 0 wait in its queue.
            listening = opened.enter_context(listen(LOOPBACK, 0))
            self._common = {
                **os.environ, **as_parent(), **threads(world_size), **environment,
                "MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(listening.getsockname()[1]),
                "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "GROUP_RANK": "0",
                # As torchrun says that every rank, the first too, is a client of the store.
                "TORCHELASTIC_RUN_ID": attempt.name, "TORCHELASTIC_RESTART_COUNT": "0",
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "TORCH_NCCL_ASYNC_ERROR_HANDLING": os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
            }  # fmt: skip
            self._starts = [self._start(rank, listening.fileno(), opened) for rank in range(world_size)]
            if world_size > 1 and can_fork():
                self._warm = WarmProcess(command, self._common, self._starts)
            else:
                self._start_each()
            self._opened = opened.pop_all()
        if self._warm is None:
            self._opened.close()

    def _start(self, rank: int, listening: int, opened: ExitStack) -> RankStart:
        """What a rank is started with."""
        error = error_file(self._attempt, self._numbered_from + rank)
        self._rooms.append(made_room(error))
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), ERROR_VARIABLE: str(error)}
        if rank == 0:
            return RankStart(
                environment={**own, SERVED_VARIABLE: str(listening)}, output=None, passed=listening, error=error
            )
        output = log_descriptor(rank_log(self._attempt, self._numbered_from + rank))
        opened.callback(os.close, output)
        return RankStart(environment=own, output=output, passed=None, error=error)

    def _start_each(self) -> None:
        """Start every rank as a process of its own."""
        for start, room in zip(self._starts, self._rooms, strict=True):
            try:
                process = subprocess.Popen(
                    self._command,
                    env={**self._common, **start.environment},
                    stdout=start.output,
                    stderr=start.output,
                    pass_fds=() if start.passed is None else (start.passed,),
                    start_new_session=True,
                )
            except BaseException:
                self.kill()
                raise
            self._ranks.append(_Rank(process, start.error, room))

    def _begun(self, warm: WarmProcess) -> bool:
        """Whether the ranks have been forked, or have failed to be."""
        try:
            forked = warm.forked()
        except NotForkedError as error:
            self._warm = None
            print(f"ranks are started one by one, which takes longer: {error}", file=sys.stderr, flush=True)
            self._start_each()
        except WarmEndedError as error:
            self._not_begun = self._failed(0, EXIT_FAILED, str(error), Status.FAILED)
        else:
            if forked is None:
                return False
            begun = zip(forked, self._starts, self._rooms, strict=True)
            self._ranks = [_Rank(rank, start.error, room) for rank, start, room in begun]
        self._warm = None
        self._opened.close()
        return True

    def _failed(self, rank: int, code: int, message: str, status: Status) -> WorkersFailed:
        number = self._numbered_from + rank
        return WorkersFailed(number, code, message, rank_log(self._attempt, number), status)

    def running(self) -> bool:
        """Whether a rank still runs. Ends the others where one has failed; to be called again and again."""
        if self._warm is not None and not self._begun(self._warm):
            return True
        now = time.time()
        for rank in self._ranks:
            code = rank.process.poll()
            if rank.ended_at == math.inf and code is not None:
                rank.ended_at = now
                self._note_end(code, now)
        alive = self._alive()
        if alive and now >= self._end_at:
            self._end_at, self._kill_at = math.inf, min(self._kill_at, now + _GRACE_SECONDS)
            for rank in alive:
                rank.told = True
                _send(rank.process, signal.SIGTERM)
        if alive and now >= self._kill_at:
            self.kill()
        return bool(alive)

    @property
    def died(self) -> bool:
        """Whether a signal has ended a rank."""
        return any((rank.process.returncode or 0) < 0 for rank in self._ranks)

    def pass_on(self, number: int) -> None:
        """Send a signal to every rank. Told once they save, which may take long; told again they leave."""
        if self._warm is not None:
            self.kill()
            self._not_begun = WorkersInterrupted(number)
        if any(rank.told for rank in self._ranks):
            self._kill_at = min(self._kill_at, time.time() + _GRACE_SECONDS)
        for rank in self._alive():
            rank.told = True
            _send(rank.process, number)

    def kill(self) -> None:
        """Kill every rank, with the processes that it has started."""
        if self._warm is not None:
            self._warm.kill()
            self._warm = None
            self._opened.close()
            self._not_begun = self._failed(0, EXIT_FAILED, "ended before it began", Status.FAILED)
        for rank in self._alive():
            try:
                os.killpg(rank.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue  # it has just ended
            rank.process.wait()

    def failure(self) -> WorkersFailed | WorkersInterrupted | None:
        """What ended ranks that have not ended well: the error of the first. None where all returned."""
        try:
            return self._first_failure()
        finally:
            for start, room in zip(self._starts, self._rooms, strict=True):
                if room is not None:
                    remove_room(start.error, room)
            self._rooms = [None] * len(self._starts)

    def _first_failure(self) -> WorkersFailed | WorkersInterrupted | None:
        if self._not_begun is not None:
            return self._not_begun
        found = [
            (_when(rank), number, rank.process.returncode)
            for number, rank in enumerate(self._ranks)
            if rank.process.returncode
        ]
        if not found:
            return None
        _, number, code = min(found)
        if is_stop(code):  # a rank received the signal, and all ranks stopped together
            return WorkersInterrupted(signal_of_exit_code(code))
        written = written_error(self._ranks[number].error, self._ranks[number].room)
        status = written_status(written.text("status")) or Status.FAILED
        return self._failed(number, code, _message(written, code, status), status)

    def _alive(self) -> list[_Rank]:
        return [rank for rank in self._ranks if rank.process.poll() is None]

    def _note_end(self, code: int, now: float) -> None:
        told = any(rank.told for rank in self._ranks)
        if code and not (told and is_stop(code)):
            # Ranks that stop together end within moments of each other, and need not be told.
            self._end_at = min(self._end_at, now + (_GRACE_SECONDS if told or is_stop(code) else 0.0))


def run_workers(command: list[str], world_size: int, attempt: Path, frozen: Path) -> None:
    """Run `command` as `world_size` ranks on this machine and wait for them.

    Rank 0 keeps this process's output; every other rank writes to its log in `attempt`.

    Raises:
        WorkersFailed: a rank failed; the error is that of the first one.
        WorkersInterrupted: this process, or a rank, received a stop signal.
    """
    with signals_noted() as received:
        workers = Workers(command, world_size, attempt, {FROZEN_VARIABLE: str(frozen)})
        passed = 0
        try:
            while workers.running():
                while passed < len(received):
                    workers.pass_on(received[passed])
                    passed += 1
                time.sleep(POLL_SECONDS)
        except BaseException:
            workers.kill()
            raise
    failure = workers.failure()
    if failure is not None:
        raise WorkersInterrupted(received[0]) if received else failure


@contextmanager
def signals_noted() -> Iterator[list[int]]:
    """The signals that this process receives inside the block and that its ranks have to get, as they come."""
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        # The death of this process's parent must not count as a second signal, see `launch.parent`.
        note_stop()
        received.append(number)

    numbers = [getattr(signal, name) for name in _PASSED_ON if hasattr(signal, name)]
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            if handler is not None:  # one that was not installed from Python cannot be put back
                signal.signal(number, handler)


def threads(world_size: int) -> dict[str, str]:
    """Threads per rank: the cores divided by the ranks, unless the user has set OMP_NUM_THREADS."""
    if "OMP_NUM_THREADS" in os.environ:
        return {}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"OMP_NUM_THREADS": str(max(1, cores // world_size))}


def _send(process: subprocess.Popen[bytes] | ForkedRank, number: int) -> None:
    # To the rank alone, not to the loaders' processes that it still needs for what it has begun.
    process.send_signal(number)


def _when(rank: _Rank) -> float:
    """When a rank failed, in seconds since 1970, to find the first."""
    raised_at = written_error(rank.error, rank.room).number("raised_at")
    if raised_at is not None:
        return raised_at
    if rank.told:
        return math.inf  # it ended because another had failed
    return rank.ended_at - _NOTICED_SECONDS


def _message(written: Any, code: int, status: Status) -> str:
    if status is not Status.FAILED:  # the reason says it all, and a traceback would hide it
        return str(written.text("reason"))
    message = written.text("message")
    if message is not None:
        return f"{message}\n{written.text('traceback') or ''}".strip()
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
