"""Adapter of Hydra: no other module imports its private names, and its sweeper leaves the check to our launchers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra.core.utils import JobReturn
from hydra.plugins.sweeper import Sweeper
from omegaconf import DictConfig

import danling_conf
from danling_conf.config.hydra_adapter import ConfigSearch, composer, knows_all_jobs
from danling_conf.sweep.hydra_launcher import LaunchesJobs

pytestmark = pytest.mark.composition

PACKAGE = Path(danling_conf.__file__).parent


class Reached(Exception):
    """The launcher was called."""


class Sweep(LaunchesJobs):
    """Keeps the jobs that it is asked to launch, and fails."""

    __name__ = "sweep"

    def __init__(self) -> None:
        self.jobs: list[list[str]] = []
        self.known = False

    def __call__(self, config: DictConfig) -> Any:
        raise AssertionError("our launchers never call the task function")

    def launch(self, master: DictConfig, jobs: list[list[str]], first: int) -> list[JobReturn]:
        self.jobs, self.known = jobs, knows_all_jobs(master)
        raise Reached


def arguments(folder: Path) -> list[str]:
    return ["hydra/launcher=danling_local", f"hydra.sweep.dir={folder}", "steps=3", "optim.lr=0.1,fast,slow"]


def test_jobs_that_do_not_compose_reach_the_launcher(tmp_path: Path) -> None:
    """Hydra's sweeper would stop at the first of them; the method that does is back in its place afterwards."""
    validate, sweep = Sweeper.validate_batch_is_legal, Sweep()
    with composer(ConfigSearch(config_name="danling")) as composing, pytest.raises(Reached):
        composing.multirun(arguments(tmp_path), sweep)
    assert sweep.jobs == [["steps=3", f"optim.lr={value}"] for value in ("0.1", "fast", "slow")]
    assert sweep.known
    assert Sweeper.validate_batch_is_legal is validate


def test_a_function_that_is_no_sweep_is_refused(tmp_path: Path) -> None:
    def train(config: DictConfig) -> None:
        raise AssertionError("started")

    with (
        composer(ConfigSearch(config_name="danling")) as composing,
        pytest.raises(TypeError, match="this is another"),
    ):
        composing.multirun(arguments(tmp_path), train)
