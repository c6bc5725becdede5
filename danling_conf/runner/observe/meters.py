"""Meter of the loss: a running mean that costs no synchronisation until it is read."""

from __future__ import annotations

import torch
import torch.distributed as distributed
from torch import Tensor

from danling_conf.parallel.forward_backward import Measured
from danling_conf.parallel.process_group import is_distributed


class LossMeter:
    """Mean of losses. Appending does not wait for the device; reading reduces over ranks and waits once.

    Losses of an optimizer step count once it has taken place (`commit`); those of one that does not are dropped.
    """

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._count: Tensor | float = 0.0
        self._step_total: Tensor | None = None
        self._step_count: Tensor | float = 0.0

    def append(self, loss: Measured, *, last: bool = False) -> None:
        """Take the loss of a micro-batch. Unless it is the `last` of its step, it is not kept: the output of a CUDA
        graph is overwritten by the next micro-batch."""
        if self._step_total is None:
            self._step_total = loss.total if last else loss.total.to(torch.float64, copy=True)
        else:
            self._step_total += loss.total
        self._step_count = self._step_count + loss.weight

    def step_sums(self, device: torch.device) -> Tensor:
        """Total and count of the step under way, (2,) in float64."""
        if self._step_total is None:
            return torch.zeros(2, dtype=torch.float64, device=device)
        count = torch.as_tensor(self._step_count, dtype=torch.float64, device=device)
        return torch.stack([self._step_total.double(), count])

    def set_step_sums(self, sums: Tensor) -> None:
        """Replace those of the step under way, as by the means over replica groups."""
        if self._step_total is not None:
            self._step_total, self._step_count = sums.unbind()

    def commit(self) -> None:
        """Take the losses of the step under way into the mean."""
        if self._step_total is not None:
            if self._total is None:
                self._total = self._step_total.to(torch.float64, copy=True)
            else:
                self._total += self._step_total
            self._count = self._count + self._step_count
        self.drop()

    def drop(self) -> None:
        """Leave out the losses of the step under way."""
        self._step_total, self._step_count = None, 0.0

    def mean(self) -> float | None:
        """Mean over everything since the last reset, of all ranks; None when there was nothing. Collective."""
        if self._total is None:
            return None
        count = torch.as_tensor(self._count, dtype=self._total.dtype, device=self._total.device)
        return reduce_sum(torch.stack([self._total, count])).ratio()

    def sums(self, device: torch.device) -> Tensor:
        """Total and count of this rank, (2,) in float64; zeros where there was nothing."""
        if self._total is None:
            return torch.zeros(2, dtype=torch.float64, device=device)
        return torch.stack([self._total, torch.as_tensor(self._count, dtype=torch.float64, device=device)])

    def set_sums(self, sums: Tensor) -> None:
        """Continue from `sums` of another meter."""
        self.reset()
        self.drop()
        if bool(sums[1] > 0):
            self._total, self._count = sums.clone().unbind()

    def reset(self) -> None:
        self._total, self._count = None, 0.0


class Sums:
    """A sum and its weight, reduced over all ranks."""

    def __init__(self, values: list[float]) -> None:
        self.values = values

    def ratio(self) -> float | None:
        """Sum over weight; None where the weight is zero."""
        total, weight = self.values
        return total / weight if weight else None


def reduce_sum(values: Tensor) -> Sums:
    """A (2,) tensor of a sum and its weight, summed over all ranks. Collective; waits for the device.

    Ranks that share samples (tensor) hold the same two numbers, which cancel in the ratio; those of other pipeline
    stages hold zeros.
    """
    if is_distributed():
        distributed.all_reduce(values)
    return Sums(values.tolist())
