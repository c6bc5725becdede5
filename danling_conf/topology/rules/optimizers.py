"""Rules of optimizers and schedulers: whether they exist, take the options that are given, and follow a metric."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from danling_conf.schema import RunnerConfig
from danling_conf.schema.torch_options import (
    OPTIMIZERS,
    SCHEDULERS,
    Problem,
    find_optimizer,
    find_scheduler,
    group_problems,
    nearest,
    optimizer_options,
    option_problems,
    scheduler_options,
)
from danling_conf.topology.rules.rule import Context
from danling_conf.topology.violation import ABSENT, Violation


def violations_of(problems: Iterable[Problem], where: str) -> Iterator[Violation]:
    """The problems of a section's options, with the path of the section."""
    for problem in problems:
        value = ABSENT if problem.value is None else problem.value
        yield Violation(f"{where}.{problem.option}", value, problem.why, problem.fix)


def known_optimizer(config: RunnerConfig, context: Context) -> Iterator[Violation]:
    """The optimizer exists, takes its options, and can be stepped by the runner."""
    section = config.optim
    entry = find_optimizer(section.type)
    if entry is None:
        yield Violation("optim.type", section.type, "torch.optim has no such class", nearest(section.type, OPTIMIZERS))
        return
    yield from violations_of(option_problems(entry, optimizer_options(section)), "optim")
    for index, group in enumerate(section.param_groups or []):
        yield from violations_of(group_problems(entry, group), f"optim.param_groups[{index}]")
    if entry.needs_closure:
        yield Violation(
            "optim.type",
            section.type,
            f"{entry.name} evaluates the loss several times a step, which the runner's loop does not do",
            "choose another optimizer, or step it in a loop of your own",
        )
    axes = config.parallel.axes
    replicated_parts = axes.replicate not in (0, 1) and axes.pipeline not in (0, 1)
    distributed = config.fsdp.enabled or {axes.tensor, axes.context} - {0, 1} or replicated_parts
    if distributed and not entry.sharded:
        what = "FSDP has sharded" if config.fsdp.enabled else "are tensors of a device mesh, as in this layout"
        yield Violation(
            "optim.type",
            section.type,
            f"torch cannot step {entry.name} on parameters that {what}",
            "choose another optimizer (optim=adamw), or a ddp layout (parallel=ddpN)",
        )


def known_scheduler(config: RunnerConfig, context: Context) -> Iterator[Violation]:
    """The scheduler exists and takes its options."""
    section = config.scheduler
    entry = find_scheduler(section.type)
    if entry is None:
        yield Violation(
            "scheduler.type",
            section.type,
            "there is no such scheduler",
            nearest(section.type, {*SCHEDULERS, "plateau"}),
        )
        return
    yield from violations_of(option_problems(entry, scheduler_options(section)), "scheduler")
    if section.monitor is not None and not entry.metric_driven and not entry.own_class:
        yield Violation(
            "scheduler.monitor",
            section.monitor,
            f"{entry.name} is not driven by a metric",
            "remove it, or scheduler=plateau",
        )
    if entry.metric_driven and section.interval == "step":
        yield Violation(
            "scheduler.interval",
            "step",
            f"{entry.name} advances when its metric is evaluated",
            "scheduler.interval=epoch",
        )
    warmup = section.warmup_steps
    if entry.shape and warmup and section.interval != "epoch" and config.steps is not None and warmup > config.steps:
        yield Violation(
            "scheduler.warmup_steps",
            warmup,
            f"it is longer than the run, steps={config.steps}",
            f"scheduler.warmup_steps=0, or steps={warmup} or more",
        )


def monitored_metric(config: RunnerConfig, context: Context) -> Iterator[Violation]:
    """A monitored metric is written as split.metric."""
    monitor = config.scheduler.monitor
    if monitor is not None and "." not in monitor:
        yield Violation(
            "scheduler.monitor", monitor, "a metric is named split.metric", f"write val.{monitor} or train.{monitor}"
        )
