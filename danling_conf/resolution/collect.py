"""All faults of a command line that Hydra refuses: Hydra stops at its first, this goes on to the last."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from danling_conf.groups.layout_names import GRAMMAR, LayoutNameError, looks_like_layout, parse_layout
from danling_conf.groups.source import LAYOUTS
from danling_conf.resolution.hydra_adapter import Composer, shadowed_settings
from danling_conf.resolution.resolve import inspect
from danling_conf.resolution.typed import unknown_key, wrong_type
from danling_conf.schema import RunnerConfig
from danling_conf.topology.rules import Context
from danling_conf.topology.violation import ABSENT, Violation, unique


def all_faults(composer: Composer, overrides: Sequence[str], context: Context, refusal: Exception) -> list[Violation]:
    """Every fault of `overrides` that can be told.

    Group choices are composed without the value overrides, which are then applied one by one; the rules see the result.

    Args:
        refusal: what Hydra raised; it is reported itself when nothing more precise is found.
    """
    violations: list[Violation] = []
    choices: list[str] = []
    values: list[Override] = []
    for text in overrides:
        try:
            parsed = OverridesParser.create().parse_overrides([text])[0]
        except (OverrideParseException, HydraException) as error:
            violations.append(_unparsed(text, error))
            continue
        if parsed.is_sweep_override():
            violations.append(_sweep(parsed))
        elif _is_choice(composer, parsed):
            fault = _choice_fault(composer, parsed)
            if fault is None:
                choices.append(text)
            else:
                violations.append(fault)
        elif parsed.is_hydra_override():
            choices.append(text)
        else:
            values.append(parsed)
    try:
        config = composer.compose(choices)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        hidden = shadowed_settings(composer, RunnerConfig)
        return unique([*violations, *(hidden or [_composition_fault(error)])])
    declared = OmegaConf.get_type(config)
    kind = declared if isinstance(declared, type) and issubclass(declared, RunnerConfig) else RunnerConfig
    violations += shadowed_settings(composer, kind)
    shadows = {item.path for item in violations}
    for override in values:
        if override.key_or_group not in shadows:
            violations += _apply(composer, override, config, kind)
    faulty = {item.path for item in violations}
    _, found = inspect(config, kind=kind, context=context)
    violations += [item for item in found if item.path not in faulty]
    return unique(violations) or [_composition_fault(refusal)]


def _is_choice(composer: Composer, override: Override) -> bool:
    return override.package is not None or composer.group_exists(override.key_or_group)


def _choice_fault(composer: Composer, override: Override) -> Violation | None:
    group, value = override.key_or_group, override.value()
    if override.is_delete() or value is None:
        return None
    if not composer.group_exists(group):
        return Violation(group, ABSENT, "there is no such group", "see --help for the groups")
    for name in value if isinstance(value, list) else [value]:
        name = str(name)
        if group == LAYOUTS and looks_like_layout(name):
            try:
                parse_layout(name)
            except LayoutNameError as error:
                rule, _, fix = str(error).partition("; ")
                return Violation(group, name, rule, fix or f"write {GRAMMAR}")
        elif not composer.config_exists(f"{group}/{name}"):
            options = composer.options(group)
            near = get_close_matches(name, options, n=1, cutoff=0.5)
            listed = GRAMMAR if group == LAYOUTS else ", ".join(options)
            fix = f"did you mean {group}={near[0]}? " if near else ""
            return Violation(group, name, "there is no such choice", f"{fix}Choices: {listed}")
    return None


def _apply(composer: Composer, override: Override, config: DictConfig, kind: type) -> list[Violation]:
    path = override.key_or_group
    try:
        composer.apply(override, config)
        return []
    except HydraException as error:
        cause = error.__cause__
        if isinstance(cause, (ConfigKeyError, ConfigAttributeError)):
            return [_unknown(config, path, kind)]
        if isinstance(cause, OmegaConfBaseException):
            return [wrong_type(path, override.value(), cause)]
        return [Violation(path, ABSENT, _first_line(error), "mend the override")]


def _unknown(config: DictConfig, path: str, kind: type) -> Violation:
    """The fault of a path with an unknown part: the first part that is unknown is the one to mend."""
    owner: Any = config
    parts = path.split(".")
    for index, part in enumerate(parts):
        declared = OmegaConf.get_type(owner) if OmegaConf.is_dict(owner) else None
        if not OmegaConf.is_dict(owner) or part not in owner:
            section = declared if isinstance(declared, type) and declared is not dict else kind
            return unknown_key(section, ".".join(parts[: index + 1]), kind)
        owner = owner._get_node(part)
    return unknown_key(kind, path, kind)


def _unparsed(text: str, error: Exception) -> Violation:
    key, equals, value = text.partition("=")
    fix = "quote values with special characters: key='\"a,b\"'" if equals else f"write {text}=VALUE"
    return Violation(key or text, value if equals else ABSENT, _first_line(error), fix)


def _sweep(override: Override) -> Violation:
    text = str(override.get_value_element_as_str())
    return Violation(
        override.key_or_group,
        text,
        "several values are a sweep, and this is a single run",
        f"add -m to sweep over them, or write a list: {override.key_or_group}=[{text}]",
    )


def _composition_fault(error: Exception) -> Violation:
    """What Hydra says of a config file, as a violation."""
    text = "\n".join(str(item) for item in (error, error.__cause__) if item is not None and str(item))
    where = re.search(r"In '([^']+)'", text)
    key = re.search(r"full_key: (\S+)", text)
    unknown = re.search(r"Key '[^']+' not in '[^']+'|Key '[^']+' is not in struct", text)
    source = f"{where[1]}.yaml" if where else "the configuration files"
    if key and unknown:
        found = _unknown(OmegaConf.structured(RunnerConfig), key[1], RunnerConfig)
        return Violation(found.path, ABSENT, f"{found.rule} (in {source})", found.fix)
    lines = [line.strip() for line in text.splitlines() if line.strip() and "raised while" not in line]
    return Violation(key[1] if key else "configuration", ABSENT, lines[0] if lines else type(error).__name__,
                     f"mend it in {source}")  # fmt: skip


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
