"""Plan of a script: its function is called up to where its runner prepares, and what it passes there is planned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from danling_conf.topology.violation import ConfigRefused, SettingError, Violation

Made = TypeVar("Made")


def plan_of_script(function: Callable[[Any], Any], script: str, config: Any, plan: Callable[[Any], Made]) -> Made:
    """What `plan` makes of the recipe (`runner.planning.Recipe`) that a script's function passes to its runner.

    Args:
        script: name of the script, for messages.

    Raises:
        ConfigRefused: the model or its layout is refused, or the function prepares no runner.
    """
    # torch, and all that is built with it, only once a configuration is accepted.
    from danling_conf.runner.planning import plan_of_function

    try:
        found = plan_of_function(function, config, plan)
    except SettingError as error:
        raise ConfigRefused([error.violation]) from error
    if found is None:
        rule = f"{function.__name__} returned without a runner that prepares a training"
        raise ConfigRefused([Violation("SCRIPT", script, rule, "call danling_conf.Runner(config).fit(...)")])
    return found
