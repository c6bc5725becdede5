"""Launcher `danling_local`: here, since Hydra 1.3 accepts launcher classes only from `hydra_plugins`."""

from danling_conf.sweep.hydra_launcher import JobsLauncher


class LocalLauncher(JobsLauncher):
    """Runs the jobs of a sweep on this machine, several at once."""

    cluster = "local"
