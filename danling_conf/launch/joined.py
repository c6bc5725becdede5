"""Rank that torchrun or srun started: it meets the other ranks and joins their world."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from hydra.types import RunMode

from danling_conf.config.check import check, compose_or_refuse
from danling_conf.config.hydra_adapter import ConfigSearch, composer
from danling_conf.launch.app import App, refuse
from danling_conf.launch.execute import open_attempt, recording_stop
from danling_conf.launch.rank import leave_at_once, run_rank
from danling_conf.launch.store import announce, await_configuration, meet
from danling_conf.records.current import Current
from danling_conf.records.frozen import take_part_in, thaw
from danling_conf.records.status import EXIT_REFUSED, outcome_of
from danling_conf.records.stopped import StoppedEarly, stopping_in_order
from danling_conf.schema.files import FROZEN
from danling_conf.topology.rank_environment import RankEnvironment
from danling_conf.topology.violation import ABSENT, ConfigRefused, Violation, trace_of


def run_joined(app: App, search: ConfigSearch, parsed: argparse.Namespace, ranks: RankEnvironment) -> Any:
    """Run as one rank of a world: rank 0 composes, checks and claims the run; the others read what it froze.

    A rank that fails ends its process at once, so that the launcher sees it and stops the others.
    """
    try:
        with stopping_in_order():
            return _run_joined(app, search, parsed, ranks)
    except StoppedEarly as stopped:
        if ranks.main:
            print(stopped, file=sys.stderr)
        leave_at_once(outcome_of(stopped).exit_code)


def _run_joined(app: App, search: ConfigSearch, parsed: argparse.Namespace, ranks: RankEnvironment) -> Any:
    try:
        if parsed.multirun:
            raise ConfigRefused([_no_sweep("--multirun", ranks)])
        return _lead(app, search, parsed, ranks) if ranks.main else _follow(app, ranks)
    except ConfigRefused as refusal:
        if ranks.main:
            refuse(refusal)
        sys.exit(EXIT_REFUSED)
    except KeyboardInterrupt as interrupt:
        sys.exit(outcome_of(interrupt).exit_code)
    except Exception as error:
        _record(error)
        print(trace_of(error).rstrip() or error, file=sys.stderr)
        leave_at_once(outcome_of(error).exit_code)


def _no_sweep(what: str, ranks: RankEnvironment) -> Violation:
    return Violation(what, ABSENT, f"{ranks.launcher} started ranks of one run", "sweep without it")


def _lead(app: App, search: ConfigSearch, parsed: argparse.Namespace, ranks: RankEnvironment) -> Any:
    with composer(search) as composing:
        try:
            composed = compose_or_refuse(composing, parsed.overrides)
            if composed.hydra.mode == RunMode.MULTIRUN:
                raise ConfigRefused([_no_sweep("hydra.mode", ranks)])
            config = check(composing, composed, parsed.overrides)
            attempt, directory, lock = open_attempt(app, composed, config)
        except ConfigRefused:
            # The others already wait for the configuration: without a word they would wait until their timeout.
            announce(meet(ranks), None, ranks.world_size)
            raise
        try:
            with recording_stop(attempt):
                store = meet(ranks)
                announce(store, (attempt.directory / FROZEN).read_text(), ranks.world_size)
                start = Current(attempt=attempt, ranks=ranks, store=store)
                outcome = composing.run_job(
                    composed,
                    lambda _: run_rank(app.function, config, start, search.job_name),
                    directory,
                )
        finally:
            lock.release()
        if isinstance(outcome._return_value, Exception):
            raise outcome._return_value
        return outcome._return_value


def _follow(app: App, ranks: RankEnvironment) -> Any:
    store = meet(ranks)
    content = await_configuration(store)
    if content is None:
        sys.exit(EXIT_REFUSED)
    config, attempt = thaw(content)
    take_part_in(content)
    return run_rank(app.function, config, Current(attempt=attempt, ranks=ranks, store=store), app.script.stem)


def _record(error: Exception) -> None:
    """Write the error to torchrun's file, so that its summary shows the error of the rank that failed first."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
