"""Base configs: typed primary configurations with every group in their defaults list."""

from __future__ import annotations

import pickle
import re
from dataclasses import fields, is_dataclass
from typing import Any

from omegaconf import DictConfig, flag_override, open_dict

from danling_conf.groups.presets import DEFAULT_CHOICES
from danling_conf.schema import RunnerConfig
from danling_conf.schema.open_sections import open_sections
from danling_conf.schema.typed_node import plain_node_of, typed_node_of

BASE_NAME = "danling"
SECTIONS = "danling/section"
"""Group of the typed sections that presets bring along in an app without a base config."""

_registered: dict[str, type[RunnerConfig]] = {BASE_NAME: RunnerConfig}
# Hydra 1.4 asks twice to start a run, and a sweep asks for each job. Bytes are read in a tenth of the time.
_made: dict[tuple[Any, bool], bytes | None] = {}
"""Base configs as bytes, once they have been made."""


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


def base_config(name: str, *, free: bool = False) -> DictConfig:
    """A base config as a typed node with its defaults list. Raises KeyError for an unknown name.

    Args:
        free: of `open_sections`.
    """
    kind: Any = _registered[name]  # for mypy, a class is as unhashable as its objects
    content = _made.get((kind, free))
    if content is not None:
        kept: DictConfig = pickle.loads(content)
        return kept
    node = _new_base_config(kind, free)
    _made[kind, free] = pickled(node)
    return node


def section_kinds() -> dict[str, type]:
    """The dataclasses of all sections, by name."""
    factories: dict[str, Any] = {item.name: item.default_factory for item in fields(RunnerConfig)}
    return {name: kind for name, kind in factories.items() if isinstance(kind, type) and is_dataclass(kind)}


def _new_base_config(kind: Any, free: bool) -> DictConfig:
    node = typed_node_of(kind)
    open_sections(node, free=free)
    with open_dict(node), flag_override(node, "no_deepcopy_set_nodes", True):
        # Presets bring no sections here. Hydra refuses to override what is not chosen, so nothing is chosen first.
        nothing = [f"{SECTIONS}@{name}" for name in DEFAULT_CHOICES if name in section_kinds()]
        node["defaults"] = plain_node_of(
            [
                "_self_",
                *({group: choice} for group, choice in DEFAULT_CHOICES.items()),
                *({section: None} for section in nothing),
                *({f"override {section}": None} for section in nothing),
            ]
        )
    return node


def pickled(node: DictConfig) -> bytes | None:
    """A node as bytes, which are read in a fifth of the time of a deep copy; None where a class cannot be pickled."""
    try:
        return pickle.dumps(node, pickle.HIGHEST_PROTOCOL)
    except (pickle.PicklingError, AttributeError, TypeError):
        return None
