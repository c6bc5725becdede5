"""Launchers `danling_slurm` and `submitit_slurm`: here, since Hydra 1.3 takes launcher classes from nowhere else."""

from danling_conf.sweep.hydra_launcher import JobsLauncher


class SlurmLauncher(JobsLauncher):
    """Runs the jobs of a sweep on Slurm, each with the resources of its own layout."""

    cluster = "slurm"


class SubmititSlurmLauncher(SlurmLauncher):
    """The same, configured by the settings of hydra-submitit-launcher."""
