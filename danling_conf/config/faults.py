"""Search for all faults of a command line that Hydra refuses, since Hydra stops at the first one."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from danling_conf.config.hydra_adapter import COMPOSITION_ERRORS, Composer
from danling_conf.config.hydra_changes import BrokenValue
from danling_conf.config.job import PREFIX, launcher_in
from danling_conf.config.resolve import declared_kind, given_in, inspect, merge_leaves
from danling_conf.config.typed import NO_SUCH_SETTING, setting_paths, unknown_key, wrong_type
from danling_conf.groups.base import SECTIONS
from danling_conf.groups.layout_names import GRAMMAR, LayoutNameError, looks_like_layout, parse_layout
from danling_conf.groups.source import LAUNCHERS, LAYOUTS
from danling_conf.schema import RunnerConfig
from danling_conf.schema.files import LONGEST_NAME
from danling_conf.schema.launcher import LauncherConfig
from danling_conf.schema.nearest import nearest
from danling_conf.schema.open_sections import open_sections
from danling_conf.topology.rules import Context
from danling_conf.topology.violation import ABSENT, ConfigRefused, Violation, unique

_OTHERS = {
    "optim": "; any class of torch.optim by optim.type=NAME, and your own by optim.type=package.Class",
    "scheduler": "; any class of torch.optim.lr_scheduler by scheduler.type=NAME, and your own by "
    "scheduler.type=package.Class",
}
"""Where what a group does not name comes from."""


def all_faults(
    composer: Composer,
    overrides: Sequence[str],
    context: Context,
    refusal: Exception,
    *,
    compose: Callable[[Sequence[str]], DictConfig] | None = None,
    also: Callable[[RunnerConfig, DictConfig], list[Violation]] | None = None,
    begun: tuple[DictConfig, BrokenValue] | None = None,
) -> list[Violation]:
    """Every fault of `overrides` that can be found.

    The group choices are composed without the values, which are then applied one by one. The rules check the result.

    Args:
        refusal: the error that Hydra raised; it is reported itself where nothing more precise is found.
        compose: composes group choices; that of the composer when None.
        also: finds further faults, in the resolved and in the composed configuration.
        begun: of `Composer.compose_until_broken`, which saves composing again where only values are at fault.
    """
    command_line = _sort(composer, overrides)
    violations = command_line.violations
    values = command_line.values
    if begun is not None and begun[1].values != tuple(str(item.input_line) for item in values):
        begun = None  # Hydra takes others for values, such as its own settings
    try:
        config = begun[0] if begun is not None else (compose or composer.compose)(command_line.choices)
    except ConfigRefused as refused:
        return unique([*violations, *refused.violations])
    except COMPOSITION_ERRORS as error:
        broken = _broken_choices(composer, command_line.choices)
        if broken:
            return unique([*violations, *broken])
        sound, found = _faults_of_files(composer, command_line.choices)
        if sound is None or not found:
            return violations or [_composition_fault(composer, error)]
        config = sound
        violations += found
    kind = declared_kind(config) or RunnerConfig
    if begun is not None:
        number = begun[1].number
        violations.append(_value_fault(values[number], begun[1].error, config, kind, begun[1].seen))
        values = values[number + 1 :]
    violations += _faults_of_values(composer, values, config, kind, {item.path for item in violations})
    faulty = {item.path for item in violations}
    violations += [item for item in _faults_of_settings(config, kind, context, also) if item.path not in faulty]
    named = in_files(composer, overrides, violations, choices=command_line.choices)
    return unique(named) or [_composition_fault(composer, refusal)]


def in_files(
    composer: Composer,
    overrides: Sequence[str],
    violations: Sequence[Violation],
    *,
    choices: Sequence[str] | None = None,
) -> list[Violation]:
    """Violations in which misspelt settings at the root name the file that has them.

    Args:
        choices: the group choices among the overrides; found there when None.
    """
    # The defaults list is computed for settings of files alone: it takes as long as half a composition.
    given = given_in(overrides)
    if not any(item.rule == NO_SUCH_SETTING and item.path not in given for item in violations):
        return list(violations)
    found = []
    if choices is None:
        choices = [item for item in overrides if composer.group_exists(item.lstrip("+~").split("=")[0])]
    merged = composer.defaults(choices)
    for item in violations:
        files = [source for source, content in merged if item.rule == NO_SUCH_SETTING and item.path in content]
        found.append(replace(item, rule=f"{item.rule} (in {files[-1]}.yaml)") if files else item)
    return found


def faults_of_sweep(composer: Composer, overrides: Sequence[str], refusal: Exception) -> list[Violation]:
    """Every fault of a sweep's own configuration: what cannot be read, and Hydra's settings.

    The other settings belong to the jobs, whose values are not known here.
    """
    violations: list[Violation] = []
    for text in overrides:
        try:
            OverridesParser.create().parse_overrides([text])
        except (OverrideParseException, HydraException, RecursionError):
            violations.append(_unparsed(text))
    if not violations:
        command_line = _sort(composer, [text for text in overrides if text.lstrip("+~").startswith("hydra")])
        violations = command_line.violations
        try:
            config = composer.compose(command_line.choices)
        except COMPOSITION_ERRORS as error:
            return violations or [_composition_fault(composer, error)]
        kind = declared_kind(config) or RunnerConfig
        violations += _faults_of_values(composer, command_line.values, config, kind, set())
        violations += launcher_in(config)[1]
    return unique(violations) or [_composition_fault(composer, refusal)]


@dataclass(frozen=True, kw_only=True)
class _CommandLine:
    """Overrides, sorted by how Hydra uses them."""

    choices: list[str] = field(default_factory=list)
    """Group choices, and Hydra's own settings: these are composed."""
    values: list[Override] = field(default_factory=list)
    """Values, which are applied after composing."""
    violations: list[Violation] = field(default_factory=list)
    """Faults of overrides that are neither."""


def _sort(composer: Composer, overrides: Sequence[str]) -> _CommandLine:
    found = _CommandLine()
    for text in overrides:
        try:
            # One at a time: Hydra's parser raises for a whole list at its first bad override.
            parsed = OverridesParser.create().parse_overrides([text])[0]
        except (OverrideParseException, HydraException, RecursionError):
            found.violations.append(_unparsed(text))
            continue
        # Hydra looks up whether there is a folder of the key's name, dots included.
        if any(len(os.fsencode(part)) > LONGEST_NAME for part in parsed.key_or_group.split("/")):
            rule, fix = f"a key has at most {LONGEST_NAME} bytes", "set what is above it to a mapping: KEY={...}"
            found.violations.append(Violation(parsed.key_or_group, ABSENT, rule, fix))
        elif not parsed.key_or_group:
            found.violations.append(Violation(text, ABSENT, "it names no setting", "write KEY=VALUE"))
        elif parsed.is_sweep_override():
            found.violations.append(_several_values(parsed, text))
        elif parsed.package is not None or composer.group_exists(parsed.key_or_group):
            fault = _choice_fault(composer, parsed)
            if fault is None:
                found.choices.append(text)
            else:
                found.violations.append(fault)
        elif parsed.is_hydra_override() and not parsed.key_or_group.startswith(PREFIX):
            found.choices.append(text)
        else:
            found.values.append(parsed)
    return found


def _broken_choices(composer: Composer, choices: Sequence[str]) -> list[Violation]:
    """Faults of chosen files that cannot be loaded at all."""
    found = []
    for text in choices:
        group, _, name = text.lstrip("+").partition("=")
        if name and composer.config_exists(f"{group}/{name}"):
            fault = composer.fault_of_file(f"{group}/{name}")
            if fault:
                found.append(Violation(group, name, fault, f"correct the file {group}/{name}.yaml"))
    return found


def _faults_of_files(composer: Composer, choices: list[str]) -> tuple[DictConfig | None, list[Violation]]:
    """The valid part of the configuration files, and their faults, each with its file.

    The configuration is None where no file declares its class.
    """
    node: DictConfig | None = None
    violations: list[Violation] = []
    try:
        merged = composer.defaults(choices)
    except COMPOSITION_ERRORS:
        return None, []
    for source, content in merged:
        if declared_kind(content) is not None:
            node = copy.deepcopy(content)
            with open_dict(node):
                node.pop("defaults", None)
            open_sections(node)
        elif node is not None:
            given: Any = OmegaConf.to_container(content)
            given.pop("hydra", None)
            given = _without_hydra(given)
            found = merge_leaves(node, given, OmegaConf.get_type(node) or RunnerConfig)
            violations += [replace(item, rule=f"{item.rule} (in {source}.yaml)") for item in found]
    return node, violations


def _without_hydra(value: Any) -> Any:
    """Values of files with a text in place of each that refers to Hydra's own settings, which are not there."""
    if isinstance(value, dict):
        return {key: _without_hydra(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_hydra(inner) for inner in value]
    return "hydra" if isinstance(value, str) and "${hydra" in value else value


def _faults_of_values(
    composer: Composer, values: Sequence[Override], config: DictConfig, kind: type[RunnerConfig], known: set[str]
) -> list[Violation]:
    """Apply values to `config`, and collect the faults of those that it rejects. Skips paths in `known`, which have a
    fault already."""
    return [
        item
        for override in values
        if override.key_or_group not in known
        for item in _apply(composer, override, config, kind)
    ]


def _faults_of_settings(
    config: DictConfig,
    kind: type[RunnerConfig],
    context: Context,
    also: Callable[[RunnerConfig, DictConfig], list[Violation]] | None,
) -> list[Violation]:
    """Faults of the launcher's settings, of the configuration's declarations and rules, and those that `also` finds."""
    found = launcher_in(config)[1]
    resolved, broken = inspect(config, kind=kind, context=context)
    found += broken
    if also is not None and resolved is not None:
        found += also(resolved, config)
    return found


def _choice_fault(composer: Composer, override: Override) -> Violation | None:
    group, value = override.key_or_group, override.value()
    if override.is_delete():
        return None
    if value is None:
        return Violation(group, None, "a group is chosen by a name", f"leave it out, or write ~{group}")
    if not composer.group_exists(group):
        return Violation(group, ABSENT, "there is no such group", "see --help for the groups")
    for name in value if isinstance(value, list) else [value]:
        if not isinstance(name, str):
            return Violation(group, value, "a group is chosen by a name", "write a name")
        if group == LAYOUTS and looks_like_layout(name):
            try:
                parse_layout(name)
            except LayoutNameError as error:
                rule, _, fix = str(error).partition("; ")
                return Violation(group, name, rule, fix or f"write {GRAMMAR}")
        elif not composer.config_exists(f"{group}/{name}"):
            return _no_such_choice(composer, group, name)
    return None


def _apply(composer: Composer, override: Override, config: DictConfig, kind: type) -> list[Violation]:
    seen = look_at(override, config)
    if override.is_delete() and not seen.exists:
        return [_nothing_to_remove(config, override.key_or_group, kind)]
    try:
        composer.apply(override, config)
        return []
    except HydraException as error:
        return [_value_fault(override, error, config, kind, seen)]


def _value_fault(override: Override, error: Exception, config: DictConfig, kind: type, seen: _Seen) -> Violation:
    """The fault of a value that Hydra could not apply."""
    path, cause = override.key_or_group, error.__cause__
    if override.is_delete():
        if not seen.exists:
            return _nothing_to_remove(config, path, kind)
        return Violation(f"~{path}", ABSENT, "it is unset already", "leave it out")
    if seen.null is not None:
        rule = "a mapping that is null cannot take keys"
        return Violation(seen.null, None, rule, "give it an empty one as its default: field(default_factory=dict)")
    if isinstance(cause, (ConfigKeyError, ConfigAttributeError)):
        return _unknown(config, path, kind)
    if isinstance(cause, OmegaConfBaseException):
        return wrong_type(path, override.value(), cause)
    return Violation(path, ABSENT, _first_line(error), "fix the override")


@dataclass(frozen=True)
class _Seen:
    """What matters to the fault of a value, before it is applied."""

    exists: bool
    """Whether there is something to remove."""
    null: str | None
    """The part of its path that is a null mapping; None where there is none."""


def look_at(override: Override, config: DictConfig) -> _Seen:
    """What is to be seen before a value is applied, for the fault that it may have."""
    path = override.key_or_group
    return _Seen(exists=not override.is_delete() or _exists(config, path), null=_null_mapping(config, path))


def _exists(config: DictConfig, path: str) -> bool:
    owner, _, key = path.rpartition(".")
    found = OmegaConf.select(config, owner, throw_on_missing=False) if owner else config
    return OmegaConf.is_dict(found) and key in found


def _nothing_to_remove(config: DictConfig, path: str, kind: type) -> Violation:
    near = re.search(r"did you mean ([^?]+)", _unknown(config, path, kind).fix)
    fix = f"did you mean ~{near[1]}?" if near else "leave it out"
    return Violation(f"~{path}", ABSENT, "there is no such setting to remove", fix)


def _null_mapping(config: DictConfig, path: str) -> str | None:
    """The part of a path that is a null mapping; None where there is none.

    Looked up before the override is applied: OmegaConf 2.3 fails with a bare AttributeError that names nothing.
    """
    owner: Any = config
    parts = path.split(".")
    for index, part in enumerate(parts):
        if not OmegaConf.is_dict(owner) or part not in owner:
            return None
        owner = owner._get_node(part)
        if isinstance(owner, DictConfig) and owner._is_none():
            return ".".join(parts[: index + 1])
    return None


def _unknown(config: DictConfig, path: str, kind: type) -> Violation:
    """The fault of a path with an unknown part. It names the first unknown part, which is the one to fix."""
    owner: Any = config
    parts = path.split(".")
    for index, part in enumerate(parts):
        declared = OmegaConf.get_type(owner) if OmegaConf.is_dict(owner) else None
        if OmegaConf.is_dict(owner) and part not in owner and declared is dict and index:
            return _undeclared(owner, ".".join(parts[: index + 1]), path)
        if index == 0 and part not in owner:
            near = nearest(part, map(str, owner), cutoff=0.6)
            if near and near not in setting_paths(kind):
                return replace(unknown_key(kind, part, kind), fix=f"did you mean {near}?")
        if not OmegaConf.is_dict(owner) or part not in owner:
            section = declared if isinstance(declared, type) and declared is not dict else kind
            if path.startswith(PREFIX) and not issubclass(section, LauncherConfig):
                choices = " or ".join(f"hydra/launcher={name}" for name in LAUNCHERS)
                rule = "Hydra's own launcher has no settings"
                return Violation(path, ABSENT, rule, f"add -m for a sweep, or choose {choices}")
            return unknown_key(section, ".".join(parts[: index + 1]), kind)
        owner = owner._get_node(part)
    return unknown_key(kind, path, kind)


def _undeclared(owner: DictConfig, unknown: str, path: str) -> Violation:
    """The fault of a key that no file declares, below a mapping of the app's own."""
    prefix, _, key = unknown.rpartition(".")
    near = nearest(key, map(str, owner), cutoff=0.6)
    fix = f"did you mean {prefix}.{near}? To add it, write +{path}=..." if near else f"to add it, write +{path}=..."
    return Violation(unknown, ABSENT, "no file declares such a key", fix)


def _unparsed(text: str) -> Violation:
    key, equals, value = text.partition("=")
    if not text.strip():
        return Violation(repr(text), ABSENT, "it is empty", "leave it out, or write KEY=VALUE")
    if not equals:
        return Violation(text, ABSENT, "it cannot be read as KEY=VALUE", f"write {text}=VALUE")
    if not re.fullmatch(r"[+~]{0,2}[\w./@:$-]+", key):
        return Violation(text, ABSENT, "it cannot be read as KEY=VALUE", "a key is a path such as optim.lr")
    opened = f"close what is open in {value}, or " if re.search(r"[\[{(]", value) else ""
    fix = f"{opened}write it in quotes: '{key}=\"{value}\"'"
    return Violation(key.lstrip("+~"), value, "the value cannot be read", fix)


def _several_values(override: Override, text: str) -> Violation:
    text = text.partition("=")[2]
    return Violation(
        override.key_or_group,
        text,
        "several values are a sweep, and this is a single run",
        f"add -m to sweep over them; a list is written [{text}]",
    )


_WITHOUT_REASON = ("Error merging override", "Could not override")
"""Beginnings of lines of Hydra's messages that only repeat the command line."""


def _composition_fault(composer: Composer, error: Exception) -> Violation:
    """Hydra's error as a violation.

    Hydra's errors carry no data, only text. Where a later version words one differently, its own first line is shown.
    """
    text = "\n".join(str(item) for item in (error, error.__cause__) if item is not None and str(item))
    if twice := re.search(r"Multiple values for ([^\s.]+)\.", text):
        group = twice[1].removeprefix(f"{SECTIONS}@")  # Hydra 1.4 names the section that a preset brings
        fix = f"write {group}=NAME without + on a command line, 'override {group}: NAME' in a defaults list"
        return Violation(group, ABSENT, "it is chosen already", fix)
    if other := re.search(r"Merge error: (\w+) is not a subclass of (RunnerConfig)", text):
        rule = (
            f"two classes declare the whole configuration, {other[2]} and {other[1]}, and the second is no {other[2]}"
        )
        fix = f"derive {other[1]} from danling_conf.RunnerConfig and pass it to danling_conf.register"
        return Violation("defaults", other[1], rule, fix)
    if choice := re.search(r"Could not find '([^']+)/([^']+)'", text):
        return _no_such_choice(composer, choice[1], choice[2], " (in a defaults list)")
    if layout := re.match(r"layout '([^']*)': ", text):
        rule, _, fix = text.splitlines()[0].partition("; ")
        return Violation(LAYOUTS, layout[1], f"{rule} (in a defaults list)", fix or f"write {GRAMMAR}")
    if primary := re.match(r"Cannot find primary config '([^']*)'", text):
        return Violation(
            "--config-name", primary[1], "there is no such config", "name a file among the configs, or danling"
        )
    if folder := re.search(r"Primary config directory not found.*config directory '([^']+)'", text, re.DOTALL):
        fix = "correct config_path of danling_conf.main, or name another by --config-path"
        return Violation("config_path", folder[1], "there is no such directory", fix)
    if scalar := re.search(r"config '([^']+)' must be a (?:DictConfig|Config)", text):
        return Violation(
            f"{scalar[1]}.yaml", ABSENT, "a config file holds a mapping of settings", "write KEY: VALUE in it"
        )
    if listless := re.match(r"Invalid defaults list in '([^']+)', (.*)", text):
        return Violation(f"{listless[1]}.yaml", ABSENT, listless[2], "write one entry a line: - danling")
    where = re.search(r"In '([^']+)'", text)
    key = re.search(r"full_key: (\S+)", text)
    lines = [line.strip() for line in text.splitlines() if line.strip() and "raised while" not in line]
    lines = [line for line in lines if not line.startswith(_WITHOUT_REASON)] or lines
    fix = f"fix it in {where[1]}.yaml" if where else "fix the command line or the configuration files"
    rule = lines[0] if lines else type(error).__name__
    return Violation(key[1] if key else "configuration", ABSENT, rule, fix)


def _no_such_choice(composer: Composer, group: str, name: str, where: str = "") -> Violation:
    options = composer.options(group)
    if group in vars(RunnerConfig):  # a setting at the root that is no section: only those have defaults there
        rule = f"the folder {group}/ among the configs hides the setting of that name{where}"
        fix = f"choose one of {', '.join(options)}, write '{group}: {name}' in a file, or rename the folder"
        return Violation(group, name, rule, fix)
    near = nearest(name, options, cutoff=0.6 if group in _OTHERS else 0.5)
    listed = GRAMMAR if group == LAYOUTS else f"{', '.join(options)}{_OTHERS.get(group, '')}"
    fix = f"did you mean {group}={near}? " if near else ""
    return Violation(group, name, f"there is no such choice{where}", f"{fix}Choices: {listed}")


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
