"""Identity of a configuration: its plain form, its canonical form, and the two hashes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

from danling_conf.config.readonly import replaced
from danling_conf.groups.layout_names import name_of
from danling_conf.schema import Layout, RunnerConfig, declared_class, defaults_of, facts_of, open_keys
from danling_conf.schema.setting import OUTPUT_DIRECTORY, PLACED

_DIGITS = 12


def plain(config: Any) -> dict[str, Any]:
    """A configuration as nested dictionaries of plain values, open keys included, hydra's `_target_`s left out."""
    return _unplaced(config, _section(config, semantic_only=False))


def semantic(config: Any) -> dict[str, Any]:
    """The part of `plain` that changes the result of training."""
    return _unplaced(config, _section(config, semantic_only=True))


def job_id(config: RunnerConfig) -> str:
    """Hash of the whole resolved configuration."""
    return _digest(plain(config))


def config_id(config: RunnerConfig) -> str:
    """Hash of what changes the result of training: not names, paths, logging, cadence, workers, nor the budget."""
    return _digest(semantic(config))


def canonical(config: Any) -> str:
    """The plain form as JSON with sorted keys, to compare two configurations by `diff`."""
    return json.dumps(plain(config), sort_keys=True, indent=1)


def layout_name(layout: Layout) -> str:
    """A layout's name on the command line: `fsdp8_tp2`."""
    return name_of(layout)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as dotted paths and leaf values; an empty dictionary is a leaf."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            leaves |= flatten(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def differences(mine: dict[str, Any], theirs: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted paths whose values differ between two plain forms, with both values; None where one has no such path."""
    left, right = ({path: value for path, value in flatten(tree).items() if value != {}} for tree in (mine, theirs))
    return {
        path: (left.get(path), right.get(path))
        for path in sorted(left.keys() | right.keys())
        if left.get(path) != right.get(path)
    }


def difference_from_defaults(config: RunnerConfig) -> dict[str, Any]:
    """Settings that differ from the defaults of the configuration's class."""
    changed = differences(plain(config), plain(defaults_of(declared_class(config))))
    return {path: mine for path, (mine, _) in changed.items()}


def _unplaced(config: Any, tree: dict[str, Any]) -> dict[str, Any]:
    """A plain form in which Hydra's output directory, which each attempt has another of, is a placeholder again."""
    directory = vars(config).get(PLACED)
    if directory is None:
        return tree
    form: dict[str, Any] = replaced(tree, directory, OUTPUT_DIRECTORY)
    return form


def _section(section: Any, semantic_only: bool) -> dict[str, Any]:
    named = {
        item.name: getattr(section, item.name)
        for item in fields(declared_class(section))
        if not item.name.startswith("_") and (facts_of(item).semantic or not semantic_only)
    }
    opened = open_keys(section)
    plain_values = {name: _plain_value(value, semantic_only) for name, value in (named | opened).items()}
    if not semantic_only:
        return plain_values
    unimportant = _unimportant_keys(section)
    kept = {name: _without(value, unimportant) for name, value in plain_values.items()}
    # Drop empty sections: a version that adds a section without semantic settings must not change the config_id.
    return {name: value for name, value in kept.items() if value != {}}


def _unimportant_keys(section: Any) -> set[str]:
    """Keys of the mappings in an open section that do not change the result of training."""
    shape = getattr(section, "open_to", None)
    return {item.name for item in fields(shape) if not facts_of(item).semantic} if isinstance(shape, type) else set()


def _without(value: Any, keys: set[str]) -> Any:
    return {key: inner for key, inner in value.items() if key not in keys} if isinstance(value, dict) else value


def _plain_value(value: Any, semantic_only: bool) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return _section(value, semantic_only)
    if isinstance(value, dict):
        return {str(key): _plain_value(inner, semantic_only) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain_value(inner, semantic_only) for inner in value]
    if isinstance(value, Enum):
        return value.name  # OmegaConf reads an enum by its member's name, not by its value
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def _digest(tree: dict[str, Any]) -> str:
    text = json.dumps(tree, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]
