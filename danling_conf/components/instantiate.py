"""Where Hydra's `instantiate` meets the builders, in both directions.

A section is rebuilt from the keywords that `hydra.utils.instantiate(config.fsdp)` passes to its `_target_`, and the
model that the configuration names is built by `instantiate`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

from danling_conf.config.resolve import merge_leaves
from danling_conf.config.typed import check_declarations
from danling_conf.schema.open_mapping import plain_values
from danling_conf.schema.open_sections import open_sections
from danling_conf.schema.runner import of_python
from danling_conf.topology.violation import ABSENT, ConfigRefused, SettingError

Section = TypeVar("Section")

TARGET = "_target_"


def section_from(section_class: type[Section], keywords: Mapping[str, Any], *, path: str) -> Section:
    """An instance of `section_class` with `keywords` as its settings.

    It is checked like a whole configuration: types, choices, aliases, mappings by the dataclass that types them. Keys
    unknown to an open section (one with `open_to`) become plain attributes.

    Args:
        path: of the section in the configuration, such as `fsdp`.

    Raises:
        ConfigRefused: a ValueError with every violation.
    """
    node = OmegaConf.structured(section_class)
    open_sections(node)
    plain = OmegaConf.create(plain_values(keywords), flags={"allow_objects": True})
    given: Any = OmegaConf.to_container(plain, resolve=True)
    violations = merge_leaves(node, given, section_class, f"{path}.")
    violations += check_declarations(node, section_class, f"{path}.")
    if violations:
        raise ConfigRefused(violations)
    section: Any = OmegaConf.to_object(node)
    return section


def model_factory(section: Mapping[str, Any]) -> Callable[[], nn.Module]:
    """A factory of what `section` (`model`) names by its `_target_`; other keys are its arguments, and may have targets
    of their own.

    Raises SettingError where there is no `_target_`; the factory does where it cannot be imported or called.
    """
    if TARGET not in section:
        raise SettingError(
            f"model.{TARGET}",
            ABSENT,
            "no model was passed, and the configuration names none",
            f"pass model=, or set model.{TARGET}",
        )

    def make() -> nn.Module:
        model: nn.Module = from_target(section, "model")
        return model

    return make


def from_target(section: Mapping[str, Any], where: str) -> Any:
    """What `section` names by its `_target_`, called with its other keys.

    Args:
        where: path of the section in the configuration, such as `model`.

    Raises:
        SettingError: the target is Python's own, cannot be imported, or refuses its arguments.
    """
    if module := of_python(section[TARGET]):
        rule = f"Python's own {module} makes nothing that a run needs"
        raise SettingError(f"{where}.{TARGET}", section[TARGET], rule, "name a class or a function of a package")
    options: dict[str, Any] = {"_convert_": "all"}
    if "_execution_whitelist_" in inspect.signature(instantiate).parameters:  # Hydra 1.4
        # 1.4 calls only what the caller permits. These are the targets that the user's own configuration names.
        options["_execution_whitelist_"] = sorted(set(_targets(section)))
    try:
        return instantiate(OmegaConf.create(plain_values(section)), **options)
    except InstantiationException as error:
        cause = error.__cause__ or error
        why = " ".join(str(cause).split())
        raise SettingError(f"{where}.{TARGET}", section[TARGET], why, "correct the name or its arguments") from error


def _targets(section: Any) -> Iterator[str]:
    if isinstance(section, Mapping):
        if TARGET in section:
            yield str(section[TARGET])
        for value in section.values():
            yield from _targets(value)
    elif isinstance(section, (list, tuple)):
        for value in section:
            yield from _targets(value)
