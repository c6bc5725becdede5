"""A model that the configuration names: `model._target_` and its arguments, as Hydra instantiates them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

TARGET = "_target_"


def model_factory(section: Mapping[str, Any]) -> Callable[[], nn.Module]:
    """A factory of what `section` (`model`) names by its `_target_`; other keys are its arguments, and may have targets
    of their own.

    Raises ValueError where there is no `_target_`.
    """
    if TARGET not in section:
        raise ValueError(
            f"model.{TARGET}: no model was given, and the configuration names none: pass model=, or set model.{TARGET}"
        )

    def make() -> nn.Module:
        return _instantiate(section)

    return make


def _instantiate(section: Mapping[str, Any]) -> Any:
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    options: dict[str, Any] = {"_convert_": "all"}
    if "_execution_whitelist_" in inspect.signature(instantiate).parameters:  # Hydra 1.4
        # The user's own configuration names them, which is all the permission there is to ask for.
        options["_execution_whitelist_"] = sorted(set(_targets(section)))
    try:
        return instantiate(OmegaConf.create(dict(section)), **options)
    except InstantiationException as error:
        cause = error.__cause__ or error
        why = " ".join(str(cause).split())
        raise ValueError(f"model.{TARGET}={section[TARGET]}: {why}: mend the name or its arguments") from error


def _targets(section: Any) -> Iterator[str]:
    if isinstance(section, Mapping):
        if TARGET in section:
            yield str(section[TARGET])
        for value in section.values():
            yield from _targets(value)
    elif isinstance(section, (list, tuple)):
        for value in section:
            yield from _targets(value)
