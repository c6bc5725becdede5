"""Signals that ask a run to stop: noted when they arrive, agreed on by all ranks between two steps."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import weakref
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as distributed

from danling_conf.parallel.process_group import is_distributed
from danling_conf.parallel.waiting import waiting
from danling_conf.records.stopped import STOPPING, early_signal, note_stop

END_REQUESTED = 1
"""What ranks agree on beside signals: the run is to end as if its budget were used up. Smaller than every number in
`STOPPING`, so that a signal comes first."""
ASK_SECONDS = 1.0
"""Seconds between two agreements of the ranks: asked at every step, they would take a fifth of one that is tiny."""
_MOST_STEPS = 64
"""Most steps between two agreements, each of which takes ten times what a step's other work for signals does. They are
counted ahead, and steps may become slower: a signal must still be heard well within the time that a scheduler leaves to
save, also where steps of a millisecond become a hundred times as long."""
_listening: weakref.WeakSet[StopRequest] = weakref.WeakSet()
_NUMBERS = tuple(int(getattr(signal, name)) for name in STOPPING if hasattr(signal, name))


class StopRequest:
    """Notes SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 while installed. A second one ends the process at once.

    Args:
        second_ends: False where the sender repeats its signals.

    The signals are read from a pipe by a thread, since Python calls a handler only between two of its own instructions:
    a process that waits in a collective would not hear the second one.
    """

    def __init__(self, *, second_ends: bool = True) -> None:
        self._second_ends = second_ends
        self.number = 0
        """The signal that arrived; 0 for none."""
        self.reason: str | None = None
        """Why this rank asked for the end of the run; None where it did not."""
        self._before: dict[int, Any] = {}
        self._pipe: tuple[int, int] | None = None
        self._wakeup = -1
        self._group: distributed.ProcessGroup | None = None
        self._reduction: tuple[torch.Tensor, Any] | None = None
        self._steps = 0
        """How often all ranks have been at a step's end."""
        self._asks_at = 1
        """The step's end at which they ask next; the same number on every rank."""
        self._asked: tuple[int, float] = (0, time.monotonic())
        """When they asked last: at which step's end, and at what time."""

    def install(self, timeout: timedelta | None = None) -> None:
        """Begin to listen. In the main thread only, where Python can; not in an interactive session, whose Ctrl-C is
        its own. Collective where there are several ranks.

        Args:
            timeout: limit of the ranks' agreement, until `process_group.tighten`; None for torch's own.
        """
        if is_distributed():
            self._group = distributed.new_group(backend="gloo", timeout=timeout)
        if _interactive() or threading.current_thread() is not threading.main_thread():
            return
        _listening.add(self)
        self.number = early_signal()
        self._pipe = os.pipe()
        for end in self._pipe:
            os.set_blocking(end, end == self._pipe[0])
        for number in _NUMBERS:
            self._before[number] = signal.signal(number, _note)
        self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(self._pipe[0],), name="danling-conf-signals", daemon=True).start()

    def end(self, reason: str) -> None:
        """Ask for the end of the run, as if its budget were used up. One rank is enough."""
        self.reason = reason

    @property
    def _own(self) -> int:
        return self.number or (0 if self.reason is None else END_REQUESTED)

    def end_on_any_rank(self) -> bool:
        """Whether any rank has asked for the end, the same answer on every rank. Collective, and waits for all."""
        if self._group is None:
            return self.reason is not None
        asked = torch.tensor(int(self.reason is not None))
        with waiting("the ranks' agreement on the end"):
            distributed.all_reduce(asked, op=distributed.ReduceOp.MAX, group=self._group)
        return bool(asked.item())

    def signal_on_any_rank(self) -> int:
        """The signal that any rank received, the same answer on every rank; `END_REQUESTED` where one asked for the end
        instead, 0 for neither. Collective.

        To be called at the end of every step. Ranks ask about once in `ASK_SECONDS`, at a step that they agreed on when
        they asked before. The first 16 steps ask each, and no pause is longer than an eighth of the steps so far.
        The answer is that of the reduction which the call before began, so that no rank waits for it.
        """
        if self._group is None:
            return self.number or (0 if self.reason is None else END_REQUESTED)
        self._steps += 1
        answer = 0
        if self._reduction is not None:
            agreed, work = self._reduction
            with waiting("the ranks' agreement on signals"):
                work.wait()
            self._reduction = None
            answer, pause = agreed.tolist()
            self._asks_at = self._steps - 1 - pause
        if self._steps >= self._asks_at:
            # The least of the ranks' pauses, so that the slowest rank decides.
            asked = torch.tensor([self._own, -self._pause()])
            work = distributed.all_reduce(asked, op=distributed.ReduceOp.MAX, group=self._group, async_op=True)
            self._reduction = asked, work
        return int(answer)

    def _pause(self) -> int:
        """Steps that this rank would let pass until the next agreement, at the pace since the last."""
        (steps, began), now = self._asked, time.monotonic()
        self._asked = self._steps, now
        paced = ASK_SECONDS * (self._steps - steps) / max(now - began, 1e-6)
        return max(1, min(int(paced), _MOST_STEPS, self._steps // 8))

    def remove(self, *, failing: bool) -> None:
        """Stop listening, and restore the handlers from before.

        Args:
            failing: whether this rank fails, so that the others may not answer any more.
        """
        if self._reduction is not None and not failing:
            with waiting("the ranks' agreement on signals"):
                self._reduction[1].wait()
        self._reduction = None
        _listening.discard(self)
        if self._pipe is None:
            return
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        os.close(self._pipe[1])  # ends the thread, which closes the other end
        self._pipe = None

    def _listen(self, pipe: int) -> None:
        while received := os.read(pipe, 1):
            number = received[0]
            if number not in _NUMBERS:
                continue
            if self.number and not self._second_ends:
                continue
            if self.number:
                name = signal.Signals(number).name
                sys.stderr.write(f"second signal ({name}): leaving at once, what was not saved is lost\n")
                sys.stderr.flush()
                os._exit(128 + number)
            self.number = number
            note_stop()
        os.close(pipe)


def _interactive() -> bool:
    return hasattr(sys, "ps1") or "ipykernel" in sys.modules


_mask_before_fork: set[Any] | None = None
"""The signal mask from before a fork that is under way."""


def _block_signals() -> None:
    """Before a fork: no signal may reach the child while it still holds the parent's pipe."""
    global _mask_before_fork
    if _listening:
        _mask_before_fork = signal.pthread_sigmask(signal.SIG_BLOCK, _NUMBERS)


def _unblock_signals() -> None:
    global _mask_before_fork
    if _mask_before_fork is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, _mask_before_fork)
        _mask_before_fork = None


def _leave_process_group() -> None:
    """In a forked child, a loader's worker: leave the process group, to which launchers and terminals send signals,
    since the run needs it to the end of the step; and do not write signals into the parent's pipe."""
    if _mask_before_fork is not None:
        signal.set_wakeup_fd(-1)
        os.setpgid(0, 0)
        _unblock_signals()


os.register_at_fork(before=_block_signals, after_in_parent=_unblock_signals, after_in_child=_leave_process_group)


def _note(number: int, frame: Any) -> None:
    """Keeps a signal from ending the process; the thread reads it from the pipe."""
