"""Config source of Hydra that computes presets, layouts and base configs from their names.

It keeps no state. Nodes in Hydra's ConfigStore would slow every composition (1.3.8 copies the whole store), and the
layouts are too many to list. A computed config costs nothing until it is chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hydra.core.object_type import ObjectType
from hydra.errors import ConfigCompositionException
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from omegaconf import DictConfig, OmegaConf

from danling_conf.groups.base import base_config, base_names
from danling_conf.groups.layout_names import EXAMPLES, LayoutNameError, looks_like_layout, parse_layout
from danling_conf.groups.presets import GLOBAL, GROUPS
from danling_conf.schema.launcher import LauncherConfig, LocalLauncherConfig, SlurmLauncherConfig
from danling_conf.schema.open_sections import open_sections

LAYOUTS = "parallel"
LAUNCHERS: dict[str, type[LauncherConfig]] = {
    "danling_local": LocalLauncherConfig,
    "danling_slurm": SlurmLauncherConfig,
}
_LAUNCHER_GROUP = "hydra/launcher"
SCHEME = "danling"


def layout_settings(name: str) -> dict[str, Any]:
    """The settings that a layout's name stands for, at the root: all seven axes and `fsdp.enabled`."""
    layout = parse_layout(name)
    return {"parallel": {"axes": layout.degrees()}, "fsdp": {"enabled": layout.fsdp}}


class NameSource(ConfigSource):
    """`danling://`: configs that are computed from their names."""

    @staticmethod
    def scheme() -> str:
        return SCHEME

    def load_config(self, config_path: str) -> ConfigResult:
        group, name = _split(config_path)
        if group == LAYOUTS:
            try:
                return self._result(layout_settings(name), GLOBAL)
            except LayoutNameError as error:
                # Hydra prints this class as one line, without a stack trace.
                raise ConfigCompositionException(str(error)) from None
        if group == "" and name in base_names():
            # No package: a primary config is placed at the root. Presets name theirs, as `@package` in a file does.
            return self._result(base_config(name), None)
        if group == _LAUNCHER_GROUP and name in LAUNCHERS:
            node = OmegaConf.structured(LAUNCHERS[name])
            open_sections(node)
            return self._result(node, "hydra.launcher")
        if group in GROUPS and name in GROUPS[group]:
            preset = GROUPS[group][name]
            return self._result(preset.settings, preset.package)
        raise ConfigLoadError(f"there is no config {config_path}")

    def available(self) -> bool:
        return True

    def is_group(self, config_path: str) -> bool:
        path = config_path.rstrip("/")
        return path in ("", LAYOUTS, "hydra", _LAUNCHER_GROUP) or path in GROUPS

    def is_config(self, config_path: str) -> bool:
        group, name = _split(config_path)
        if group == LAYOUTS:
            # Claim misspelled layouts too: `load_config` then explains the mistake, where Hydra would report that
            # there is no such file.
            return looks_like_layout(name)
        if group == "":
            return name in base_names()
        if group == _LAUNCHER_GROUP:
            return name in LAUNCHERS
        return name in GROUPS.get(group, {})

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        # Feeds --help and shell completion. Layouts are too many to list, so a few examples stand for them.
        path = config_path.rstrip("/")
        names: list[str] = []
        if path == "":
            if results_filter in (None, ObjectType.GROUP):
                names += [LAYOUTS, *GROUPS]
            if results_filter in (None, ObjectType.CONFIG):
                names += base_names()
        elif path == "hydra":
            if results_filter in (None, ObjectType.GROUP):
                names.append("launcher")
        elif path == _LAUNCHER_GROUP:
            if results_filter in (None, ObjectType.CONFIG):
                names += LAUNCHERS
        elif results_filter in (None, ObjectType.CONFIG):
            names += EXAMPLES if path == LAYOUTS else GROUPS.get(path, {})
        return sorted(names)

    def _result(self, settings: Mapping[str, Any], package: str | None) -> ConfigResult:
        config = settings if isinstance(settings, DictConfig) else OmegaConf.create(dict(settings))
        return ConfigResult(
            provider=self.provider, path=f"{SCHEME}://{self.path}", config=config, header={"package": package}
        )


def _split(config_path: str) -> tuple[str, str]:
    path = config_path.rstrip("/").removesuffix(".yaml")
    group, _, name = path.rpartition("/")
    return group, name
