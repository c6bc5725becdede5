"""Pages of settings and presets, from the same docs that `danling-conf explain` prints.

One page for each section of a configuration, with its settings and the presets of its group, and one for the layouts,
the launchers and what stands at the root. Imports no torch.
"""

from __future__ import annotations

from dataclasses import MISSING, fields, is_dataclass
from typing import Any

import yaml

from danling_conf.groups.layout_names import EXAMPLES, GRAMMAR
from danling_conf.groups.presets import DEFAULT_CHOICES, GROUPS
from danling_conf.groups.source import LAUNCHER_GROUP, LAUNCHERS, LAYOUTS
from danling_conf.schema import RunnerConfig
from danling_conf.schema.docs import Described, describe, field_docs
from danling_conf.topology.violation import show

FOLDER = "settings"
OVERVIEW = f"{FOLDER}/index.md"


def pages() -> dict[str, str]:
    """Markdown of every page, by its path in the site."""
    sections = [item.name for item in fields(RunnerConfig) if is_dataclass(_class_of(item.name))]
    alone = [group for group in GROUPS if group not in sections]  # a group without a section of its own: tracking
    made = {f"{FOLDER}/root.md": _root(), f"{FOLDER}/launchers.md": _launchers()}
    made |= {f"{FOLDER}/{name}.md": _section(name) for name in sections}
    made |= {
        f"{FOLDER}/{name}.md": "\n".join([f"# {name}", "", "## Presets", "", *_presets(name)]) + "\n" for name in alone
    }
    return {OVERVIEW: _overview(sections, alone), **made}


def _class_of(path: str) -> type | None:
    found = describe(RunnerConfig, path)
    return found.section if found is not None and not found.facts.shape else None


def _overview(sections: list[str], alone: list[str]) -> str:
    lines = [
        "# Settings and presets",
        "",
        "Every setting and every preset, from the docs in the code that `danling-conf explain` prints too. A setting "
        "is `section.name=value` on a command line, a preset is `group=name`. The search of this site finds both. "
        "A preset holds only what it names, so presets of different groups combine in any order.",
        "",
        "| Section or group | Holds | Presets, the default first |",
        "|---|---|---|",
        "| [at the root](root.md) | Length of a run, precision, evaluation, directories. | |",
        "| [launchers](launchers.md) | `hydra/launcher`: jobs on this machine and on Slurm. | "
        f"{', '.join(f'`{name}`' for name in LAUNCHERS)} |",
    ]
    for name in [*sections, *alone]:
        found = describe(RunnerConfig, name)
        doc = found.doc.split("\n\n")[0] if found is not None else "Where metrics go."
        presets = ", ".join(f"`{preset}`" for preset in _ordered(name)) if name in GROUPS else ""
        if name == LAYOUTS:
            presets = f"{', '.join(f'`{example}`' for example in EXAMPLES[:6])}, ..."
        lines.append(f"| [{name}]({name}.md) | {_one_line(doc)} | {presets} |")
    return "\n".join(lines) + "\n"


def _root() -> str:
    names = [item.name for item in fields(RunnerConfig) if _class_of(item.name) is None]
    head = ["# At the root", "", "Settings that stand in no section: `steps=200` on a command line.", ""]
    head += ["## Settings", ""]
    return "\n".join([*head, *_settings(RunnerConfig, "", names)]) + "\n"


def _section(name: str) -> str:
    found = describe(RunnerConfig, name)
    assert found is not None
    lines = [f"# {name}", "", _paragraphs(found.doc), "", f"Read by `{found.read_by}`.", ""]
    if name == LAYOUTS:
        lines += [
            "## Layouts",
            "",
            f"`parallel=NAME`, where NAME is {GRAMMAR}. `ddp` and `fsdp` without a number are filled from the world "
            f"size. For instance {', '.join(f'`{example}`' for example in EXAMPLES)}.",
            "",
        ]
    elif name in GROUPS:
        lines += ["## Presets", "", *_presets(name)]
    return "\n".join([*lines, "## Settings", "", *_settings(RunnerConfig, name, [name])]) + "\n"


def _settings(kind: type, prefix: str, names: list[str]) -> list[str]:
    """Settings below each name, sections inside it too; the section itself has no entry."""
    lines: list[str] = []
    for name in names:
        found = describe(kind, name)
        if found is None:
            continue
        if found.section is None or name != prefix:
            lines += _setting(found)
        if found.section is not None:
            below = [f"{name}.{item.name}" for item in fields(found.section) if not item.name.startswith("_")]
            lines += _settings(kind, prefix, below)
    return lines


def _setting(found: Described) -> list[str]:
    facts = found.facts
    rows = [f"Type `{found.type}`", f"default {_default(found)}"] if found.section is None or facts.shape else []
    if facts.choices:
        also = [f"`{facts.fraction}:X` (X from 0 to 1)"] if facts.fraction else []
        rows.append("choices " + ", ".join([*(f"`{choice}`" for choice in facts.choices), *also]))
    if facts.aliases:
        rows.append("aliases " + ", ".join(f"`{alias}` = `{name}`" for alias, name in facts.aliases.items()))
    lines = [f"### {found.path} {{ #{found.path} }}", "", _paragraphs(found.doc), ""]
    if rows:
        lines += [f"{'; '.join(rows)}. Read by `{found.read_by}`.", ""]
    return lines


def _presets(group: str) -> list[str]:
    lines: list[str] = []
    for name in _ordered(group):
        preset = GROUPS[group][name]
        default = " (the default)" if DEFAULT_CHOICES.get(group) == name else ""
        heading = f'### {group}={name} {{ id="{group}={name}" }}'
        lines += [heading, "", f"{_paragraphs(preset.doc)}{default}", ""]
        if preset.settings:
            body = yaml.safe_dump(dict(preset.settings), sort_keys=False, default_flow_style=False).rstrip()
            lines += ["```yaml", body, "```", ""]
    return lines


def _ordered(group: str) -> list[str]:
    first = DEFAULT_CHOICES.get(group)
    return sorted(GROUPS[group], key=lambda name: name != first)


def _launchers() -> str:
    lines = ["# Launchers", "", f"`{LAUNCHER_GROUP}=NAME` says where the jobs of `-m` run, and a single run too.", ""]
    for name, kind in LAUNCHERS.items():
        lines += [f"## {name} {{ #{name} }}", "", _paragraphs(kind.__doc__ or ""), ""]
        docs = field_docs(kind)
        for item in fields(kind):
            found = describe(kind, item.name)
            if found is not None:
                path = f"hydra.launcher.{item.name}"
                lines += [f"### {path} {{ #{name}.{item.name} }}", "", _paragraphs(docs.get(item.name, "")), ""]
                lines += [f"Type `{found.type}`; default {_default(found)}.", ""]
    return "\n".join(lines) + "\n"


def _default(found: Described) -> str:
    if found.default is MISSING:
        return "empty"
    return "unset" if found.default is None else f"`{show(found.default)}`"


def _one_line(doc: str) -> str:
    return " ".join(doc.split()).replace("|", "\\|")


def _paragraphs(doc: str) -> str:
    """A doc as Markdown: what `explain` wraps anew stands as it is. Its angle brackets are no markup."""
    return doc.strip().replace("<", "&lt;")


def unlisted(value: Any) -> list[Any]:
    """Every leaf of a navigation, a nested list of mappings."""
    if isinstance(value, dict):
        value = list(value.values())
    return [leaf for item in value for leaf in unlisted(item)] if isinstance(value, list) else [value]
