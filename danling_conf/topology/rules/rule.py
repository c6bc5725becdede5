"""What a rule is: a pure function from a typed configuration and what is known around it to violations."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from danling_conf.schema import RunnerConfig
from danling_conf.topology.machine import Machine
from danling_conf.topology.violation import Violation


@dataclass(frozen=True, kw_only=True)
class Context:
    """What rules may know beside the configuration."""

    machine: Machine = field(default_factory=Machine)
    given: frozenset[str] = frozenset()
    """Paths that were given on the command line, so that a fix can speak of what the user wrote."""


@dataclass(frozen=True)
class Ineffective:
    """A setting that is allowed and changes nothing as things stand."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path} has no effect: {self.reason}"


Rule = Callable[[RunnerConfig, Context], Iterable[Violation]]
EffectRule = Callable[[RunnerConfig, Context], Iterable[Ineffective]]
