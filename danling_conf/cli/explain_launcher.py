"""`danling-conf explain hydra.launcher...`: the settings of our launchers, which Hydra's own node holds."""

from __future__ import annotations

from dataclasses import fields, replace
from difflib import get_close_matches

from danling_conf.cli.explained import paragraph, setting_lines
from danling_conf.groups.source import LAUNCHERS
from danling_conf.schema.docs import describe, field_docs
from danling_conf.schema.launcher import LauncherConfig
from danling_conf.topology.violation import ABSENT, ConfigRefused, Violation

GROUP = "hydra/launcher"
SECTION = "hydra.launcher"


def explain_launcher(key: str) -> list[str]:
    """Lines that explain a launcher, or one of its settings. Raises ConfigRefused for what is neither."""
    group, equals, name = key.partition("=")
    if equals and group == GROUP:
        if name not in LAUNCHERS:
            near = get_close_matches(name, LAUNCHERS, n=1, cutoff=0.5)
            fix = f"did you mean {GROUP}={near[0]}?" if near else f"choose among {', '.join(LAUNCHERS)}"
            raise ConfigRefused([Violation(GROUP, name, "there is no such launcher of ours", fix)])
        return _launcher(name)
    if key in (GROUP, SECTION):
        lines = [f"launchers ({GROUP}=NAME)"]
        for other, kind in LAUNCHERS.items():
            lines += [f"  {other}", *paragraph(kind.__doc__ or "", indent=4)]
        return [*lines, f"  settings of each: danling-conf explain {GROUP}=NAME"]
    setting = key.removeprefix(f"{SECTION}.")
    lines = []
    if setting != key:
        for name, kind in LAUNCHERS.items():
            found = describe(kind, setting)
            if found is not None:
                # What both launchers know is told once.
                lines = lines or setting_lines(replace(found, path=key))
                lines.append(f"  of       {GROUP}={name}")
    if lines:
        return lines
    known = sorted({f"{SECTION}.{item}" for kind in LAUNCHERS.values() for item in _settings(kind)})
    near = get_close_matches(key, known, n=1, cutoff=0.5)
    fix = f"did you mean {near[0]}?" if near else f"write {GROUP}, or a setting of a launcher: {SECTION}.nodes"
    raise ConfigRefused([Violation(key, ABSENT, "there is no such setting of ours", fix)])


def _launcher(name: str) -> list[str]:
    kind = LAUNCHERS[name]
    lines = [f"{GROUP}={name}", *paragraph(kind.__doc__ or ""), "  settings:"]
    docs = field_docs(kind)
    for item in _settings(kind):
        found = describe(kind, item)
        if found is not None:
            lines.append(f"    {SECTION}.{item}: {found.type}")
            lines += paragraph(docs.get(item, ""), indent=6)
    return lines


def _settings(kind: type[LauncherConfig]) -> list[str]:
    return [item.name for item in fields(kind) if not item.name.startswith("_")]
