"""Execution of one configuration: claim or join its run, freeze it, run it here or in local workers.

Every way to start an attempt opens it here, so that all of them freeze the same files and print the same warnings.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from danling_conf.config.hydra_adapter import Composer
from danling_conf.config.hydra_directories import chosen_run_directory, make_directory
from danling_conf.config.hydra_job import hydra_settings, settings_in
from danling_conf.launch.app import App, worker_command
from danling_conf.launch.rank import run_rank
from danling_conf.launch.rank_error import WorkersFailed, WorkersInterrupted
from danling_conf.records.code import code_identity
from danling_conf.records.current import Current
from danling_conf.records.frozen import freeze_attempt, thaw_job
from danling_conf.records.reading import read_result
from danling_conf.records.result import reserve_result, write_result
from danling_conf.records.run_directory import Attempt, claim, refusing_unwritable, start, warn
from danling_conf.records.run_lock import RunLock
from danling_conf.records.status import Status, outcome_of
from danling_conf.records.stopped import StoppedEarly, stopping_in_order
from danling_conf.schema import RunnerConfig
from danling_conf.schema.files import FROZEN
from danling_conf.schema.imports import uncollected
from danling_conf.schema.printable import printable_lines
from danling_conf.topology.layout import layout_of
from danling_conf.topology.machine import this_machine
from danling_conf.topology.rank_environment import SINGLE
from danling_conf.topology.rules.fault_tolerance import starts_groups
from danling_conf.topology.violation import ConfigRefused, PlainError, Violation

if TYPE_CHECKING:
    from danling_conf.launch.groups import Place
    from danling_conf.records.job_file import JobFile


def execute(app: App, composing: Composer, composed: DictConfig, config: RunnerConfig) -> Any:
    """Run one configuration to its end and return its score. Exits the process if it failed or was stopped.

    Raises ConfigRefused where the run, or a rank, refuses the configuration.
    """
    with stopping_in_order():
        return _execute(app, composing, composed, config)


def _execute(app: App, composing: Composer, composed: DictConfig, config: RunnerConfig) -> Any:
    with uncollected():
        attempt, directory, lock = open_attempt(app, composed, config)
    try:
        with recording_stop(attempt):
            run_job = partial(composing.run_job, composed, directory=directory)
            return run_attempt(app, run_job, config, attempt)
    except StoppedEarly as error:  # otherwise the runner has said so
        show_error(error, attempt.run_directory)
        raise
    except (ConfigRefused, SystemExit):
        raise
    except (Exception, KeyboardInterrupt) as error:
        show_error(error, attempt.run_directory)
        sys.exit(outcome_of(error).exit_code)
    finally:
        lock.release()


def open_attempt(app: App, composed: DictConfig, config: RunnerConfig) -> tuple[Attempt, Path, RunLock]:
    """Claim the run, freeze the attempt, and print warnings. Raises ConfigRefused like `claim`.

    Returns:
        The attempt, the directory of Hydra's job, and the lock of the run.
    """
    chosen = chosen_run_directory(composed)
    if chosen is not None:
        make_directory("hydra.run.dir", chosen)
    attempt, lock = claim(config)
    directory = chosen or attempt.directory
    with releasing(lock), recording_stop(attempt), refusing_unwritable(config):
        reserve_result(attempt.directory)
        freeze_attempt(config, attempt, app.script, hydra_settings(composed, directory))
        warn(attempt, config)
    return attempt, directory, lock


@contextmanager
def recording_stop(attempt: Attempt) -> Iterator[None]:
    """Write how an attempt ended that is stopped before any runner listens for signals: it would look lost."""
    try:
        yield
    except (StoppedEarly, KeyboardInterrupt) as error:
        write_result(attempt.directory, outcome_of(error))
        raise


@contextmanager
def releasing(lock: RunLock) -> Iterator[None]:
    """Give the run's lock back where what follows fails."""
    try:
        yield
    except BaseException:
        lock.release()
        raise


def open_job(
    job: JobFile, script: Path, *, fence: tuple[str, int] | None = None, **facts: Any
) -> tuple[RunnerConfig, Attempt, RunLock]:
    """Open an attempt of a job's run, and add to the ledger that the job is running.

    Args:
        script: file of the user's function.
        fence: fencing token, see `RunLock`.
        facts: further facts of the attempt for the ledger, besides its host and process.

    Returns:
        The job's configuration as it was submitted, the attempt, and the lock of its run.

    Raises:
        ConfigRefused: the run is live or cannot be written, or the job's configuration cannot be restored.
    """
    config = _thawed(job)
    again = job.ledger.records()[job.key].attempts > 0
    attempt, lock = start(job.binding, config, [str(script), *job.overrides], again=again, fence=fence)
    # A warning and no refusal: while a sweep is queued, people fix bugs in its code, and want the fixed code to run.
    submitted, now = job.content["program"]["code_id"], code_identity(script.parent).code_id
    if submitted != now:
        note = f"the code was {submitted} when this job was submitted, and is {now}"
        attempt = replace(attempt, notes=(*attempt.notes, note))
    with releasing(lock), refusing_unwritable(config):
        reserve_result(attempt.directory)
        freeze_attempt(config, attempt, script, settings_in(job.content["hydra"], attempt.directory))
        host, pid = os.uname().nodename, os.getpid()
        job.ledger.add(job.key, status=Status.RUNNING, attempt=attempt.directory.name, host=host, pid=pid, **facts)
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
        fix = "restore the file and the app's class, or submit it again"
        raise ConfigRefused([Violation("job", str(job.path), rule, fix)]) from error


def run_attempt(
    app: App, run_job: Callable[..., Any], config: RunnerConfig, attempt: Attempt, place: Place | None = None
) -> Any:
    """Run an opened attempt as Hydra's job, in this process or in one worker for each rank of the layout.

    Args:
        run_job: runs a task as Hydra's job in its directory: `Composer.run_job` or `hydra_job.run_frozen`.
        place: where replica groups run, see `launch.groups`; None for this machine.

    Raises:
        WorkersFailed, WorkersInterrupted: from the workers.
        Exception: what the user's function raised in this process.
    """
    world_size = layout_of(config).world_size
    command, started_in = worker_command(), os.getcwd()
    groups = starts_groups(config, this_machine())

    def task(_: DictConfig) -> Any:
        if world_size == 1 and not groups:
            return run_rank(app.function, config, Current(attempt=attempt, ranks=SINGLE), app.script.stem)
        # Hydra has changed the directory already if `hydra.job.chdir` is set. Workers run the script from its first
        # line, where a relative path must still resolve, and change the directory themselves.
        os.chdir(started_in)
        try:
            if groups:
                from danling_conf.launch.groups import run_groups

                run_groups(command, config, world_size, attempt.directory, place)
            else:
                from danling_conf.launch.workers import run_workers

                run_workers(command, world_size, attempt.directory, attempt.directory / FROZEN)
        except (WorkersFailed, WorkersInterrupted) as error:
            # Overwrite the main rank's result: it may have been killed before it wrote one, and where another rank
            # failed first it wrote only the consequence.
            write_result(attempt.directory, outcome_of(error))
            raise
        return read_result(attempt.directory).number("score")

    with refusing_unwritable(config):  # Hydra's own files; what the task raises is in its outcome
        outcome = run_job(task=task)
    # Not `outcome.return_value`, which prints Hydra's own report of the error before it raises it.
    if isinstance(outcome._return_value, Exception):
        raise outcome._return_value
    return outcome._return_value


def show_error(error: BaseException, run: Path) -> None:
    """Print why an attempt failed or was stopped: of several ranks the error that came first.

    A refusal has no traceback, since it is the configuration that has to change.
    """
    outcome = outcome_of(error)
    if isinstance(error, WorkersFailed) and not error.refused:
        lines = [f"rank {error.rank} failed: {error}", f"the other ranks were stopped; logs: {error.log.parent}"]
    elif isinstance(error, PlainError):
        lines = [str(error), f"run failed: {run}"]
    elif outcome.status is Status.FAILED:
        traceback.print_exception(error)
        lines = [f"run failed: {run}"]
    elif outcome.status is Status.INTERRUPTED:
        lines = [f"{outcome.message}; the run so far: {run}"]
    elif outcome.status is Status.OUT_OF_MEMORY:
        lines = [outcome.message, f"the run so far: {run}"]
    else:
        lines = [outcome.message]
    print(printable_lines("\n".join(lines)), file=sys.stderr)
