"""Rule: a pure function from a typed configuration and its context to violations.

An effect rule returns settings that are allowed but have no effect. The package's `__init__` lists both kinds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from danling_conf.schema import RunnerConfig, declared_class, defaults_of
from danling_conf.schema.layout import WORLD_AXES
from danling_conf.topology.machine import Machine
from danling_conf.topology.violation import Violation


@dataclass(frozen=True, kw_only=True)
class Context:
    """Input of the rules besides the configuration."""

    machine: Machine = field(default_factory=Machine)
    given: frozenset[str] = frozenset()
    """Paths of the settings on the command line: they win over files and presets, and a fix names what was typed."""
    choices: Mapping[str, Any] = field(default_factory=dict)
    """Choices of groups, by group."""
    own_loop: bool = False
    """Whether the app trains by a loop of its own, which needs no budget of ours."""

    def on_cpu(self, config: RunnerConfig) -> bool:
        """Whether ranks run on the CPU: there is no accelerator, or the mesh is not to use it."""
        return not self.machine.devices or config.parallel.mesh_device_type == "cpu"


@dataclass(frozen=True)
class Ineffective:
    """A setting that is allowed, was given, and changes nothing in this configuration."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path} has no effect: {self.reason}"


def one_process(config: RunnerConfig) -> bool:
    """Whether the layout has one process. A degree of -1 counts as several: it may be filled with any number."""
    return all(getattr(config.parallel.axes, axis) == 1 for axis in WORLD_AXES)


def compiles(config: RunnerConfig) -> bool:
    """Whether something is compiled: the graph stack is nothing else, whatever `compile.enable` is."""
    return config.compile.enable or config.stack == "graph"


def changed(section: Any, prefix: str, reason: str) -> Iterator[Ineffective]:
    """Every setting of a section that has another value than its default, as having no effect for one reason."""
    default = defaults_of(declared_class(section))
    for item in fields(default):
        if item.name.startswith("_"):
            continue
        if getattr(section, item.name) != getattr(default, item.name):
            yield Ineffective(f"{prefix}.{item.name}", reason)


Rule = Callable[[RunnerConfig, Context], Iterable[Violation]]
EffectRule = Callable[[RunnerConfig, Context], Iterable[Ineffective]]
