"""Where Hydra 1.3 wants launcher classes to live."""

from danling_conf.sweep.hydra_launcher import JobsLauncher


class SlurmLauncher(JobsLauncher):
    """Runs the jobs of a sweep on Slurm, each with the resources of its own layout."""

    cluster = "slurm"
