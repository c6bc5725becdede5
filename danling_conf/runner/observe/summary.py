"""Summary of all ranks for a log line: one reduction, for which the device is waited for once; and memory in use."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass

import torch
import torch.distributed as distributed

from danling_conf.parallel.process_group import is_distributed
from danling_conf.parallel.waiting import waiting
from danling_conf.runner.observe.meters import LossMeter
from danling_conf.runner.observe.nonfinite import NonFinite
from danling_conf.runner.observe.stopwatch import Lap


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The same on every rank."""

    loss: float | None
    """Mean since the last line; None where there was nothing."""
    peak_bytes: list[float]
    """Of each rank."""
    data_seconds: list[float]
    """That each rank waited for batches in this lap."""
    step_seconds: float | None
    """Of one step, on the rank that took longest; None where nothing was timed."""
    bad_steps: list[int]
    """Steps that were not finite."""
    logged: bool
    """Whether any rank has logged values by name."""


def summarise(
    meter: LossMeter, nonfinite: NonFinite, lap: Lap | None, step: int, device: torch.device, *, names: int = 0
) -> Summary:
    """Read and reset the running mean and what was not finite. Collective; waits for the device.

    Args:
        names: how many names this rank has logged values by.
    """
    several = is_distributed()
    world, rank = (distributed.get_world_size(), distributed.get_rank()) if several else (1, 0)
    data, step_seconds = (0.0, 0.0) if lap is None else (lap.data, lap.stepping / lap.steps)
    numbers: list[float] = []
    for own in (peak_bytes(), data, step_seconds):  # each rank fills in its place
        numbers += [0.0] * rank + [own] + [0.0] * (world - 1 - rank)
    known = torch.tensor([*numbers, names], dtype=torch.float64, device=device)
    values = torch.cat([meter.sums(device), known, nonfinite.flags(step)])
    if several:
        with waiting("the log line"):
            distributed.all_reduce(values)
    read = values.tolist()
    meter.reset()
    memory, waits, seconds = (read[2 + number * world : 2 + (number + 1) * world] for number in range(3))
    return Summary(
        loss=read[0] / read[1] if read[1] else None,
        peak_bytes=memory,
        data_seconds=waits,
        step_seconds=None if lap is None else max(seconds),
        bad_steps=nonfinite.read(step, read[3 + 3 * world :]),
        logged=read[2 + 3 * world] > 0,
    )


def peak_bytes() -> int:
    """The most that this rank has used so far: allocated on the accelerator, or resident in the process."""
    if torch.accelerator.is_available():
        return int(torch.accelerator.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kibibytes


def used_bytes() -> int:
    """What this rank uses now: allocated on the accelerator, or resident in the process (its peak where the system does
    not show it)."""
    if torch.accelerator.is_available():
        return int(torch.accelerator.memory_allocated())
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return peak_bytes()
