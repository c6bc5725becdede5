"""Rules of pipelines: whether the model and the batch can be split as configured, and run by the schedule."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from danling_conf.schema import RunnerConfig, open_keys
from danling_conf.schema.parallel import (
    SINGLE_STAGE_SCHEDULES,
    SPLIT_BACKWARD_SCHEDULES,
    V_SCHEDULES,
    ParallelConfig,
)
from danling_conf.topology.rules.rule import Context
from danling_conf.topology.violation import ABSENT, Violation

_SCHEDULE = "parallel.pipeline_schedule"


def microbatches(config: RunnerConfig, context: Context) -> Iterator[Violation]:
    """A pipeline splits the local batch into equal microbatches."""
    if config.parallel.axes.pipeline <= 1:
        return
    where, batch = _batch_of_training(config)
    path, divisor = divisor_of_batch(config.parallel)
    if batch % divisor:
        yield Violation(
            path,
            divisor,
            f"it must divide the local batch, {where}={batch}",
            f"choose a divisor of {batch}, or {where}={(batch // divisor + 1) * divisor}",
        )


def whole_batches(config: RunnerConfig, context: Context) -> Iterator[Violation]:
    """A smaller last batch could not be split into the same microbatches as the others."""
    if config.parallel.axes.pipeline <= 1:
        return
    given = _of_training(config, "drop_last")
    path = "dataloader.drop_last" if given is None else "dataloader.train.drop_last"
    if (config.dataloader.drop_last if given is None else given) is False:
        yield Violation(
            path,
            False,
            "a pipeline trains on whole batches, which it cuts into microbatches of one size",
            f"{path}=null drops the incomplete batch of training only",
        )


def stage_parts(config: RunnerConfig, context: Context) -> Iterator[Violation]:
    """The number of stages is a multiple of the pipeline degree, and one that the schedule supports."""
    parts, degree = config.parallel.module_fqns_per_model_part, config.parallel.axes.pipeline
    schedule = config.parallel.pipeline_schedule
    if parts is None or degree < 1:
        return
    path, count = "parallel.module_fqns_per_model_part", len(parts)
    if count % degree:
        yield Violation(
            path,
            ABSENT,
            f"its {count} parts are the stages, and parallel.axes.pipeline={degree} must divide their number",
            f"give a multiple of {degree} parts",
        )
    elif schedule in SINGLE_STAGE_SCHEDULES and count != degree > 1:
        yield Violation(
            path,
            ABSENT,
            f"its {count} parts are the stages, and the schedule {schedule} has one for each of {degree} ranks",
            f"give {degree} parts, or {_SCHEDULE}=Interleaved1F1B",
        )
    elif schedule in V_SCHEDULES and count != 2 * degree and degree > 1:
        yield Violation(
            path,
            ABSENT,
            f"its {count} parts are the stages, and the schedule {schedule} has two for each of {degree} ranks",
            f"give {2 * degree} parts, or {_SCHEDULE}=Interleaved1F1B",
        )


def enough_microbatches(config: RunnerConfig, context: Context) -> Iterator[Violation]:
    """Schedules need some number of microbatches to be in flight."""
    degree, schedule = config.parallel.axes.pipeline, config.parallel.pipeline_schedule
    where, batch = _batch_of_training(config)
    path, divisor = divisor_of_batch(config.parallel)
    if degree <= 1 or batch % divisor:
        return
    count = config.parallel.pipeline_n_microbatches or batch // divisor
    parts = config.parallel.module_fqns_per_model_part
    stages = len(parts) if parts is not None else degree * (1 if schedule in SINGLE_STAGE_SCHEDULES else 2)
    smaller = f"choose a smaller {path.rpartition('.')[2]}, or " if divisor > 1 else "choose "
    more = f"{smaller}a larger {where}, {stages * divisor} or more"
    if path == "parallel.pipeline_n_microbatches":
        more = f"{path}={stages}"
    if schedule in ("1F1B", "DualPipeV") and count < stages:
        yield Violation(
            path,
            divisor,
            f"the schedule {schedule} needs a microbatch for each of {stages} stages, and has {count}",
            more,
        )
    rounds = max(1, count // degree)
    if schedule in ("Interleaved1F1B", "InterleavedZeroBubble") and count % rounds:
        yield Violation(
            path,
            divisor,
            f"the schedule {schedule} takes {count} microbatches in {rounds} rounds, which does not divide them",
            f"have a multiple of {degree} microbatches",
        )


def local_statistics(config: RunnerConfig, context: Context) -> Iterator[Violation]:
    """A stage sees one microbatch at a time, so that no sum over ranks gives the statistics of a batch."""
    if config.parallel.sync_batch_norm and config.parallel.axes.pipeline > 1:
        yield Violation(
            "parallel.sync_batch_norm",
            True,
            "a pipeline normalises over the samples of a microbatch, whatever other ranks have",
            "parallel.sync_batch_norm=false, or a layout without a pipeline",
        )


def split_backward(config: RunnerConfig, context: Context) -> Iterator[Violation]:
    """Gradients of inputs and of weights cannot be computed separately in compiled code."""
    schedule = config.parallel.pipeline_schedule
    if config.parallel.axes.pipeline <= 1 or schedule not in SPLIT_BACKWARD_SCHEDULES:
        return
    if config.compile.enable:
        yield Violation(
            _SCHEDULE,
            schedule,
            "it computes the gradients of inputs and of weights separately, which torch cannot do in compiled code",
            f"compile=none, or {_SCHEDULE}=Interleaved1F1B",
        )


def stages_are_not_compiled(config: RunnerConfig, context: Context) -> Iterator[Violation]:
    """A schedule works inside a stage's forward, so blocks can be compiled and stages cannot."""
    if config.parallel.axes.pipeline > 1 and config.compile.enable and config.compile.scope == "model":
        yield Violation(
            "compile.scope", "model", "a pipeline has no whole model to compile, only blocks", "compile.scope=block"
        )


def _of_training(config: RunnerConfig, name: str) -> Any:
    """A setting of the training split itself; None where it has none."""
    own = open_keys(config.dataloader).get("train") or {}
    return own.get(name) if isinstance(own, dict) else getattr(own, name, None)


def _batch_of_training(config: RunnerConfig) -> tuple[str, int]:
    """The local batch of training, and where it is set."""
    own = _of_training(config, "batch_size")
    if own is not None:
        return "dataloader.train.batch_size", own
    return "dataloader.batch_size", config.dataloader.batch_size or 1


def divisor_of_batch(section: ParallelConfig) -> tuple[str, int]:
    """The setting that cuts a batch into microbatches, and its value, which must divide the batch."""
    if section.pipeline_n_microbatches is not None:
        return "parallel.pipeline_n_microbatches", section.pipeline_n_microbatches
    return "parallel.pipeline_microbatch_size", section.pipeline_microbatch_size
