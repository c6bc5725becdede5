"""Forked ranks: the command's side of the warm process (`launch.warm`), from its start until its ranks have begun.

The ranks end up as children of the command, like those that it starts itself: while the warm process forks them, the
command adopts orphans, and the warm process ends. Until then a rank waits for the command's word, so that none begins
where the command or the warm process was killed meanwhile.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from danling_conf.launch.warm import CHANNEL_VARIABLE, REFUSED
from danling_conf.topology.machine import accelerator_files

_PR_SET_CHILD_SUBREAPER, _PR_GET_CHILD_SUBREAPER = 36, 37
_WARM = Path(__file__).with_name("warm.py")


@dataclass(frozen=True, kw_only=True)
class RankStart:
    """What one rank is started with, beside what all of them have."""

    environment: Mapping[str, str]
    output: int | None
    """Descriptor of its standard output and error; None for the command's own."""
    passed: int | None
    """A descriptor that it keeps."""
    error: Path
    """The file of its error."""


class ForkedRank:
    """One rank that was forked for this process: its child, in the manner of a `subprocess.Popen`."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        """Exit code, or the negative number of the signal that ended it; None while it runs."""

    def poll(self) -> int | None:
        """The exit code, if it has ended."""
        return self._wait(os.WNOHANG)

    def wait(self) -> int | None:
        """Wait until it has ended."""
        return self._wait(0)

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def _wait(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


class NotForkedError(Exception):
    """The warm process cannot fork: no rank has begun, and none will."""


class WarmEndedError(Exception):
    """The warm process ended early: no rank has begun, and none will."""


def can_fork() -> bool:
    """Whether ranks of this machine may be forked from a process that has imported torch.

    Not where an accelerator is present: a driver that was opened before the fork does not work after it. Nor where the
    script ignores the ends of its children, whose exit codes are then lost.
    """
    if sys.platform != "linux" or signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
        return False
    return not accelerator_files() and _is_adopting() is not None


class WarmProcess:
    """A process that imports what ranks need, and then forks them.

    Args:
        command: argv of a rank, `python -u SCRIPT ARGUMENT...` or `python -u -m MODULE ARGUMENT...`.
        environment: of all ranks.
        starts: what each has beside.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], starts: Sequence[RankStart]) -> None:
        self._count, self._lines = len(starts), b""
        self._channel, theirs = socket.socketpair()
        passed = [item for start in starts for item in (start.output, start.passed) if item is not None]
        _adoption.begin()
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [*command[:2], str(_WARM), *command[2:]],  # who looks at a process sees its script
                    env={**environment, CHANNEL_VARIABLE: str(theirs.fileno())},
                    pass_fds=[theirs.fileno(), *passed],
                    start_new_session=True,
                )
        except BaseException:
            self._channel.close()
            _adoption.end()
            raise
        ranks = [
            {"environment": dict(start.environment), "output": start.output, "passed": start.passed} for start in starts
        ]
        try:
            self._channel.sendall(json.dumps({"path": sys.path, "ranks": ranks}).encode() + b"\n")
        except OSError:
            self._channel.close()  # it has ended, and `forked` says so
        else:
            self._channel.setblocking(False)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def forked(self) -> list[ForkedRank] | None:
        """The ranks, once they have begun; None before. To be called again and again.

        Raises:
            NotForkedError, WarmEndedError: see there.
        """
        code = self._process.poll()
        if code is None:
            return None
        self._read()
        *lines, _ = self._lines.decode(errors="replace").split("\n")
        if lines and lines[-1].startswith(REFUSED):
            self.kill()
            raise NotForkedError(lines[-1].removeprefix(REFUSED).strip())
        if code or len(lines) != self._count:
            self.kill()
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            raise WarmEndedError(f"the process that starts the ranks {how} before it had started them")
        # Its exit has made the ranks children of this process.
        self._channel.setblocking(True)
        self._channel.sendall(b"!" * self._count)
        self._close()
        return [ForkedRank(int(line)) for line in lines]

    def kill(self) -> None:
        """End it, and ranks that have not begun."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        if self._channel.fileno() >= 0:
            self._channel.shutdown(socket.SHUT_WR)  # those that wait for a word see that none will come
            self._channel.setblocking(True)
            self._read()
        for line in self._lines.decode(errors="replace").split("\n"):
            if line.isdigit():
                ForkedRank(int(line)).wait()
        self._close()

    def _read(self) -> None:
        """Read what there is; all until the last process at the other end is gone, where the channel blocks."""
        try:
            while content := self._channel.recv(65536):
                self._lines += content
        except OSError:  # nothing more to read, or it was killed while there was something that it had not read
            return

    def _close(self) -> None:
        self._channel.close()
        _adoption.end()


class _Adoption:
    """Orphans among this process's descendants become its children while any warm process forks."""

    def __init__(self) -> None:
        self._warm, self._before = 0, 0

    def begin(self) -> None:
        if self._warm == 0:
            self._before = _is_adopting() or 0
            _set_adopting(1)
        self._warm += 1

    def end(self) -> None:
        self._warm -= 1
        if self._warm == 0:
            _set_adopting(self._before)


_adoption = _Adoption()


def _is_adopting() -> int | None:
    """Whether this process adopts orphans, 0 or 1; None where the system has no such thing."""
    import ctypes  # Python has no call for it, and most commands start no ranks

    found = ctypes.c_int(0)
    return found.value if ctypes.CDLL(None).prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(found), 0, 0, 0) == 0 else None


def _set_adopting(value: int) -> None:
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(value), 0, 0, 0)
