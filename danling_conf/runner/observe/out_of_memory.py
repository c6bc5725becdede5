"""Out of memory on an accelerator: what held the memory, and what would need less of it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from danling_conf.records.planned import breakdown_of
from danling_conf.records.status import EXIT_FAILED, HasOutcome, Outcome, Status
from danling_conf.runner.observe.planned import plan_now
from danling_conf.runner.world import World
from danling_conf.schema import RunnerConfig
from danling_conf.topology.layout import coordinates, layout_of

_GIB = 1 << 30
_WAYS = 3
"""Ways out that are shown."""


class OutOfMemory(torch.OutOfMemoryError, HasOutcome):
    """An accelerator had no memory left. A loop that survives `torch.OutOfMemoryError` survives this."""

    @property
    def outcome(self) -> Outcome:
        return Outcome(status=Status.OUT_OF_MEMORY, exit_code=EXIT_FAILED, message=str(self))


def full_device(error: BaseException) -> torch.OutOfMemoryError | None:
    """The error of a device without memory that an error is, or was raised for: torch's pipelines and compilers raise
    one of their own for it."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, torch.OutOfMemoryError):
        found = found.__cause__
    return found


def explained(error: torch.OutOfMemoryError, config: RunnerConfig, world: World, step: int) -> OutOfMemory:
    """The error with the step, what the allocator holds, what is planned to, and the settings that need less memory.

    Args:
        step: optimizer steps done before.
    """
    device = world.device
    lines = [f"out of memory on {device} in step {step + 1}: {str(error).strip().splitlines()[0]}"]
    if device.type != "cpu":
        lines.append(f"  {_held(device)}")
    plan = plan_now(config.plan, world.attempt, world.ranks, device)
    if plan is not None:
        stage = coordinates(world.layout, world.ranks.rank)["pipeline"]
        lines += [f"  {line}" for line in breakdown_of(plan.rank_at(stage))]
    ways = list(plan.ways) if plan is not None else []
    # What the plan has measured stands first, and not a second time without its figure.
    known = {_setting(way) for way in ways}
    ways += [way for way in ways_out(config) if _setting(way) not in known]
    lines += [f"  try {way}" for way in ways[:_WAYS]]
    return OutOfMemory("\n".join(lines))


def _setting(way: str) -> str:
    return way.partition(":")[0].partition("=")[0]


def _held(device: torch.device) -> str:
    free, total = torch.accelerator.get_memory_info(device)
    used, peak = torch.accelerator.memory_allocated(device), torch.accelerator.max_memory_allocated(device)
    reserved = torch.accelerator.memory_reserved(device)
    # What this process has not reserved may belong to other processes, whose memory no setting of ours frees.
    elsewhere = max(0, total - free - reserved)
    return (
        f"tensors held {used / _GIB:.2f} GiB (at most {peak / _GIB:.2f}), the allocator {reserved / _GIB:.2f}, "
        f"contexts and other processes {elsewhere / _GIB:.2f} of {total / _GIB:.2f}"
    )


def ways_out(config: RunnerConfig) -> Iterator[str]:
    """Settings that need less memory, the cheapest first, each with its price."""
    if config.activation_checkpointing.mode == "none":
        yield "activation_checkpointing.mode=full: blocks compute their activations again, a third more arithmetic"
    if config.precision in (None, "fp32"):
        yield "precision=bf16: half the memory of activations"
    batch, offload = config.dataloader.batch_size, config.fsdp.offload_policy
    section = config.parallel
    if section.axes.pipeline > 1:  # its schedule says how many microbatches are kept, whatever the batch
        half = section.pipeline_microbatch_size // 2
        if half and section.pipeline_n_microbatches is None:
            yield f"parallel.pipeline_microbatch_size={half}: half the activations of each microbatch in flight"
    elif batch is not None and batch % 2 == 0:
        halves = f"dataloader.batch_size={batch // 2} accum_steps={2 * config.accum_steps}"
        yield f"{halves}: the same global batch in smaller pieces"
    if not layout_of(config).fsdp:
        yield "parallel=fsdpN: parameters, gradients and optimizer states are sharded over N devices"
    elif offload is None or not offload.enabled:
        yield "fsdp=offload: parameters and optimizer states in host memory, slower by their transfers"
