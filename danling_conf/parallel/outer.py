"""Outer step of semi-synchronous training: what groups make of the weights that each has trained for a while.

`local_sgd` takes the mean of the weights (S. Stich, https://arxiv.org/abs/1805.09767). `diloco` takes the mean change
as a gradient, for SGD with Nesterov momentum on the weights of the agreement before (A. Douillard et al.,
https://arxiv.org/abs/2311.08105).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from danling_conf.parallel.replica_groups import local
from danling_conf.schema.fault_tolerance import DILOCO, FtConfig


class Outer:
    """The weights that groups have agreed on last, and the step from there.

    Args:
        parameters: of this rank, that are trained.
        momentum: of the outer optimizer, one tensor for each parameter, laid out like it; changed in place. Empty
            where there is no such optimizer.
    """

    def __init__(self, section: FtConfig, parameters: Sequence[nn.Parameter], momentum: Sequence[Tensor] = ()) -> None:
        self._section = section
        self._diloco = section.sync == DILOCO
        # Once, while nothing is gathered.
        with torch.no_grad():
            self._live = [local(item) for item in parameters]
        self._agreed = [item.clone() for item in self._live]
        self._momentum = [local(item) for item in momentum]
        self._proposed: list[Tensor] = []

    def begin(self) -> None:
        """A stretch of steps begins: keep what it begins with."""
        with torch.no_grad():
            for kept, item in zip(self._agreed, self._live, strict=True):
                kept.copy_(item)

    def proposed(self) -> list[Tensor]:
        """What this group proposes, to be averaged in place."""
        if self._diloco:
            self._proposed = [kept - item for kept, item in zip(self._agreed, self._live, strict=True)]
        else:
            self._proposed = [item.clone() for item in self._live]
        return self._proposed

    def end(self, *, committed: bool) -> None:
        """Take the average over where the groups have agreed on it; else go on with this group's own weights."""
        proposed, self._proposed = self._proposed, []
        if not committed:
            return
        if not self._diloco:
            for item, mean in zip(self._live, proposed, strict=True):
                item.copy_(mean)
            return
        rate, momentum = self._section.outer_lr, self._section.outer_momentum
        for item, kept, buffer, change in zip(self._live, self._agreed, self._momentum, proposed, strict=True):
            buffer.mul_(momentum).add_(change)
            item.copy_(kept - rate * (change + momentum * buffer))
