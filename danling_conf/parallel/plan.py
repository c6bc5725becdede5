"""Plans of the axes: names of modules and parameters, and the style that each is laid out in."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn


def matches(model: nn.Module, plan: Mapping[str, str]) -> Iterator[tuple[str, str, bool]]:
    """The matches of a plan: (fully qualified name, style, whether it is a parameter), in the order of the plan. In a
    plan's name, `*` stands for one part: `layers.*.attention.wq`. A later entry for the same name wins."""
    modules = [name for name, _ in model.named_modules(remove_duplicate=False)]
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    found: dict[str, tuple[str, bool]] = {}
    for pattern, style in plan.items():
        expression = re.compile(r"[^.]+".join(re.escape(part) for part in pattern.split("*")))
        for names, is_parameter in ((modules, False), (parameters, True)):
            for name in names:
                if expression.fullmatch(name):
                    found[name] = (style, is_parameter)
    for name, (style, is_parameter) in found.items():
        yield name, style, is_parameter


def unmatched(model: nn.Module, plan: Mapping[str, str]) -> list[str]:
    """The names of a plan that stand for nothing in the model."""
    return [pattern for pattern, style in plan.items() if next(matches(model, {pattern: style}), None) is None]


def plan_of(model: nn.Module, attribute: str) -> dict[str, str] | None:
    """A model's own plan: its attribute of that name, where it is a mapping with an entry."""
    plan: Any = getattr(model, attribute, None)
    return dict(plan) if isinstance(plan, Mapping) and plan else None


def owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds the parameter of this name, and the last part of the name."""
    parent, _, last = name.rpartition(".")
    return model.get_submodule(parent), last
