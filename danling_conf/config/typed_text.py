"""Text as it was typed: Hydra's parser and YAML read `12e3`, `1_000` or `1.10` as numbers, also for a setting of type
str, and `str(number)` is another text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, ListConfig, OmegaConf, StringNode, open_dict, read_write

_FROM_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?(e[-+]?\d+)?|inf|nan)|True|False", re.IGNORECASE)
"""How numbers and booleans look once they are converted to text."""
_SIMPLE_LIST = re.compile(r"\[([^\[\]{}()\"'\\]*)\]")


def restore_typed(config: DictConfig, overrides: Iterable[Override]) -> None:
    """Set text that overrides gave to settings of type str to what was typed."""
    for override in overrides:
        line = override.input_line
        if line is None or override.is_delete() or override.is_sweep_override() or override.package is not None:
            continue
        found = _node_at(config, override.key_or_group)
        if found is not None:
            _restore(*found, override.value(), line.partition("=")[2].strip())


def restore_written(
    config: DictConfig,
    given: frozenset[str],
    written: Callable[[Sequence[str]], Mapping[str, tuple[Any, Any]]],
) -> None:
    """Set text that files gave to settings of type str to what is written there.

    Args:
        given: paths that are on the command line.
        written: for paths, what YAML made of the value in the last file that has it, and its text.
    """
    suspects = {path: place for path, place in _converted(config, "") if path not in given}
    if not suspects:  # almost always, so that files are read a second time only where it matters
        return
    for path, (value, text) in written(list(suspects)).items():
        _restore(*suspects[path], value, text)


def _converted(node: DictConfig, prefix: str) -> Iterable[tuple[str, tuple[DictConfig, str]]]:
    """Settings of type str whose value may have been a number: path, section and key."""
    for key in node:
        child = node._get_node(key)
        path = f"{prefix}{key!s}"
        if isinstance(child, StringNode):
            if _looks_converted(child):
                yield path, (node, str(key))
        elif isinstance(child, ListConfig) and isinstance(child._value(), list):
            if any(isinstance(item, StringNode) and _looks_converted(item) for item in child._value()):
                yield path, (node, str(key))
        elif isinstance(child, DictConfig) and isinstance(child._value(), dict) and path != "hydra":
            yield from _converted(child, f"{path}.")


def _looks_converted(node: StringNode) -> bool:
    value = node._value()
    return isinstance(value, str) and _FROM_NUMBER.fullmatch(value) is not None


def _node_at(config: DictConfig, path: str) -> tuple[DictConfig, str] | None:
    """The section that holds a setting, and the setting's key; None where there is no such setting."""
    owner: Any = config
    *above, key = path.split(".")
    for part in above:
        owner = owner._get_node(part) if isinstance(owner, DictConfig) and isinstance(owner._value(), dict) else None
    if not isinstance(owner, DictConfig) or not isinstance(owner._value(), dict) or key not in owner:
        return None
    return owner, key


def _restore(owner: DictConfig, key: str, value: Any, text: Any) -> None:
    node = owner._get_node(key)
    if isinstance(node, StringNode) and isinstance(text, str) and _came_from(node, value):
        _set(owner, key, text)
    elif isinstance(node, ListConfig) and isinstance(node._value(), list) and isinstance(value, list):
        items, nodes = _items(text), node._value()
        if len(items) == len(nodes) == len(value) and all(isinstance(child, StringNode) for child in nodes):
            texts = zip(nodes, value, items, strict=True)
            _set(owner, key, [item if _came_from(child, given) else child._value() for child, given, item in texts])


def _came_from(node: StringNode, value: Any) -> bool:
    """Whether a setting of type str holds what OmegaConf made of a number or a boolean."""
    return isinstance(value, (bool, int, float)) and node._value() == str(value)


def _items(text: Any) -> list[Any]:
    """The items of a list as they are written; none where it takes a parser to tell."""
    if isinstance(text, list):
        return text
    simple = _SIMPLE_LIST.fullmatch(str(text))
    return [item.strip() for item in simple[1].split(",")] if simple else []


def _set(owner: DictConfig, key: str, value: Any) -> None:
    with read_write(owner), open_dict(owner):
        owner[key] = value


def written_in(repository: Any, merged: Iterable[Any], paths: Sequence[str]) -> dict[str, tuple[Any, Any]]:
    """For settings, what YAML made of them in the last file that has them, and their text there.

    Args:
        repository: Hydra's, of all configs of the app.
        merged: Hydra's list of the configs that were merged, in order.
    """
    found: dict[str, tuple[Any, Any]] = {}
    for item in merged:
        if item.config_path is None or (loaded := repository.load_config(item.config_path)) is None:
            continue
        package = (item.package or "").replace("_global_", "")
        prefix = f"{package}." if package else ""
        inside = {path: path[len(prefix) :].split(".") for path in paths if path.startswith(prefix)}
        values = {path: _value_at(loaded.config, keys) for path, keys in inside.items()}
        if any(value is not None for value in values.values()):
            texts = yaml.load(_source(f"{loaded.path}/{item.config_path}"), Loader=yaml.BaseLoader)
            for path, value in values.items():
                if value is not None:
                    found[path] = value, _value_at(texts, inside[path])
    return found


def _source(path: str) -> str:
    """The text of a config file, by its source's path and its own; empty for configs that are no files."""
    scheme, _, name = path.removesuffix(".yaml").partition("://")
    if scheme == "file":
        return Path(f"{name}.yaml").read_text(encoding="utf-8")
    if scheme == "pkg":
        package, _, inside = name.partition("/")
        return files(package).joinpath(f"{inside}.yaml").read_text(encoding="utf-8")
    return ""


def _value_at(tree: Any, path: Sequence[str]) -> Any:
    """The value at a path of nested mappings, as plain values; None where there is none."""
    for part in path:
        if not isinstance(tree, Mapping) and not OmegaConf.is_dict(tree):
            return None
        tree = tree.get(part)
    return OmegaConf.to_container(tree) if OmegaConf.is_config(tree) else tree
