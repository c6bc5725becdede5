"""The command line of a user's app: from its arguments to finished runs and a true exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from danling_conf.launch.job_file import CLUSTER_VARIABLE, JOB_VARIABLE
from danling_conf.launch.local_workers import FROZEN_VARIABLE
from danling_conf.resolution.hydra_adapter import (
    VERSION_BASE,
    Composer,
    ConfigSearch,
    composer,
    parse_arguments,
    shadowed_settings,
)
from danling_conf.resolution.resolve import inspect
from danling_conf.resolution.warn import warnings_of
from danling_conf.schema import RunnerConfig
from danling_conf.topology.machine import this_machine
from danling_conf.topology.rank_environment import RankEnvironment, started_rank
from danling_conf.topology.rules import Context
from danling_conf.topology.violation import ConfigRefused, Violation

REFUSED = 2
"""Exit code of a refused configuration."""

Inspector = Callable[["App", ConfigSearch, list[str]], Any]
inspector: Inspector | None = None
"""Takes over an app's command line instead of running it (`danling-conf explain KEY SCRIPT`)."""


@dataclass(frozen=True, kw_only=True)
class App:
    """A user's function and where its configuration is."""

    function: Callable[[Any], Any]
    """Called on every rank with the resolved configuration."""
    script: Path
    """File of the function."""
    config_path: str | None
    """Absolute directory, or `pkg://` module, of the app's configs."""
    config_name: str

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


def run_command(app: App, arguments: Sequence[str]) -> Any:
    """Do what a command line asks for; gives the value of the function where it ran in this process.

    Exits with 2 when the configuration is refused, and with 1 when the run failed.
    """
    if FROZEN_VARIABLE in os.environ:
        from danling_conf.launch.worker import run_local_worker

        ranks = started_rank()
        if ranks is None:
            raise RuntimeError(f"{FROZEN_VARIABLE} is set, but this process is no rank: unset it")
        # Programs that the user's function starts are no workers of this run.
        return run_local_worker(app.function, Path(os.environ.pop(FROZEN_VARIABLE)), ranks, app.script.stem)
    if JOB_VARIABLE in os.environ:
        return _run_job(app, Path(os.environ.pop(JOB_VARIABLE)))
    parsed = parse_arguments(arguments)
    if inspector is not None:
        return inspector(app, app.search(parsed), list(parsed.overrides))
    if parsed.help or parsed.hydra_help or parsed.cfg or parsed.info or parsed.shell_completion:
        return _hand_to_hydra(app)
    try:
        if parsed.experimental_rerun is not None:
            raise ConfigRefused([_no_rerun(parsed.experimental_rerun)])
        ranks = started_rank()
        if ranks is not None and ranks.world_size > 1:
            from danling_conf.launch.joined import run_joined

            return run_joined(app, app.search(parsed), parsed, ranks)
        with composer(app.search(parsed)) as composing:
            if parsed.multirun:
                return _sweep(composing, app, parsed.overrides)
            composed = compose_or_refuse(composing, parsed.overrides)
            if composed.hydra.mode == RunMode.MULTIRUN:
                return _sweep(composing, app, parsed.overrides)
            if composed.hydra.runtime.choices.get("hydra/launcher") == "danling_slurm":
                from danling_conf.launch.sweep import run_one

                return run_one(app, composing, composed, parsed.overrides)
            config = check(composing, composed, parsed.overrides)
            from danling_conf.launch.execute import execute

            return execute(app, composing, composed, config)
    except ConfigRefused as refusal:
        refuse(refusal)


def _run_job(app: App, path: Path) -> Any:
    """This process belongs to a job of a sweep: as a rank that Slurm started, or as the whole job on this machine."""
    if os.environ.get(CLUSTER_VARIABLE) == "slurm":
        from danling_conf.launch.slurm.rank import run_slurm_rank

        return run_slurm_rank(app, path)
    from danling_conf.launch.local_job import run_local_job

    return run_local_job(app, path)


def compose_or_refuse(composing: Composer, overrides: Sequence[str], *, multirun: bool = False) -> DictConfig:
    """Compose; where Hydra refuses, raise ConfigRefused with every fault and not only Hydra's first."""
    try:
        return composing.compose(overrides, multirun=multirun)
    except ConfigRefused:
        raise
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        from danling_conf.resolution.collect import all_faults

        raise ConfigRefused(all_faults(composing, overrides, _context(overrides), error)) from error


def check(composing: Composer, composed: DictConfig, overrides: Sequence[str]) -> RunnerConfig:
    """The resolved configuration of what was composed. Raises ConfigRefused with all violations."""
    declared = OmegaConf.get_type(composed)
    kind = declared if isinstance(declared, type) and issubclass(declared, RunnerConfig) else RunnerConfig
    config, violations = inspect(composed, kind=kind, context=_context(overrides))
    violations = shadowed_settings(composing, kind) + violations
    if violations:
        raise ConfigRefused(violations)
    return config


def refuse(refusal: ConfigRefused) -> None:
    """Show a refusal and exit."""
    print(refusal.report(), file=sys.stderr)
    sys.exit(REFUSED)


def _context(overrides: Sequence[str]) -> Context:
    given = frozenset(item.partition("=")[0].lstrip("+~") for item in overrides)
    return Context(machine=this_machine(), given=given)


def _no_rerun(file: str) -> Violation:
    return Violation(
        "--experimental-rerun", file, "it would run a pickled configuration unchecked", "use resume=RUN instead"
    )


def _sweep(composing: Composer, app: App, overrides: list[str]) -> Any:
    from danling_conf.launch.sweep import run_sweep

    return run_sweep(app, composing, overrides)


def _hand_to_hydra(app: App) -> None:
    """Flags that only show something are Hydra's own."""
    import hydra

    path = app.config_path
    decorated = hydra.main(config_path=path, config_name=app.config_name, **VERSION_BASE)(app.function)
    decorated()


__all__ = ["App", "RankEnvironment", "check", "compose_or_refuse", "refuse", "run_command", "warnings_of"]
