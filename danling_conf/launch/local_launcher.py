"""A Hydra launcher that checks every job before it starts the first, and runs them on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class JobsLauncher(Launcher):
    """Jobs one after another; a failed one does not stop the others, and fails the sweep at its end."""

    def __init__(self) -> None:
        self.config: DictConfig | None = None
        self.hydra_context: HydraContext | None = None
        self.task_function: TaskFunction | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config, self.hydra_context, self.task_function = config, hydra_context, task_function

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from danling_conf.launch.sweep import run_jobs

        if self.config is None:
            raise RuntimeError("the launcher was not set up: setup comes before launch")
        sweep: Any = self.task_function
        return run_jobs(sweep, self.config, [list(overrides) for overrides in job_overrides], initial_job_idx)
