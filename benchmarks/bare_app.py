"""Writes plain Hydra apps: one as large as ours, with the same settings, groups and choices, and the smallest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from danling_conf.groups.layout_names import EXAMPLES
from danling_conf.groups.presets import DEFAULT_CHOICES, GLOBAL, GROUPS
from danling_conf.groups.source import layout_settings
from danling_conf.schema import RunnerConfig

_SCRIPT = """
from dataclasses import dataclass, field
from typing import *
import os, sys
import hydra
from hydra.core.config_store import ConfigStore

{classes}

ConfigStore.instance().store("base", node={root})

# Hydra 1.3 warns without a version_base; 1.4 warns with one.
version = {{"version_base": None}} if hydra.__version__.startswith("1.3") else {{}}

@hydra.main(config_path="conf", config_name="app", **version)
def train(config):
    assert "danling_conf" not in sys.modules
    assert config.steps == 100 and config.optim.lr == 0.5 and config.parallel.axes.replicate == 1
    os._exit(0)

train()
"""


_SMALLEST = """
import os
import hydra

version = {"version_base": None} if hydra.__version__.startswith("1.3") else {}

@hydra.main(config_path="smallest_conf", config_name="app", **version)
def train(config):
    assert config.steps == 100 and config.optim.lr == 0.5
    os._exit(0)

train()
"""


def write_smallest_app(folder: Path) -> Path:
    """Write an app of one untyped file with two settings into a folder; returns its script."""
    _write_yaml(folder / "smallest_conf" / "app.yaml", {"steps": 1, "optim": {"lr": 0.1}})
    script = folder / "smallest.py"
    script.write_text(_SMALLEST)
    return script


def write_bare_app(folder: Path) -> Path:
    """Write the app into a folder; returns its script.

    The primary config is one tree of typed dataclasses with the fields, types and defaults of `RunnerConfig`; each
    group is a folder with one YAML file a choice, as users write them.
    """
    conf = folder / "conf"
    defaults: list[Any] = ["base", *({group: choice} for group, choice in DEFAULT_CHOICES.items()), "_self_"]
    _write_yaml(conf / "app.yaml", {"defaults": defaults})
    for name in EXAMPLES:
        _write_yaml(conf / "parallel" / f"{name}.yaml", layout_settings(name), GLOBAL)
    for group, presets in GROUPS.items():
        for name, preset in presets.items():
            # A plain typed section refuses undeclared keys, and this app has no open sections.
            settings = {key: value for key, value in preset.settings.items() if _is_declared(group, key)}
            _write_yaml(conf / group / f"{name}.yaml", settings, preset.package)
    classes: dict[str, str] = {}
    for name, source in _sources(RunnerConfig):
        classes[name] = source
    script = folder / "bare.py"
    script.write_text(_SCRIPT.format(classes="\n\n".join(classes.values()), root=RunnerConfig.__name__))
    return script


def count_settings() -> int:
    """Leaves of the primary config, of theirs and of ours."""

    def leaves(kind: type) -> int:
        sections = [item.default_factory for item in fields(kind) if is_dataclass(item.default_factory)]
        return len(fields(kind)) - len(sections) + sum(map(leaves, sections))

    return leaves(RunnerConfig)


def count_choices() -> tuple[int, int]:
    """Groups, and choices in all of them."""
    return len(GROUPS) + 1, sum(map(len, GROUPS.values())) + len(EXAMPLES)


def _is_declared(group: str, key: str) -> bool:
    section = (
        next(item.default_factory for item in fields(RunnerConfig) if item.name == group)
        if group in {item.name for item in fields(RunnerConfig)}
        else RunnerConfig
    )
    return key in {item.name for item in fields(section)}


def _sources(kind: type) -> Iterator[tuple[str, str]]:
    """The source of a dataclass without anything of ours, inner ones first."""
    lines = ["@dataclass", f"class {kind.__name__}:"]
    for item in fields(kind):
        default = repr(item.default)
        if item.default is MISSING:
            factory = item.default_factory
            default = f"field(default_factory={factory.__name__})"
            if is_dataclass(factory):
                yield from _sources(factory)
        lines.append(f"    {item.name}: {item.type} = {default}")
    yield kind.__name__, "\n".join(lines)


def _write_yaml(path: Path, content: Any, package: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = f"# @package {package}\n" if package else ""
    path.write_text(header + OmegaConf.to_yaml(OmegaConf.create(content)))
