"""From a resolved configuration to a finished attempt: claim, freeze, run here or in local workers."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

from omegaconf import DictConfig

from danling_conf.config.hydra_adapter import Composer, hydra_settings
from danling_conf.launch.app import App
from danling_conf.launch.rank import read_result, run_rank, write_result
from danling_conf.launch.workers import WorkersFailed, WorkersInterrupted, run_workers, worker_command
from danling_conf.records.current import Current
from danling_conf.records.frozen import FROZEN, freeze_attempt
from danling_conf.records.run_directory import Attempt, claim
from danling_conf.records.run_lock import RunLock
from danling_conf.records.warn import warn
from danling_conf.schema import RunnerConfig
from danling_conf.topology.layout import layout_of
from danling_conf.topology.rank_environment import SINGLE
from danling_conf.topology.violation import ConfigRefused


def execute(app: App, composing: Composer, composed: DictConfig, config: RunnerConfig) -> Any:
    """Run one configuration to its end; gives its score. Exits the process where it failed."""
    attempt, lock = open_attempt(app, composed, config)
    try:
        return run_attempt(app, partial(composing.run_job, composed), config, attempt)
    except ConfigRefused:
        raise
    except WorkersFailed as failure:
        show_failure(failure)
        sys.exit(failure.exit_code if failure.exit_code > 0 else 1)
    except WorkersInterrupted as interruption:
        _show_interruption(str(interruption), attempt)
        sys.exit(interruption.exit_code)
    except KeyboardInterrupt:
        _show_interruption("interrupted", attempt)
        sys.exit(130)
    except Exception:
        traceback.print_exc()
        print(f"run failed: {attempt.run_directory}", file=sys.stderr)
        sys.exit(1)
    finally:
        lock.release()


def open_attempt(app: App, composed: DictConfig, config: RunnerConfig) -> tuple[Attempt, RunLock]:
    """Claim the run, write what is frozen of the attempt, and tell the user what they should know."""
    attempt, lock = claim(config)
    freeze_attempt(config, attempt, app.script, hydra_settings(composed, attempt.directory))
    warn(attempt, config)
    return attempt, lock


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
            # The main rank may have been stopped before it could say how the attempt ended.
            failed = "refused" if isinstance(error, WorkersFailed) and error.refused else "failed"
            status = failed if isinstance(error, WorkersFailed) else "interrupted"
            write_result(attempt.directory, status, None, str(error))
            raise
        result = read_result(attempt.directory)
        return None if result is None else result["score"]

    outcome = run_job(task=task, directory=attempt.directory)
    if isinstance(outcome._return_value, Exception):
        raise outcome._return_value
    return outcome._return_value


def show_failure(failure: WorkersFailed) -> None:
    """The first failing rank's error; a refusal without its traceback."""
    if failure.refused:
        print(str(failure), file=sys.stderr)
    else:
        print(f"rank {failure.rank} failed: {failure}", file=sys.stderr)
        print(f"the other ranks were stopped; logs: {failure.log.parent}", file=sys.stderr)


def _show_interruption(reason: str, attempt: Attempt) -> None:
    print(f"{reason}; the run so far: {attempt.run_directory}", file=sys.stderr)
