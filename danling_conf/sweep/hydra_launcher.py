"""The Hydra launcher that both of ours are: every job is checked before the first one starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class JobsLauncher(Launcher):
    """A failed job does not stop the others, unless `on_failure` says so, and fails the sweep at its end."""

    cluster: ClassVar[str]
    """Where jobs run: `local` or `slurm`."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings  # read again from each job's own configuration
        self.config: DictConfig | None = None
        self.hydra_context: HydraContext | None = None
        self.task_function: TaskFunction | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config, self.hydra_context, self.task_function = config, hydra_context, task_function

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from danling_conf.sweep.submit import run_jobs

        if self.config is None:
            raise RuntimeError("the launcher was not set up: setup comes before launch")
        sweep: Any = self.task_function
        return run_jobs(sweep, self.config, [list(overrides) for overrides in job_overrides], initial_job_idx)
