"""Resolution: turns a composed configuration into a checked, read-only object of the user's class.

This is the only way out of OmegaConf: all code behind it reads plain dataclasses. `_get_node`, `_value` and the `_is_`
methods are private in OmegaConf; public access would resolve interpolations, which may be broken here.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, TypeVar, overload

from omegaconf import AnyNode, DictConfig, FloatNode, ListConfig, Node, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from danling_conf.config.hydra_adapter import hydra_of
from danling_conf.config.identity import plain
from danling_conf.config.readonly import freeze
from danling_conf.config.typed import check_declarations, unknown_key, wrong_type
from danling_conf.schema import RunnerConfig
from danling_conf.schema.open_sections import open_sections
from danling_conf.schema.setting import READONLY
from danling_conf.topology.layout import fill, layout_of
from danling_conf.topology.machine import this_machine
from danling_conf.topology.rules import Context, violations_of
from danling_conf.topology.violation import ConfigRefused, Violation, unique

Config = TypeVar("Config", bound=RunnerConfig)
"""The user's class of configurations."""


@overload
def resolve(config: Config, *, context: Context | None = None) -> Config: ...
@overload
def resolve(config: DictConfig | Mapping[str, Any], *, context: Context | None = None) -> RunnerConfig: ...
@overload
def resolve(config: object, *, kind: type[Config], context: Context | None = None) -> Config: ...


def resolve(config: Any, *, kind: type[Any] = RunnerConfig, context: Context | None = None) -> Any:
    """Check a configuration and make it read-only.

    Args:
        config: a composed `DictConfig`, a mapping such as a loaded YAML file, or a configuration object.
        kind: the configuration's class, where `config` does not carry one.
        context: further input of the rules; this machine when None.

    Returns:
        An instance of the configuration's class: aliases canonical, `stack` derived, degrees of -1 filled.

    Raises:
        ConfigRefused: with every violation, not only the first.
    """
    if getattr(config, READONLY, False):
        return config
    resolved, violations = inspect(config, kind=kind, context=context)
    if violations:
        raise ConfigRefused(violations)
    return resolved


def inspect(
    config: Any, *, kind: type[RunnerConfig] = RunnerConfig, context: Context | None = None, spent: bool = False
) -> tuple[RunnerConfig | None, list[Violation]]:
    """Resolve a configuration and find all of its violations.

    Args:
        spent: whether `config` may be changed, since the caller does not use it afterwards; this saves a copy.

    Returns:
        The configuration, which is usable only without violations, and None where settings are missing; and the
        violations.
    """
    context = context or Context(machine=this_machine())
    node, violations = _typed_copy(config, kind, spent)
    violations += check_declarations(node, OmegaConf.get_type(node) or kind)
    OmegaConf.resolve(node)
    if _has_missing(node):
        return None, unique(violations)
    faulty = {item.path for item in violations}
    resolved: Any = OmegaConf.to_object(node)
    # A setting that broke its declaration was reset to its default, so violations of rules by it are spurious.
    violations += [item for item in violations_of(resolved, context) if item.path not in faulty]
    if not violations:
        _derive(resolved, context)
        freeze(resolved)
    return resolved, unique(violations)


def declared_kind(config: DictConfig) -> type[RunnerConfig] | None:
    """The class that a configuration was declared with; None for an untyped mapping."""
    declared = OmegaConf.get_type(config)
    return declared if isinstance(declared, type) and issubclass(declared, RunnerConfig) else None


def _has_missing(node: Node) -> bool:
    """Whether a resolved node has missing values, like `OmegaConf.missing_keys` but in a tenth of its time."""
    value = node._value()
    if isinstance(value, dict):
        return any(map(_has_missing, value.values()))
    if isinstance(value, list):
        return any(map(_has_missing, value))
    return isinstance(value, str) and value == "???"


def _typed_copy(config: Any, kind: type[RunnerConfig], spent: bool) -> tuple[DictConfig, list[Violation]]:
    if isinstance(config, DictConfig):
        node = _without_hydra(config, spent)
        if declared_kind(node) is not None:
            return node, []
        given: Any = OmegaConf.to_container(node)
    elif is_dataclass(config) and not isinstance(config, type):
        node = OmegaConf.structured(config)
        open_sections(node)
        return node, []
    elif isinstance(config, Mapping):
        given = dict(config)
    else:
        raise TypeError(f"resolve takes a composed configuration, a mapping or a RunnerConfig, not {type(config)}")
    node = OmegaConf.structured(kind)
    open_sections(node)
    return node, merge_leaves(node, given, kind)


def _without_hydra(config: DictConfig, spent: bool) -> DictConfig:
    """A configuration without Hydra's own node: a copy, or the same object where it is spent.

    Settings that refer to Hydra's node are replaced by their values first.
    """
    hydra = config._get_node("hydra") if config and "hydra" in config else None
    # Hydra's node is the larger half of a deep copy, and most configurations do not refer to it. An entry in the memo
    # of `deepcopy` puts an empty node in its place.
    left_out = hydra is not None and not refers_to_hydra(config)
    node = config if spent else copy.deepcopy(config, {id(hydra): AnyNode(None)} if left_out else {})
    OmegaConf.set_readonly(node, None)
    with read_write(node), open_dict(node):
        if hydra is not None and not left_out:
            with hydra_of(node):
                _resolve_hydra(node)
        if hydra is not None:
            node.pop("hydra")
    return node


def refers_to_hydra(node: Node) -> bool:
    """Whether any value outside of Hydra's own node is an interpolation that mentions Hydra."""
    value = node._value()
    if isinstance(value, str):
        return "hydra" in value and node._is_interpolation()
    if isinstance(value, dict):
        return any(key != "hydra" and refers_to_hydra(child) for key, child in value.items())
    return isinstance(value, list) and any(map(refers_to_hydra, value))


def _resolve_hydra(node: DictConfig | ListConfig) -> None:
    """Replace interpolations of Hydra's settings with their values. The check later reports those that do not
    resolve."""
    for key in list(node) if isinstance(node, DictConfig) else range(len(node)):
        child = None if key == "hydra" else node._get_node(key)
        if not isinstance(child, Node) or child._is_none() or child._is_missing():
            continue
        if child._is_interpolation():
            if "hydra" in str(child._value()):
                with suppress(OmegaConfBaseException):
                    node[key] = node[key]
        elif isinstance(child, (DictConfig, ListConfig)):
            _resolve_hydra(child)


def merge_leaves(node: DictConfig, given: Mapping[Any, Any], kind: Any, prefix: str = "") -> list[Violation]:
    """Merge a mapping into a typed node leaf by leaf, and return the faults: `OmegaConf.merge` raises at the first."""
    violations: list[Violation] = []
    for key, value in given.items():
        path = f"{prefix}{key}"
        child = node._get_node(key) if key in node else None
        if isinstance(child, DictConfig) and isinstance(value, Mapping) and is_dataclass(OmegaConf.get_type(child)):
            violations += merge_leaves(child, value, OmegaConf.get_type(child), f"{path}.")
            continue
        try:
            # OmegaConf 2.4 warns when an int is assigned to a float, but in YAML and JSON `1` is how people write 1.0.
            node[key] = float(value) if isinstance(child, FloatNode) and type(value) is int else value
        except OmegaConfBaseException as error:
            known = key in node
            violations.append(wrong_type(path, value, error) if known else unknown_key(kind, path, RunnerConfig))
    return violations


def _derive(config: RunnerConfig, context: Context) -> None:
    """Set derived values: degrees of -1, the stack, and that the graph stack compiles."""
    if config.stack == "graph":
        config.compile.enable = True
    axes = config.parallel.axes
    layout = fill(layout_of(config), context.machine.fill_world_size)
    for axis, degree in layout.degrees().items():
        setattr(axes, axis, degree)
    if config.stack == "auto":
        replicated_only = layout.world_size == layout.replicate and not layout.fsdp
        config.stack = "ddp" if replicated_only else "parallel"


def save(config: RunnerConfig, path: str | Path) -> None:
    """Write a configuration, open keys included, as YAML."""
    OmegaConf.save(OmegaConf.create(plain(config)), Path(path))


@overload
def load(path: str | Path) -> RunnerConfig: ...
@overload
def load(path: str | Path, kind: type[Config]) -> Config: ...


def load(path: str | Path, kind: type[Any] = RunnerConfig) -> Any:
    """Read a configuration that `save` or a run wrote, and check it like any other.

    Args:
        kind: class of the configuration.

    Raises:
        ConfigRefused: it breaks rules here, for instance because this machine has another number of devices.
    """
    return resolve(OmegaConf.load(Path(path)), kind=kind)
