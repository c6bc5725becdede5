"""Workers: the ranks of a run on this machine, started and watched by torch elastic.

Each has its own log. When several fail, the earliest error is shown, since the others follow from it.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from danling_conf.launch.loopback import loopback
from danling_conf.launch.parent import as_parent
from danling_conf.records.logs import rank_log
from danling_conf.records.status import (
    EXIT_FAILED,
    HasOutcome,
    Outcome,
    Status,
    exit_code_of_signal,
    signal_of_exit_code,
    written_status,
)
from danling_conf.records.stopped import STOPPING, is_stop, note_stop
from danling_conf.schema.files import error_file
from danling_conf.topology.rendezvous import LOOPBACK

FROZEN_VARIABLE = "DANLING_CONF_FROZEN"
"""Environment variable that names the frozen configuration of a worker."""
RAISED_AT = "raised_at"
"""Key of a rank's error file: when the error was raised, in seconds."""
STATUS, REASON = "status", "reason"
"""Keys of a rank's error file: what the error means for the run. Torch elastic writes the others."""
_ELASTICS = ("SIGHUP", "SIGQUIT")
"""Signals that elastic's own handler passes on to the ranks."""
_NOTICED_SECONDS = 2.0
_SAVING_SECONDS = 24 * 3600


class WorkersFailed(HasOutcome, RuntimeError):
    """A rank failed; the others were stopped."""

    def __init__(self, rank: int, exit_code: int, message: str, log: Path, status: Status = Status.FAILED) -> None:
        self.rank, self.exit_code, self.log, self.status = rank, exit_code, log, status
        super().__init__(message)

    @property
    def refused(self) -> bool:
        return self.status is Status.REFUSED

    @property
    def outcome(self) -> Outcome:
        # The exit code of a rank that a signal ended is negative.
        return Outcome(status=self.status, exit_code=max(self.exit_code, EXIT_FAILED), message=str(self))


class WorkersInterrupted(HasOutcome, RuntimeError):
    """The workers were stopped by a signal.

    Not a `Stopped`: Hydra's `run_job` catches no SystemExit, and its callbacks would not see the end of the job.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(f"stopped by {signal.Signals(number).name}")

    @property
    def outcome(self) -> Outcome:
        return Outcome(status=Status.INTERRUPTED, exit_code=exit_code_of_signal(self.number), message=str(self))


def run_workers(command: list[str], world_size: int, attempt: Path, frozen: Path) -> None:
    """Run `command` as `world_size` ranks on this machine and wait for them.

    Rank 0 keeps this process's output; every other rank writes to its log in `attempt`.

    Raises:
        WorkersFailed: a rank failed; the error is that of the first one.
        WorkersInterrupted: this process, or a rank, received a stop signal.
    """
    from torch.distributed.elastic.multiprocessing.api import LogsDest, LogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    class RankLogs(LogsSpecs):
        """One file a rank for output and errors; rank 0 keeps the terminal."""

        def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
            paths = {rank: "" if rank == 0 else str(rank_log(attempt, rank)) for rank in envs}
            errors = {rank: str(error_file(attempt, rank)) for rank in envs}
            for rank, environment in envs.items():
                environment["TORCHELASTIC_ERROR_FILE"] = errors[rank]
            return LogsDest(stdouts=paths, stderrs=dict(paths), error_files=errors)

        @property
        def root_log_dir(self) -> str:
            return str(attempt)

    def stop(number: int, frame: Any) -> None:
        # Not elastic's own handler, which does the same: the death of this process's parent must not count as a second
        # signal, see `launch.parent`.
        note_stop()
        raise SignalException(f"stopped by {signal.Signals(number).name}", sigval=signal.Signals(number))

    environment = {FROZEN_VARIABLE: str(frozen), **as_parent(), **threads(world_size)}
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world_size,
        run_id=attempt.name,
        rdzv_backend=loopback(),
        local_addr=LOOPBACK,
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=RankLogs(),
        signals_to_handle=",".join(_ELASTICS),
        # Elastic kills workers that outlive this timeout after a signal, and saving a checkpoint may take long. A
        # second signal ends them at once.
        shutdown_timeout=_SAVING_SECONDS,
    )
    before = {name: os.environ.get(name) for name in environment}
    # Elastic installs signal handlers and never restores the earlier ones.
    handlers = {name: signal.getsignal(getattr(signal, name)) for name in (*STOPPING, *_ELASTICS)}
    for name in STOPPING:
        signal.signal(getattr(signal, name), stop)
    os.environ.update(environment)
    # Elastic logs every failure at length; WorkersFailed has what the user needs.
    elastic_log = logging.getLogger("torch.distributed.elastic")
    level = elastic_log.level
    elastic_log.setLevel(logging.CRITICAL + 1)
    for name in ("multiprocessing.api", "agent.server.api", "agent.server.local_elastic_agent"):
        logging.getLogger(f"{elastic_log.name}.{name}").setLevel(logging.NOTSET)
    try:
        elastic_launch(config, command[0])(*command[1:])
    except ChildFailedError as error:
        raise first_failure(error.failures, attempt) from None
    except SignalException as error:
        raise WorkersInterrupted(error.sigval) from None
    finally:
        elastic_log.setLevel(level)
        for name, handler in handlers.items():
            signal.signal(getattr(signal, name), handler)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def first_failure(failures: Mapping[int, Any], attempt: Path) -> WorkersFailed | WorkersInterrupted:
    """The error of ranks that have ended: that of the rank which failed first.

    Args:
        failures: torch elastic's `ProcessFailure`s, by rank.
    """
    rank, failure = min(failures.items(), key=lambda item: _when(item[1]))
    if is_stop(failure.exitcode):  # a rank received the signal, and all ranks stopped together
        return WorkersInterrupted(signal_of_exit_code(failure.exitcode))
    status = written_status((failure.error_file_data or {}).get(STATUS)) or Status.FAILED
    return WorkersFailed(rank, failure.exitcode, _message(failure, status), rank_log(attempt, rank), status)


def worker_command() -> list[str]:
    """The command line that runs this process's script again, as a worker.

    `-u`: a rank may be killed at any time, and what it printed must not be lost in a buffer.
    """
    # `python -m package.module` has to be repeated as such: run by its path, relative imports would fail.
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        name = spec.name.removesuffix(".__main__")
        return [sys.executable, "-u", "-m", name, *sys.argv[1:]]
    return [sys.executable, "-u", str(Path(sys.argv[0]).absolute()), *sys.argv[1:]]


def threads(world_size: int) -> dict[str, str]:
    """Threads per rank: the cores divided by the ranks, unless the user has set OMP_NUM_THREADS."""
    if "OMP_NUM_THREADS" in os.environ:
        return {}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"OMP_NUM_THREADS": str(max(1, cores // world_size))}


def _when(failure: Any) -> float:
    """Time of a rank's failure in seconds, to find the first one (elastic records whole seconds only)."""
    if RAISED_AT in failure.error_file_data:
        return float(failure.error_file_data[RAISED_AT])
    if failure.exitcode == -signal.SIGTERM:
        return math.inf  # stopped by elastic after another rank failed
    # A rank without an error file was killed or exited by itself. Elastic notices that at its next poll, before another
    # rank can have recorded the loss, but rounds to whole seconds.
    return float(failure.timestamp) - _NOTICED_SECONDS


def _message(failure: Any, status: Status) -> str:
    if status is not Status.FAILED:  # the reason says it all, and a traceback would hide it
        return str(failure.error_file_data[REASON])
    content = failure.error_file_data.get("message", failure.message) if failure.error_file_data else failure.message
    if isinstance(content, dict):
        callstack = content.get("extraInfo", {}).get("py_callstack", "")
        return f"{content.get('message', '')}\n{callstack}".strip()
    if failure.exitcode < 0:
        return f"ended by {signal.Signals(-failure.exitcode).name}"
    return str(content) if failure.error_file_data else f"ended with exit code {failure.exitcode}"
