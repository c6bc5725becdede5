"""What the user should know of an accepted configuration and of the run that it got."""

from __future__ import annotations

import sys

from danling_conf.resolution.run_directory import Attempt
from danling_conf.schema import RunnerConfig
from danling_conf.topology.machine import this_machine
from danling_conf.topology.rules import Context, ineffective_settings


def warn(attempt: Attempt, config: RunnerConfig) -> None:
    """Tell it on the terminal, before anything starts."""
    for line in (*attempt.notes, *warnings_of(config)):
        print(f"warning: {line}", file=sys.stderr)


def warnings_of(config: RunnerConfig) -> list[str]:
    """The settings that have no effect."""
    return [str(item) for item in ineffective_settings(config, Context(machine=this_machine()))]
