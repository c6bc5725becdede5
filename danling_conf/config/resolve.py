"""Resolution: turns a composed configuration into a checked, read-only object of the user's class.

This is the only way out of OmegaConf: all code behind it reads plain dataclasses. `_get_node`, `_value` and the `_is_`
methods are private in OmegaConf; public access would resolve interpolations, which may be broken here.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, overload

import yaml
from omegaconf import AnyNode, DictConfig, FloatNode, ListConfig, Node, OmegaConf, open_dict, read_write
from omegaconf._utils import get_omega_conf_dumper
from omegaconf.errors import OmegaConfBaseException

from danling_conf.config.hydra_job import hydra_of, running_job
from danling_conf.config.identity import plain
from danling_conf.config.precedence import give_way
from danling_conf.config.readonly import freeze, writable
from danling_conf.config.typed import check_declarations, section_type, unknown_key, wrong_type
from danling_conf.schema import Layout, RunnerConfig, declared_class, facts_of
from danling_conf.schema.open_mapping import plain_values
from danling_conf.schema.open_sections import open_sections
from danling_conf.schema.setting import READONLY, add_notes
from danling_conf.schema.typed_node import typed_node_of
from danling_conf.topology.layout import fill, layout_of
from danling_conf.topology.machine import this_machine
from danling_conf.topology.rules import Context, violations_of
from danling_conf.topology.violation import ABSENT, ConfigRefused, Violation, unique

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
    config: Any,
    *,
    kind: type[RunnerConfig] = RunnerConfig,
    context: Context | None = None,
    spent: bool = False,
    changed: Collection[str] | None = None,
) -> tuple[RunnerConfig | None, list[Violation]]:
    """Resolve a configuration and find all of its violations.

    Args:
        spent: whether `config` may be changed, since the caller does not use it afterwards; this saves a copy.
        changed: names at the root of a typed node whose declarations are to be checked, where `settled` has checked the
            others; None for all.

    Returns:
        The configuration, which is usable only without violations, and None where settings are missing; and the
        violations.
    """
    context = _with_choices(context or Context(machine=this_machine()), config)
    node, violations = _typed_copy(config, kind, spent)
    violations += check_declarations(node, OmegaConf.get_type(node) or kind, only=changed)
    try:
        if _refers(node):
            violations += _of_no_seed(node)
            OmegaConf.resolve(node)
    except (OmegaConfBaseException, RecursionError) as error:  # an interpolation inside a list, for instance
        where = getattr(error, "full_key", None) or "configuration"
        reason = (str(error).strip() or "it refers to itself").splitlines()[0]
        return None, unique([*violations, Violation(where, ABSENT, reason, "fix the interpolation")])
    if _has_missing(node):
        return None, unique(violations)
    faulty = {item.path for item in violations}
    notes = give_way(node, context)
    resolved: Any = OmegaConf.to_object(node)
    add_notes(resolved, notes)
    # A setting that broke its declaration was reset to its default, so violations of rules by it are spurious.
    violations += [item for item in violations_of(resolved, context) if item.path not in faulty]
    if not violations:
        _derive(resolved, context)
        freeze(resolved)
    return resolved, unique(violations)


def settled(node: DictConfig) -> bool:
    """Whether a typed configuration keeps its declarations, and none of its settings refers to another: then a change
    of one leaves the check of the others as it was. It is canonical afterwards, where that is so."""
    kind = declared_kind(node)
    return kind is not None and not _refers(node) and not check_declarations(node, kind)


def _with_choices(context: Context, config: Any) -> Context:
    """A context with the choices of groups that a composed configuration records, and outside of our `main` with what
    was on Hydra's command line."""
    if context.choices or not isinstance(config, DictConfig):
        return context
    if "hydra" in config:
        return replace(context, choices=dict(config.hydra.runtime.choices))
    given, choices = running_job()
    return replace(context, given=context.given or given_in(given), choices=choices)


def given_in(overrides: Iterable[str]) -> frozenset[str]:
    """The paths of the settings in overrides."""
    return frozenset(item.partition("=")[0].lstrip("+~") for item in overrides)


def typed_node(given: Mapping[str, Any], kind: type[Any], sections: Mapping[str, type]) -> DictConfig:
    """A mapping that was a configuration as a typed node again.

    Args:
        sections: classes of sections that `kind` does not declare, by path.
    """
    node = typed_node_of(kind)
    open_sections(node)
    for path, section in sections.items():
        OmegaConf.update(node, path, OmegaConf.structured(section), force_add=True)
    merge_leaves(node, given, kind)
    return node


def own_sections(config: Any, prefix: str = "") -> dict[str, type]:
    """Classes of the sections that a configuration's class does not declare, by path: those of Hydra's ConfigStore."""
    declared = {
        item.name for item in fields(declared_class(config)) if section_type(item) or facts_of(item).shape is not None
    }
    found: dict[str, type] = {}
    for name, value in vars(config).items():
        if is_dataclass(value) and not isinstance(value, type) and not name.startswith("_"):
            if name not in declared:
                found[prefix + name] = declared_class(value)
            found |= own_sections(value, f"{prefix}{name}.")
    return found


def declared_kind(config: DictConfig) -> type[RunnerConfig] | None:
    """The class that a configuration was declared with; None for an untyped mapping."""
    declared = OmegaConf.get_type(config)
    return declared if isinstance(declared, type) and issubclass(declared, RunnerConfig) else None


def _of_no_seed(node: Any) -> list[Violation]:
    """Refuse what refers to a seed that is not set: one is drawn when the run starts, and this would stay without."""
    if node._get_node("seed") is None or node._get_node("seed")._value() is not None:
        return []
    rule = "it refers to the seed, which is unset: one is drawn when the run starts, and this would be null"
    fix = "set seed=0, for instance, or let the program ask runner.world.attempt.seed"
    return [Violation(path, value, rule, fix) for path, value in _leaves(node) if "${seed}" in value]


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The texts of a node that is not resolved, by path."""
    value = node._value()
    if isinstance(value, str):
        yield prefix, value
    elif isinstance(value, dict):
        for key, child in value.items():
            yield from _leaves(child, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from _leaves(child, f"{prefix}[{index}]")


def _refers(node: Node) -> bool:
    """Whether any value is an interpolation, found in a tenth of the time of resolving none."""
    value = node._value()
    if isinstance(value, dict):
        return any(map(_refers, value.values()))
    if isinstance(value, list):
        return any(map(_refers, value))
    return isinstance(value, str) and "${" in value


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
        node = OmegaConf.structured(writable(config))
        open_sections(node)
        return node, []
    elif isinstance(config, Mapping):
        given = plain_values(config)
    else:
        raise TypeError(f"resolve takes a composed configuration, a mapping or a RunnerConfig, not {type(config)}")
    node = typed_node_of(kind)
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
        config.stack = stack_of(layout)


def stack_of(layout: Layout) -> str:
    """The stack that `stack=auto` stands for."""
    return "ddp" if layout.world_size == layout.replicate and not layout.fsdp else "parallel"


def save(config: RunnerConfig, path: str | Path) -> None:
    """Write a configuration, open keys included, as YAML."""
    Path(path).write_text(as_yaml(plain(config)), encoding="utf-8")


def as_yaml(values: Mapping[str, Any]) -> str:
    """Plain values as YAML, which OmegaConf reads as the same values; `OmegaConf.to_yaml` makes nodes of them first."""
    text: str = yaml.dump(
        values, Dumper=get_omega_conf_dumper(), default_flow_style=False, allow_unicode=True, sort_keys=False
    )
    return text


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
