"""Rules of settings that are declared but not implemented yet: refused where ignoring them would change the
training."""

from __future__ import annotations

from collections.abc import Iterator

from danling_conf.schema import RunnerConfig
from danling_conf.topology.rules.rule import Context
from danling_conf.topology.violation import Violation


def built_stack(config: RunnerConfig, context: Context) -> Iterator[Violation]:
    """The deepspeed stack is a name without an implementation."""
    if config.stack == "deepspeed":
        fix = "leave stack=auto: parallel=fsdpN is ZeRO 3, fsdp=zero2 keeps parameters, fsdp=offload uses host memory"
        yield Violation("stack", config.stack, "this stack is not implemented yet", fix)
