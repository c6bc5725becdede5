"""Launcher `danling_slurm`: here, since Hydra 1.3 accepts launcher classes only from `hydra_plugins`."""

from danling_conf.sweep.hydra_launcher import JobsLauncher


class SlurmLauncher(JobsLauncher):
    """Runs the jobs of a sweep on Slurm, each with the resources of its own layout."""

    cluster = "slurm"
