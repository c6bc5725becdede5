"""`danling-conf explain`: the meaning of a setting, group or preset, and the origin of its value in an app."""

from __future__ import annotations

import textwrap
from dataclasses import MISSING, fields, replace
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from danling_conf.cli.inspect_app import inspect_app
from danling_conf.config.check import check, compose_or_refuse
from danling_conf.config.hydra_adapter import Composer, ConfigSearch, composer
from danling_conf.config.identity import flatten, plain
from danling_conf.config.typed import setting_paths
from danling_conf.groups.layout_names import EXAMPLES, GRAMMAR, LayoutNameError, parse_layout
from danling_conf.groups.presets import DEFAULT_CHOICES, GROUPS
from danling_conf.groups.source import LAUNCHER_GROUP, LAUNCHERS, LAYOUTS, SUBMITIT, layout_settings
from danling_conf.launch.app import App
from danling_conf.schema import RunnerConfig
from danling_conf.schema.docs import Described, describe, field_docs
from danling_conf.schema.launcher import LauncherConfig
from danling_conf.schema.nearest import nearest
from danling_conf.topology.violation import ABSENT, ConfigRefused, Violation, show

_MISSING = object()
_WIDTH = 100
_LAUNCHER_SECTION = "hydra.launcher"
_LAUNCHERS = {**LAUNCHERS, **SUBMITIT}


def explain(key: str, script: str | None, overrides: list[str]) -> list[str]:
    """Lines that explain a setting, a section, a group or a preset.

    Raises ConfigRefused for an unknown key, and for an app whose configuration is refused.
    """
    if script is None:
        return _explain(key, RunnerConfig)
    return inspect_app(script, overrides, lambda app, search, given: _in_app(key, app, search, given))


def overview() -> list[str]:
    """Groups with their choices, and all settings by section with their types and defaults."""
    lines = ["groups (GROUP=NAME; danling-conf explain GROUP)"]
    groups = {LAYOUTS: [*EXAMPLES[:6], "..."], **{group: list(presets) for group, presets in GROUPS.items()}}
    for group, names in {**groups, LAUNCHER_GROUP: list(LAUNCHERS)}.items():
        lines += _hanging(f"  {group}: ", ", ".join(names))
    lines += ["", "settings (danling-conf explain SETTING)"]
    paths = setting_paths(RunnerConfig)
    for section in dict.fromkeys(path.rpartition(".")[0] for path in sorted(paths, key=lambda path: "." in path)):
        lines.append(f"  {section or 'at the root'}")
        for path in paths:
            owner, _, name = path.rpartition(".")
            found = describe(RunnerConfig, path) if owner == section else None
            if found is not None:
                lines.append(f"    {name}: {found.type} = {_default(found)}")
    return [*lines, "", "  of the launchers: danling-conf explain hydra/launcher=NAME"]


def search(word: str) -> list[str]:
    """The settings and presets whose name or doc has a word, each with its doc. Raises ConfigRefused for none."""
    wanted = word.casefold()
    lines: list[str] = []
    of_launchers = {
        f"{_LAUNCHER_SECTION}.{item}": found
        for launcher in LAUNCHERS.values()
        for item in _launcher_settings(launcher)
        if (found := describe(launcher, item)) is not None
    }
    settings = {path: found for path in setting_paths(RunnerConfig) if (found := describe(RunnerConfig, path))}
    for path, found in (settings | of_launchers).items():
        if wanted in f"{path} {' '.join(found.doc.split())} {' '.join(found.facts.choices or ())}".casefold():
            lines += [f"{path}: {found.type} = {_default(found)}", *_paragraph(found.doc)]
    for group, presets in GROUPS.items():
        for name, preset in presets.items():
            if wanted in f"{group}={name} {preset.doc}".casefold():
                lines += [f"{group}={name}", *_paragraph(preset.doc)]
    if not lines:
        rule = "no setting and no preset has it in its name or meaning"
        raise ConfigRefused([Violation("--search", word, rule, "danling-conf explain shows all")])
    return lines


def _explain(key: str, kind: type[RunnerConfig]) -> list[str]:
    if key.startswith("hydra"):
        return _explain_launcher(key)
    group, equals, name = key.partition("=")
    if equals:
        return _preset(group, name)
    found = describe(kind, key)
    lines = [] if found is None else _setting_lines(found)
    if key in GROUPS or key == LAYOUTS:
        lines += ["", *_group(key)] if lines else _group(key)
    if lines:
        return lines
    known = [*setting_paths(kind), *GROUPS, LAYOUTS]
    near = nearest(key, known)
    fix = f"did you mean {near}?" if near else "see a training script's --help for the groups"
    raise ConfigRefused([Violation(key or "KEY", ABSENT, "there is no such setting, section or group", fix)])


def _group(group: str) -> list[str]:
    if group == LAYOUTS:
        return [
            "layout names (parallel=NAME)",
            f"  {GRAMMAR}",
            "  ddp and fsdp without a number are filled from the world size",
            f"  for instance {', '.join(EXAMPLES)}",
        ]
    lines = [f"presets ({group}=NAME)"]
    for name, preset in GROUPS[group].items():
        mark = " (default)" if DEFAULT_CHOICES.get(group) == name else ""
        lines.append(f"  {name}{mark}")
        lines += _paragraph(preset.doc, indent=4)
        lines += [f"      {path}={show(value)}" for path, value in flatten(dict(preset.settings)).items()]
    return lines


def _preset(group: str, name: str) -> list[str]:
    if group == LAYOUTS:
        try:
            parse_layout(name)
        except LayoutNameError as error:
            rule, _, fix = str(error).partition("; ")
            raise ConfigRefused([Violation(group, name, rule, fix or f"write {GRAMMAR}")]) from None
        settings = flatten(layout_settings(name))
        return [f"{group}={name}", *(f"  {path}={show(value)}" for path, value in settings.items())]
    if group not in GROUPS:
        fix = f"groups are {', '.join([LAYOUTS, *GROUPS])}"
        raise ConfigRefused([Violation(group, name, "there is no such group of presets", fix)])
    if name not in GROUPS[group]:
        near, choices = nearest(name, GROUPS[group]), ", ".join(GROUPS[group])
        fix = (f"did you mean {group}={near}? Or " if near else "") + f"choose among {choices}"
        raise ConfigRefused([Violation(group, name, "there is no such preset", fix)])
    preset = GROUPS[group][name]
    shown = [f"  {path}={show(value)}" for path, value in flatten(dict(preset.settings)).items()]
    return [f"{group}={name}", *_paragraph(preset.doc), *shown]


def _in_app(key: str, app: App, search: ConfigSearch, overrides: list[str]) -> list[str]:
    with composer(search) as composing:
        composed = compose_or_refuse(composing, overrides)
        config = check(composing, composed, overrides)
        declared = OmegaConf.get_type(composed)
        kind = declared if isinstance(declared, type) and issubclass(declared, RunnerConfig) else RunnerConfig
        values = {path: value for path, value in _settings_of(config, composed).items() if _below(path, key)}
        lines = _explain_own(key, kind, composing, known=bool(values))
        if not values and "=" not in key and not composing.group_exists(key):
            return [*lines, f"in {app.script.name}: nothing is set at {key}"]
        if values:
            lines.append(f"in {app.script.name} {' '.join(overrides)}".rstrip())
        for path, value in values.items():
            lines.append(f"  {path} = {show(value)}")
            if len(values) <= 3 or path == key:
                lines += [f"    {step}" for step in _origins(composing, path, value, overrides)]
        return lines


def _settings_of(config: RunnerConfig, composed: DictConfig) -> dict[str, Any]:
    """All settings by their paths, including those of the launcher."""
    launcher: Any = OmegaConf.to_container(composed.hydra.launcher)
    return flatten(plain(config)) | flatten({"hydra": {"launcher": launcher}})


def _explain_own(key: str, kind: type[RunnerConfig], composing: Composer, *, known: bool) -> list[str]:
    """What `_explain` returns; for keys that are not ours, what the app's configuration has about them."""
    try:
        return _explain(key, kind)
    except ConfigRefused:
        group, equals, name = key.partition("=")
        if group not in GROUPS and composing.group_exists(group):
            choices = ", ".join(composing.options(group))
            if equals and not composing.config_exists(f"{group}/{name}"):
                fault = Violation(group, name, "there is no such choice", f"choose among {choices}")
                raise ConfigRefused([fault]) from None
            return [f"{group}: a group of this app", f"  choices  {choices}"]
        if known:
            return [key, "  a key of this app's own, or an option of a section that is open to them"]
        raise


def _origins(composing: Composer, path: str, value: Any, overrides: list[str]) -> list[str]:
    """Every place that sets a path, in the order of merging; the last one wins."""
    steps = []
    last: Any = _MISSING
    for source, content in composing.defaults(overrides):
        found = _select(content, path)
        if found is not _MISSING:
            group, _, name = source.rpartition("/")
            where = f"{group}={name}" if group else f"base or primary config {source}"
            steps.append(f"{where}: {show(found)}")
            last = found
    for override in overrides:
        given, equals, _ = override.partition("=")
        if equals and given.lstrip("+") == path:
            steps.append(f"command line {override}")
            last = OverridesParser.create().parse_overrides([override])[0].value()
    if last is _MISSING or (last != value and not OmegaConf.is_config(last)):
        steps.append(f"resolution: {show(value)} (derived, or the canonical spelling)")
    return steps


def _select(content: DictConfig, path: str) -> Any:
    owner: Any = content
    for part in path.split("."):
        if not OmegaConf.is_dict(owner) or owner._is_none() or part not in owner:
            return _MISSING
        if OmegaConf.is_interpolation(owner, part):
            return owner._get_node(part)._value()
        owner = owner[part]
    return owner


def _below(path: str, key: str) -> bool:
    return path == key or path.startswith(f"{key}.")


def _explain_launcher(key: str) -> list[str]:
    """Lines that explain a launcher or one of its settings. Raises ConfigRefused for any other key."""
    group, equals, name = key.partition("=")
    if equals and group == LAUNCHER_GROUP:
        if name not in _LAUNCHERS:
            near = nearest(name, _LAUNCHERS)
            fix = f"did you mean {LAUNCHER_GROUP}={near}?" if near else f"choose among {', '.join(_LAUNCHERS)}"
            raise ConfigRefused([Violation(LAUNCHER_GROUP, name, "there is no such launcher of ours", fix)])
        return _launcher(name)
    if key in (LAUNCHER_GROUP, _LAUNCHER_SECTION):
        lines = [f"launchers ({LAUNCHER_GROUP}=NAME)"]
        for other, kind in _LAUNCHERS.items():
            lines += [f"  {other}", *_paragraph(kind.__doc__ or "", indent=4)]
        return [*lines, f"  settings of each: danling-conf explain {LAUNCHER_GROUP}=NAME"]
    setting = key.removeprefix(f"{_LAUNCHER_SECTION}.")
    lines = []
    if setting != key:
        for name, kind in _LAUNCHERS.items():
            found = describe(kind, setting)
            if found is not None:
                # A setting that several launchers have is shown once.
                lines = lines or _setting_lines(replace(found, path=key))
                lines.append(f"  of       {LAUNCHER_GROUP}={name}")
    if lines:
        return lines
    if key.startswith("hydra.") and not key.startswith(f"{_LAUNCHER_SECTION}."):
        fix = "see --hydra-help, and docs/existing_app.md for what each does under danling_conf.main"
        raise ConfigRefused([Violation(key, ABSENT, "it is a setting of Hydra's own", fix)])
    known = sorted({f"{_LAUNCHER_SECTION}.{item}" for kind in _LAUNCHERS.values() for item in _launcher_settings(kind)})
    near = nearest(key, known)
    fix = (
        f"did you mean {near}?"
        if near
        else f"write {LAUNCHER_GROUP}, or a setting of a launcher: {_LAUNCHER_SECTION}.nodes"
    )
    raise ConfigRefused([Violation(key, ABSENT, "there is no such setting of ours", fix)])


def _launcher(name: str) -> list[str]:
    kind = _LAUNCHERS[name]
    lines = [f"{LAUNCHER_GROUP}={name}", *_paragraph(kind.__doc__ or ""), "  settings:"]
    docs = field_docs(kind)
    for item in _launcher_settings(kind):
        found = describe(kind, item)
        if found is not None:
            lines.append(f"    {_LAUNCHER_SECTION}.{item}: {found.type} = {_default(found)}")
            lines += _paragraph(docs.get(item, ""), indent=6)
    return lines


def _launcher_settings(kind: type[LauncherConfig]) -> list[str]:
    return [item.name for item in fields(kind) if not item.name.startswith("_")]


def _setting_lines(found: Described) -> list[str]:
    """The lines that describe a setting or a section."""
    lines = [found.path, *_paragraph(found.doc)]
    if found.section is not None:
        inner = found.section
        lines.append("  settings:")
        for item in fields(inner):
            below = describe(inner, item.name)
            if below is not None:
                default = "" if below.section and not below.facts.shape else f" = {_default(below)}"
                lines.append(f"    {found.path}.{item.name}: {below.type}{default}")
    else:
        lines += [f"  type     {found.type}", f"  default  {_default(found)}"]
    facts = found.facts
    if facts.choices:
        also = [f"{facts.fraction}:X (X from 0 to 1)"] if facts.fraction else []
        lines.append(f"  choices  {', '.join([*facts.choices, *also])}")
    if facts.aliases:
        lines.append("  aliases  " + ", ".join(f"{alias} = {name}" for alias, name in facts.aliases.items()))
    lines.append(f"  read by  {found.read_by}")
    return lines


def _default(found: Described) -> str:
    if found.default is MISSING:
        return "empty"
    return "unset" if found.default is None else show(found.default)


def _hanging(head: str, text: str) -> list[str]:
    return textwrap.wrap(f"{head}{text}", _WIDTH, subsequent_indent=" " * len(head))


def _paragraph(text: str, indent: int = 2) -> list[str]:
    margin = " " * indent
    return textwrap.wrap(" ".join(text.split()), _WIDTH, initial_indent=margin, subsequent_indent=margin)
