"""Dispatcher of an app's command line: starts a single run or a sweep, or runs one process of either.

All processes of a run start the same script with the same command line, so environment variables tell them apart.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hydra.types import RunMode

from danling_conf.config.hydra_adapter import Composer, ConfigSearch, as_in_main, composer, parse_arguments
from danling_conf.config.hydra_job import VERSION_BASE
from danling_conf.launch.app import App, refuse
from danling_conf.records.logs import outlast_full_disk
from danling_conf.schema.imports import uncollected
from danling_conf.topology.rank_environment import CLUSTER_VARIABLE, FROZEN_VARIABLE, JOB_VARIABLE, started_rank
from danling_conf.topology.violation import ConfigRefused, Violation

Inspector = Callable[["App", ConfigSearch, list[str]], Any]
inspector: Inspector | None = None
"""Inspects an app instead of running it, when set (`danling-conf check` and `danling-conf explain KEY SCRIPT`)."""


def run_command(app: App, arguments: Sequence[str]) -> Any:
    """Run an app's command line.

    Returns:
        The value of the app's function, where it ran in this process.

    Exits with 2 when the configuration is refused, and with 1 when the run failed.
    """
    if FROZEN_VARIABLE in os.environ:
        from danling_conf.launch.rank import run_worker

        ranks = started_rank()
        if ranks is None:
            raise RuntimeError(f"{FROZEN_VARIABLE} is set, but this process is not a rank: unset it")
        outlast_full_disk()
        # Removed from the environment: a training script started by the user's function is not a worker of this run.
        return run_worker(app.function, Path(os.environ.pop(FROZEN_VARIABLE)), ranks, app.script.stem)
    if JOB_VARIABLE in os.environ:
        return _run_job(app, Path(os.environ.pop(JOB_VARIABLE)))
    parsed = parse_arguments(arguments)
    if inspector is not None:
        return inspector(app, app.search(parsed), list(parsed.overrides))
    shown = [flag for flag in ("cfg", "info", "shell_completion") if getattr(parsed, flag)]
    if parsed.multirun and shown:
        flag = f"--{shown[0].replace('_', '-')}"
        rule = (
            f"it shows one configuration, and -m makes several jobs of it: danling-conf check {app.script.name} -m ..."
        )
        refuse(ConfigRefused([Violation(flag, getattr(parsed, shown[0]), rule, "leave out -m")]))
    if parsed.help or parsed.hydra_help or parsed.cfg or parsed.info or parsed.shell_completion:
        return _hand_to_hydra(app, app.search(parsed))
    try:
        if parsed.experimental_rerun is not None:
            raise ConfigRefused([_no_rerun(parsed.experimental_rerun)])
        ranks = started_rank()
        if ranks is not None and ranks.world_size > 1:
            from danling_conf.launch.joined import run_joined

            return run_joined(app, app.search(parsed), parsed, ranks)
        with uncollected() as end_pause, composer(app.search(parsed)) as composing:
            run = _accepted(app, composing, parsed)
            end_pause()
            return run()
    except ConfigRefused as refusal:
        refuse(refusal)


def _accepted(app: App, composing: Composer, parsed: Namespace) -> Callable[[], Any]:
    """What runs a command line: a sweep, a job on Slurm, or a run here, which is checked. Raises ConfigRefused."""
    overrides = parsed.overrides
    if parsed.multirun or composing.asks_for_sweep(overrides):
        return partial(_sweep, composing, app, overrides)
    # Imported here, like all that only some command lines need: `--help` shows at once.
    from danling_conf.config.check import check, compose_or_refuse

    composed = compose_or_refuse(composing, overrides)
    if composed.hydra.mode == RunMode.MULTIRUN:
        return partial(_sweep, composing, app, overrides)
    if composed.hydra.runtime.choices.get("hydra/launcher") == "danling_slurm":
        from danling_conf.sweep.submit import run_one

        return partial(run_one, app, composing, composed, overrides)
    config = check(composing, composed, overrides)
    from danling_conf.launch.execute import execute

    return partial(execute, app, composing, composed, config)


def _run_job(app: App, path: Path) -> Any:
    """Run this process's part of a sweep's job: one rank on Slurm, or what starts its replica groups; the whole job on
    this machine."""
    outlast_full_disk()
    if os.environ.get(CLUSTER_VARIABLE) == "slurm":
        if started_rank() is None:
            from danling_conf.launch.slurm.groups import run_slurm_groups

            return run_slurm_groups(app, path)
        from danling_conf.launch.slurm.rank import run_slurm_rank

        return run_slurm_rank(app, path)
    from danling_conf.launch.job_process import run_local_job

    return run_local_job(app, path)


def _no_rerun(file: str) -> Violation:
    return Violation(
        "--experimental-rerun", file, "it would run a pickled configuration unchecked", "use resume=RUN instead"
    )


def _sweep(composing: Composer, app: App, overrides: list[str]) -> Any:
    from danling_conf.sweep.submit import run_sweep

    return run_sweep(app, composing, overrides)


def _hand_to_hydra(app: App, search: ConfigSearch) -> None:
    """Let Hydra handle flags that only show something, such as --help and --cfg."""
    import hydra

    path = app.config_path
    decorated = hydra.main(config_path=path, config_name=app.config_name, **VERSION_BASE)(app.function)
    with uncollected(), as_in_main(search):
        decorated()
