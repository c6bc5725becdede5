"""Precedence: what the user wrote wins over what a file, a preset or a default gave, where the two exclude each other.

What gives way is named in a note, which a run prints with its warnings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from danling_conf.groups.presets import GROUPS
from danling_conf.schema.torch_options import Entry, find_optimizer, find_scheduler
from danling_conf.schema.typed_node import typed_node_of
from danling_conf.topology.rules import Context
from danling_conf.topology.violation import show

_FIND: dict[str, Callable[[str], Entry | None]] = {"optim": find_optimizer, "scheduler": find_scheduler}
_BUDGETS = ("steps", "epochs")


def give_way(node: DictConfig, context: Context) -> list[str]:
    """Remove from a typed, resolved configuration what gives way to settings that the user wrote.

    Args:
        context: the settings on the command line, and the choices of groups.

    Returns:
        A note for each, in order.
    """
    return [*_other_budget(node, context.given), *_options_of_presets(node, context)]


def _other_budget(node: DictConfig, given: frozenset[str]) -> Iterator[str]:
    """`steps=5` on the command line against `epochs: 20` in a file."""
    for kept, dropped in (_BUDGETS, _BUDGETS[::-1]):
        if kept in given and dropped not in given and None not in (node[kept], node[dropped]):
            yield f"{kept}={node[kept]} is on the command line, so {dropped}={node[dropped]} of a file is set to null"
            node[dropped] = None


def _options_of_presets(node: DictConfig, context: Context) -> Iterator[str]:
    """Options of a preset or a default that the chosen optimizer or scheduler does not have."""
    for name, find in _FIND.items():
        section = node[name]
        entry = find(section.type)
        if entry is None or entry.own_class:
            continue
        chosen = context.choices.get(name)
        preset: Mapping[str, Any] = GROUPS[name][chosen].settings if chosen in GROUPS[name] else {}
        kind: Any = OmegaConf.get_type(section)
        defaults = _defaults(kind)
        for key in list(section):
            known = key in ("type", "interval", "monitor", "param_groups") or str(key).startswith("_")
            if known or section[key] is None or key in entry.options or f"{name}.{key}" in context.given:
                continue
            value = _plain(section[key])
            if key in preset and value == preset[key]:
                source = f"the preset {name}={chosen}"
            elif key in defaults and value == defaults[key]:
                source = "the default"
            else:
                continue
            yield f"{name}.{key}={show(value)} of {source} is dropped: {entry.name} has no such option"
            if key in defaults:
                section[key] = None
            else:
                with open_dict(section):
                    section.pop(key)


@cache  # a sweep asks for the same few of every job
def _defaults(kind: Any) -> DictConfig:
    return typed_node_of(kind)


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
