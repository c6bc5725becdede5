"""Looking after a sweep: its jobs' ends are noticed and written down, failed ones are retried or stop the others."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence

from danling_conf.launch.slurm.queries import SlurmUnavailable
from danling_conf.records.job_file import JobFile
from danling_conf.records.ledger import Ledger, Record
from danling_conf.records.status import Status
from danling_conf.sweep.backend import Backend, Ending
from danling_conf.sweep.policy import RETRIED, OnFailure


class Following:
    """Looks after some jobs of a sweep until all of them have ended.

    Args:
        jobs: by key.
        show: called with every record that has changed.
        may_act: whether to write down ends, retry and stop now, or only to look on.
        after_look: called after every look.
    """

    def __init__(
        self,
        ledger: Ledger,
        backend: Backend,
        jobs: Mapping[str, JobFile],
        policy: OnFailure,
        show: Callable[[Record], None] = lambda record: None,
        *,
        may_act: Callable[[], bool] = lambda: True,
        after_look: Callable[[], None] = lambda: None,
    ) -> None:
        self._ledger, self._backend, self._jobs, self._policy, self._show = ledger, backend, dict(jobs), policy, show
        self._may_act, self._after_look = may_act, after_look
        self._seen: dict[str, int] = {}
        self._ended_since: dict[str, float] = {}
        self._stopped = self._said = False

    def to_the_end(self) -> list[Record]:
        """Look on until every job has ended; gives their records in the order of the sweep."""
        while self.look():
            time.sleep(self._backend.interval)
        return list(self._mine().values())

    def look(self) -> bool:
        """One look; says whether a job is still to end."""
        self._tell()
        if self._may_act():
            unfinished = [record for record in self._mine().values() if not record.ended]
            if unfinished:
                self._settle(unfinished, self._backend.endings(unfinished))
                self._tell()
            retrying = self._enact()
            self._backend.proceed()
        else:
            retrying = False
        self._after_look()
        return retrying or any(not record.ended for record in self._mine().values())

    def _mine(self) -> dict[str, Record]:
        return {key: record for key, record in self._ledger.records().items() if key in self._jobs}

    def _tell(self) -> None:
        for key, record in self._mine().items():
            changes = sum("status" in line for line in record.history)
            if self._seen.get(key) != changes:
                self._seen[key] = changes
                self._show(record)

    def _settle(self, unfinished: Sequence[Record], endings: Mapping[str, Ending]) -> None:
        """Write down ends of which the jobs themselves could not speak any more."""
        now = time.monotonic()
        for record in unfinished:
            ending = endings.get(record.key)
            if ending is None:
                self._ended_since.pop(record.key, None)
                continue
            since = self._ended_since.setdefault(record.key, now)
            if now - since < self._backend.patience:
                continue  # its own word may still be on its way
            self._ledger.settle(record.key, status=ending.status, error=ending.error)
            del self._ended_since[record.key]

    def _enact(self) -> bool:
        """Retry what failed, or stop the others; says whether something is still to be retried."""
        records = self._mine().values()
        # What somebody has stopped has not failed.
        bad = [
            r
            for r in records
            if r.ended and r.status not in (Status.COMPLETED, Status.CANCELLED) and "told" not in r.facts
        ]
        again = [record for record in bad if record.status in RETRIED and record.queued <= self._policy.retries]
        again = [] if self._stopped else again
        # Its last processes may still be on their way out, with the run in their hands.
        over = self._backend.endings(again) if again else {}
        if over:
            self._retry([self._jobs[record.key] for record in again if record.key in over])
        given_up = [record for record in bad if record not in again and record.status != Status.INTERRUPTED]
        if given_up and self._policy.stops and not self._stopped:
            self._stopped = True
            self._backend.cancel([record for record in records if not record.ended])
        return bool(again)

    def _retry(self, jobs: Sequence[JobFile]) -> None:
        try:
            self._backend.submit(jobs)
        except SlurmUnavailable as error:  # one of its moods, which the other jobs do not feel: tried at the next look
            if not self._said:
                self._said = True
                print(f"a failed job cannot be submitted again yet: {error}", file=sys.stderr, flush=True)
            time.sleep(self._backend.interval)
