"""`hydra.launcher` of a job, checked as the settings of a run are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from danling_conf.config.resolve import merge_leaves
from danling_conf.config.typed import check_declarations
from danling_conf.groups.source import LAUNCHERS
from danling_conf.schema.launcher import LauncherConfig
from danling_conf.topology.violation import Violation, unique

PREFIX = "hydra.launcher."


def launcher_kind(settings: Mapping[str, Any]) -> type[LauncherConfig] | None:
    """The class of a launcher's settings; None where the launcher is not ours."""
    target = settings.get("_target_")
    return next((kind for kind in LAUNCHERS.values() if getattr(kind, "_target_", None) == target), None)


def check_launcher(settings: Mapping[str, Any]) -> tuple[LauncherConfig | None, list[Violation]]:
    """Settings of one of our launchers as its class, and their faults; None where the launcher is not ours.

    Args:
        settings: plain values, interpolations resolved.
    """
    kind = launcher_kind(settings)
    if kind is None:
        return None, []
    node = OmegaConf.structured(kind)
    violations = merge_leaves(node, settings, kind, PREFIX)
    violations += check_declarations(node, kind, PREFIX)
    typed: Any = OmegaConf.to_object(node)
    return typed, unique(violations)


def launcher_in(config: DictConfig) -> tuple[LauncherConfig | None, list[Violation]]:
    """`check_launcher` of what was composed, as far as it does not refer to other settings, which may be faulty."""
    if "hydra" not in config:
        return None, []
    given: Any = OmegaConf.to_container(config.hydra.launcher)
    return check_launcher({key: value for key, value in given.items() if "${" not in str(value)} | _name(given))


def _name(given: Mapping[str, Any]) -> dict[str, str]:
    """The one setting whose default refers to another one."""
    return {"name": str(given["name"]).replace("$", "")} if "name" in given else {}
