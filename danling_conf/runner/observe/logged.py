"""Values that are logged by name from anywhere: means that cost no synchronisation until a log line reads them."""

from __future__ import annotations

import re

import torch
import torch.distributed as distributed
from torch import Tensor

from danling_conf.parallel.process_group import is_distributed
from danling_conf.parallel.waiting import waiting
from danling_conf.records.metrics import BASE, PRODUCTIVE, STATUS

_NAME = re.compile(r"[\w./ -]+")
"""What every tracker takes as a name."""
OWN = (
    *BASE,
    STATUS,
    PRODUCTIVE,
    "goodput",
    "train.loss",
    "train.lr",
    "train.grad_norm",
    "train.expert_load",
    "train.nonfinite_steps",
    "train.samples_per_second",
    "train.tokens_per_second",
    "train.step_seconds",
    "train.data_seconds",
    "train.compute_seconds",
    "train.mfu",
    "memory.peak_bytes",
    "evaluation.seconds",
    "checkpoint.seconds",
)
"""Names of the runner's own values, in the same records."""


class LoggedValues:
    """Sums and counts by name, on the device.

    The mean of a name is over all values that all ranks have logged since the last log line, each of the same weight.
    Ranks may log different names: at a log line the names of all ranks are gathered, if there are any.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor | float] = {}
        self._counts: dict[str, int] = {}

    def add(self, name: str, value: float | Tensor, device: torch.device) -> None:
        """Take a value into the mean of a name. Does not wait for the device, and keeps no graph.

        Raises:
            ValueError: the name is the runner's own or no tracker takes it, or the value is no single number.
        """
        if name not in self._sums:
            _check(name)
            self._sums[name], self._counts[name] = 0.0, 0
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(f"log({name!r}): a tensor of shape {tuple(value.shape)} is no single number")
            # A copy: the output of a CUDA graph is overwritten by the next step.
            value = value.detach().reshape(()).to(device, torch.float64, copy=True, non_blocking=True)
        elif not isinstance(value, (int, float)):
            raise ValueError(f"log({name!r}): {value!r} is no number and no tensor")
        self._sums[name] = self._sums[name] + value
        self._counts[name] += 1

    @property
    def names(self) -> list[str]:
        """The names that this rank has logged since the last line."""
        return list(self._sums)

    def take(self, device: torch.device) -> dict[str, float]:
        """The means, and start anew. Collective; call it where any rank has names. Waits for the device."""
        sums, counts = self._sums, self._counts
        self._sums, self._counts = {}, {}
        names = sorted(sums)
        several = is_distributed()
        if several:
            everywhere: list[list[str]] = [[] for _ in range(distributed.get_world_size())]
            with waiting("the names of logged values"):
                distributed.all_gather_object(everywhere, names)
            names = sorted({name for theirs in everywhere for name in theirs})
        if not names:
            return {}
        totals = [torch.as_tensor(sums.get(name, 0.0), dtype=torch.float64, device=device) for name in names]
        numbers = torch.tensor([counts.get(name, 0) for name in names], dtype=torch.float64, device=device)
        values = torch.cat([torch.stack(totals), numbers])
        if several:
            with waiting("the logged values"):
                distributed.all_reduce(values)
        read = values.tolist()
        return {name: read[index] / read[index + len(names)] for index, name in enumerate(names)}

    def take_where_any(self, device: torch.device) -> dict[str, float]:
        """`take`, where it is not known whether any rank has names. Collective."""
        if is_distributed():
            some = torch.tensor(len(self._sums), device="cpu")
            with waiting("the logged values"):
                distributed.all_reduce(some, op=distributed.ReduceOp.MAX)
            return self.take(device) if some else {}
        return self.take(device)


def _check(name: str) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"log({name!r}): a name has letters, digits, spaces and . _ - / only")
    if name in OWN or name.startswith("memory.peak_bytes."):
        raise ValueError(f"log({name!r}): the runner logs a value of its own by this name: choose another")
