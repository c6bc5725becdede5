"""Declaration of a setting: its default, its allowed values, and its reader.

Choices are strings in the metadata: OmegaConf supports no `Literal`, and reads an enum by its members' names, not by
its values. A choice is named `none` and never `off`, which YAML reads as false. Annotations are `Optional`, `List` and
`Dict`, since OmegaConf 2.3 evaluates them and does not support `X | None` everywhere.

A section with a `_target_` can be built by `hydra.utils.instantiate`. Its `_recursive_` is false: mappings inside of it
are settings of the builder, and not objects for Hydra to build first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from typing import Any

_KEY = "danling_conf"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Facts of a setting besides its type and default."""

    choices: tuple[str, ...] | None = None
    """The only values allowed, in their canonical spelling."""
    aliases: Mapping[str, str] | None = None
    """Other spellings, each mapped to its canonical one."""
    fraction: str | None = None
    """One more choice: this word, a colon and a number from 0 to 1, such as `budget:0.5`."""
    at_least: float | None = None
    """Smallest value allowed."""
    at_most: float | None = None
    """Largest value allowed."""
    above: float | None = None
    """Values must be larger than this."""
    semantic: bool = True
    """Whether a change of the value changes the result of training (and so the run's `config_id`)."""
    shape: type | None = None
    """For a setting that is either unset or a mapping: the dataclass that types the mapping."""
    kinds: tuple[type, ...] | None = None
    """For a setting whose type OmegaConf cannot express (a union with a list): the Python types allowed."""
    read_by: str | None = None
    """Module that reads the setting, where it is another than its section's."""


def setting(
    default: Any = MISSING,
    *,
    factory: Callable[[], Any] | None = None,
    choices: Sequence[str] | None = None,
    **facts: Any,
) -> Any:
    """A dataclass field with its `Facts` attached; every other keyword is a field of `Facts`."""
    metadata = {_KEY: Facts(choices=tuple(choices) if choices is not None else None, **facts)}
    if factory is not None:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def fraction_in(value: str, word: str) -> float | None:
    """The number in a choice such as `budget:0.5`; None where `value` is no such choice, or not from 0 to 1."""
    name, _, number = value.partition(":")
    try:
        fraction = float(number)
    except ValueError:
        return None
    return fraction if name == word and 0 <= fraction <= 1 else None


def facts_of(declared: Field[Any]) -> Facts:
    """The facts of a dataclass field; a plain field of a user's class has the defaults."""
    return declared.metadata.get(_KEY) or Facts()


READONLY = "_danling_locked"
"""Attribute that marks the class of a read-only section. On an instance, it tells whether it is locked."""


OUTPUT_DIRECTORY = "<hydra.runtime.output_dir>"
"""Stands in settings for Hydra's output directory, which is not known before the run has its own. It is in the records
and in the identity of a run too, so that both are the same for each attempt."""
PLACED = "_danling_output_directory"
"""Attribute of a configuration in which `OUTPUT_DIRECTORY` has been replaced: by what."""

_NOTES = "_danling_notes"


def notes_of(config: Any) -> list[str]:
    """What was set aside when a configuration was resolved, one sentence each."""
    return list(vars(config).get(_NOTES, ()))


def add_notes(config: Any, notes: Sequence[str]) -> None:
    """Note what was set aside, for `notes_of`. Notes are no settings: they are not saved."""
    if notes:
        vars(config)[_NOTES] = tuple(notes)


def declared_class(section: Any) -> type:
    """The dataclass that declares a section; for a read-only one, the class that it had before it was frozen."""
    return next(kind for kind in type(section).__mro__ if READONLY not in vars(kind))


def defaults_of(kind: type) -> Any:
    """An object of a configuration class with all defaults, and None for settings without a default."""
    # Not `kind()`: it raises where the user's class has a required setting, and runs the user's __post_init__.
    made: Any = object.__new__(kind)
    for item in fields(kind):
        factory = item.default_factory
        if factory is not MISSING:
            value = defaults_of(factory) if isinstance(factory, type) and is_dataclass(factory) else factory()
        else:
            value = None if item.default is MISSING else item.default
        object.__setattr__(made, item.name, value)
    return made


def open_keys(section: Any) -> dict[str, Any]:
    """The keys of a section that its class does not declare (sections with `open_to`)."""
    declared = {item.name for item in fields(declared_class(section))}
    return {key: value for key, value in vars(section).items() if key not in declared and not key.startswith("_")}
