"""Training process: communication, garbage collection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Optional

from danling_conf.schema.setting import setting


@dataclass(kw_only=True)
class CommConfig:
    """Time limits of collectives."""

    read_by: ClassVar[str] = "danling_conf.parallel.process_group"

    init_timeout_seconds: Optional[int] = setting(None, at_least=1, semantic=False)
    """Time limit of collectives, in seconds, during start-up and compilation. Unset: torch's default."""
    train_timeout_seconds: Optional[int] = setting(None, at_least=1, semantic=False)
    """Tighter limit, in seconds, applied once after the first successful optimizer step. Unset: the first one stays."""


@dataclass(kw_only=True)
class GcConfig:
    """Pacing of Python's garbage collector, so that ranks do not stop at different steps."""

    read_by: ClassVar[str] = "danling_conf.runner.process"

    interval: Optional[int] = setting(None, at_least=1, semantic=False)
    """Optimizer steps between collections. Unset: no pacing."""
    generation: int = setting(1, at_least=0, at_most=2, semantic=False)
    """Generation passed to `gc.collect`: 0, 1 or 2."""
    disable_automatic: bool = setting(True, semantic=False)
    """Switch CPython's automatic collection off while pacing."""
