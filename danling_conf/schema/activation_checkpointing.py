"""Activation checkpointing: less memory for more computation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, List, Optional

from danling_conf.schema.setting import setting


@dataclass(kw_only=True)
class ActivationCheckpointingConfig:
    """Recompute activations of the repeated blocks in the backward pass instead of keeping them."""

    read_by: ClassVar[str] = "danling_conf.parallel.activation_checkpointing"

    mode: str = setting("none", choices=("none", "full", "every_n", "selective"), semantic=False)
    """`none` keeps all activations; `full` recomputes every block; `every_n` recomputes each n-th block; `selective`
    recomputes every block but keeps the results of the expensive operators."""
    every_n: int = setting(2, at_least=1, semantic=False)
    """With `mode: every_n`: recompute one block in this many."""
    keep_ops: Optional[List[str]] = setting(None, semantic=False)
    """With `mode: selective`: operators whose results are kept, such as `aten.mm.default`. Unset: attention, and every
    second product of a layer with its weight, as torchtitan does."""

    _target_: str = "danling_conf.parallel.activation_checkpointing.from_keywords"
    _recursive_: bool = False
