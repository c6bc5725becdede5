"""Settings and sections as lines to read."""

from __future__ import annotations

import textwrap
from dataclasses import MISSING, fields

from danling_conf.schema.docs import Described, describe
from danling_conf.topology.violation import show

_WIDTH = 100


def setting_lines(found: Described) -> list[str]:
    """What there is to say of a setting or a section."""
    lines = [found.path, *paragraph(found.doc)]
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
        lines.append(f"  choices  {', '.join(facts.choices)}")
    if facts.aliases:
        lines.append("  aliases  " + ", ".join(f"{alias} = {name}" for alias, name in facts.aliases.items()))
    lines.append(f"  read by  {found.read_by}")
    if facts.pending:
        lines.append(f"  note     no effect yet: {facts.pending} is not implemented")
    return lines


def _default(found: Described) -> str:
    if found.default is MISSING:
        return "empty"
    return "unset" if found.default is None else show(found.default)


def paragraph(text: str, indent: int = 2) -> list[str]:
    margin = " " * indent
    return textwrap.wrap(" ".join(text.split()), _WIDTH, initial_indent=margin, subsequent_indent=margin)
