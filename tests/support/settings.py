"""The settings of a configuration class as tests walk them, and the documented ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Any

from danling_conf.config.typed import section_type
from danling_conf.schema import RunnerConfig, facts_of

DOCUMENTED = Path(__file__).with_name("documented_settings.tsv")


@dataclass(frozen=True)
class Row:
    """One documented setting."""

    path: str
    type: str
    default: str

    @property
    def optional(self) -> bool:
        return "None" in self.type or self.default == "-"


def documented() -> list[Row]:
    """All rows of the table."""
    lines = [line for line in DOCUMENTED.read_text().splitlines() if not line.startswith("#")]
    return [Row(*line.split("\t")[:3]) for line in lines]


def sections(kind: type = RunnerConfig, prefix: str = "") -> Iterator[tuple[str, type]]:
    """Every section below a class, with its path and dot: the class itself, its sections, its optional mappings."""
    yield prefix, kind
    for item in fields(kind):
        for inner in (section_type(item), facts_of(item).shape):
            if inner is not None:
                yield from sections(inner, f"{prefix}{item.name}.")


def settings() -> list[tuple[str, Field[Any]]]:
    """Every setting that is no section, with its path."""
    return [
        (prefix + item.name, item)
        for prefix, kind in sections()
        for item in fields(kind)
        if not item.name.startswith("_") and section_type(item) is None
    ]


def another_value(path: str, item: Field[Any]) -> Any:
    """A value that a setting may take and that is not its default."""
    facts, kind = facts_of(item), str(item.type)
    if facts.choices is not None:
        return next(choice for choice in facts.choices if choice != item.default)
    if facts.shape is not None:
        return {fields(facts.shape)[0].name: another_value(path, fields(facts.shape)[0])}
    if "Dict" in kind and "List" not in kind:
        return {"key": 1}
    if "List[List" in kind:
        return [["layers.0"]]
    if "List[Dict" in kind:
        return [{"pattern": "bias"}]
    if "List" in kind:
        return ["one"]
    if "bool" in kind:
        return item.default is not True
    if "int" in kind or "float" in kind:
        return (item.default or 1) + 1
    return "another"


def nested(path: str, value: Any) -> dict[str, Any]:
    """A mapping that gives one setting its value."""
    for part in reversed(path.split(".")):
        value = {part: value}
    return value


def given(config: Any, path: str) -> Any:
    """The value at a dotted path of a configuration object."""
    for part in path.split("."):
        config = config[part] if isinstance(config, dict) else getattr(config, part)
    return config
