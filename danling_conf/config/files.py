"""Configurations as YAML files: what an attempt's `config.yaml` holds, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from danling_conf.config.identity import plain
from danling_conf.config.resolve import resolve
from danling_conf.schema import RunnerConfig


def save(config: RunnerConfig, path: str | Path) -> None:
    """Write a configuration, open keys included, as YAML."""
    OmegaConf.save(OmegaConf.create(plain(config)), Path(path))


def load(path: str | Path, kind: type[RunnerConfig] = RunnerConfig) -> Any:
    """Read a configuration that `save` or a run wrote, checked like any other.

    Args:
        kind: class of the configuration.

    Raises:
        ConfigRefused: it breaks rules here, under another number of devices for instance.
    """
    return resolve(OmegaConf.load(Path(path)), kind=kind)
