"""Rules of a run's budget, and of the metric that scores it."""

from __future__ import annotations

from collections.abc import Iterator

from danling_conf.schema import RunnerConfig
from danling_conf.topology.rules.rule import Context
from danling_conf.topology.violation import Violation


def one_budget(config: RunnerConfig, context: Context) -> Iterator[Violation]:
    """A run has steps or epochs, never both."""
    if config.steps is None and config.epochs is None:
        yield Violation("steps", None, "a run needs a budget: steps or epochs", "set steps=1000 or epochs=10")
    elif config.steps is not None and config.epochs is not None:
        # One on the command line against one of a file is settled before: the typed one wins.
        rule = f"steps and epochs exclude each other, and epochs={config.epochs} is set as well"
        yield Violation("steps", config.steps, rule, "add epochs=null")


def monitored_metric(config: RunnerConfig, context: Context) -> Iterator[Violation]:
    """A monitored metric is written as split.metric."""
    monitor = config.scheduler.monitor
    if monitor is not None and "." not in monitor:
        yield Violation(
            "scheduler.monitor", monitor, "a metric is named split.metric", f"write val.{monitor} or train.{monitor}"
        )
