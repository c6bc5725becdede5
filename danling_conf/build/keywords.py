"""A section rebuilt from the keywords that `hydra.utils.instantiate` passes to its `_target_`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from typing import Any, TypeVar

from omegaconf import OmegaConf

from danling_conf.schema.setting import facts_of

Section = TypeVar("Section")


def section_from(section_class: type[Section], keywords: Mapping[str, Any], *, path: str) -> Section:
    """An instance of `section_class` with `keywords` as its settings; `path` is where it stands (`fsdp`).

    OmegaConf containers become plain ones, aliases their canonical spelling, and mappings the dataclass that types
    them. Keys unknown to an open section (one with `open_to`) become plain attributes.

    Raises ValueError for an unknown key of a closed section and for a value that is not among the choices.
    """
    declared = {item.name: item for item in fields(section_class)}  # type: ignore[arg-type]
    known: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    for name, value in keywords.items():
        if OmegaConf.is_config(value):
            value = OmegaConf.to_container(value, resolve=True)
        if name in declared:
            known[name] = _canonical(declared[name], value, f"{path}.{name}")
        elif hasattr(section_class, "open_to"):
            extra[name] = value
        else:
            nearest = get_close_matches(name, [key for key in declared if not key.startswith("_")], n=1)
            hint = f"did you mean `{path}.{nearest[0]}`?" if nearest else "remove it"
            raise ValueError(f"{path}.{name}={value!r}: `{path}` has no such setting; {hint}")
    section = section_class(**known)
    for name, value in extra.items():
        setattr(section, name, value)
    return section


def _canonical(declared: Any, value: Any, path: str) -> Any:
    facts = facts_of(declared)
    if isinstance(value, str) and facts.aliases:
        value = facts.aliases.get(value, value)
    if value is not None and facts.choices is not None and value not in facts.choices:
        raise ValueError(f"{path}={value!r}: the choices are {', '.join(facts.choices)}")
    shape = facts.shape or (declared.default_factory if declared.default_factory is not MISSING else None)
    if isinstance(value, Mapping) and isinstance(shape, type) and is_dataclass(shape):
        return section_from(shape, value, path=path)
    return value
