"""Local backend: each job of a sweep is a process with its own devices. As many run at once as the machine has."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from danling_conf.launch.parent import as_parent
from danling_conf.records.job_file import JobFile
from danling_conf.records.ledger import Ledger, Record
from danling_conf.records.status import Status
from danling_conf.records.stopped import is_stop
from danling_conf.schema.files import no_links
from danling_conf.sweep.backend import Ending
from danling_conf.topology.machine import count_devices
from danling_conf.topology.rank_environment import JOB_VARIABLE

OUTPUT = "output.log"
"""Name of the file, in a job's folder, that holds what its processes print."""


@dataclass
class _Running:
    job: JobFile
    process: subprocess.Popen[bytes]
    devices: list[str]
    ranks_on_cpu: int


class LocalJobs:
    """Runs jobs as processes of this machine.

    Args:
        parallel_jobs: the most jobs at once; None for as many as devices or cores allow.
    """

    interval = 0.1
    patience = 0.0  # on one machine, what a process wrote is visible as soon as it has ended

    def __init__(self, parallel_jobs: int | None, environment: Mapping[str, str] = os.environ) -> None:
        self._most = parallel_jobs
        self._free = _devices(environment)
        self._all_devices = len(self._free)
        self._cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._environment = environment
        self._waiting: deque[JobFile] = deque()
        self._running: dict[str, _Running] = {}
        self._ended: dict[str, Ending] = {}
        self._ledger: Ledger | None = None
        """Kept, so that it reads only what is new."""
        self._at_once = 1

    def submit(self, jobs: Sequence[JobFile]) -> None:
        self._ledger = self._ledger or jobs[0].ledger
        self._ledger.add_all([(job.key, {"status": Status.QUEUED}) for job in jobs])
        for job in jobs:
            self._ended.pop(job.key, None)
        self._waiting.extend(jobs)
        widest = max(job.world_size for job in jobs)
        room = max(1, self._cores // widest)
        self._at_once = min(len(self._waiting) + len(self._running), self._most or room)
        self._start_what_fits()

    def endings(self, unfinished: Sequence[Record]) -> dict[str, Ending]:
        for key, running in list(self._running.items()):
            code = running.process.poll()
            if code is not None:
                self._free += running.devices
                del self._running[key]
                self._ended[key] = _ending(code)
        return {record.key: self._ended[record.key] for record in unfinished if record.key in self._ended}

    def proceed(self) -> None:
        self._start_what_fits()

    def cancel(self, records: Sequence[Record]) -> None:
        keys = {record.key for record in records}
        for job in self._waiting:
            if job.key in keys:
                self._ended[job.key] = Ending(status=Status.CANCELLED, error="not started: the sweep was stopped")
        self._waiting = deque(job for job in self._waiting if job.key not in keys)
        for running in self._running.values():
            if running.job.key in keys and running.process.poll() is None:
                running.process.send_signal(signal.SIGTERM)

    def wait(self) -> None:
        """Wait for the processes that still run."""
        for running in self._running.values():
            running.process.wait()

    def _start_what_fits(self) -> None:
        while self._waiting and (self._most is None or len(self._running) < self._most):
            job = self._waiting[0]
            # `danling-conf cancel` while it waited
            if self._ledger is not None and self._ledger.records()[job.key].status == Status.CANCELLED:
                self._waiting.popleft()
                continue
            on_cpu = not self._all_devices or job.content["config"]["parallel"]["mesh_device_type"] == "cpu"
            if on_cpu:
                busy = sum(running.ranks_on_cpu for running in self._running.values())
                # A layout with more ranks than cores runs alone, rather than never.
                if busy and busy + job.world_size > self._cores and self._most is None:
                    return
                self._start(job, [], job.world_size)
            elif len(self._free) >= job.world_size:
                devices, self._free = self._free[: job.world_size], self._free[job.world_size :]
                self._start(job, devices, 0)
            else:
                return
            self._waiting.popleft()

    def _start(self, job: JobFile, devices: list[str], ranks_on_cpu: int) -> None:
        environment = {**self._environment, **as_parent(), JOB_VARIABLE: str(job.path)}
        if devices:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
        elif self._at_once > 1:
            # By default every torch process starts a thread for each core, and several jobs slow each other down.
            threads = max(1, self._cores // (self._at_once * job.world_size))
            environment.setdefault("OMP_NUM_THREADS", str(threads))
        # Appending: a retried job keeps the output of its earlier attempts. `-u`: what a killed process printed must
        # not be lost in its buffer.
        with open(job.folder / OUTPUT, "ab", opener=no_links) as output:
            process = subprocess.Popen(
                [sys.executable, "-u", *job.argv],
                env=environment,
                cwd=job.directory,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                # The terminal sends Ctrl-C to every process of its session. In sessions of their own, jobs get one
                # SIGTERM from the sweep; a second signal would make them exit without saving.
                start_new_session=True,
            )
        self._running[job.key] = _Running(job, process, devices, ranks_on_cpu)


def _devices(environment: Mapping[str, str]) -> list[str]:
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    count = count_devices(visible)
    return [str(index) for index in range(count)] if visible is None else visible.split(",")[:count]


def _ending(code: int) -> Ending:
    """The end of a job that did not record one, from its exit code."""
    if code == 0:
        return Ending(status=Status.COMPLETED)
    if -code in (signal.SIGTERM, signal.SIGINT):
        return Ending(status=Status.INTERRUPTED, error=f"ended by {signal.Signals(-code).name}")
    if code < 0:
        name = signal.Signals(-code).name
        hint = " (by the system, when memory runs out)" if name == "SIGKILL" else ""
        return Ending(status=Status.FAILED, error=f"ended by {name}{hint}")
    status = Status.INTERRUPTED if is_stop(code) else Status.FAILED
    return Ending(status=status, error=f"ended with exit code {code}")
