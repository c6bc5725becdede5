"""Meter of the loss: a running mean that costs no synchronisation until it is read."""

from __future__ import annotations

import torch
import torch.distributed as distributed
from torch import Tensor

from danling_conf.parallel.measured import Measured
from danling_conf.parallel.process_group import is_distributed

Number = Tensor | float
"""A number that is on the device still, or a plain one."""


def at_hand(value: Number) -> Number:
    """A scalar without a wait for it: on the CPU a plain number, of which nothing on the device has to be made."""
    return value.item() if isinstance(value, Tensor) and value.is_cpu else value


class LossMeter:
    """Mean of losses. Appending does not wait for the device; reading reduces over ranks and waits once.

    Losses of an optimizer step count once it has taken place (`commit`); those of one that does not are dropped.
    """

    def __init__(self) -> None:
        self._total: Number | None = None
        self._count: Number = 0.0
        self._step_total: Number | None = None
        self._step_count: Number = 0.0

    def append(self, loss: Measured, *, last: bool = False, whole: bool = False) -> Number:
        """Take the loss of a micro-batch. A tensor is kept only if it is the `last` of its step: the output of a CUDA
        graph is overwritten by the next micro-batch.

        Args:
            whole: it is a step of its own, and takes place: it counts at once.

        Returns:
            The total, as `at_hand` does.
        """
        total = at_hand(loss.total)
        weight = loss.weight if type(loss.weight) is float else at_hand(loss.weight)
        if whole and self._total is not None:
            self._total += total
            self._count = self._count + weight
            return total
        if self._step_total is None:
            self._step_total = total if last else _copied(total)
        else:
            self._step_total += total
        self._step_count = self._step_count + weight
        if whole:
            self.commit()
        return total

    def step_sums(self, device: torch.device) -> Tensor:
        """Total and count of the step under way, (2,) in float64."""
        if self._step_total is None:
            return torch.zeros(2, dtype=torch.float64, device=device)
        return _pair(self._step_total, self._step_count, device)

    def set_step_sums(self, sums: Tensor) -> None:
        """Replace those of the step under way, as by the means over replica groups."""
        if self._step_total is not None:
            self._step_total, self._step_count = map(at_hand, sums.unbind())

    def commit(self) -> None:
        """Take the losses of the step under way into the mean."""
        if self._step_total is not None:
            if self._total is None:
                self._total = _copied(self._step_total)
            else:
                self._total += self._step_total
            self._count = self._count + self._step_count
            self._step_total, self._step_count = None, 0.0

    def drop(self) -> None:
        """Leave out the losses of the step under way."""
        self._step_total, self._step_count = None, 0.0

    def mean(self) -> float | None:
        """Mean over everything since the last reset, of all ranks; None when there was nothing. Collective."""
        if self._total is None:
            return None
        device = self._total.device if isinstance(self._total, Tensor) else torch.device("cpu")
        return reduce_sum(_pair(self._total, self._count, device)).ratio()

    def sums(self, device: torch.device) -> Tensor:
        """Total and count of this rank, (2,) in float64; zeros where there was nothing."""
        if self._total is None:
            return torch.zeros(2, dtype=torch.float64, device=device)
        return _pair(self._total, self._count, device)

    def set_sums(self, sums: Tensor) -> None:
        """Continue from `sums` of another meter."""
        self.reset()
        self.drop()
        if bool(sums[1] > 0):
            self._total, self._count = map(at_hand, sums.clone().unbind())

    def reset(self) -> None:
        self._total, self._count = None, 0.0


def _copied(value: Number) -> Number:
    return value.to(torch.float64, copy=True) if isinstance(value, Tensor) else value


def _pair(total: Number, count: Number, device: torch.device) -> Tensor:
    if isinstance(total, Tensor) or isinstance(count, Tensor):
        return torch.stack([torch.as_tensor(item, dtype=torch.float64, device=device) for item in (total, count)])
    return torch.tensor([total, count], dtype=torch.float64, device=device)


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
