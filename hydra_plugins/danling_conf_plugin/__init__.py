"""Plugin package for Hydra's discovery. The classes live in danling_conf: Hydra 1.3 executes this package twice."""

from danling_conf.groups.plugin import DanlingSearchPath, NameSource

__all__ = ["DanlingSearchPath", "NameSource"]
