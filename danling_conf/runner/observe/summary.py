"""What a log line says of all ranks: one reduction, for which the device is waited for once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as distributed

from danling_conf.runner.observe.memory import peak_bytes
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


def summarise(meter: LossMeter, nonfinite: NonFinite, lap: Lap | None, step: int, device: torch.device) -> Summary:
    """Read and reset the running mean and what was not finite. Collective; waits for the device."""
    several = distributed.is_initialized() and distributed.get_world_size() > 1
    world, rank = (distributed.get_world_size(), distributed.get_rank()) if several else (1, 0)
    own = torch.zeros(3, world, dtype=torch.float64)
    own[:, rank] = torch.tensor(
        [peak_bytes(), 0.0 if lap is None else lap.data, 0.0 if lap is None else lap.stepping / lap.steps],
        dtype=torch.float64,
    )
    values = torch.cat([meter.sums(device), own.flatten().to(device), nonfinite.flags(step)])
    if several:
        distributed.all_reduce(values)
    read = values.tolist()
    meter.reset()
    memory, data, seconds = (read[2 + number * world : 2 + (number + 1) * world] for number in range(3))
    return Summary(
        loss=read[0] / read[1] if read[1] else None,
        peak_bytes=memory,
        data_seconds=data,
        step_seconds=None if lap is None else max(seconds),
        bad_steps=nonfinite.read(step, read[2 + 3 * world :]),
    )
