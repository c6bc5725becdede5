"""Base configs: typed primary configurations with every group in their defaults list."""

from __future__ import annotations

import copy
import re
from dataclasses import is_dataclass
from functools import cache
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict

from danling_conf.groups.presets import DEFAULT_CHOICES
from danling_conf.schema import RunnerConfig
from danling_conf.schema.open_sections import open_sections

BASE_NAME = "danling"

_registered: dict[str, type[RunnerConfig]] = {BASE_NAME: RunnerConfig}


def register(config: type[RunnerConfig], name: str | None = None) -> type[RunnerConfig]:
    """Make a subclass of `RunnerConfig` a base config, like `danling`: typed, with every group in its defaults.

    It can be the primary config itself (`config_name="my_config"`) or the first entry of a YAML file's defaults.

    Args:
        config: dataclass that derives from `RunnerConfig`; its own fields are checked like ours.
        name: name of the base config; the class name in snake case when None.

    Returns:
        The class, so that `register` can be used as a decorator.

    Raises:
        TypeError: `config` is not a dataclass deriving from `RunnerConfig`.
        ValueError: another class already has that name.
    """
    if not (isinstance(config, type) and is_dataclass(config) and issubclass(config, RunnerConfig)):
        raise TypeError(f"register: {config!r} must be a dataclass that derives from RunnerConfig")
    if "__dataclass_fields__" not in vars(config):
        raise TypeError(f"register: {config.__name__} derives from RunnerConfig but is no dataclass: add @dataclass")
    if name is None:
        name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", config.__name__).lower()
    known = _registered.get(name)
    # A script that is imported again (as itself and as __main__) defines its class again: same name, same class.
    if known is not None and known.__qualname__ != config.__qualname__:
        raise ValueError(f"register: the name {name!r} already belongs to {known.__qualname__}; pass another name")
    _registered[name] = config
    return config


def base_names() -> list[str]:
    """Names of all base configs."""
    return sorted(_registered)


def base_config(name: str) -> DictConfig:
    """A base config as a typed node with its defaults list. Raises KeyError for an unknown name."""
    kind: Any = _registered[name]  # for mypy, a class is as unhashable as its objects
    return copy.deepcopy(_base_config(kind))


# Cached, since a sweep composes twice a job, and a copy takes a fifth of the time of a new node.
@cache
def _base_config(kind: Any) -> DictConfig:
    node: DictConfig = OmegaConf.structured(kind)
    open_sections(node)
    with open_dict(node):
        node["defaults"] = ListConfig(["_self_", *({group: choice} for group, choice in DEFAULT_CHOICES.items())])
    return node
