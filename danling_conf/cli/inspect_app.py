"""Inspection of an app without running it: its script is executed up to the point where its `main` would start."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

from danling_conf import command
from danling_conf.config.hydra_adapter import ConfigSearch
from danling_conf.launch.app import App
from danling_conf.topology.violation import ConfigRefused, Violation

Found = TypeVar("Found")


class _Inspected(BaseException):
    """Unwinds the script once it has been inspected; no handler for errors must catch it."""

    def __init__(self, value: Any) -> None:
        self.value = value


def inspect_app(script: str, overrides: list[str], look: Callable[[App, ConfigSearch, list[str]], Found]) -> Found:
    """Call `look` with the app, its search path and its overrides, where the script would start.

    Works for `@danling_conf.main` and for `@hydra.main`.

    Raises:
        ConfigRefused: there is no such script, or it starts no app.
    """
    path = Path(script)
    if not path.is_file():
        raise ConfigRefused([Violation("SCRIPT", script, "there is no such file", "give a training script's path")])

    def stop(app: App, search: ConfigSearch, given: list[str]) -> None:
        raise _Inspected(look(app, search, given))

    arguments, paths = sys.argv, list(sys.path)
    sys.argv = [str(path), *overrides]
    sys.path.insert(0, str(path.parent.absolute()))
    command.inspector = stop
    try:
        with mock.patch("hydra.main", _plain_hydra_main):
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


def _plain_hydra_main(config_path: str | None = None, config_name: str | None = None, **_: Any) -> Any:
    """Stands in for `hydra.main`: reads its arguments as ours."""
    from danling_conf.app import main

    return main(config_path=config_path, config_name=config_name or "danling")
