"""One rank of a run: calls the user's function with the resolved configuration, and records the outcome.

Every way to start a rank ends in `run_rank`. `run_worker` is the process of a rank that `run_workers` started.
"""

from __future__ import annotations

import faulthandler
import gc
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from danling_conf.config.hydra_job import output_directory
from danling_conf.config.readonly import place_output
from danling_conf.launch.parent import end_with_parent
from danling_conf.launch.rank_error import hold_own_room, record_failure
from danling_conf.launch.store import serve
from danling_conf.records import current
from danling_conf.records.current import Current
from danling_conf.records.frozen import take_part_in, thaw
from danling_conf.records.logs import ENDS_RANK, close_logs, configure_job_logging, open_logs, rank_log, redirect_output
from danling_conf.records.result import hold_room, write_result
from danling_conf.records.run_lock import RankLock
from danling_conf.records.status import Status, outcome_of
from danling_conf.records.stopped import Stopped
from danling_conf.schema import RunnerConfig
from danling_conf.topology.rank_environment import RankEnvironment, in_group
from danling_conf.topology.rendezvous import keep_to_loopback
from danling_conf.topology.violation import PlainError

_log = logging.getLogger(__name__)
REPEATED_VARIABLE = "DANLING_CONF_SIGNALS_REPEATED"
"""Environment variable: `1` in a worker whose scheduler repeats its signals, see `Current.repeats_signals`."""


def run_rank(function: Callable[[Any], Any], config: RunnerConfig, start: Current, job_name: str) -> Any:
    """Call the user's function as one rank. Returns its value, which on rank 0 is the run's score.

    Rank 0 writes the outcome to `result.json`. Raises whatever the function raised.
    """
    attempt, ranks = start.attempt, start.ranks
    if config.ft.address is None:
        keep_to_loopback(ranks, os.environ)
    share = RankLock(attempt.run_directory, attempt.token)
    if ranks.main:
        hold_room(attempt.directory)
    handlers = open_logs(attempt.directory, ranks, log=config.log, job_name=job_name)
    _log.info("%s", _place_of(ranks))
    current.enter(start)
    directory = output_directory()
    if directory is not None:
        place_output(config, directory)
    try:
        value = function(config)
        if ranks.main:  # of several groups each, with the same result: the first of them that ends
            write_result(attempt.directory, outcome_of(None), value)
        return value
    except BaseException as error:
        outcome = outcome_of(error)
        if outcome.status in (Status.FAILED, Status.OUT_OF_MEMORY):
            trace = None if isinstance(error, PlainError) else error
            _log.error("rank %d failed: %s", ranks.rank, outcome.reason, exc_info=trace, extra={ENDS_RANK: True})
        if ranks.main and ranks.groups == 1:
            write_result(attempt.directory, outcome)
        raise
    finally:
        current.enter(None)
        close_logs(handlers)
        share.release()
        # After any other exception the ranks are out of step, and leaving the group could wait for them for ever.
        if sys.exc_info()[0] in (None, Stopped):
            _leave_process_group()


def _place_of(ranks: RankEnvironment) -> str:
    """Rank, host and master of a rank, for its log: the first thing to compare when ranks do not find each other."""
    of_group = f"replica group {ranks.group} of {ranks.groups}, start {ranks.starts}; " if ranks.groups > 1 else ""
    if ranks.world_size == 1:
        return f"{of_group}one process, on {os.uname().nodename}"
    master = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
    return (
        f"{of_group}rank {ranks.rank} of {ranks.world_size}, local rank {ranks.local_rank} of "
        f"{ranks.local_world_size} on {os.environ.get('SLURMD_NODENAME', os.uname().nodename)}, "
        f"started by {ranks.launcher}; master {master}"
    )


def _leave_process_group() -> None:
    # Look in sys.modules: a function that never imported torch has no group, and importing it here takes seconds.
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        groups = sys.modules.get("danling_conf.parallel.process_group")
        if groups is not None:
            groups.stop()  # with the groups of background work, which it keeps
        else:
            # torch 2.13 sometimes aborts when a sharded model, kept by a reference cycle, outlives its process group.
            gc.collect()
            distributed.destroy_process_group()


def run_worker(function: Callable[[Any], Any], frozen: Path, ranks: RankEnvironment, job_name: str) -> Any:
    """Run as a rank that `run_workers` started. After an error it exits with the outcome's code; the parent prints the
    error."""
    end_with_parent()
    faulthandler.enable()  # a rank that crashes in C++ says where it was
    hold_own_room()
    try:
        # Before all else: other ranks may be waiting for the store.
        serve()
        content = frozen.read_text()
        config, attempt = thaw(content)
        ranks, terminal = replace(in_group(ranks), launcher="local workers"), None
        if ranks.groups > 1 and ranks.main:
            # The terminal is for the group that leads, and which one does may change.
            terminal = os.dup(1)
            redirect_output(rank_log(attempt.directory, ranks.number))
        hydra = take_part_in(content)
        if ranks.main and hydra is not None:
            configure_job_logging(hydra)
        repeated = os.environ.pop(REPEATED_VARIABLE, "") == "1"
        start = Current(attempt=attempt, ranks=ranks, terminal=terminal, repeats_signals=repeated)
        return run_rank(function, config, start, job_name)
    except KeyboardInterrupt as interrupt:
        sys.exit(outcome_of(interrupt).exit_code)
    except Exception as error:
        outcome = outcome_of(error)
        record_failure(error, outcome)
        leave_at_once(outcome.exit_code)


def leave_at_once(code: int) -> NoReturn:
    """End this process without any cleanup.

    Destructors of process groups and atexit handlers would wait for other ranks, which may be waiting for this one in a
    collective.
    """
    # os._exit does not flush Python's buffers.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
