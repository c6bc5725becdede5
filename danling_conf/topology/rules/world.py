"""Rules of degrees: against each other, the world size and the devices."""

from __future__ import annotations

import math
from collections.abc import Iterator

from danling_conf.schema import FILL, RunnerConfig
from danling_conf.schema.layout import WORLD_AXES, Layout
from danling_conf.topology.layout import fill, layout_of
from danling_conf.topology.machine import Machine
from danling_conf.topology.rules.rule import Context
from danling_conf.topology.violation import ABSENT, Violation

_MOST_RANKS = 2**31 - 1
"""torch numbers ranks in 32 bits."""


def whole_degrees(config: RunnerConfig, context: Context) -> Iterator[Violation]:
    """A degree is a whole number from 1 up, and at most one of them is -1."""
    degrees = {axis: getattr(config.parallel.axes, axis) for axis in WORLD_AXES}
    for axis, degree in degrees.items():
        if degree == 0:
            yield Violation(
                f"parallel.axes.{axis}", 0, "a degree is at least 1, or -1 to be filled", f"parallel.axes.{axis}=1"
            )
    size = math.prod(abs(degree) for degree in degrees.values())
    if size > _MOST_RANKS:
        axis = max(degrees, key=lambda each: degrees[each])
        rule = f"the degrees make {size:.3g} ranks, and no more than {_MOST_RANKS} can be numbered"
        yield Violation(f"parallel.axes.{axis}", degrees[axis], rule, "choose a smaller layout")
    unknown = [axis for axis, degree in degrees.items() if degree == FILL]
    for axis in unknown[1:]:
        yield Violation(
            f"parallel.axes.{axis}",
            FILL,
            f"only one degree can be filled from the world size, and parallel.axes.{unknown[0]} is -1 already",
            "give a number to all but one of them",
        )


def sharding_is_fsdp(config: RunnerConfig, context: Context) -> Iterator[Violation]:
    """Sharding is done by FSDP, so a shard degree and `fsdp.enabled` must agree."""
    shard = config.parallel.axes.shard
    if not config.fsdp.enabled and shard not in (0, 1):
        replicate = config.parallel.axes.replicate
        name = f"hsdp{replicate}x{shard}" if replicate > 1 else "fsdp" if shard == FILL else f"fsdp{shard}"
        yield Violation(
            "parallel.axes.shard",
            shard,
            "a shard degree needs FSDP, and the layout leaves fsdp.enabled=false",
            f"choose a layout that shards, such as parallel={name}, or parallel.axes.shard=1",
        )


def stack_fits_layout(config: RunnerConfig, context: Context) -> Iterator[Violation]:
    """`stack=ddp` replicates only."""
    if config.stack == "ddp":
        axes = config.parallel.axes
        others = [axis for axis in WORLD_AXES if axis != "replicate" and getattr(axes, axis) not in (0, 1)]
        if others or config.fsdp.enabled:
            what = f"parallel.axes.{others[0]}={getattr(axes, others[0])}" if others else "fsdp.enabled=true"
            yield Violation(
                "stack",
                "ddp",
                f"the ddp stack only replicates, and {what}",
                "leave stack=auto, or choose parallel=ddpN",
            )


def graph_of_one_process(config: RunnerConfig, context: Context) -> Iterator[Violation]:
    """A graph that has the backward pass inside knows nothing of DDP and FSDP2: in torch 2.13 all gradients are None
    afterwards, and no error is raised."""
    if config.stack != "graph":
        return
    several = [axis for axis in WORLD_AXES if getattr(config.parallel.axes, axis) not in (0, 1)]
    if several or config.fsdp.enabled:
        what = f"parallel.axes.{several[0]}={getattr(config.parallel.axes, several[0])}" if several else "FSDP"
        yield Violation(
            "stack",
            "graph",
            f"it is for one process without FSDP, and the layout has {what}: torch 2.13 loses every gradient, without "
            "an error, where backward is in the graph of a model under DDP or FSDP2",
            "stack=auto compile=whole, or parallel=single",
        )


def world_size(config: RunnerConfig, context: Context) -> Iterator[Violation]:
    """The product of the degrees is the number of processes."""
    layout = known_layout(config)
    if layout is None:
        return
    machine = context.machine
    try:
        layout = fill(layout, machine.fill_world_size)
    except ValueError as error:
        axis = next(axis for axis in WORLD_AXES if getattr(layout, axis) == FILL)
        rule = f"{_filled_from(machine)}, and {error}"
        yield Violation(f"parallel.axes.{axis}", FILL, rule, "give every degree a number")
        return
    started = machine.started_world_size
    product = " x ".join(f"{axis} {getattr(layout, axis)}" for axis in WORLD_AXES if getattr(layout, axis) > 1)
    what = product or "the layout single"
    fills = "ddp" if config.stack == "ddp" else "fsdp"
    if started is not None and layout.world_size != started:
        yield Violation(
            "parallel",
            ABSENT,
            f"{what} needs {_processes(layout.world_size)}, but {machine.launcher} started {started}",
            f"start {layout.world_size}, or choose a layout of {started}: parallel={fills} fills itself",
        )
    elif started is None and _more_than_here(layout, config, machine):
        groups = _groups_here(config, machine)
        several = f"{what} in {groups} groups (ft.group_size)" if groups > 1 else what
        yield Violation(
            "parallel",
            ABSENT,
            f"{several} needs {layout.world_size * groups} devices, and this machine has {machine.devices}",
            "choose a smaller layout, start it on a cluster, or parallel.mesh_device_type=cpu",
        )


def reshard_divides(config: RunnerConfig, context: Context) -> Iterator[Violation]:
    """Resharding to a smaller group cuts the ranks that share weights (shard x context) into whole groups."""
    size, layout = config.fsdp.reshard_after_forward, known_layout(config)
    if size is None or isinstance(size, bool) or layout is None or not layout.fsdp:
        return
    try:
        layout = fill(layout, context.machine.fill_world_size)
    except ValueError:
        return  # reported by `world_size`
    degree = layout.shard * layout.context
    if size < 1 or degree % size:
        what = "the shard degree" if layout.context == 1 else "shard x context"
        yield Violation(
            "fsdp.reshard_after_forward",
            size,
            f"it is true, false, or a divisor of {what}, {degree}",
            "choose one of these",
        )


def known_layout(config: RunnerConfig) -> Layout | None:
    """The layout of a configuration; None where its degrees are invalid, which `whole_degrees` reports."""
    layout = layout_of(config)
    degrees = [getattr(layout, axis) for axis in WORLD_AXES]
    invalid = 0 in degrees or degrees.count(FILL) > 1 or math.prod(map(abs, degrees)) > _MOST_RANKS
    return None if invalid else layout


def _filled_from(machine: Machine) -> str:
    """Origin of the world size that fills a degree of -1."""
    if machine.started_world_size:
        return f"{machine.launcher} started {machine.started_world_size}"
    if machine.cluster_world_size:
        return f"the job's nodes take {_processes(machine.cluster_world_size)}"
    return f"this machine has {machine.devices} devices" if machine.devices else "this machine runs one process on CPU"


def _more_than_here(layout: Layout, config: RunnerConfig, machine: Machine) -> bool:
    """Whether a run on this machine needs more accelerators than it has; without any, ranks share the CPU."""
    on_cpu = not machine.devices or config.parallel.mesh_device_type == "cpu"
    needed = layout.world_size * _groups_here(config, machine)
    return machine.cluster_world_size is None and not on_cpu and needed > machine.devices


def _groups_here(config: RunnerConfig, machine: Machine) -> int:
    """Replica groups that a command starts on this machine."""
    alone = not config.ft.enabled or config.ft.lighthouse or machine.lighthouse
    return 1 if alone else config.ft.group_size


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"
