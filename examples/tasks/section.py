"""Sections of a configuration as dataclasses: types and keys are checked, and a refusal names the path."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from types import NoneType
from typing import Any, TypeVar, get_args, get_type_hints

Section = TypeVar("Section")


def section_of(section: type[Section], path: str, values: Mapping[str, Any]) -> Section:
    """Build the dataclass `section` from the values at `path` of a configuration."""
    declared = {entry.name: entry for entry in fields(section)}
    types = get_type_hints(section)
    for key, value in values.items():
        if key not in declared:
            raise ValueError(f"{path}.{key}={value!r}: no such setting{nearest(str(key), declared)}")
        allowed = get_args(types[key]) or (types[key],)
        # By exact type: True is an int, but never meant as a size. A whole number may stand for a float.
        if type(value) not in ((*allowed, int) if float in allowed else allowed):
            names = " or ".join("null" if kind is NoneType else kind.__name__ for kind in allowed)
            raise TypeError(f"{path}.{key}={value!r}: must be {names}, not {type(value).__name__}")
    required = [name for name, entry in declared.items() if entry.default is MISSING]
    if missing := [f"{path}.{name}" for name in required if name not in values]:
        raise ValueError(f"{', '.join(missing)}: missing, and there is no default; set it")
    return section(**values)


def nearest(name: str, known: Iterable[str]) -> str:
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"


def check_val_fraction(value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(
            f"data.val_fraction={value}: must be larger than 0 and smaller than 1, so that both splits hold data"
        )
