"""Where Hydra 1.3 wants launcher classes to live."""

from danling_conf.sweep.hydra_launcher import JobsLauncher


class LocalLauncher(JobsLauncher):
    """Runs the jobs of a sweep on this machine, several at once."""

    cluster = "local"
