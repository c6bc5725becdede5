"""Process of a job of a local sweep: its only rank, or the parent of its ranks."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danling_conf.config.hydra_job import run_frozen
from danling_conf.launch.execute import open_job, run_attempt, show_error
from danling_conf.launch.parent import end_with_parent
from danling_conf.launch.rank_error import WorkersFailed
from danling_conf.records.job_file import JobFile, write_error
from danling_conf.records.logs import on_any_disk
from danling_conf.records.result import score_of
from danling_conf.records.run_lock import LostRun
from danling_conf.records.status import EXIT_FAILED, Status, outcome_of
from danling_conf.records.stopped import stopping_in_order
from danling_conf.topology.violation import trace_of

if TYPE_CHECKING:
    from danling_conf.launch.app import App


def run_local_job(app: App, path: Path) -> Any:
    """Run the job of a job file to its end, and add its end to the ledger. Exits the process if it failed."""
    with stopping_in_order():
        return _run_to_its_end(app, path)


def _run_to_its_end(app: App, path: Path) -> Any:
    # If the sweep's command is killed, its jobs save and exit instead of training on unseen.
    end_with_parent()
    job = JobFile.read(path)
    os.chdir(job.directory)
    lock = None
    value: Any = None
    try:
        config, attempt, lock = open_job(job, app.script)
        settings = job.content["hydra"], job.content["config"]
        value = run_attempt(app, partial(run_frozen, *settings, directory=attempt.directory), config, attempt)
        attempt.check_token()
    except LostRun as error:  # the attempt that has taken the run over writes to the ledger from now on
        print(error, file=sys.stderr)
        sys.exit(EXIT_FAILED)
    except BaseException as error:  # SystemExit and KeyboardInterrupt are ends of the job too
        outcome = outcome_of(error)
        facts: dict[str, Any] = {}
        if isinstance(error, WorkersFailed):
            facts["rank"] = error.rank
            write_error(job.folder, error.rank, outcome.reason, str(error))
        elif outcome.status is Status.FAILED:
            facts["rank"] = 0
            write_error(job.folder, 0, outcome.message, trace_of(error))
        if not outcome.completed:
            _record(job, status=outcome.status, error=outcome.reason, **facts)
            show_error(error, job.binding.run_directory)
            print(f"{outcome.status}: {outcome.reason}", file=sys.stderr)
            sys.exit(outcome.exit_code)
    finally:
        if lock is not None:
            lock.release()
    _record(job, status=Status.COMPLETED, score=score_of(value))
    return value


def _record(job: JobFile, **facts: Any) -> None:
    """Add the end of a job to the ledger. On a full disk the monitor does, later, by the exit code."""
    with on_any_disk(job.ledger.path):
        job.ledger.add(job.key, **facts)
