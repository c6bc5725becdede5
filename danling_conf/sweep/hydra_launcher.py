"""Hydra launcher behind `danling_local` and `danling_slurm`: passes a sweeper's jobs back to the sweep that started it.

Hydra's sweepers know only launchers and task functions. So the sweep travels through Hydra as the task function, and
this module does not depend on how jobs are checked and started.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class LaunchesJobs(ABC):
    """The task function that our launchers need."""

    @abstractmethod
    def launch(self, master: DictConfig, jobs: list[list[str]], first: int) -> list[JobReturn]:
        """Check and run a batch of jobs. Returns their results in order.

        Args:
            master: the sweep's own configuration.
            jobs: overrides of each job.
            first: number of the first job.
        """


class JobsLauncher(Launcher):
    """Base of our launchers: every job of a batch is checked before the first one starts.

    A failed job does not stop the others, unless `on_failure` says so; it fails the sweep at its end. The class does
    not live in `hydra_plugins`: Hydra 1.3 executes modules there again when it scans for plugins, and would make a
    second class of the same name.
    """

    cluster: ClassVar[str]
    """Where jobs run: `local` or `slurm`."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings  # not used: each job's own configuration has them, and they may refer to its settings
        self.config: DictConfig | None = None
        self.hydra_context: HydraContext | None = None
        self.task_function: TaskFunction | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config, self.hydra_context, self.task_function = config, hydra_context, task_function

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Raises TypeError for a task function that is not a sweep of danling-conf, such as one of `@hydra.main`."""
        if self.config is None:
            raise RuntimeError("the launcher was not set up: setup comes before launch")
        if not isinstance(self.task_function, LaunchesJobs):
            raise TypeError(f"danling_{self.cluster} launches apps of danling_conf.main, but this is another function")
        return self.task_function.launch(self.config, [list(item) for item in job_overrides], initial_job_idx)
