"""The process of one job on this machine: its only rank, or the parent of its ranks."""

from __future__ import annotations

import os
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danling_conf.config.hydra_adapter import run_frozen
from danling_conf.launch.execute import run_attempt, show_failure
from danling_conf.launch.opening import open_job
from danling_conf.launch.rank import score_of
from danling_conf.launch.worker import end_with_parent
from danling_conf.launch.workers import WorkersFailed, WorkersInterrupted
from danling_conf.records.job_file import JobFile, write_error
from danling_conf.records.status import Status
from danling_conf.records.stopped import Stopped
from danling_conf.topology.violation import ConfigRefused

if TYPE_CHECKING:
    from danling_conf.launch.app import App


def run_local_job(app: App, path: Path) -> Any:
    """Run the job of a job file to its end, and leave word of how it ended. Exits the process where it failed."""
    end_with_parent()
    job = JobFile.read(path)
    os.chdir(job.directory)
    lock = None
    try:
        config, attempt, lock = open_job(job, app.script)
        value = run_attempt(app, partial(run_frozen, job.content["hydra"], job.content["config"]), config, attempt)
    except ConfigRefused as refusal:
        _end(job, Status.REFUSED, 2, str(refusal))
    except WorkersFailed as failure:
        show_failure(failure)
        write_error(job.folder, failure.rank, str(failure).partition("\n")[0], str(failure))
        status = Status.REFUSED if failure.refused else Status.FAILED
        _end(job, status, max(failure.exit_code, 1), str(failure).partition("\n")[0], rank=failure.rank)
    except WorkersInterrupted as interruption:
        _end(job, Status.INTERRUPTED, interruption.exit_code, str(interruption))
    except Stopped as stopped:
        _end(job, Status.INTERRUPTED, 128 + stopped.number, str(stopped))
    except KeyboardInterrupt:
        _end(job, Status.INTERRUPTED, 130, "interrupted")
    except SystemExit as ending:
        if ending.code not in (None, 0):
            write_error(job.folder, 0, f"SystemExit: {ending.code}", traceback.format_exc())
            _end(job, Status.FAILED, 1, f"exit {ending.code}", rank=0)
        value = None
    except Exception as error:
        write_error(job.folder, 0, f"{type(error).__name__}: {error}", traceback.format_exc())
        traceback.print_exc()
        _end(job, Status.FAILED, 1, f"{type(error).__name__}: {error}", rank=0)
    finally:
        if lock is not None:
            lock.release()
    job.ledger.add(job.key, status=Status.COMPLETED, score=score_of(value))
    return value


def _end(job: JobFile, status: str, code: int, error: str, **facts: Any) -> None:
    job.ledger.add(job.key, status=status, error=error, **facts)
    print(f"{status}: {error}", file=sys.stderr)
    sys.exit(code)
