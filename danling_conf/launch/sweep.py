"""A sweep on this machine: every job checked, then run one after another; true exit code, a ledger of the runs."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from hydra.errors import HydraException
from hydra.utils import get_class
from omegaconf import DictConfig, open_dict
from omegaconf.errors import OmegaConfBaseException

from danling_conf.launch.command import App, check, compose_or_refuse
from danling_conf.launch.execute import open_attempt, run_attempt, show_failure
from danling_conf.launch.jobs_launcher import JobsLauncher
from danling_conf.launch.local_workers import WorkersFailed, WorkersInterrupted
from danling_conf.launch.run_rank import score_of
from danling_conf.resolution.hydra_adapter import Composer
from danling_conf.resolution.identity import config_id, job_id
from danling_conf.resolution.stopped import Stopped
from danling_conf.schema import RunnerConfig
from danling_conf.topology.violation import ConfigRefused, Violation

# Hydra makes the sweep's directory before it launches; its name must be known without a configuration object.
_DIRECTORY = "hydra.sweep.dir='${{workspace_root}}/${{lineage}}/${{experiment}}/sweeps/{stamp}'"
LEDGER = "jobs.jsonl"


@dataclass
class Sweep:
    """What the launcher needs to run jobs; Hydra carries it where it expects a task function."""

    app: App
    composing: Composer
    failed: list[str] = field(default_factory=list)
    __name__: str = "sweep"

    def __call__(self, config: DictConfig) -> Any:
        raise TypeError("this sweep runs with the launchers of danling-conf: hydra/launcher=danling_local")


def run_sweep(app: App, composing: Composer, overrides: Sequence[str]) -> None:
    """Run Hydra's sweep over this machine. Exits with 1 when a job failed; raises ConfigRefused when one is refused."""
    arguments = list(overrides)
    arguments += _launcher(composing, arguments)
    if not any(item.startswith("hydra.sweep.dir=") for item in arguments):
        arguments.append(_DIRECTORY.format(stamp=datetime.now().strftime("%Y%m%d-%H%M%S-%f")))
    sweep = Sweep(app=app, composing=composing)
    try:
        composing.multirun(arguments, sweep)
    except (HydraException, OmegaConfBaseException) as error:
        _remove_unused(composing, arguments)
        raise ConfigRefused(_sweep_faults(composing, overrides, error)) from error
    except ConfigRefused:
        _remove_unused(composing, arguments)
        raise
    except (WorkersFailed, JobFailed):
        sys.exit(1)


def _launcher(composing: Composer, arguments: list[str]) -> list[str]:
    """The override that chooses our launcher in place of Hydra's default one; none where the user chose one of ours.

    Raises ConfigRefused for any other launcher, which would run jobs that nobody has checked.
    """
    ours = "hydra/launcher=danling_local"
    try:
        composed = composing.compose(arguments, multirun=True)
        kind = get_class(composed.hydra.launcher._target_)
    except (HydraException, OmegaConfBaseException, ValueError):
        # Whatever is wrong is told of all jobs, by the sweep.
        return [] if any(item.startswith("hydra/launcher=") for item in arguments) else [ours]
    chosen = composed.hydra.runtime.choices.get("hydra/launcher")
    if issubclass(kind, JobsLauncher):
        return []
    if chosen != "basic" or any(item.startswith("hydra/launcher=") for item in arguments):
        rule = "it would run jobs without checking all of them first, and cannot start a layout's processes"
        raise ConfigRefused([Violation("hydra/launcher", chosen, rule, f"leave it out, or write {ours}")])
    return [ours]


class JobFailed(RuntimeError):
    """A job of the sweep failed; its error has been shown."""


def run_jobs(sweep: Sweep, master: DictConfig, jobs: list[list[str]], first: int) -> list[JobReturn]:
    """Check all jobs, then run them in order; one line a job, and all results kept.

    Raises ConfigRefused, before any job starts, with the faults of all jobs.
    """
    directory = Path(master.hydra.sweep.dir)
    prepared = _check_all(sweep.composing, master, jobs, first)
    print(f"sweep of {len(jobs)} jobs: {directory}")
    results = []
    for number, (overrides, composed, config) in enumerate(prepared, first):
        print(f"#{number} {' '.join(filter_overrides(overrides))}", flush=True)
        outcome = _run_job(sweep, composed, config, overrides, number, directory)
        score = score_of(outcome._return_value) if outcome.status == JobStatus.COMPLETED else None
        print(f"#{number} {outcome.status.name.lower()}" + (f" score={score:.6g}" if score is not None else ""))
        results.append(outcome)
    failed = sum(item.status == JobStatus.FAILED for item in results)
    print(f"sweep done: {len(results) - failed} of {len(results)} jobs completed: {directory}", flush=True)
    return results


def _check_all(
    composing: Composer, master: DictConfig, jobs: list[list[str]], first: int
) -> list[tuple[list[str], DictConfig, RunnerConfig]]:
    prepared: list[tuple[list[str], DictConfig, RunnerConfig]] = []
    refusals: list[tuple[int, list[str], ConfigRefused]] = []
    own = [str(item) for item in master.hydra.overrides.hydra]
    for number, overrides in enumerate(jobs, first):
        try:
            composed = compose_or_refuse(composing, [*own, *overrides])
            with open_dict(composed):
                composed.hydra.job.num = number
                composed.hydra.job.id = str(number)
            prepared.append((overrides, composed, check(composing, composed, overrides)))
        except ConfigRefused as refusal:
            refusals.append((number, overrides, refusal))
    if refusals:
        raise ConfigRefused(_of_jobs(refusals))
    return prepared


def _of_jobs(refusals: Sequence[tuple[int, list[str], ConfigRefused]]) -> list[Violation]:
    """The faults of all jobs, each told once, with the first job that has it."""
    found: dict[tuple[str, str, str], Violation] = {}
    for number, overrides, refusal in refusals:
        for item in refusal.violations:
            shown = f"job #{number} ({' '.join(filter_overrides(overrides))}): {item.rule}"
            found.setdefault((item.path, str(item.value), item.rule), replace(item, rule=shown))
    return list(found.values())


def _remove_unused(composing: Composer, arguments: list[str]) -> None:
    """Remove the directory that Hydra has made for a sweep of which no job was started."""
    try:
        directory = Path(composing.compose(arguments, multirun=True).hydra.sweep.dir)
    except (HydraException, OmegaConfBaseException, ValueError):
        return  # the sweep itself could not be composed, so nothing was made
    if directory.is_dir() and [item.name for item in directory.iterdir()] == ["multirun.yaml"]:
        shutil.rmtree(directory)


def _run_job(
    sweep: Sweep, composed: DictConfig, config: RunnerConfig, overrides: list[str], number: int, directory: Path
) -> JobReturn:
    outcome = JobReturn(overrides=overrides, cfg=composed, status=JobStatus.FAILED)
    record: dict[str, Any] = {
        "job": number, "overrides": overrides, "job_id": job_id(config), "config_id": config_id(config),
    }  # fmt: skip
    lock, interruption = None, None
    try:
        attempt, lock = open_attempt(sweep.app, composed, config, overrides)
        record["run"] = str(attempt.run_directory)
        outcome.return_value = run_attempt(sweep.app, sweep.composing, composed, config, attempt)
        outcome.status = JobStatus.COMPLETED
    except KeyboardInterrupt:
        interruption = 128 + signal.SIGINT
    except Stopped as stopped:
        interruption = 128 + stopped.number
    except WorkersInterrupted as error:
        interruption = error.exit_code
    except WorkersFailed as error:
        show_failure(error)
        outcome.return_value = JobFailed(str(error))
    except ConfigRefused as error:
        print(error.report(), file=sys.stderr)
        outcome.return_value = JobFailed(str(error))
    except SystemExit as error:  # of the user's function: the end of that job, not of the sweep
        if error.code in (None, 0):
            outcome.status = JobStatus.COMPLETED
            outcome.return_value = None
        else:
            outcome.return_value = JobFailed(f"exit {error.code}")
    except Exception as error:
        traceback.print_exc()
        outcome.return_value = JobFailed(f"{type(error).__name__}: {error}")
    finally:
        if lock is not None:
            lock.release()
    completed = outcome.status == JobStatus.COMPLETED
    status = "completed" if completed else "failed" if interruption is None else "interrupted"
    record |= {"status": status, "score": score_of(outcome._return_value) if completed else None}
    with open(directory / LEDGER, "a") as ledger:
        ledger.write(json.dumps(record) + "\n")
    if interruption is not None:
        print(f"#{number} interrupted; the jobs after it were not started: {directory}", file=sys.stderr)
        sys.exit(interruption)
    return outcome


def _sweep_faults(composing: Composer, overrides: Sequence[str], error: Exception) -> list[Violation]:
    """The faults of a sweep that Hydra would not compose, each with the first job that has it."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    try:
        parsed = OverridesParser.create(config_loader=composing.loader).parse_overrides(list(overrides))
        jobs = BasicSweeper.split_arguments(parsed, None)[0]
    except HydraException:
        jobs = [list(overrides)]
    refusals: list[tuple[int, list[str], ConfigRefused]] = []
    for number, job in enumerate(jobs):
        try:
            check(composing, compose_or_refuse(composing, job), job)
        except ConfigRefused as refusal:
            refusals.append((number, job, refusal))
    fallback = Violation("sweep", " ".join(overrides), str(error).strip().splitlines()[0], "mend the sweep's overrides")
    return _of_jobs(refusals) or [fallback]
