"""Execution of one configuration: claim or join its run, freeze it, run it here or in local workers.

Every way to start an attempt opens it here, so that what is frozen and what the user is told is the same.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from danling_conf.config.hydra_adapter import Composer, hydra_settings, settings_in
from danling_conf.launch.app import App
from danling_conf.launch.rank import run_rank
from danling_conf.launch.workers import WorkersFailed, WorkersInterrupted, run_workers, worker_command
from danling_conf.records.code import code_identity
from danling_conf.records.current import Current
from danling_conf.records.frozen import freeze_attempt, thaw_job
from danling_conf.records.job_file import JobFile
from danling_conf.records.reading import read_fields
from danling_conf.records.run_directory import Attempt, claim, start, warn, write_result
from danling_conf.records.run_lock import RunLock
from danling_conf.records.status import Status, outcome_of
from danling_conf.schema import RunnerConfig
from danling_conf.schema.files import FROZEN, RESULT
from danling_conf.topology.layout import layout_of
from danling_conf.topology.rank_environment import SINGLE
from danling_conf.topology.violation import ConfigRefused, Violation


def execute(app: App, composing: Composer, composed: DictConfig, config: RunnerConfig) -> Any:
    """Run one configuration to its end; returns its score. Exits the process where it failed or was stopped.

    Raises ConfigRefused where the run, or a rank, refuses the configuration.
    """
    attempt, lock = open_attempt(app, composed, config)
    try:
        return run_attempt(app, partial(composing.run_job, composed), config, attempt)
    except (ConfigRefused, SystemExit):
        raise
    except (Exception, KeyboardInterrupt) as error:
        show_error(error, attempt.run_directory)
        sys.exit(outcome_of(error).exit_code)
    finally:
        lock.release()


def open_attempt(app: App, composed: DictConfig, config: RunnerConfig) -> tuple[Attempt, RunLock]:
    """Claim the run, write what is frozen of the attempt, and warn the user. Raises ConfigRefused as `claim`."""
    attempt, lock = claim(config)
    freeze_attempt(config, attempt, app.script, hydra_settings(composed, attempt.directory))
    warn(attempt, config)
    return attempt, lock


def open_job(
    job: JobFile, script: Path, *, fence: tuple[str, int] | None = None, **facts: Any
) -> tuple[RunnerConfig, Attempt, RunLock]:
    """Open an attempt of a job's run, and enter in the ledger that the job runs.

    Args:
        script: file of the user's function.
        fence: see `RunLock`.
        facts: of the attempt, for the ledger, beside where it runs.

    Returns:
        The job's configuration, as it was when the job was submitted; the attempt; the lock of its run.

    Raises ConfigRefused where the run is live or cannot be written, or the job cannot be read as it was submitted.
    """
    config = _thawed(job)
    again = job.ledger.records()[job.key].attempts > 0
    attempt, lock = start(job.binding, config, [str(script), *job.overrides], again=again, fence=fence)
    submitted, now = job.content["program"]["code_id"], code_identity(script.parent).code_id
    if submitted != now:
        note = f"the code was {submitted} when this job was submitted, and is {now}"
        attempt = replace(attempt, notes=(*attempt.notes, note))
    freeze_attempt(config, attempt, script, settings_in(job.content["hydra"], attempt.directory))
    host = os.uname().nodename
    job.ledger.add(job.key, status=Status.RUNNING, attempt=attempt.directory.name, host=host, pid=os.getpid(), **facts)
    warn(attempt, config)
    return config, attempt, lock


def _thawed(job: JobFile) -> RunnerConfig:
    try:
        config: RunnerConfig = thaw_job(job.content)
        return config
    except ConfigRefused:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        rule = f"its configuration cannot be read: {error}"
        fix = "restore the file and the app's class, or submit it anew"
        raise ConfigRefused([Violation("job", str(job.path), rule, fix)]) from error


def run_attempt(app: App, run_job: Callable[..., Any], config: RunnerConfig, attempt: Attempt) -> Any:
    """Run an opened attempt as Hydra's job: in this process, or in as many workers as the layout has ranks.

    Args:
        run_job: runs a task as Hydra's job in a directory: of `Composer`, or `hydra_adapter.run_frozen`.

    Raises:
        WorkersFailed, WorkersInterrupted: from the workers.
        Exception: what the user's function raised in this process.
    """
    world_size = layout_of(config).world_size
    command, started_in = worker_command(), os.getcwd()

    def task(_: DictConfig) -> Any:
        if world_size == 1:
            return run_rank(app.function, config, Current(attempt=attempt, ranks=SINGLE), app.script.stem)
        # Workers start as this process did; where `hydra.job.chdir` is set they change the directory themselves.
        os.chdir(started_in)
        try:
            run_workers(command, world_size, attempt.directory, attempt.directory / FROZEN)
        except (WorkersFailed, WorkersInterrupted) as error:
            # The main rank may have been killed before it could write how the attempt ended; and where another rank
            # failed, what the main rank wrote is only the consequence.
            write_result(attempt.directory, outcome_of(error))
            raise
        return read_fields(attempt.directory / RESULT).number("score")

    outcome = run_job(task=task, directory=attempt.directory)
    if isinstance(outcome._return_value, Exception):
        raise outcome._return_value
    return outcome._return_value


def show_error(error: BaseException, run: Path) -> None:
    """Print why an attempt failed or was stopped: of several ranks the first one's error; a refusal without its
    traceback."""
    outcome = outcome_of(error)
    if isinstance(error, WorkersFailed) and not error.refused:
        lines = [f"rank {error.rank} failed: {error}", f"the other ranks were stopped; logs: {error.log.parent}"]
    elif outcome.status is Status.FAILED:
        traceback.print_exception(error)
        lines = [f"run failed: {run}"]
    elif outcome.status is Status.INTERRUPTED:
        lines = [f"{outcome.message}; the run so far: {run}"]
    else:
        lines = [outcome.message]
    print("\n".join(lines), file=sys.stderr)
