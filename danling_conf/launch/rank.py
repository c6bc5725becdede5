"""One rank's part of an attempt: the user's function, called with the resolved configuration."""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from danling_conf.records import current
from danling_conf.records.current import Current
from danling_conf.records.logs import close_logs, open_logs
from danling_conf.records.run_directory import write_whole
from danling_conf.records.stopped import Stopped
from danling_conf.schema import RunnerConfig
from danling_conf.topology.rank_environment import RankEnvironment
from danling_conf.topology.violation import ConfigRefused

RESULT = "result.json"
_log = logging.getLogger(__name__)


def run_rank(function: Callable[[Any], Any], config: RunnerConfig, start: Current, job_name: str) -> Any:
    """Call the user's function as the rank that `start` says; its value is the run's score.

    The main process writes the outcome to `result.json`. Raises what the function raised.
    """
    attempt, ranks = start.attempt, start.ranks
    handlers = open_logs(attempt.directory, ranks, log=config.log, job_name=job_name)
    _log.info("%s", _place_of(ranks))
    current.enter(start)
    try:
        value = function(config)
        if ranks.main:
            write_result(attempt.directory, "completed", value)
        return value
    except BaseException as error:
        ended_well = isinstance(error, SystemExit) and error.code in (None, 0)
        if not ended_well and not isinstance(error, (ConfigRefused, KeyboardInterrupt, Stopped)):
            _log.exception("rank %d failed", ranks.rank)
        if ranks.main and ended_well:
            write_result(attempt.directory, "completed", None)
        elif ranks.main:
            status = "refused" if isinstance(error, ConfigRefused) else "failed"
            status = "interrupted" if isinstance(error, (KeyboardInterrupt, Stopped)) else status
            write_result(attempt.directory, status, None, f"{type(error).__name__}: {error}")
        raise
    finally:
        current.enter(None)
        close_logs(handlers)
        if sys.exc_info()[0] in (None, Stopped):
            _leave_process_group()


def _place_of(ranks: RankEnvironment) -> str:
    """Where a rank stands, for its log: what went wrong between ranks is often seen here first."""
    if ranks.world_size == 1:
        return f"one process, on {os.uname().nodename}"
    master = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
    return (
        f"rank {ranks.rank} of {ranks.world_size}, local rank {ranks.local_rank} of {ranks.local_world_size} on "
        f"{os.environ.get('SLURMD_NODENAME', os.uname().nodename)}, started by {ranks.launcher}; master {master}"
    )


def write_result(attempt: Path, status: str, value: Any, error: str | None = None) -> None:
    """Write how an attempt ended."""
    write_whole(attempt / RESULT, json.dumps({"status": status, "score": score_of(value), "error": error}) + "\n")


def score_of(value: Any) -> float | None:
    """What a user's function returned, as the run's score; None for what is no finite number, which JSON cannot say."""
    number = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
    return number if number is not None and math.isfinite(number) else None


def read_result(attempt: Path) -> dict[str, Any] | None:
    """How an attempt ended; None when it wrote nothing."""
    path = attempt / RESULT
    return json.loads(path.read_text()) if path.is_file() else None


def _leave_process_group() -> None:
    # Only a function that used torch can have started one; a rank that failed must not wait for the others here.
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        # Sharded models in reference cycles that outlive the group make torch 2.13 abort now and then.
        gc.collect()
        distributed.destroy_process_group()
