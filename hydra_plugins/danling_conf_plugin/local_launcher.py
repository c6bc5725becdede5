"""Launchers `danling_local` and `submitit_local`: here, since Hydra 1.3 takes launcher classes from nowhere else."""

from danling_conf.sweep.hydra_launcher import JobsLauncher


class LocalLauncher(JobsLauncher):
    """Runs the jobs of a sweep on this machine, several at once."""

    cluster = "local"


class SubmititLocalLauncher(LocalLauncher):
    """The same, configured by the settings of hydra-submitit-launcher."""
