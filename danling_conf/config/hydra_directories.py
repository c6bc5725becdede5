"""Directories of Hydra's: `hydra.run.dir`, `hydra.sweep.dir` and `hydra.sweep.subdir`.

Unset, a run and a sweep have ours in their place. Hydra makes and writes a directory before anything of a run starts,
so one that cannot be that of a run is refused first.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from danling_conf.config.hydra_job import hydra_of
from danling_conf.topology.rules.paths import directory_fault
from danling_conf.topology.violation import ABSENT, ConfigRefused, Violation

_SHIPPED = {
    "run.dir": "outputs/${now:%Y-%m-%d}/${now:%H-%M-%S}",
    "sweep.dir": "multirun/${now:%Y-%m-%d}/${now:%H-%M-%S}",
    "sweep.subdir": "${hydra.job.num}",
}
"""What Hydra ships (`hydra/output=default`)."""


def chosen_run_directory(composed: DictConfig) -> Path | None:
    """Where a single run is Hydra's job, with `.hydra` and the job's log: `hydra.run.dir`. None where it is not set:
    that is the directory of the attempt then."""
    return None if _as_shipped(composed, "run.dir") else Path(_given(composed, "run")).absolute()


def run_directory_faults(composed: DictConfig) -> list[Violation]:
    """Why `hydra.run.dir` cannot be the directory of a run."""
    return [] if _as_shipped(composed, "run.dir") else _faults(composed, "run")


def make_directory(path: str, directory: Path) -> None:
    """Make a directory. Raises ConfigRefused where the file system does not let it.

    Args:
        path: the setting that names it.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        rule = f"it cannot be made: {error.strerror}: {error.filename}"
        raise ConfigRefused([Violation(path, str(directory), rule, "choose a directory to write to")]) from error


def chosen_sweep_directory(master: DictConfig) -> Path | None:
    """`hydra.sweep.dir`, where an app or a command line sets it."""
    return None if _as_shipped(master, "sweep.dir") else Path(_given(master, "sweep")).absolute()


def sweep_directory_faults(master: DictConfig) -> list[Violation]:
    """Why `hydra.sweep.dir` and `hydra.sweep.subdir` cannot be those of a sweep."""
    faults = [] if _as_shipped(master, "sweep.dir") else _faults(master, "sweep")
    if _as_shipped(master, "sweep.subdir"):
        return faults
    written: Any = OmegaConf.to_container(master.hydra.sweep)
    rule = "a job has no directory in its sweep: it writes to that of its run, which another sweep may continue"
    fix = "leave it out; `danling-conf runs` shows which job made which run"
    return [*faults, Violation("hydra.sweep.subdir", written["subdir"], rule, fix)]


def _faults(composed: DictConfig, section: str) -> list[Violation]:
    path = f"hydra.{section}.dir"
    try:
        given = _given(composed, section)
    except OmegaConfBaseException as error:
        rule = str(error).strip().splitlines()[0]
        return [Violation(path, ABSENT, rule, "fix the interpolation")]
    fault = directory_fault(given)
    return [Violation(path, given or "''", fault, "choose a directory to write to, or leave it out")] if fault else []


def _given(composed: DictConfig, section: str) -> str:
    """The directory, interpolations resolved. Raises OmegaConf's errors."""
    written: Any = OmegaConf.to_container(composed.hydra)
    with hydra_of(composed) if "${hydra:" in written[section]["dir"] else nullcontext():
        return str(composed.hydra[section].dir)


def _as_shipped(composed: DictConfig, path: str) -> bool:
    """Whether a setting of Hydra has the value that Hydra ships."""
    section, _, key = path.partition(".")
    written: Any = OmegaConf.to_container(composed.hydra[section])
    return bool(written[key] == _SHIPPED[path])
