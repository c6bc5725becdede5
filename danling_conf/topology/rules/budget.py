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
        # The fix keeps the one on the command line: that one the user has just typed, the other comes from a file.
        epochs_typed = "epochs" in context.given and "steps" not in context.given
        keep, drop = ("epochs", "steps") if epochs_typed else ("steps", "epochs")
        yield Violation(
            keep,
            getattr(config, keep),
            f"steps and epochs exclude each other, and {drop}={getattr(config, drop)} is set as well",
            f"add {drop}=null",
        )


def monitored_metric(config: RunnerConfig, context: Context) -> Iterator[Violation]:
    """A monitored metric is written as split.metric."""
    monitor = config.scheduler.monitor
    if monitor is not None and "." not in monitor:
        yield Violation(
            "scheduler.monitor", monitor, "a metric is named split.metric", f"write val.{monitor} or train.{monitor}"
        )
