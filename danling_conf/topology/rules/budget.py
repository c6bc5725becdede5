"""How long a run lasts, and how it is measured."""

from __future__ import annotations

from collections.abc import Iterator

from danling_conf.schema import RunnerConfig
from danling_conf.topology.rules.rule import Context
from danling_conf.topology.violation import ABSENT, Violation


def one_budget(config: RunnerConfig, context: Context) -> Iterator[Violation]:
    """A run has steps or epochs, never both."""
    if config.steps is None and config.epochs is None:
        yield Violation("steps", None, "a run needs a budget: steps or epochs", "set steps=1000 or epochs=10")
    elif config.steps is not None and config.epochs is not None:
        # Keep the one on the command line: the other comes from a file that the user did not write just now.
        keep, drop = ("epochs", "steps") if "epochs" in context.given and "steps" not in context.given else (
            "steps", "epochs")  # fmt: skip
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


def microbatches(config: RunnerConfig, context: Context) -> Iterator[Violation]:
    """A pipeline cuts the local batch into whole microbatches."""
    if config.parallel.axes.pipeline <= 1:
        return
    batch = config.dataloader.batch_size or 1
    count, size = config.parallel.pipeline_n_microbatches, config.parallel.pipeline_microbatch_size
    path, divisor = (
        ("parallel.pipeline_microbatch_size", size) if count is None else ("parallel.pipeline_n_microbatches", count)
    )
    if batch % divisor:
        yield Violation(
            path,
            divisor,
            f"it must divide the local batch, dataloader.batch_size={batch}",
            f"choose a divisor of {batch}, or dataloader.batch_size={(batch // divisor + 1) * divisor}",
        )


def stage_parts(config: RunnerConfig, context: Context) -> Iterator[Violation]:
    """The number of pipeline stages is a multiple of the pipeline degree."""
    parts, degree = config.parallel.module_fqns_per_model_part, config.parallel.axes.pipeline
    if parts is not None and degree >= 1 and len(parts) % degree:
        yield Violation(
            "parallel.module_fqns_per_model_part",
            ABSENT,
            f"its {len(parts)} parts are the stages, and parallel.axes.pipeline={degree} must divide their number",
            f"give a multiple of {degree} parts",
        )
