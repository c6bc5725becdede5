"""App: a user's function, its script, and where its configuration is. Every way to launch a run starts from it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from danling_conf.config.hydra_adapter import ConfigSearch
from danling_conf.records.status import EXIT_REFUSED
from danling_conf.topology.violation import ConfigRefused


@dataclass(frozen=True, kw_only=True)
class App:
    """A user's function and the place of its configuration."""

    function: Callable[[Any], Any]
    """Called on every rank with the resolved configuration."""
    script: Path
    """File of the function."""
    config_path: str | None
    """Absolute directory, or `pkg://` module, of the app's configs."""
    config_name: str
    plain_hydra: bool = False
    """Whether its entry is `@hydra.main`."""

    def search(self, arguments: Any) -> ConfigSearch:
        """Where the configuration comes from, given the flags of a command line."""
        path = arguments.config_path or self.config_path
        if path is not None and "://" not in path:
            path = str(self.script.parent.joinpath(path).resolve())
        return ConfigSearch(
            config_name=arguments.config_name or self.config_name,
            config_path=path,
            config_dir=arguments.config_dir,
            job_name=self.script.stem,
        )


def refuse(refusal: ConfigRefused) -> NoReturn:
    """Print a refusal and exit with 2."""
    print(refusal.report(), file=sys.stderr)
    sys.exit(EXIT_REFUSED)


def worker_command() -> list[str]:
    """The command line that runs this process's script again, as a worker.

    `-u`: a rank may be killed at any time, and what it printed must not be lost in a buffer.
    """
    # `python -m package.module` has to be repeated as such: run by its path, relative imports would fail.
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        name = spec.name.removesuffix(".__main__")
        return [sys.executable, "-u", "-m", name, *sys.argv[1:]]
    return [sys.executable, "-u", str(Path(sys.argv[0]).absolute()), *sys.argv[1:]]
