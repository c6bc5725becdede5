"""Monitor of a sweep: records the ends of jobs that could not do so themselves, and retries or stops jobs.

A job writes its own end to the ledger if it can. One that was killed, or whose node was lost, cannot, so the monitor
polls the backend. It also enacts `hydra.launcher.on_failure`.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from danling_conf.launch.slurm.queries import SlurmUnavailable
from danling_conf.records.job_file import JobFile
from danling_conf.records.ledger import Ledger, Record
from danling_conf.records.logs import is_full, show_unwritable
from danling_conf.records.status import Status
from danling_conf.sweep.backend import Backend, Ending

CONTINUE, STOP, RETRY = "continue", "stop", "retry"
RETRIED = (Status.FAILED, Status.OUT_OF_MEMORY, Status.NODE_LOST, Status.PREEMPTED, Status.LOST)
"""Ends after which a retry may succeed. A refused job, or one out of time, would end the same way again."""


@dataclass(frozen=True, kw_only=True)
class OnFailure:
    """What a failed job means for the rest of its sweep: `hydra.launcher.on_failure`, parsed."""

    stops: bool = False
    """Whether the first failure ends the other jobs."""
    retries: int = 0
    """How often a failed job is started again."""


def parse_on_failure(text: str) -> OnFailure:
    """Parse `continue`, `stop`, `retry` or `retry N`. Raises ValueError."""
    found = re.fullmatch(r"(continue|stop|retry)(?:[ _]?(\d+))?", text.strip())
    if found is None or (found[2] and found[1] != RETRY):
        raise ValueError(f"on_failure is {CONTINUE}, {STOP}, or {RETRY} N, not {text!r}")
    return OnFailure(stops=found[1] == STOP, retries=int(found[2] or 1) if found[1] == RETRY else 0)


class Monitor:
    """Monitors some jobs of a sweep until all of them have ended.

    Args:
        jobs: by key.
        show: called with every record whose status has changed.
        may_act: whether this process may record ends, retry and stop jobs now; otherwise it only watches. Called at
            every poll, since the process that holds the sweep's lock may end at any time.
        after_poll: called after every poll.
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
        after_poll: Callable[[], None] = lambda: None,
    ) -> None:
        self._ledger, self._backend, self._jobs, self._policy, self._show = ledger, backend, dict(jobs), policy, show
        self._may_act, self._after_poll = may_act, after_poll
        self._shown: dict[str, int] = {}
        self._ended_since: dict[str, float] = {}
        self._stopped = self._warned = False

    def run(self) -> list[Record]:
        """Poll until every job has ended. Returns their records in the order of the sweep.

        A full or read-only disk does not end the monitor: what it could not record, it records when the disk takes it.
        """
        while self._poll_on_any_disk():
            time.sleep(self._backend.interval)
        return list(self._records().values())

    def _poll_on_any_disk(self) -> bool:
        try:
            return self.poll()
        except OSError as error:
            if not is_full(error):
                raise
            show_unwritable(self._ledger.path, error, "the sweep goes on when it can be written again")
            return True

    def poll(self) -> bool:
        """Check all jobs once. Returns whether any has not ended yet."""
        self._show_changes()
        retrying = False
        if self._may_act():
            unfinished = [record for record in self._records().values() if not record.ended]
            if unfinished:
                self._settle(unfinished, self._backend.endings(unfinished))
                self._show_changes()
            retrying = self._enact_policy()
            # After the policy: a sweep that stops at this failure must not start one more job.
            self._backend.proceed()
        self._after_poll()
        return retrying or any(not record.ended for record in self._records().values())

    def _records(self) -> dict[str, Record]:
        return {key: record for key, record in self._ledger.records().items() if key in self._jobs}

    def _show_changes(self) -> None:
        for key, record in self._records().items():
            changes = sum("status" in line for line in record.history)
            if self._shown.get(key) != changes:
                self._shown[key] = changes
                self._show(record)

    def _settle(self, unfinished: Sequence[Record], endings: Mapping[str, Ending]) -> None:
        """Record the ends of jobs that have not recorded their own."""
        now = time.monotonic()
        over: dict[str, tuple[str, str | None]] = {}
        for record in unfinished:
            ending = endings.get(record.key)
            if ending is None:
                self._ended_since.pop(record.key, None)
                continue
            since = self._ended_since.setdefault(record.key, now)
            if now - since < self._backend.patience:
                continue  # its own line may not be visible here yet
            over[record.key] = ending.status, ending.error
            del self._ended_since[record.key]
        self._ledger.settle_all(over)

    def _enact_policy(self) -> bool:
        """Retry failed jobs, or stop the others. Returns whether any retry is pending."""
        records = list(self._records().values())
        failed = [record for record in records if _has_failed(record)]
        to_retry = [] if self._stopped else [record for record in failed if self._may_retry(record)]
        self._retry(to_retry)
        given_up = [record for record in failed if record not in to_retry and record.status != Status.INTERRUPTED]
        if given_up and self._policy.stops and not self._stopped:
            self._stopped = True
            self._backend.cancel([record for record in records if not record.ended])
        return bool(to_retry)

    def _may_retry(self, record: Record) -> bool:
        return record.status in RETRIED and record.queued <= self._policy.retries

    def _retry(self, records: Sequence[Record]) -> None:
        """Resubmit failed jobs whose processes have all ended."""
        # A job records its failure while its processes still exit, and they hold the run's lock until then: a retry at
        # once would be refused because the run is live.
        over = self._backend.endings(records) if records else {}
        if not over:
            return
        try:
            self._backend.submit([self._jobs[record.key] for record in records if record.key in over])
        # a busy controller must not end the monitor of all jobs; the next poll retries
        except SlurmUnavailable as error:
            if not self._warned:
                self._warned = True
                print(f"a failed job cannot be resubmitted yet: {error}", file=sys.stderr, flush=True)
            time.sleep(self._backend.interval)


def _has_failed(record: Record) -> bool:
    """Whether a job failed, in whatever way; one that was requested to stop did not fail."""
    return record.ended and record.status not in (Status.COMPLETED, Status.CANCELLED) and not record.stop_requested
