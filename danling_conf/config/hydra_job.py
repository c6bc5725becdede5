"""Hydra's job: runs a composed configuration as one, and enters one in a process that composed nothing itself.

The second part of the adapter of Hydra's private interface, see hydra_adapter.py.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra import version
from hydra._internal import config_loader_impl
from hydra._internal.callbacks import Callbacks
from hydra.core.override_parser.types import Override
from hydra.core.utils import run_job, setup_globals
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from danling_conf.schema.imports import uncollected
from danling_conf.schema.setting import OUTPUT_DIRECTORY

# Hydra 1.3 warns without a version_base; 1.4 warns at every run that passes one.
VERSION_BASE: dict[str, Any] = {"version_base": None} if hydra.__version__.startswith("1.3") else {}


def run_frozen(settings: Mapping[str, Any], config: Mapping[str, Any], task: Any, directory: Path) -> Any:
    """`Composer.run_job` for a configuration that another process composed.

    Args:
        settings: of `hydra_settings`.
        config: the rest of the configuration.
    """
    # Normally `hydra.main` does these two; this process never enters it.
    set_version_base()
    setup_globals()
    composed = _frozen_node(settings, config)
    os.environ.update({name: str(value) for name, value in composed.hydra.job.env_set.items()})
    return run_as_job(composed, task, directory, composed.hydra.job.config_name, None)


def run_as_job(config: DictConfig, task: Any, directory: Path, name: str | None, loader: Any) -> Any:
    single = _is_single(config.hydra.job)
    with open_dict(config):
        config.hydra.run.dir = str(directory)
        config.hydra.mode = RunMode.RUN if single else RunMode.MULTIRUN
    callbacks = Callbacks(config)
    if single:  # the jobs of a sweep have the callbacks of a job only
        callbacks.on_run_start(config=config, config_name=name)
    with uncollected() as end_pause:

        def collected(composed: DictConfig) -> Any:
            end_pause()
            return task(composed)

        result = run_job(
            hydra_context=HydraContext(config_loader=loader, callbacks=callbacks),
            task_function=collected,
            config=config,
            job_dir_key="hydra.run.dir",  # also for a job of a sweep: its directory is that of its run
            job_subdir_key=None,
        )
    if single:
        callbacks.on_run_end(config=config, config_name=name, job_return=result)
    return result


def _is_single(job: Mapping[str, Any]) -> bool:
    """Whether Hydra's job is not one of a sweep: those have numbers."""
    missing = OmegaConf.is_missing(job, "num") if isinstance(job, DictConfig) else job.get("num") == "???"
    return missing or job.get("num") is None


def set_version_base() -> None:
    version.setbase(*VERSION_BASE.values() or (version._UNSPECIFIED_,))


def hydra_settings(composed: DictConfig, directory: Path | None) -> dict[str, Any]:
    """Hydra's own node of a composed configuration as plain values, with interpolations unresolved.

    Args:
        directory: directory of the job; None where it is not known yet, and `settings_in` sets it later.
    """
    settings: Any = OmegaConf.to_container(composed.hydra, enum_to_str=True)
    return settings if directory is None else settings_in(settings, directory)


def settings_of_job(settings: Mapping[str, Any], *, task: Sequence[str] | None = None, **job: Any) -> dict[str, Any]:
    """Hydra's settings with a job's own overrides and entries of `hydra.job`. Jobs share the rest, without a copy."""
    overrides = settings["overrides"] if task is None else {**settings["overrides"], "task": list(task)}
    return {**settings, "overrides": overrides, "job": {**settings["job"], **job}}


def settings_in(settings: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """Hydra's settings for a job that runs in `directory`."""
    run, runtime = {**settings["run"], "dir": str(directory)}, {**settings["runtime"], "output_dir": str(directory)}
    mode = RunMode.RUN if _is_single(settings["job"]) else RunMode.MULTIRUN
    return {**settings, "mode": mode.name, "run": run, "runtime": runtime}


def override_facts(config: DictConfig, overrides: Sequence[Override]) -> dict[str, Any]:
    """The entries that Hydra 1.3 adds to `hydra.job` for a job's overrides; 1.4 computes them when they are read."""
    name = getattr(config_loader_impl, "get_overrides_dirname", None)
    if name is None:
        return {}
    form = config.hydra.job.config.override_dirname
    written = name(
        overrides=list(overrides), kv_sep=form.kv_sep, item_sep=form.item_sep, exclude_keys=form.exclude_keys
    )
    return {"override_dirname": written}


def take_part(settings: Mapping[str, Any], config: Mapping[str, Any]) -> DictConfig:
    """Enter a Hydra job in a process that composed nothing itself.

    `HydraConfig.get()`, `hydra.job.chdir` and `hydra.job.env_set` work as in the process where Hydra runs the job.

    Args:
        settings: of `hydra_settings`.
        config: the rest of the configuration, which they may refer to.

    Returns:
        Hydra's own node.
    """
    from hydra.core.hydra_config import HydraConfig

    setup_globals()  # registers Hydra's resolvers, such as `now` and `hydra`
    typed = _frozen_node(settings, config)
    HydraConfig.instance().set_config(typed)
    os.environ.update({name: str(value) for name, value in typed.hydra.job.env_set.items()})
    if typed.hydra.job.chdir:
        os.chdir(typed.hydra.runtime.output_dir)
    node = typed.hydra
    assert isinstance(node, DictConfig)
    return node


def _frozen_node(settings: Mapping[str, Any], config: Mapping[str, Any]) -> DictConfig:
    from hydra.conf import HydraConf

    typed = OmegaConf.create({**config, "hydra": OmegaConf.structured(HydraConf, flags={"struct": False})})
    typed.merge_with({"hydra": settings})
    return typed


@contextmanager
def hydra_of(composed: DictConfig) -> Iterator[None]:
    """Let `HydraConfig.get()`, and with it `${hydra:...}`, read a composed configuration."""
    from hydra.core.hydra_config import HydraConfig

    instance = HydraConfig.instance()
    previous = instance.cfg
    given = copy.deepcopy(composed)  # a copy: `set_config` makes its argument read-only
    if OmegaConf.is_missing(given.hydra.runtime, "output_dir"):
        with read_write(given), open_dict(given):
            given.hydra.runtime.output_dir = OUTPUT_DIRECTORY  # known once the run has its directory
    instance.set_config(given)
    try:
        yield
    finally:
        instance.cfg = previous


def running_job() -> tuple[list[str], dict[str, Any]]:
    """The overrides and the choices of groups of the Hydra job that this process runs; empty outside of one."""
    from hydra.core.hydra_config import HydraConfig

    node: Any = HydraConfig.instance().cfg
    if node is None:
        return [], {}
    return [str(item) for item in node.hydra.overrides.task], dict(node.hydra.runtime.choices)


def output_directory() -> str | None:
    """The output directory of the Hydra job that this process runs; None outside of one."""
    from hydra.core.hydra_config import HydraConfig

    node: Any = HydraConfig.instance().cfg
    if node is None or OmegaConf.is_missing(node.hydra.runtime, "output_dir"):
        return None
    return str(node.hydra.runtime.output_dir)
