"""Replica groups of a job on Slurm: the job's own process, on its first node, starts each as a step of one task.

The task (`launch.slurm.group_task`) starts the ranks of its group and ends them together, as a command does on one
machine. The death of a group, or of its node, ends its step alone, which is started again. This process holds the
lighthouse. Steps get their orders through standard input, which srun forwards to any node.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danling_conf.config.hydra_job import run_frozen
from danling_conf.launch.execute import run_attempt
from danling_conf.launch.groups import Place, TaskGone
from danling_conf.launch.rank_error import WorkersFailed, WorkersInterrupted
from danling_conf.launch.slurm import requeue
from danling_conf.launch.slurm.queries import SlurmUnavailable, node_state
from danling_conf.launch.slurm.rank import open_here
from danling_conf.records.job_file import JobFile, write_error
from danling_conf.records.logs import rank_log
from danling_conf.records.reading import read_fields
from danling_conf.records.result import score_of
from danling_conf.records.run_lock import LostRun
from danling_conf.records.status import EXIT_FAILED, Status, outcome_of, written_status
from danling_conf.records.stopped import Stopped
from danling_conf.schema.files import group_file
from danling_conf.topology.rank_environment import CLUSTER_VARIABLE, SINGLE
from danling_conf.topology.rendezvous import LOOPBACK, address_of_node, hosts_of

if TYPE_CHECKING:
    from danling_conf.launch.app import App

_ORDERED_SECONDS = 10.0
"""How long a task may take to end its ranks when it is told to."""


def run_slurm_groups(app: App, path: Path) -> Any:
    """Run the replica groups of a job, as its only process. Returns the run's score; exits where it has none."""
    os.environ.pop(CLUSTER_VARIABLE, None)
    job = JobFile.read(path)
    if not job.content["shape"].get("groups"):
        raise RuntimeError("this process was not started by srun, as the ranks of a Slurm job must be")
    try:
        value = _run(app, job)
    except WorkersInterrupted as error:
        requeue.leave(Stopped(error.number), job, SINGLE)
    except LostRun as error:  # a later start of this job has taken over the run, and its ledger entries
        print(error, file=sys.stderr)
        sys.exit(EXIT_FAILED)
    except Exception as error:
        outcome = outcome_of(error)
        print(outcome.message, file=sys.stderr)
        if outcome.status is Status.REFUSED:
            requeue.record_refusal(job, outcome)
        elif not requeue.superseded(job):
            rank = error.rank if isinstance(error, WorkersFailed) else 0
            write_error(job.folder, rank, outcome.reason, outcome.message)
            job.ledger.add(job.key, status=outcome.status, error=outcome.reason, rank=rank)
        sys.exit(outcome.exit_code)
    if not requeue.superseded(job):
        job.ledger.add(job.key, status=Status.COMPLETED, score=score_of(value))
    return value


def _run(app: App, job: JobFile) -> Any:
    config, attempt, lock = open_here(app, job)
    try:
        hosts = hosts_of(os.environ["SLURM_JOB_NODELIST"])
        address = address_of_node(os.environ.get("SLURMD_NODENAME", hosts[0])) if len(hosts) > 1 else LOOPBACK
        place = Place(make=partial(Step, job, hosts), address=address, scheduled=True)
        run_job = partial(run_frozen, job.content["hydra"], job.content["config"], directory=attempt.directory)
        value = run_attempt(app, run_job, config, attempt, place)
        attempt.check_token()
        return value
    finally:
        lock.release()


class Step:
    """One start of a group, as a step of this job.

    Args:
        hosts: nodes of the job; the groups are spread over them in order.
        command, world_size, attempt, environment, numbered_from: see `Workers`.
    """

    def __init__(
        self,
        job: JobFile,
        hosts: Sequence[str],
        command: Sequence[str],
        world_size: int,
        attempt: Path,
        environment: Mapping[str, str],
        *,
        numbered_from: int = 0,
    ) -> None:
        index, on_node = numbered_from // world_size, int(job.content["shape"]["tasks_per_node"])
        self._first, self._log, self.host = numbered_from, rank_log(attempt, numbered_from), hosts[index // on_node]
        self._report = group_file(attempt, index)
        self._report.unlink(missing_ok=True)
        task = {
            "command": list(command),
            "world_size": world_size,
            "attempt": str(attempt),
            "environment": dict(environment),
            "numbered_from": numbered_from,
            "report": str(self._report),
            "place": index % on_node,
            "groups_here": on_node,
            "alone": len(hosts) == 1,
            "first_host": hosts[0],
        }
        # Groups of one node share it by themselves: exclusive steps would wait for the memory of each other.
        options = ["--overlap", "--nodes=1", "--ntasks=1", f"--nodelist={self.host}", "--unbuffered"]
        options += [f"--cpus-per-task={job.content['shape']['cpus_per_task']}"]
        options += job.content["launcher"]["srun_args"] or []
        program = [sys.executable, "-u", "-m", "danling_conf.launch.slurm.group_task", json.dumps(task)]
        # In a session of its own: Slurm signals the tasks of a step itself.
        self._srun = subprocess.Popen(["srun", *options, *program], stdin=subprocess.PIPE, start_new_session=True)

    @property
    def died(self) -> bool:
        """The task ends its ranks itself."""
        return False

    def running(self) -> bool:
        """Whether the step has not ended."""
        return self._srun.poll() is None

    def failure(self) -> WorkersFailed | WorkersInterrupted | None:
        """What ended the group, as its task has written it; None where all ranks returned."""
        found = read_fields(self._report)
        number, message = found.integer("signal"), found.text("message")
        if number is not None:
            return WorkersInterrupted(number)
        if message is not None:
            status, code = written_status(found.text("status")) or Status.FAILED, found.integer("exit_code")
            rank = found.integer("rank")
            log = rank_log(self._report.parent, rank if rank is not None else self._first)
            return WorkersFailed(rank or self._first, code or EXIT_FAILED, message, log, status)
        if found.text("status") == Status.COMPLETED:
            return None
        if self._host_is_lost():  # Slurm takes it out of the job
            return TaskGone(self._first, f"its node {self.host} is lost", self._log, for_good=True)
        said = f"its task on {self.host} is gone (srun: exit code {self._srun.returncode})"
        return TaskGone(self._first, said, self._log, for_good=False)

    def _host_is_lost(self) -> bool:
        try:
            return "DOWN" in node_state(self.host)
        except SlurmUnavailable:
            return False

    def pass_on(self, number: int) -> None:
        """Send a signal to all ranks."""
        self._order(number)

    def kill(self) -> None:
        """End all ranks at once, and the step with them."""
        if not self.running():
            return
        self._order(signal.SIGKILL)
        for insist in (self._srun.terminate, self._srun.kill):
            deadline = time.monotonic() + _ORDERED_SECONDS
            while self.running():
                if time.monotonic() > deadline:
                    insist()
                    break
                time.sleep(0.05)

    def _order(self, number: int) -> None:
        assert self._srun.stdin is not None
        try:
            self._srun.stdin.write(b"%d\n" % number)
            self._srun.stdin.flush()
        except OSError:
            pass  # it has just ended
