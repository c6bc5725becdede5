"""What the user should know of an accepted configuration and of the run that it got."""

from __future__ import annotations

import sys

from danling_conf.config.check import warnings_of
from danling_conf.records.run_directory import Attempt
from danling_conf.schema import RunnerConfig


def warn(attempt: Attempt, config: RunnerConfig) -> None:
    """Tell it on the terminal, before anything starts."""
    for line in (*attempt.notes, *warnings_of(config)):
        print(f"warning: {line}", file=sys.stderr)
