"""Job of a sweep: its checked configuration, and the settings of the launcher that starts it.

`hydra.launcher` is not part of a run's configuration, but its settings are declared and checked in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from omegaconf import DictConfig, OmegaConf

from danling_conf.config.identity import config_id, job_id
from danling_conf.config.resolve import merge_leaves
from danling_conf.config.typed import check_declarations
from danling_conf.groups.source import LAUNCHERS, SUBMITIT
from danling_conf.schema import Layout, RunnerConfig
from danling_conf.schema.launcher import REFUSED_OF_SUBMITIT, LauncherConfig
from danling_conf.schema.typed_node import typed_node_of
from danling_conf.topology.layout import layout_of
from danling_conf.topology.rules.launcher import launcher_faults
from danling_conf.topology.violation import Violation, unique

PREFIX = "hydra.launcher."


@dataclass(frozen=True, kw_only=True)
class Job:
    """An accepted job of a sweep, with everything needed to start it later, on any machine."""

    number: int
    """Its place in the sweep."""
    overrides: tuple[str, ...]
    """Its overrides on the command line, with the sweep's values in place."""
    config: RunnerConfig
    """Resolved and read-only."""
    hydra: Mapping[str, Any]
    """Hydra's own settings (`hydra_job.hydra_settings`), shared between jobs."""
    launcher: Mapping[str, Any]
    """`hydra.launcher` of this job as plain values, interpolations resolved."""

    @property
    def job_id(self) -> str:
        return job_id(self.config)

    @property
    def config_id(self) -> str:
        return config_id(self.config)

    @property
    def layout(self) -> Layout:
        return layout_of(self.config)


def check_launcher(settings: Mapping[str, Any]) -> tuple[LauncherConfig | None, list[Violation]]:
    """Settings of one of our launchers as an instance of its class, and their faults; None for other launchers.

    Args:
        settings: plain values, interpolations resolved.
    """
    target = settings.get("_target_")
    kinds = (LAUNCHERS | SUBMITIT).values()
    kind = next((kind for kind in kinds if getattr(kind, "_target_", None) == target), None)
    if kind is None:
        return None, []
    node = typed_node_of(kind)
    violations = merge_leaves(node, settings, kind, PREFIX)
    violations += check_declarations(node, kind, PREFIX)
    typed = OmegaConf.to_object(node)
    assert isinstance(typed, LauncherConfig)
    if kind in SUBMITIT.values():
        declared = {item.name: item.default for item in fields(kind)}
        violations += [
            Violation(PREFIX + name, getattr(typed, name), rule, fix)
            for name, (rule, fix) in REFUSED_OF_SUBMITIT.items()
            if declared[name] in (None, False) and getattr(typed, name) != declared[name]
        ]
    faulty = {item.path for item in violations}
    violations += [item for item in launcher_faults(typed) if item.path not in faulty]
    return typed, unique(violations)


def no_launcher(value: Any) -> Violation:
    """The fault of a launcher that is null, or anything else than a section."""
    fix = "leave it out, or choose another by its name: hydra/launcher=NAME"
    return Violation("hydra.launcher", value, "a launcher is a section with a _target_", fix)


def launcher_in(config: DictConfig) -> tuple[LauncherConfig | None, list[Violation]]:
    """`check_launcher` of a composed configuration, without launcher settings that refer to other settings.

    The other settings may be faulty themselves, and would be reported a second time.
    """
    if "hydra" not in config:
        return None, []
    if not isinstance(config.hydra.launcher, DictConfig):
        return None, [no_launcher(config.hydra.launcher)]
    given: Any = OmegaConf.to_container(config.hydra.launcher)
    settings = {key: value for key, value in given.items() if "${" not in str(value)}
    if "name" in given:  # refers to Hydra's job name by default; the check needs some string
        settings["name"] = str(given["name"]).replace("$", "")
    return check_launcher(settings)
