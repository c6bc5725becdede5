"""Rules of settings that are declared but not implemented yet: refused where ignoring them would change the
training."""

from __future__ import annotations

from collections.abc import Iterator

from danling_conf.schema import RunnerConfig
from danling_conf.topology.rules.rule import Context
from danling_conf.topology.violation import Violation


def built_fault_tolerance(config: RunnerConfig, context: Context) -> Iterator[Violation]:
    """TorchFT would change how gradients are averaged."""
    if config.ft.enabled:
        yield Violation("ft.enabled", True, "fault tolerance by TorchFT is not implemented yet", "ft=none")
