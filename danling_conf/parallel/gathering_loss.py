"""Losses that communicate over the ranks, such as a contrastive one that gathers embeddings.

In an evaluation a rank may have fewer batches than another, or a smaller one. The loss then waits for ranks that do not
come, until the collective times out. It is refused at the first batch.
"""

from __future__ import annotations

from typing import Any

from danling_conf._torch_private.dispatch import TorchDispatchMode
from danling_conf.topology.violation import SettingError, Violation

_NAMESPACES = ("c10d", "_c10d_functional", "c10d_functional")


class Collectives(TorchDispatchMode):
    """Context of a loss, which finds out whether it communicates.

    Args:
        split: that is evaluated.
        even: whether ranks have as many batches as each other, and as large ones. Where not, the first collective is
            not begun, and SettingError is raised in its place.
    """

    def __init__(self, split: str, *, even: bool) -> None:
        super().__init__()
        self.split, self.even, self.found = split, even, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in _NAMESPACES:
            self.found = True
            if not self.even:
                item = uneven(self.split)
                raise SettingError(item.path, item.value, item.rule, item.fix)
        return func(*args, **(kwargs or {}))


def uneven(split: str) -> Violation:
    """The refusal of a split whose ranks do not have the same, under a loss that communicates."""
    return Violation(
        f"dataloader.{split}.drop_last",
        False,
        f"the loss communicates over the ranks, and they do not have equally many samples of {split}: some would wait "
        f"for others that have no batch left",
        f"set dataloader.{split}.drop_last=true, or let the number of samples be a multiple of the data ranks",
    )
