"""Layout: the seven degrees of parallelism as one value."""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import prod

FILL = -1
"""A degree that is filled from the world size."""

WORLD_AXES = ("pipeline", "replicate", "shard", "context", "tensor")
"""The axes whose product is the world size, outermost first: ranks that are next to each other differ in `tensor`."""

DATA_AXES = ("replicate", "shard")
"""The axes along which ranks see different samples."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The seven degrees of a run, and whether FSDP wraps it."""

    replicate: int = 1
    shard: int = 1
    context: int = 1
    pipeline: int = 1
    tensor: int = 1
    expert: int = 1
    expert_tensor: int = 1
    fsdp: bool = False

    def degrees(self) -> dict[str, int]:
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name != "fsdp"}

    @property
    def filled(self) -> bool:
        """Whether every degree is known."""
        return FILL not in self.degrees().values()

    @property
    def world_size(self) -> int:
        """Number of processes. Raises ValueError while a degree is still to be filled."""
        if not self.filled:
            raise ValueError("a layout with a degree of -1 has no world size yet: fill it first")
        return prod(getattr(self, axis) for axis in WORLD_AXES)

    @property
    def data_degree(self) -> int:
        """Number of data ranks: ranks that see different samples."""
        return prod(getattr(self, axis) for axis in DATA_AXES)
