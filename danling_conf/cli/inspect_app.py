"""Inspection of an app without running it: executes its script up to the point where its `main` would start.

Only the script knows its configuration's class and place, since it may register them when it is imported.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

from danling_conf import command
from danling_conf.config.hydra_adapter import ConfigSearch
from danling_conf.launch.app import App
from danling_conf.topology.violation import ConfigRefused, Violation

Found = TypeVar("Found")


class _Inspected(BaseException):
    """Unwinds the script after the inspection. A BaseException, so that no `except Exception` of the script catches
    it."""

    def __init__(self, value: Any) -> None:
        self.value = value


def inspect_app(script: str, overrides: list[str], look: Callable[[App, ConfigSearch, list[str]], Found]) -> Found:
    """Call `look` with the app, its search path and its overrides, where the script would start.

    Works for `@danling_conf.main` and for `@hydra.main`.

    Raises:
        ConfigRefused: the script does not exist, or starts no app.
    """
    path = Path(script)
    if not path.is_file():
        raise ConfigRefused([Violation("SCRIPT", script, "there is no such file", "name a training script")])

    plain: list[Callable[[Any], Any]] = []

    def hydra_main(config_path: str | None = None, config_name: str | None = None, **_: Any) -> Any:
        """Replaces `hydra.main`, and reads its arguments like those of our `main`."""
        from danling_conf.app import main

        def decorate(function: Callable[[Any], Any]) -> Any:
            plain.append(function)
            return main(config_path=config_path, config_name=config_name or "danling")(function)

        return decorate

    def stop(app: App, search: ConfigSearch, given: list[str]) -> None:
        raise _Inspected(look(replace(app, plain_hydra=app.function in plain), search, given))

    arguments, paths = sys.argv, list(sys.path)
    sys.argv = [str(path), *overrides]
    sys.path.insert(0, str(path.parent.absolute()))
    command.inspector = stop
    try:
        with mock.patch("hydra.main", hydra_main):
            runpy.run_path(str(path), run_name="__main__")
    except _Inspected as inspected:
        found: Found = inspected.value
        return found
    finally:
        command.inspector = None
        sys.argv, sys.path[:] = arguments, paths
    raise ConfigRefused(
        [Violation("SCRIPT", script, "it ran without starting an app", "decorate its entry with danling_conf.main")]
    )
