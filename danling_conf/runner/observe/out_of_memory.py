"""Out of memory on an accelerator: what held the memory, and what would need less of it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from danling_conf.records.status import EXIT_FAILED, HasOutcome, Outcome, Status
from danling_conf.schema import RunnerConfig
from danling_conf.topology.layout import layout_of

_GIB = 1 << 30


class OutOfMemory(torch.OutOfMemoryError, HasOutcome):
    """An accelerator had no memory left. A loop that survives `torch.OutOfMemoryError` survives this."""

    @property
    def outcome(self) -> Outcome:
        return Outcome(status=Status.OUT_OF_MEMORY, exit_code=EXIT_FAILED, message=str(self))


def explained(error: torch.OutOfMemoryError, config: RunnerConfig, device: torch.device, step: int) -> OutOfMemory:
    """The error with the step, what the allocator holds, and the settings that need less memory.

    Args:
        step: optimizer steps done before.
    """
    lines = [f"out of memory on {device} in step {step + 1}: {str(error).strip().splitlines()[0]}"]
    if device.type != "cpu":
        lines.append(f"  {_held(device)}")
    lines += [f"  try {way}" for way in ways_out(config)]
    return OutOfMemory("\n".join(lines))


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
    if batch is not None and batch % 2 == 0:
        halves = f"dataloader.batch_size={batch // 2} accum_steps={2 * config.accum_steps}"
        yield f"{halves}: the same global batch in smaller pieces"
    if not layout_of(config).fsdp:
        yield "parallel=fsdpN: parameters, gradients and optimizer states are sharded over N devices"
    elif offload is None or not offload.enabled:
        yield "fsdp=offload: parameters and optimizer states in host memory, slower by their transfers"
