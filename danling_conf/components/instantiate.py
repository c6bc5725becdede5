"""A section rebuilt from the keywords that `hydra.utils.instantiate` passes to its `_target_`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from omegaconf import OmegaConf

from danling_conf.config.resolve import merge_leaves
from danling_conf.config.typed import check_declarations
from danling_conf.schema.open_sections import open_sections
from danling_conf.topology.violation import ConfigRefused

Section = TypeVar("Section")


def section_from(section_class: type[Section], keywords: Mapping[str, Any], *, path: str) -> Section:
    """An instance of `section_class` with `keywords` as its settings; `path` is where it stands (`fsdp`).

    Checked as a whole configuration is: types, choices, aliases, mappings by the dataclass that types them. Keys
    unknown to an open section (one with `open_to`) become plain attributes.

    Raises ConfigRefused (a ValueError) with every fault.
    """
    node = OmegaConf.structured(section_class)
    open_sections(node)
    given: Any = OmegaConf.to_container(OmegaConf.create(dict(keywords), flags={"allow_objects": True}), resolve=True)
    violations = merge_leaves(node, given, section_class, f"{path}.")
    violations += check_declarations(node, section_class, f"{path}.")
    if violations:
        raise ConfigRefused(violations)
    section: Any = OmegaConf.to_object(node)
    return section
