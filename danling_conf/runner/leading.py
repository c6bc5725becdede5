"""Lead of a run's replica groups: one group at a time writes checkpoints, metrics and the terminal.

The right is a lock, so that it passes on by itself when the leading group dies, and is never held by two.
"""

from __future__ import annotations

import time

import torch
import torch.distributed as distributed

from danling_conf.parallel.process_group import is_distributed, slow_work
from danling_conf.parallel.waiting import waiting
from danling_conf.records.membership import Event, has_happened, note
from danling_conf.records.run_directory import Attempt
from danling_conf.records.run_lock import LeadLock
from danling_conf.topology.rank_environment import RankEnvironment

_PAUSE_SECONDS = 0.2


class Lead:
    """Whether this rank's group leads. A run without replica groups leads itself.

    Attributes:
        held: what the ranks of the group have agreed on last.
    """

    def __init__(self, attempt: Attempt, ranks: RankEnvironment) -> None:
        self._attempt, self._ranks = attempt, ranks
        self.several = ranks.groups > 1
        self.held = not self.several
        self._lock = LeadLock(attempt.directory) if self.several and ranks.main else None

    @property
    def main(self) -> bool:
        """Whether this is the rank that writes what one process of a run writes."""
        return self.held and self._ranks.main

    def agree(self) -> bool:
        """Take the lead where no group has it. Collective in the group; the same answer on its ranks."""
        if not self.held:
            self.held = self._agreed(self._lock is not None and self._lock.take())
        return self.held

    def ends_the_run(self) -> bool:
        """Wait until it is known which group saves the end of the run. Collective in the group.

        Returns:
            Whether it is this one; otherwise the run is complete by now.
        """
        while not self.agree():
            if self._agreed(self._completed()):
                return False
            time.sleep(_PAUSE_SECONDS)
        # The group that led before may have come to the end of it all, and just gone.
        self.held = not (self.several and self._agreed(self._completed()))
        return self.held

    def complete(self, step: int) -> None:
        """Note that the run is saved and complete."""
        self.note(Event.COMPLETE, step=step)

    def note(self, event: Event, *, step: int | None = None, why: str = "") -> None:
        """Note an event of this group, once for all of its ranks."""
        if self.several and self._ranks.main:
            note(self._attempt.directory, self._ranks.group, event, step=step, why=why)

    def _completed(self) -> bool:
        return self._ranks.main and has_happened(self._attempt.directory, Event.COMPLETE)

    def _agreed(self, mains: bool) -> bool:
        """The main rank's answer, on all ranks."""
        if not is_distributed():
            return mains
        answer = torch.tensor(int(mains))
        with waiting("the lead among replica groups"):
            distributed.broadcast(answer, src=0, group=slow_work())
        return bool(answer.item())

    def close(self) -> None:
        """Give the lead up."""
        if self._lock is not None:
            self._lock.release()
