"""Config source of Hydra that computes presets, layouts and base configs from their names.

It keeps no state. Nodes in Hydra's ConfigStore would slow every composition (1.3.8 copies the whole store), and the
layouts are too many to list. A computed config costs nothing until it is chosen.

In an app without our base config, a preset first brings its section: typed, with all defaults and its `_target_`. Over
the base config it must not, since the defaults would undo what other presets have set there: the base config overrides
the group of sections with nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from hydra.core.object_type import ObjectType
from hydra.errors import ConfigCompositionException
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from omegaconf import DictConfig, OmegaConf

from danling_conf.groups.base import SECTIONS, base_config, base_names, section_kinds
from danling_conf.groups.layout_names import EXAMPLES, LayoutNameError, looks_like_layout, parse_layout
from danling_conf.groups.presets import GLOBAL, GROUPS
from danling_conf.schema.fsdp import FsdpConfig
from danling_conf.schema.launcher import (
    LauncherConfig,
    LocalLauncherConfig,
    SlurmLauncherConfig,
    SubmititLocalConfig,
    SubmititSlurmConfig,
)
from danling_conf.schema.open_sections import open_sections
from danling_conf.schema.typed_node import plain_node_of, typed_node_of

LAYOUTS = "parallel"
LAYOUTS_SWITCH = "fsdp"
"""The other section that a layout sets: whether it shards."""
LAUNCHERS: dict[str, type[LauncherConfig]] = {
    "danling_local": LocalLauncherConfig,
    "danling_slurm": SlurmLauncherConfig,
}
SUBMITIT: dict[str, type[LauncherConfig]] = {
    "submitit_local": SubmititLocalConfig,
    "submitit_slurm": SubmititSlurmConfig,
}
"""Launchers of hydra-submitit-launcher as ours, for our `main` alone: other apps keep that package's."""
LAUNCHER_GROUP = "hydra/launcher"
SCHEME = "danling"


def layout_settings(name: str) -> dict[str, Any]:
    """The settings that a layout's name stands for, at the root: all seven axes and `fsdp.enabled`."""
    layout = parse_layout(name)
    return {"parallel": {"axes": layout.degrees()}, "fsdp": {"enabled": layout.fsdp}}


def section_config(name: str) -> DictConfig:
    """A section as a typed node with its defaults. Raises KeyError where there is none of that name."""
    kind: Any = section_kinds()[name]
    node = typed_node_of(kind)
    open_sections(node)
    if not hasattr(kind, "open_to"):
        OmegaConf.set_struct(node, None)  # nothing of ours checks the keys, so Hydra has to
    if name == LAYOUTS_SWITCH:
        # Left to the layout, whichever of the two is composed first.
        OmegaConf.set_struct(node, False)
        node.pop("enabled")
    return node


class NameSource(ConfigSource):
    """`danling://`: configs that are computed from their names."""

    free: ClassVar[str | None] = None
    """Base config of an app that has no files: `model` and `data` take any key there, since none can be declared."""
    launchers: ClassVar[Mapping[str, type[LauncherConfig]]] = LAUNCHERS
    """Launchers by name; with those of submitit while an app of our `main` is composed."""

    @staticmethod
    def scheme() -> str:
        return SCHEME

    def load_config(self, config_path: str) -> ConfigResult:
        group, name = _split(config_path)
        if group == LAYOUTS:
            try:
                return self._result(_with_sections(layout_settings(name)), GLOBAL)
            except LayoutNameError as error:
                # Hydra prints this class as one line, without a stack trace.
                raise ConfigCompositionException(str(error)) from None
        if group == "" and name in base_names():
            # No package: a primary config is placed at the root. Presets name theirs, as `@package` in a file does.
            return self._result(base_config(name, free=name == self.free), None)
        if group == LAUNCHER_GROUP and name in self.launchers:
            node = typed_node_of(self.launchers[name])
            open_sections(node)
            return self._result(node, "hydra.launcher")
        if group in GROUPS and name in GROUPS[group]:
            preset = GROUPS[group][name]
            if group in section_kinds():
                # An app that knows nothing of us has no section yet.
                place = "_here_" if preset.package is None else group
                before = {f"/{SECTIONS}@{place}": group}
                return self._result({"defaults": [before, "_self_"], **preset.settings}, preset.package)
            return self._result(preset.settings, preset.package)
        if group == SECTIONS:
            return self._result(section_config(name), None)
        raise ConfigLoadError(f"there is no config {config_path}")

    def available(self) -> bool:
        return True

    def is_group(self, config_path: str) -> bool:
        path = config_path.rstrip("/")
        return path in ("", LAYOUTS, "hydra", LAUNCHER_GROUP, SECTIONS) or path in GROUPS

    def is_config(self, config_path: str) -> bool:
        group, name = _split(config_path)
        if group == LAYOUTS:
            # Claim misspelled layouts too: `load_config` then explains the mistake, where Hydra would report that
            # there is no such file.
            return looks_like_layout(name)
        if group == "":
            return name in base_names()
        if group == LAUNCHER_GROUP:
            return name in self.launchers
        if group == SECTIONS:
            return name in section_kinds()
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
        elif path == LAUNCHER_GROUP:
            if results_filter in (None, ObjectType.CONFIG):
                names += self.launchers
        elif results_filter in (None, ObjectType.CONFIG):
            names += EXAMPLES if path == LAYOUTS else GROUPS.get(path, {})
        return sorted(names)

    def _result(self, settings: Mapping[str, Any], package: str | None) -> ConfigResult:
        config = settings if isinstance(settings, DictConfig) else plain_node_of(settings)
        return ConfigResult(
            provider=self.provider, path=f"{SCHEME}://{self.path}", config=config, header={"package": package}
        )


def _with_sections(layout: Mapping[str, Any]) -> dict[str, Any]:
    """A layout's settings with what makes both of its sections ready for `instantiate`."""
    target = {"_target_": FsdpConfig._target_, "_recursive_": False}
    before = {f"/{SECTIONS}@{LAYOUTS}": LAYOUTS}
    return {"defaults": [before, "_self_"], **layout, LAYOUTS_SWITCH: {**target, **layout[LAYOUTS_SWITCH]}}


def _split(config_path: str) -> tuple[str, str]:
    path = config_path.rstrip("/").removesuffix(".yaml")
    group, _, name = path.rpartition("/")
    return group, name
