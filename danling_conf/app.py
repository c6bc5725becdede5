"""`main`, the decorator of a user's training script, and `compose`, for notebooks and tests."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from danling_conf.schema.imports import uncollected

Function = TypeVar("Function", bound=Callable[[Any], Any])


def main(config_path: str | None = None, config_name: str = "danling") -> Callable[[Function], Callable[..., Any]]:
    """Make a function the entry point of a training script, in place of `@hydra.main`.

    The function is called on every rank with the resolved, read-only configuration; it returns the run's score.
    When the layout needs several processes and nothing started them, they are started on this machine; under torchrun
    or srun the process joins as the rank that it is. A refused configuration exits with 2, before torch is imported.

    Args:
        config_path: directory of the app's configs, relative to the function's file; absolute; or `pkg://module`. None:
            the app has no configs of its own.
        config_name: name of the primary config: a file in that directory, or a base config (`danling`, or a registered
            class's name).
    """

    def decorate(function: Function) -> Callable[..., Any]:
        @functools.wraps(function)
        def entry(config: Any = None) -> Any:
            if config is not None:  # with a configuration, it calls the function itself, as under @hydra.main
                return function(config)
            # Imported here: `import danling_conf` in a library must not load Hydra and all of the schema.
            with uncollected():
                from danling_conf.command import run_command
                from danling_conf.launch.app import App

            script = Path(inspect.unwrap(function).__code__.co_filename).absolute()
            path = config_path
            if path is not None and "://" not in path:
                path = str((script.parent / path).resolve())
            return run_command(
                App(function=function, script=script, config_path=path, config_name=config_name), sys.argv[1:]
            )

        return entry

    return decorate


def compose(
    overrides: list[str] | None = None, *, config_name: str = "danling", config_path: str | Path | None = None
) -> Any:
    """Compose and resolve a configuration in a notebook or a test.

    Args:
        overrides: as on the command line: `["parallel=fsdp8", "steps=100"]`.
        config_name: name of the primary config.
        config_path: directory of your own configs; None for none.

    Returns:
        The checked, read-only configuration, an instance of the primary config's class. The type is `Any`, since that
        class is known at run time only.

    Raises:
        ConfigRefused: with all violations.
    """
    from danling_conf.config.check import check, compose_or_refuse
    from danling_conf.config.hydra_adapter import ConfigSearch, composer

    directory = str(Path(config_path).absolute()) if config_path is not None else None
    with composer(ConfigSearch(config_name=config_name, config_path=directory)) as composing:
        composed = compose_or_refuse(composing, overrides or [])
        return check(composing, composed, overrides or [])
